// The LoRA delta, forward: y = s * (drop(x) A) B, or y += that.
//
// x [m, k], A [k, r], B [r, n], y [m, n], h = drop(x) A [m, r] f32. x is T; A and B are W (T or f32); y is T or f32.
// Bytes it must move: m (k + n) elements of x and y; A, B and h stay in the L2 cache.
//
// A block owns 16 MT rows. Down: its warps take chunks of k in turn, x through a ring in shared memory that every lane fills
// and reads for itself, A transposed through a buffer of the warp's own; the warps' sums of h are added in a fixed order. Up: h lies
// in shared memory as fragments, the warps take chunks of n in turn. gridDim.y blocks share the columns of the same rows, each
// computing h for itself.
//
// Few rows are bound by latency, not by bytes: `Short` gives a block ROWS rows and asks for x, A and B at once, in plain f32.
#pragma once
#include "fragments.cuh"

struct ForwardArgs {
  const void *x, *a, *b;
  void* y;             // null: h only
  float* h;            // null: not wanted
  const float* parts;  // not null: h is the sum of `part_count` matrices [m, r], and x and A are not read
  int64_t m;
  Dropout dropout;     // of x; with `parts`, of y
  int k, r, n, part_count;
  int column_span;     // columns of y a block computes, a multiple of 32
  int stages;          // of the ring
  float s, kept_scale; // y = s h B; kept_scale: what sums of kept elements are multiplied with, 1 / (1 - p)
  int y_f32, add, a_vec, b_vec;
};

// The i-th chunk of a warp. Where there are enough, chunks come in pairs: a pair is a line of 128 bytes of a 16-bit matrix.
__device__ __forceinline__ int chunk_of(int i, int chunks) {
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  return chunks >= 2 * warps ? 2 * (i / 2 * warps + warp) + i % 2 : i * warps + warp;
}

