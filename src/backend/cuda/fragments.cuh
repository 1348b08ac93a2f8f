// What the LoRA kernels share: element types, bf16 terms, tensor-core fragments, dropout.
//
// Every product runs on one instruction, mma m16n8k16 of bf16 with f32 sums (compute capability 8.0 and up). A value that
// bf16 cannot hold is a sum of bf16 terms: f16 is exactly two, f32 is three (24 bits). Of the products of terms those of order
// i + j < 3 are computed, which leaves the precision of f32. Products that make an f16 or bf16 activation (y, dx) from h or u
// stop at order 2 (16 bits). An infinite f16 or f32 input gives NaN, not infinity.
//
// Lane l of a warp is (g, t) = (l / 4, l % 4). A chunk is 32 columns of a row-major matrix; a lane holds columns 8t..8t+7 of
// rows g and g + 8: 16-byte loads, four lanes a row. The k slots of a product may be taken in any order if both operands
// agree: product j of a chunk (j = 0, 1) takes a lane's column pairs 2j and 2j + 1.
#pragma once

#include <cstdint>

#ifndef HOST_PRIMITIVES
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t v) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}
__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// Four 8x8 matrices, each transposed; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_transposed(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared_address(row)) : "memory");
}
// 16 bytes from global to shared memory behind the thread's back; zeros where `valid` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
// As copy_async, for what will not be read again: it leaves the L2 cache first.
__device__ __forceinline__ void copy_async_once(void* to, const void* from, bool valid) {
  asm volatile("{ .reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0; cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, policy; }"
               ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
// Programmatic dependent launch (compute capability 9.0; a launch without the attribute makes both do nothing): the next kernel's
// blocks may start where there is room, and wait until this one's results are there.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// (low, high) rounded to bf16.
__device__ __forceinline__ uint32_t to_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ uint32_t to_f16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ float from_f16(uint16_t v) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(v));
  return d;
}
#endif

#define UNROLL _Pragma("unroll")

__device__ __forceinline__ void copy_wait_all_but(int groups) {
  switch (groups) {
    case 0: return copy_wait<0>();
    case 1: return copy_wait<1>();
    case 2: return copy_wait<2>();
    default: return copy_wait<3>();
  }
}

__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// TERMS: bf16 terms of a value. UP: order of the products that make y and dx of this type. VECTORS: 16-byte loads for 8 values.
struct Bf16 {
  typedef uint16_t Raw;
  static constexpr int TERMS = 1, UP = 2, VECTORS = 1;
  static __device__ __forceinline__ float widen(Raw v) { return __uint_as_float((uint32_t)v << 16); }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) { return to_bf16x2(low, high); }
};
struct F16 {
  typedef uint16_t Raw;
  static constexpr int TERMS = 2, UP = 2, VECTORS = 1;
  static __device__ __forceinline__ float widen(Raw v) { return from_f16(v); }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) { return to_f16x2(low, high); }
};
struct F32 {
  typedef float Raw;
  static constexpr int TERMS = 3, UP = 3, VECTORS = 2;
  static __device__ __forceinline__ float widen(Raw v) { return v; }
};

constexpr int FINE = 3;  // terms and order of the products that make h, u, dA and dB

// Eight consecutive values as they lie in memory.
template <class E> struct Eight { uint4 v[E::VECTORS]; };

__device__ __forceinline__ uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <class E> __device__ __forceinline__ void widen8(const Eight<E>& e, float (&f)[8]) {
  UNROLL for (int i = 0; i < 4; i++) {
    uint32_t pair = word(e.v[0], i);
    f[2 * i] = E::widen((uint16_t)(pair & 0xffff));
    f[2 * i + 1] = E::widen((uint16_t)(pair >> 16));
  }
}
template <> __device__ __forceinline__ void widen8<F32>(const Eight<F32>& e, float (&f)[8]) {
  UNROLL for (int i = 0; i < 8; i++) f[i] = __uint_as_float(word(e.v[i / 4], i % 4));
}

