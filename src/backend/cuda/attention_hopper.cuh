// attention_tiles.cuh for bf16 on Hopper (compute capability 9.0a): the same blocks of queries and keys and the same order of sums, with the
// products of a warpgroup (wgmma) in place of a warp's. The formulas and the kernels' parts are there.
//
// A block has two warpgroups of 64 rows each, which share every tile of the other side. Scores go from accumulators to the next product
// as its left operand, in registers. Tiles lie as wgmma reads them: 64 columns a row of 128 bytes, 16-byte pieces swizzled.
#pragma once
#include "attention_tiles.cuh"
#include "hopper.cuh"

namespace attention_hopper {
using namespace attention;
using hopper::descriptor;
using hopper::multiply_begin;
using hopper::multiply_commit;
using hopper::multiply_wait;

constexpr int BLOCK_ROWS = 128, BLOCK_THREADS = 256;

// d (+)= left (64 x 16) · right (16 x N), both in rows of the outer dimension, in shared memory.
template <int N> __device__ __forceinline__ void scores_product(float (&d)[N / 2], uint64_t left, uint64_t right, int add);
template <> __device__ __forceinline__ void scores_product<64>(float (&d)[32], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{ .reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
      : R32(d, 0)
      : "l"(left), "l"(right), "r"(add));
}
template <> __device__ __forceinline__ void scores_product<128>(float (&d)[64], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{ .reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0; }"
      : R32(d, 0), R32(d, 32)
      : "l"(left), "l"(right), "r"(add));
}

// d += a (64 x 16, registers) · right (16 x N), right in rows of the inner dimension.
template <int N> __device__ __forceinline__ void weighted_product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t right);
template <> __device__ __forceinline__ void weighted_product<64>(float (&d)[32], const uint32_t (&a)[4], uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : R32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right));
}
template <> __device__ __forceinline__ void weighted_product<128>(float (&d)[64], const uint32_t (&a)[4], uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : R32(d, 0), R32(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right));
}

// R rows of D elements in shared memory, on 1024 bytes: D / 64 chunks of R rows of 128 bytes.
template <int D, int R> struct Tile {
  static constexpr int BYTES = R * D * 2;
  uint32_t at;

  // `count` rows of `dim` from `from`, `stride` elements apart, zeros after.
  __device__ __forceinline__ void fetch(const Bf16* from, int64_t stride, int count, int dim) const {
#pragma unroll
    for (int i = threadIdx.x; i < R * (D / 8); i += BLOCK_THREADS) {
      int r = i / (D / 8), piece = i % (D / 8);
      bool valid = r < count && 8 * piece < dim;
      copy16(at + piece / 8 * (R * 128) + r * 128 + ((piece % 8) ^ (r & 7)) * 16, valid ? from + r * stride + 8 * piece : from, valid);
    }
  }
  // 16 columns from 16 i, of rows from `row`, as a factor in rows of the outer dimension.
  __device__ __forceinline__ uint64_t outer(int row, int i) const { return descriptor(at + i / 4 * (R * 128) + row * 128 + i % 4 * 32, 16, 1024); }
  // 16 rows from 16 i as a factor in rows of the inner dimension.
  __device__ __forceinline__ uint64_t inner(int i) const { return descriptor(at + i * (16 * 128), R * 128, 1024); }
};

// scores = 64 rows of `left` from `row` · the N rows of `right`, transposed.
template <int D, int R, int N> __device__ __forceinline__ void products(float (&scores)[N / 2], const Tile<D, R>& left, int row, const Tile<D, N>& right) {
#pragma unroll
  for (int i = 0; i < D / 16; i++) scores_product<N>(scores, left.outer(row, i), right.outer(0, i), i > 0);
}

// sums += scores · right. `operands` must live until the products are waited for.
template <int D, int N> __device__ __forceinline__ void weighted(float (&sums)[D / 2], const uint32_t (&operands)[N / 16][4], const Tile<D, N>& right) {
#pragma unroll
  for (int i = 0; i < N / 16; i++) weighted_product<D>(sums, operands[i], right.inner(i));
}