// Ranks a block computes at once are 8 NR; 8 NR < r means several passes over x.
template <class T, class W, int NR, int MT, bool VEC> struct Forward {
  static constexpr int ROWS = 16 * MT, RANKS = 8 * NR, XT = T::TERMS, AT = W::TERMS;
  static constexpr int HT = FINE, BT = least(W::TERMS, FINE);
  static constexpr int ITEMS = VEC ? MT * 2 * T::VECTORS : 0, PITCH = 16 * (NR | 1);
  // Steps of 16 ranks where their number is known (8 NR >= r), and whether B of the next chunk is read ahead.
  static constexpr int STEPS = NR <= 2 ? 1 : NR == 4 ? 2 : 0;
  static constexpr bool AHEAD = STEPS * W::VECTORS == 1 || STEPS * W::VECTORS == 2;
  typedef typename T::Raw X;
  typedef typename W::Raw A;

  static __device__ __forceinline__ void issue(const ForwardArgs& p, uint4* slots, int64_t row0, int chunk, int chunks) {
    if (VEC) {
      int lane = threadIdx.x % 32, column = 32 * chunk + 8 * (lane % 4);
      UNROLL for (int half = 0; half < 2 * MT; half++) {
        int64_t row = row0 + 8 * half + lane / 4;
        bool valid = chunk < chunks && row < p.m && column < p.k;
        const X* from = valid ? (const X*)p.x + row * p.k + column : (const X*)p.x;
        UNROLL for (int v = 0; v < T::VECTORS; v++)
          {
          // Four tiles came out a third slower with the hint, one and two a tenth faster.
          if (MT == 4) copy_async(slots + (half * T::VECTORS + v) * 32 + lane, (const uint4*)from + v, valid);
          else copy_async_once(slots + (half * T::VECTORS + v) * 32 + lane, (const uint4*)from + v, valid);
        }
      }
    }
    copy_commit();
  }

  // Adds x A of ranks rank0.. to acc for the warp's chunks.
  static __device__ __forceinline__ void down(const ForwardArgs& p, unsigned char* buffer, uint4* ring, int64_t row0, int rank0,
                                              float (&acc)[MT][NR][4]) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, chunks = (p.k + 31) / 32;
    // Row 8t + i of A's chunk goes to place 4i + t, so that the rows of one 8x8 matrix are neighbours.
    int a_row = 8 * t + g, matrix_row = (lane & ~7) + (lane & 1) * 4 + (lane >> 1 & 3);
    int ahead = VEC ? p.stages - 1 : 0;
    for (int i = 0; i < ahead; i++) issue(p, ring + i * ITEMS * 32, row0, chunk_of(i, chunks), chunks);
    int slot = 0, next = ahead;
    for (int i = 0, chunk; (chunk = chunk_of(i, chunks)) < chunks; i++) {
      if (VEC) issue(p, ring + next * ITEMS * 32, row0, chunk_of(i + ahead, chunks), chunks);
      int a_at = 32 * chunk + a_row;
      Eight<W> rows[NR];
      UNROLL for (int q = 0; q < NR; q++) {
        int valid = a_at < p.k ? p.r - rank0 - 8 * q : 0;
        rows[q] = load8<W>((const A*)p.a + (int64_t)a_at * p.r + rank0 + 8 * q, valid, p.a_vec);
      }
      UNROLL for (int q = 0; q < NR; q++) {
        uint32_t terms[AT][4];
        split8<W, AT>(rows[q], terms);
        UNROLL for (int i = 0; i < AT; i++)
          *(uint4*)(buffer + (i * 32 + lane) * PITCH + 16 * q) = make_uint4(terms[i][0], terms[i][1], terms[i][2], terms[i][3]);
      }
      if (VEC) copy_wait_all_but(ahead);
      uint32_t x[MT][2][XT][4];
      UNROLL for (int half = 0; half < 2 * MT; half++) {
        int64_t row = row0 + 8 * half + g;
        int column = 32 * chunk + 8 * t;
        Eight<T> e;
        if (VEC) {
          UNROLL for (int v = 0; v < T::VECTORS; v++) e.v[v] = ring[(slot * ITEMS + half * T::VECTORS + v) * 32 + lane];
        } else {
          e = load8<T, false>((const X*)p.x + row * p.k + column, row < p.m ? p.k - column : 0);
        }
        if (p.dropout.on) keep8<T>(e, kept8((uint64_t)(row * p.k + column), p.dropout));
        split8<T, XT>(e, x[half / 2][half % 2]);
      }
      __syncwarp();
      UNROLL for (int q = 0; q < NR; q++) {
        uint32_t b[AT][4];
        UNROLL for (int i = 0; i < AT; i++) load_transposed(b[i], buffer + (i * 32 + matrix_row) * PITCH + 16 * q);
        UNROLL for (int mt = 0; mt < MT; mt++)
          UNROLL for (int j = 0; j < 2; j++)
            UNROLL for (int i = 0; i < XT; i++)
              UNROLL for (int o = 0; o < AT; o++)
                if (i + o < FINE)
                  mma(acc[mt][q], x[mt][0][i][2 * j], x[mt][1][i][2 * j], x[mt][0][i][2 * j + 1], x[mt][1][i][2 * j + 1], b[o][2 * j], b[o][2 * j + 1]);
      }
      __syncwarp();
      slot = slot + 1 == p.stages ? 0 : slot + 1;
      next = next + 1 == p.stages ? 0 : next + 1;
    }
    if (VEC) copy_wait<0>();
  }

  // B of 32 columns and the ranks 16 step.., as right operand.
  struct Rows { Eight<W> at[2][2]; };
  static __device__ __forceinline__ Rows read_b(const ForwardArgs& p, int column0, int end, int step) {
    int lane = threadIdx.x % 32, column = column0 + 8 * (lane / 8);
    Rows rows;
    UNROLL for (int half = 0; half < 2; half++)
      UNROLL for (int i = 0; i < 2; i++) {
        int rank = 16 * step + 8 * half + 2 * (lane % 4) + i;
        rows.at[half][i] = load8<W>((const A*)p.b + (int64_t)rank * p.n + column, column0 < end && rank < p.r ? p.n - column : 0, p.b_vec);
      }
    return rows;
  }
  static __device__ __forceinline__ void pack_b(const Rows& rows, uint32_t (&b)[2][BT][4]) {
    UNROLL for (int half = 0; half < 2; half++) pair_rows<W, BT>(rows.at[half][0], rows.at[half][1], threadIdx.x / 4 % 2, b[half]);
  }
  static __device__ __forceinline__ void multiply(float (&acc)[4][4], const uint4* fragments, const uint32_t (&b)[2][BT][4], bool fine) {
    UNROLL for (int order = 0; order < FINE; order++) {
      if (order >= T::UP && !fine) break;
      UNROLL for (int o = 0; o < BT; o++)
        if (o <= order) {
          uint4 h = fragments[(order - o) * 32 + threadIdx.x % 32];
          UNROLL for (int j = 0; j < 4; j++) mma(acc[j], h.x, h.y, h.z, h.w, b[0][o][j], b[1][o][j]);
        }
    }
  }
  static __device__ __forceinline__ void put(const ForwardArgs& p, const float (&acc)[4][4], int64_t row0, int column0) {
    int lane = threadIdx.x % 32, column = column0 + 8 * (lane % 4);
    UNROLL for (int half = 0; half < 2; half++) {
      int64_t row = row0 + 8 * half + lane / 4, at = row * p.n + column;
      if (row >= p.m) continue;
      float f[8];
      UNROLL for (int i = 0; i < 8; i++) f[i] = acc[i / 2][2 * half + i % 2];
      if (p.parts && p.dropout.on) {
        uint32_t bits = kept8((uint64_t)at, p.dropout);
        UNROLL for (int i = 0; i < 8; i++) f[i] = bits >> i & 1 ? f[i] : 0;
      }
      put8<T, VEC>(p.y, at, f, p.n - column, p.y_f32, p.add);
    }
  }

  static __device__ __forceinline__ int start(const ForwardArgs& p) { return blockIdx.y * p.column_span; }
  static __device__ __forceinline__ int end(const ForwardArgs& p) { return least(p.n, start(p) + p.column_span); }
  static __device__ __forceinline__ int column_of(const ForwardArgs& p, int i) {
    return start(p) + 32 * chunk_of(i, (end(p) - start(p) + 31) / 32);
  }

  // y of the block's rows and columns from the fragments of s h. `ahead`: B of the warp's first chunk, where AHEAD.
  static __device__ __forceinline__ void up(const ForwardArgs& p, const uint4* fragments, int64_t row0, Rows (&ahead)[STEPS + 1]) {
    constexpr int KNOWN = STEPS ? STEPS : 1;
    int steps = STEPS ? STEPS : (p.r + 15) / 16;
    for (int i = 0, column0; (column0 = column_of(p, i)) < end(p); i++) {
      uint32_t b[KNOWN][2][BT][4];
      UNROLL for (int step = 0; step < STEPS; step++) {
        if (!AHEAD) ahead[step] = read_b(p, column0, end(p), step);
        pack_b(ahead[step], b[step]);
        if (AHEAD) ahead[step] = read_b(p, column_of(p, i + 1), end(p), step);
      }
      _Pragma("unroll 1") for (int mt = 0; mt < MT; mt++) {
        float acc[4][4] = {};
        UNROLL for (int step = 0; step < STEPS; step++) multiply(acc, fragments + (mt * steps + step) * HT * 32, b[step], p.y_f32);
        if (!STEPS)
          for (int step = 0; step < steps; step++) {
            pack_b(read_b(p, column0, end(p), step), b[0]);
            multiply(acc, fragments + (mt * steps + step) * HT * 32, b[0], p.y_f32);
          }
        put(p, acc, row0 + 16 * mt, column0);
      }
    }
  }

  static __device__ __forceinline__ void run(const ForwardArgs& p, unsigned char* shared) {
    wait_for_previous();
    let_next_start();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    int64_t row0 = (int64_t)blockIdx.x * ROWS;
    int steps = STEPS ? STEPS : (p.r + 15) / 16;
    uint4* fragments = (uint4*)shared;
    Rows ahead[STEPS + 1];
    unsigned char* work = shared + MT * steps * HT * 512;
    float* sums = (float*)work;  // [warps][ROWS][RANKS], in the place of the ring and the buffers
    unsigned char* buffer = work + warp * AT * 32 * PITCH;
    uint4* ring = (uint4*)(work + warps * AT * 32 * PITCH) + warp * p.stages * ITEMS * 32;
    for (int rank0 = 0; rank0 < (STEPS ? RANKS : p.r); rank0 += RANKS) {
      if (!p.parts) {
        float acc[MT][NR][4] = {};
        down(p, buffer, ring, row0, rank0, acc);
        if (AHEAD && p.y)
          UNROLL for (int step = 0; step < STEPS; step++) ahead[step] = read_b(p, column_of(p, 0), end(p), step);
        __syncthreads();
        UNROLL for (int mt = 0; mt < MT; mt++)
          UNROLL for (int q = 0; q < NR; q++)
            UNROLL for (int half = 0; half < 2; half++)
              *(float2*)&sums[(warp * ROWS + 16 * mt + 8 * half + g) * RANKS + 8 * q + 2 * t] = make_float2(acc[mt][q][2 * half], acc[mt][q][2 * half + 1]);
        __syncthreads();
      } else if (AHEAD) {
        UNROLL for (int step = 0; step < STEPS; step++) ahead[step] = read_b(p, column_of(p, 0), end(p), step);
      }
      for (int i = threadIdx.x; i < ROWS * RANKS; i += blockDim.x) {
        int64_t row = row0 + i / RANKS;
        int rank = rank0 + i % RANKS;
        float sum = 0;
        if (p.parts) {
          if (row < p.m && rank < p.r)
            for (int part = 0; part < p.part_count; part++) sum += p.parts[((int64_t)part * p.m + row) * p.r + rank];
        } else {
          for (int w = 0; w < warps; w++) sum += sums[w * ROWS * RANKS + i];
          sum *= p.kept_scale;
        }
        sums[i] = sum;
        if (p.h && blockIdx.y == 0 && row < p.m && rank < p.r) p.h[row * p.r + rank] = sum;
      }
      __syncthreads();
      constexpr int HERE = (NR + 1) / 2;
      for (int i = threadIdx.x; i < MT * HERE * 32; i += blockDim.x) {
        int l = i % 32, step = i / 32 % HERE, mt = i / 32 / HERE;
        if (rank0 / 16 + step >= steps) continue;
        uint32_t f[4][HT];
        UNROLL for (int part = 0; part < 4; part++) {
          int row = 16 * mt + 8 * (part % 2) + l / 4, rank = 16 * step + 8 * (part / 2) + 2 * (l % 4);
          bool there = rank < RANKS;
          split2<HT>(there ? p.s * sums[row * RANKS + rank] : 0, there ? p.s * sums[row * RANKS + rank + 1] : 0, f[part]);
        }
        UNROLL for (int term = 0; term < HT; term++)
          fragments[((mt * steps + rank0 / 16 + step) * HT + term) * 32 + l] = make_uint4(f[0][term], f[1][term], f[2][term], f[3][term]);
      }
      __syncthreads();
    }
    if (p.y) up(p, fragments, row0, ahead);
  }
};