// The first `valid` of eight values at p, zeros after. VEC: p is on 16 bytes and `valid` is 8 or more, or none.
template <class E, bool VEC> __device__ __forceinline__ Eight<E> load8(const typename E::Raw* p, int valid) {
  Eight<E> e;
  if constexpr (VEC) {
    UNROLL for (int v = 0; v < E::VECTORS; v++) e.v[v] = valid > 0 ? __ldg((const uint4*)p + v) : make_uint4(0, 0, 0, 0);
  } else {
    uint32_t w[8];
    UNROLL for (int i = 0; i < 8; i++) {
      typename E::Raw value = i < valid ? p[i] : typename E::Raw(0);
      if constexpr (E::VECTORS == 2) w[i] = __float_as_uint(value);
      else w[i] = (uint32_t)value;
    }
    if constexpr (E::VECTORS == 2) {
      e.v[0] = make_uint4(w[0], w[1], w[2], w[3]);
      e.v[1] = make_uint4(w[4], w[5], w[6], w[7]);
    } else {
      e.v[0] = make_uint4(w[0] | w[1] << 16, w[2] | w[3] << 16, w[4] | w[5] << 16, w[6] | w[7] << 16);
    }
  }
  return e;
}

// As load8 where the alignment is known at run time only.
template <class E> __device__ __forceinline__ Eight<E> load8(const typename E::Raw* p, int valid, bool vec) {
  return vec ? load8<E, true>(p, valid) : load8<E, false>(p, valid);
}

template <class E, bool VEC> __device__ __forceinline__ void store8(typename E::Raw* p, const float (&f)[8], int valid) {
  uint32_t w[4];
  UNROLL for (int i = 0; i < 4; i++) w[i] = E::narrow(f[2 * i], f[2 * i + 1]);
  if constexpr (VEC) {
    if (valid > 0) *(uint4*)p = make_uint4(w[0], w[1], w[2], w[3]);
  } else {
    UNROLL for (int i = 0; i < 8; i++)
      if (i < valid) p[i] = (uint16_t)(w[i / 2] >> (16 * (i % 2)));
  }
}
template <bool VEC> __device__ __forceinline__ void store8_f32(float* p, const float (&f)[8], int valid) {
  if constexpr (VEC) {
    if (valid > 0) {
      *(float4*)p = make_float4(f[0], f[1], f[2], f[3]);
      *((float4*)p + 1) = make_float4(f[4], f[5], f[6], f[7]);
    }
  } else {
    UNROLL for (int i = 0; i < 8; i++)
      if (i < valid) p[i] = f[i];
  }
}
template <> __device__ __forceinline__ void store8<F32, true>(float* p, const float (&f)[8], int valid) { store8_f32<true>(p, f, valid); }
template <> __device__ __forceinline__ void store8<F32, false>(float* p, const float (&f)[8], int valid) { store8_f32<false>(p, f, valid); }

// Writes (or adds) eight sums to an activation of type T or f32.
template <class T, bool VEC>
__device__ __forceinline__ void put8(void* base, int64_t at, float (&f)[8], int valid, bool is_f32, bool add) {
  if (is_f32) {
    float* p = (float*)base + at;
    if (add) {
      float old[8];
      widen8<F32>(load8<F32, VEC>(p, valid), old);
      UNROLL for (int i = 0; i < 8; i++) f[i] += old[i];
    }
    store8<F32, VEC>(p, f, valid);
  } else {
    typename T::Raw* p = (typename T::Raw*)base + at;
    if (add) {
      float old[8];
      widen8<T>(load8<T, VEC>(p, valid), old);
      UNROLL for (int i = 0; i < 8; i++) f[i] += old[i];
    }
    store8<T, VEC>(p, f, valid);
  }
}