// Scores as left operands of 16 columns each.
template <int N> __device__ __forceinline__ void round_scores(const float (&scores)[N / 2], uint32_t (&operands)[N / 16][4]) {
#pragma unroll
  for (int i = 0; i < N / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) operands[i][j] = pair<Bf16>(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
}

// Copies of this thread are there, for the tensor cores too, and then those of all.
template <int PENDING> __device__ __forceinline__ void arrived() {
  copies_wait<PENDING>();
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
}

__device__ __forceinline__ float exp2_fast(float v) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
  return d;
}

template <int D> __device__ __forceinline__ void write_sums(Bf16* to, int64_t stride, const float (&sums)[D / 2], float factor0, float factor1, int row, int count, int dim) {
  int lane = threadIdx.x % 32, r = row + lane / 4;
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    int c = 8 * j + 2 * (lane % 4);
    if (c >= dim) continue;
    if (r < count) *(uint32_t*)(to + r * stride + c) = pair<Bf16>(factor0 * sums[4 * j], factor0 * sums[4 * j + 1]);
    if (r + 8 < count) *(uint32_t*)(to + (r + 8) * stride + c) = pair<Bf16>(factor1 * sums[4 * j + 2], factor1 * sums[4 * j + 3]);
  }
}

__device__ __forceinline__ uint32_t aligned_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return (shared_at(memory) + 1023) & ~1023u;
}

// N keys a tile.
template <int D, int N> __device__ __forceinline__ void forward(const Args& args) {
  QueryBlock<BLOCK_ROWS> block(args);
  uint32_t base = aligned_memory();
  constexpr int SIDE = Tile<D, N>::BYTES;
  Tile<D, BLOCK_ROWS> q{base};
  auto k = [&](int tile) { return Tile<D, N>{base + q.BYTES + tile % 2 * SIDE}; };
  auto v = [&](int tile) { return Tile<D, N>{base + q.BYTES + (2 + tile % 2) * SIDE}; };
  int warp_row = 16 * (threadIdx.x / 32), group_row = 64 * (threadIdx.x / 128), lane = threadIdx.x % 32;
  int64_t q_stride = (int64_t)args.q_heads * args.dim, kv_stride = (int64_t)args.kv_heads * args.dim;
  int begin = block.key_begin / N, end = (block.key_end + N - 1) / N;
  auto fetch = [&](int tile) {
    int key = tile * N, count = min(N, (int)block.s.k_len - key);
    k(tile).fetch(block.template keys<Bf16>(args.k, args, key), kv_stride, count, args.dim);
    v(tile).fetch(block.template keys<Bf16>(args.v, args, key), kv_stride, count, args.dim);
    copies_commit();
  };
  q.fetch(block.template queries<Bf16>(args.q, args), q_stride, block.count, args.dim);
  fetch(begin);
  float o[D / 2], most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, scale = args.scale * LOG2E;
#pragma unroll
  for (int i = 0; i < D / 2; i++) o[i] = 0.f;
  for (int tile = begin; tile < end; tile++) {
    if (tile + 1 < end) {
      fetch(tile + 1);
      arrived<1>();
    } else {
      arrived<0>();
    }
    float s[N / 2];
    multiply_begin();
    products<D, BLOCK_ROWS, N>(s, q, group_row, k(tile));
    multiply_commit();
    multiply_wait<0>();
    bool whole = block.all_see(args, tile * N, N);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int i = warp_row + lane / 4 + 8 * half;
      float larger = most[half];
#pragma unroll
      for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = s[4 * j + 2 * half + e];
          if (!whole && !block.sees(args, i, tile * N + 8 * j + 2 * (lane % 4) + e)) score = -INFINITY;
          larger = fmaxf(larger, score);
        }
      larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 2));
      float shift = larger == -INFINITY ? 0.f : larger * scale, kept = exp2_fast(most[half] * scale - shift);
      most[half] = larger;
      sum[half] *= kept;
#pragma unroll
      for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = s[4 * j + 2 * half + e];
          score = exp2_fast(score * scale - shift);
          sum[half] += score;
        }