// Four consecutive values as they lie in memory, on a boundary of their size.
template <class E> struct Four { uint2 v; };
template <> struct Four<F32> { uint4 v; };
template <class E> __device__ __forceinline__ Four<E> load4(const typename E::Raw* p, bool valid) {
  Four<E> e = {};
  if (valid) e.v = __ldg((const decltype(e.v)*)p);
  return e;
}
template <class E> __device__ __forceinline__ void widen4(const Four<E>& e, float (&f)[4]) {
  UNROLL for (int i = 0; i < 4; i++) f[i] = E::widen((uint16_t)((i < 2 ? e.v.x : e.v.y) >> (16 * (i % 2))));
}
template <> __device__ __forceinline__ void widen4<F32>(const Four<F32>& e, float (&f)[4]) {
  UNROLL for (int i = 0; i < 4; i++) f[i] = __uint_as_float(word(e.v, i));
}
template <class E> __device__ __forceinline__ void put4(void* base, int64_t at, float (&f)[4], bool add) {
  typename E::Raw* p = (typename E::Raw*)base + at;
  if (add) {
    float old[4];
    widen4<E>(load4<E>(p, true), old);
    UNROLL for (int i = 0; i < 4; i++) f[i] += old[i];
  }
  if constexpr (E::VECTORS == 2) *(float4*)p = make_float4(f[0], f[1], f[2], f[3]);
  else *(uint2*)p = make_uint2(E::narrow(f[0], f[1]), E::narrow(f[2], f[3]));
}