template <int N> __device__ __forceinline__ void split2(float low, float high, uint32_t (&terms)[N]) {
  UNROLL for (int i = 0; i < N; i++) {
    terms[i] = to_bf16x2(low, high);
    low -= bf16_low(terms[i]);
    high -= bf16_high(terms[i]);
  }
}

// terms[i][pair]: the pairs of columns of eight values, as bf16.
template <class E, int N> __device__ __forceinline__ void split8(const Eight<E>& e, uint32_t (&terms)[N][4]) {
  float f[8];
  widen8<E>(e, f);
  UNROLL for (int pair = 0; pair < 4; pair++) {
    uint32_t two[N];
    split2<N>(f[2 * pair], f[2 * pair + 1], two);
    UNROLL for (int i = 0; i < N; i++) terms[i][pair] = two[i];
  }
}
template <> __device__ __forceinline__ void split8<Bf16, 1>(const Eight<Bf16>& e, uint32_t (&terms)[1][4]) {
  UNROLL for (int pair = 0; pair < 4; pair++) terms[0][pair] = word(e.v[0], pair);
}

// Of two rows of eight: the pairs (row0[c], row1[c]) of the four columns c = 2j + odd.
template <class E, int N>
__device__ __forceinline__ void pair_rows(const Eight<E>& row0, const Eight<E>& row1, bool odd, uint32_t (&terms)[N][4]) {
  float f0[8], f1[8];
  widen8<E>(row0, f0);
  widen8<E>(row1, f1);
  UNROLL for (int j = 0; j < 4; j++) {
    uint32_t two[N];
    split2<N>(odd ? f0[2 * j + 1] : f0[2 * j], odd ? f1[2 * j + 1] : f1[2 * j], two);
    UNROLL for (int i = 0; i < N; i++) terms[i][j] = two[i];
  }
}
template <>
__device__ __forceinline__ void pair_rows<Bf16, 1>(const Eight<Bf16>& row0, const Eight<Bf16>& row1, bool odd, uint32_t (&terms)[1][4]) {
  UNROLL for (int j = 0; j < 4; j++)
    terms[0][j] = __byte_perm(word(row0.v[0], j), word(row1.v[0], j), odd ? 0x7632 : 0x5410);
}

// Dropout as src/backend/dropout.rs draws it: the factor's zero or not; its 1 / (1 - p) is applied to sums.
struct Dropout {
  uint64_t seed, stream;
  uint32_t threshold;
  int on;
};

__device__ __forceinline__ uint4 philox(uint64_t block, const Dropout& d) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = (uint32_t)d.stream, c3 = (uint32_t)(d.stream >> 32);
  uint32_t k0 = (uint32_t)d.seed, k1 = (uint32_t)(d.seed >> 32);
  UNROLL for (int i = 0; i < 10; i++) {
    uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// Bit i: element `index + i` is kept.
__device__ __forceinline__ uint32_t kept8(uint64_t index, const Dropout& d) {
  int skip = (int)(index % 4);
  uint32_t bits = 0;
  for (int block = 0; block < (skip ? 3 : 2); block++) {
    uint4 words = philox(index / 4 + block, d);
    UNROLL for (int i = 0; i < 4; i++) bits |= (uint32_t)(word(words, i) >= d.threshold) << (4 * block + i);
  }
  return bits >> skip;
}

template <class E> __device__ __forceinline__ void keep8(Eight<E>& e, uint32_t bits) {
  UNROLL for (int v = 0; v < E::VECTORS; v++) {
    uint32_t w[4];
    UNROLL for (int i = 0; i < 4; i++) {
      uint32_t mask;
      if (E::VECTORS == 2) mask = bits >> (4 * v + i) & 1 ? 0xffffffffu : 0;
      else mask = (bits >> (2 * i) & 1 ? 0xffffu : 0) | (bits >> (2 * i + 1) & 1 ? 0xffff0000u : 0);
      w[i] = word(e.v[v], i) & mask;
    }
    e.v[v] = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

__device__ __forceinline__ constexpr int least(int a, int b) { return a < b ? a : b; }