#pragma unroll
      for (int j = 0; j < D / 8; j++) o[4 * j + 2 * half] *= kept, o[4 * j + 2 * half + 1] *= kept;
    }
    uint32_t operands[N / 16][4];
    round_scores<N>(s, operands);
    multiply_begin();
    weighted<D, N>(o, operands, v(tile));
    multiply_commit();
    multiply_wait<0>();
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    int i = warp_row + lane / 4 + 8 * half;
    if (lane % 4 == 0 && i < block.count) args.lse[block.row(args, i)] = most[half] * args.scale + logf(sum[half]);
  }
  write_sums<D>((Bf16*)args.to_o + block.row(args, 0) * args.dim, q_stride, o, 1.f / sum[0], 1.f / sum[1], warp_row, block.count, args.dim);
}

template <int D, int N> __device__ __forceinline__ void backward_queries(const Args& args) {
  QueryBlock<BLOCK_ROWS> block(args);
  uint32_t base = aligned_memory();
  constexpr int SIDE = Tile<D, N>::BYTES;
  Tile<D, BLOCK_ROWS> q{base}, g{base + q.BYTES};
  auto k = [&](int tile) { return Tile<D, N>{base + 2 * q.BYTES + tile % 2 * SIDE}; };
  auto v = [&](int tile) { return Tile<D, N>{base + 2 * q.BYTES + (2 + tile % 2) * SIDE}; };
  int warp_row = 16 * (threadIdx.x / 32), group_row = 64 * (threadIdx.x / 128), lane = threadIdx.x % 32;
  int64_t q_stride = (int64_t)args.q_heads * args.dim, kv_stride = (int64_t)args.kv_heads * args.dim;
  int begin = block.key_begin / N, end = (block.key_end + N - 1) / N;
  auto fetch = [&](int tile) {
    int key = tile * N, count = min(N, (int)block.s.k_len - key);
    k(tile).fetch(block.template keys<Bf16>(args.k, args, key), kv_stride, count, args.dim);
    v(tile).fetch(block.template keys<Bf16>(args.v, args, key), kv_stride, count, args.dim);
    copies_commit();
  };
  q.fetch(block.template queries<Bf16>(args.q, args), q_stride, block.count, args.dim);
  g.fetch(block.template queries<Bf16>(args.g, args), q_stride, block.count, args.dim);
  fetch(begin);
  float lse[2], delta[2], scale = args.scale * LOG2E, dq[D / 2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int i = warp_row + lane / 4 + 8 * half;
    bool there = i < block.count;
    lse[half] = there ? args.lse[block.row(args, i)] * LOG2E : 0.f;
    delta[half] = there ? args.delta[block.row(args, i)] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < D / 2; i++) dq[i] = 0.f;
  for (int tile = begin; tile < end; tile++) {
    if (tile + 1 < end) {
      fetch(tile + 1);
      arrived<1>();
    } else {
      arrived<0>();
    }
    float s[N / 2], dp[N / 2];
    multiply_begin();
    products<D, BLOCK_ROWS, N>(s, q, group_row, k(tile));
    multiply_commit();
    products<D, BLOCK_ROWS, N>(dp, g, group_row, v(tile));
    multiply_commit();
    multiply_wait<0>();
    bool whole = block.all_see(args, tile * N, N);
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int i = warp_row + lane / 4 + 8 * (e / 2), key = tile * N + 8 * j + 2 * (lane % 4) + e % 2;
        float p = whole || block.sees(args, i, key) ? exp2_fast(scale * s[4 * j + e] - lse[e / 2]) : 0.f;
        s[4 * j + e] = p * (dp[4 * j + e] - delta[e / 2]);
      }
    uint32_t operands[N / 16][4];
    round_scores<N>(s, operands);
    multiply_begin();
    weighted<D, N>(dq, operands, k(tile));
    multiply_commit();
    multiply_wait<0>();
    __syncthreads();
  }
  write_sums<D>((Bf16*)args.dq + block.row(args, 0) * args.dim, q_stride, dq, args.scale, args.scale, warp_row, block.count, args.dim);
}