// Sums v over the warp: lane l gets the sum of v[l / (32 / N)].
template <int N> __device__ __forceinline__ float warp_sums(float (&v)[N]) {
  int lane = threadIdx.x % 32;
  UNROLL for (int size = N, offset = 16; size > 1; size /= 2, offset /= 2)
    UNROLL for (int i = 0; i < size / 2; i++) {
      float mine = lane & offset ? v[i + size / 2] : v[i], theirs = lane & offset ? v[i] : v[i + size / 2];
      v[i] = mine + __shfl_xor_sync(0xffffffffu, theirs, offset);
    }
  UNROLL for (int offset = 16 / N; offset > 0; offset /= 2) v[0] += __shfl_xor_sync(0xffffffffu, v[0], offset);
  return v[0];
}

// k and n are multiples of 8, pointers lie on 16 bytes, r <= RANKS.
template <class T, class W, int RANKS, int ROWS> struct Short {
  static constexpr int SUMS = ROWS * RANKS;
  typedef typename T::Raw X;
  typedef typename W::Raw A;

  static __device__ __forceinline__ void read_b(const ForwardArgs& p, int column, bool valid, Four<W> (&b)[RANKS]) {
    UNROLL for (int rank = 0; rank < RANKS; rank++) b[rank] = load4<W>((const A*)p.b + rank * p.n + column, valid && rank < p.r);
  }

  static __device__ __forceinline__ void run(const ForwardArgs& p, float (*shared)[SUMS]) {
    wait_for_previous();
    let_next_start();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int64_t row0 = (int64_t)blockIdx.x * ROWS;
    int column = blockIdx.y * p.column_span + 4 * threadIdx.x, end = least(p.n, (blockIdx.y + 1) * p.column_span);
    Four<W> b[RANKS];
    read_b(p, column, p.y && column < end, b);
    float h[SUMS] = {};
    for (int at = 4 * threadIdx.x; at < p.k; at += 4 * blockDim.x) {
      Four<T> x[ROWS];
      UNROLL for (int row = 0; row < ROWS; row++) x[row] = load4<T>((const X*)p.x + (row0 + row) * p.k + at, row0 + row < p.m);
      Eight<W> a[4][RANKS / 8];
      UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int q = 0; q < RANKS / 8; q++) a[i][q] = load8<W>((const A*)p.a + (int64_t)(at + i) * p.r + 8 * q, p.r - 8 * q, p.a_vec);
      float f[ROWS][4];
      UNROLL for (int row = 0; row < ROWS; row++) {
        widen4<T>(x[row], f[row]);
        if (p.dropout.on) {
          uint4 words = philox((uint64_t)((row0 + row) * p.k + at) / 4, p.dropout);
          UNROLL for (int i = 0; i < 4; i++) f[row][i] = word(words, i) < p.dropout.threshold ? 0 : f[row][i];
        }
      }
      UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int q = 0; q < RANKS / 8; q++) {
          float w[8];
          widen8<W>(a[i][q], w);
          UNROLL for (int row = 0; row < ROWS; row++)
            UNROLL for (int rank = 0; rank < 8; rank++) h[row * RANKS + 8 * q + rank] += f[row][i] * w[rank];
        }
    }
    float mine = warp_sums<SUMS>(h);
    if (lane % (32 / SUMS) == 0) shared[warp][lane / (32 / SUMS)] = mine;
    __syncthreads();
    float sum = 0;
    for (int w = 0; w < warps; w++) sum += shared[w][lane % SUMS];
    sum *= p.kept_scale;
    int64_t row = row0 + lane / RANKS;
    if (p.h && blockIdx.y == 0 && warp == 0 && lane < SUMS && row < p.m && lane % RANKS < p.r) p.h[row * p.r + lane % RANKS] = sum;
    if (!p.y) return;
    UNROLL for (int i = 0; i < SUMS; i++) h[i] = __shfl_sync(0xffffffffu, p.s * sum, i);
    while (column < end) {
      float f[ROWS][4] = {};
      UNROLL for (int rank = 0; rank < RANKS; rank++) {
        float w[4];
        widen4<W>(b[rank], w);
        UNROLL for (int row = 0; row < ROWS; row++)
          UNROLL for (int i = 0; i < 4; i++) f[row][i] += h[row * RANKS + rank] * w[i];
      }
      UNROLL for (int row = 0; row < ROWS; row++) {
        if (row0 + row >= p.m) break;
        int64_t at = (row0 + row) * p.n + column;
        if (p.y_f32) put4<F32>(p.y, at, f[row], p.add);
        else put4<T>(p.y, at, f[row], p.add);
      }
      column += 4 * blockDim.x;
      read_b(p, column, column < end, b);
    }
  }
};