// The block is of keys here; N queries at a time.
template <int D, int N> __device__ __forceinline__ void backward_keys(const Args& args) {
  KeyBlock<BLOCK_ROWS> block(args, N);
  uint32_t base = aligned_memory();
  constexpr int SIDE = Tile<D, N>::BYTES;
  Tile<D, BLOCK_ROWS> k{base}, v{base + k.BYTES};
  auto q = [&](int step) { return Tile<D, N>{base + 2 * k.BYTES + step % 2 * SIDE}; };
  auto g = [&](int step) { return Tile<D, N>{base + 2 * k.BYTES + (2 + step % 2) * SIDE}; };
  __shared__ float numbers[4 * N];  // lse and delta of the tile's queries, twice
  int warp_row = 16 * (threadIdx.x / 32), group_row = 64 * (threadIdx.x / 128), lane = threadIdx.x % 32;
  int64_t q_stride = (int64_t)args.q_heads * args.dim, kv_stride = (int64_t)args.kv_heads * args.dim;
  auto fetch = [&](int step) {
    int query = block.query(step, N), there = min(N, (int)block.s.q_len - query);
    int64_t row = block.query_row(args, step, N);
    q(step).fetch((const Bf16*)args.q + row * args.dim, q_stride, there, args.dim);
    g(step).fetch((const Bf16*)args.g + row * args.dim, q_stride, there, args.dim);
    for (int i = threadIdx.x; i < N; i += BLOCK_THREADS) {
      numbers[step % 2 * 2 * N + i] = i < there ? args.lse[row + (int64_t)i * args.q_heads] * LOG2E : 0.f;
      numbers[step % 2 * 2 * N + N + i] = i < there ? args.delta[row + (int64_t)i * args.q_heads] : 0.f;
    }
    copies_commit();
  };
  k.fetch((const Bf16*)args.k + block.row * args.dim, kv_stride, block.count, args.dim);
  v.fetch((const Bf16*)args.v + block.row * args.dim, kv_stride, block.count, args.dim);
  float dk[D / 2], dv[D / 2], scale = args.scale * LOG2E;
#pragma unroll
  for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0.f;
  if (block.steps > 0) fetch(0);
  for (int step = 0; step < block.steps; step++) {
    if (step + 1 < block.steps) {
      fetch(step + 1);
      arrived<1>();
    } else {
      arrived<0>();
    }
    const float *lse = numbers + step % 2 * 2 * N, *delta = lse + N;
    int query = block.query(step, N);
    float p[N / 2], dp[N / 2];
    multiply_begin();
    products<D, BLOCK_ROWS, N>(p, k, group_row, q(step));
    multiply_commit();
    products<D, BLOCK_ROWS, N>(dp, v, group_row, g(step));
    multiply_commit();
    multiply_wait<1>();
    bool whole = block.all_see(args, query, N);
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int key = warp_row + lane / 4 + 8 * (e / 2), at = 8 * j + 2 * (lane % 4) + e % 2;
        p[4 * j + e] = whole || block.seen(args, key, query + at) ? exp2_fast(scale * p[4 * j + e] - lse[at]) : 0.f;
      }
    uint32_t operands[N / 16][4];
    round_scores<N>(p, operands);
    multiply_wait<0>();
    multiply_begin();
    weighted<D, N>(dv, operands, g(step));
    multiply_commit();
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) dp[4 * j + e] = p[4 * j + e] * (dp[4 * j + e] - delta[8 * j + 2 * (lane % 4) + e % 2]);
    uint32_t gradients[N / 16][4];
    round_scores<N>(dp, gradients);
    multiply_begin();
    weighted<D, N>(dk, gradients, q(step));
    multiply_commit();
    multiply_wait<0>();
    __syncthreads();
  }
  write_sums<D>((Bf16*)args.dk + block.row * args.dim, kv_stride, dk, args.scale, args.scale, warp_row, block.count, args.dim);
  write_sums<D>((Bf16*)args.dv + block.row * args.dim, kv_stride, dv, 1.f, 1.f, warp_row, block.count, args.dim);
}

}  // namespace attention_hopper
