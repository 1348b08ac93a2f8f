// The LoRA delta, forward: y = s * (drop(x) A) B, or y += that.
//
// x [m, k], A [k, r], B [r, n], y [m, n], h = drop(x) A [m, r] f32. x is T; A and B are W (T or f32); y is T or f32.
// Bytes it must move: m (k + n) elements of x and y; A, B and h stay in the L2 cache.
//
// A block owns 16 MT rows. Down: its warps take chunks of k in turn, x through a ring in shared memory that every lane fills
// and reads for itself, A transposed through a buffer of the warp's own; the warps' sums of h are added in a fixed order. Up: h lies
// in shared memory as fragments, the warps take chunks of n in turn. gridDim.y blocks share the columns of the same rows, each
// computing h for itself: for few rows.
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
  float s, kept_scale; // kept_scale: 1 / (1 - p)
  int y_f32, add, a_vec, b_vec;
};

// Ranks a block computes at once are 8 NR; 8 NR < r means several passes over x.
template <int NR> struct Transposed { static constexpr int PITCH = 16 * (NR | 1); };

template <class T, class W, int NR, int MT, bool VEC> struct Forward {
  static constexpr int ROWS = 16 * MT, RANKS = 8 * NR, XT = T::TERMS, AT = W::TERMS;
  static constexpr int HT = T::UP, BT = least(W::TERMS, T::UP);
  static constexpr int ITEMS = VEC ? MT * 2 * T::VECTORS : 0, PITCH = Transposed<NR>::PITCH;
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
          copy_async(slots + (half * T::VECTORS + v) * 32 + lane, (const uint4*)from + v, valid);
      }
    }
    copy_commit();
  }

  // Adds x A of ranks rank0.. to acc for the warp's chunks.
  static __device__ __forceinline__ void down(const ForwardArgs& p, unsigned char* buffer, uint4* ring, int64_t row0, int rank0,
                                              float (&acc)[MT][NR][4]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    int chunks = (p.k + 31) / 32;
    // Row 8t + i of A's chunk goes to place 4i + t, so that the rows of one 8x8 matrix are neighbours.
    int a_row = 8 * t + g, matrix_row = (lane & ~7) + (lane & 1) * 4 + (lane >> 1 & 3);
    int ahead = VEC ? p.stages - 1 : 0;
    for (int i = 0; i < ahead; i++) issue(p, ring + i * ITEMS * 32, row0, warp + i * warps, chunks);
    int slot = 0, next = ahead;
    for (int chunk = warp; chunk < chunks; chunk += warps) {
      if (VEC) issue(p, ring + next * ITEMS * 32, row0, chunk + ahead * warps, chunks);
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

  // y of the block's rows and columns from the fragments of h.
  static __device__ __forceinline__ void up(const ForwardArgs& p, const uint4* fragments, int64_t row0) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    int steps = (p.r + 15) / 16, end = least(p.n, (blockIdx.y + 1) * p.column_span);
    for (int column0 = blockIdx.y * p.column_span + 32 * warp; column0 < end; column0 += 32 * warps) {
      float acc[MT][4][4] = {};
      int b_column = column0 + 8 * (g / 2);
      for (int step = 0; step < steps; step++) {
        uint32_t b[2][BT][4];
        UNROLL for (int half = 0; half < 2; half++) {
          int rank = 16 * step + 8 * half + 2 * t;
          const A* from = (const A*)p.b + (int64_t)rank * p.n + b_column;
          Eight<W> row0 = load8<W>(from, rank < p.r ? p.n - b_column : 0, p.b_vec);
          Eight<W> row1 = load8<W>(from + p.n, rank + 1 < p.r ? p.n - b_column : 0, p.b_vec);
          pair_rows<W, BT>(row0, row1, g % 2, b[half]);
        }
        UNROLL for (int mt = 0; mt < MT; mt++) {
          uint4 h[HT];
          UNROLL for (int i = 0; i < HT; i++) h[i] = fragments[((mt * steps + step) * HT + i) * 32 + lane];
          UNROLL for (int j = 0; j < 4; j++)
            UNROLL for (int i = 0; i < HT; i++)
              UNROLL for (int o = 0; o < BT; o++)
                if (i + o < T::UP) mma(acc[mt][j], h[i].x, h[i].y, h[i].z, h[i].w, b[0][o][j], b[1][o][j]);
        }
      }
      int column = column0 + 8 * t;
      UNROLL for (int half = 0; half < 2 * MT; half++) {
        int64_t row = row0 + 8 * half + g;
        if (row >= p.m) continue;
        float f[8];
        UNROLL for (int i = 0; i < 8; i++) f[i] = p.s * acc[half / 2][i / 2][2 * (half % 2) + i % 2];
        int64_t at = row * p.n + column;
        if (p.parts && p.dropout.on) {
          uint32_t bits = kept8((uint64_t)at, p.dropout);
          UNROLL for (int i = 0; i < 8; i++) f[i] = bits >> i & 1 ? f[i] * p.kept_scale : 0;
        }
        put8<T, VEC>(p.y, at, f, p.n - column, p.y_f32, p.add);
      }
    }
  }

  static __device__ __forceinline__ void run(const ForwardArgs& p, unsigned char* shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    int64_t row0 = (int64_t)blockIdx.x * ROWS;
    int steps = (p.r + 15) / 16;
    uint4* fragments = (uint4*)shared;
    unsigned char* work = shared + MT * steps * HT * 512;
    float* sums = (float*)work;  // [warps][ROWS][RANKS], in the place of the ring and the buffers
    unsigned char* buffer = work + warp * AT * 32 * PITCH;
    uint4* ring = (uint4*)(work + warps * AT * 32 * PITCH) + warp * p.stages * ITEMS * 32;
    for (int rank0 = 0; rank0 < p.r; rank0 += RANKS) {
      if (!p.parts) {
        float acc[MT][NR][4] = {};
        down(p, buffer, ring, row0, rank0, acc);
        __syncthreads();
        UNROLL for (int mt = 0; mt < MT; mt++)
          UNROLL for (int q = 0; q < NR; q++)
            UNROLL for (int half = 0; half < 2; half++)
              *(float2*)&sums[(warp * ROWS + 16 * mt + 8 * half + g) * RANKS + 8 * q + 2 * t] = make_float2(acc[mt][q][2 * half], acc[mt][q][2 * half + 1]);
        __syncthreads();
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
      constexpr int STEPS = (NR + 1) / 2;
      for (int i = threadIdx.x; i < MT * STEPS * 32; i += blockDim.x) {
        int l = i % 32, step = i / 32 % STEPS, mt = i / 32 / STEPS;
        if (rank0 / 16 + step >= steps) continue;
        uint32_t f[4][HT];
        UNROLL for (int part = 0; part < 4; part++) {
          int row = 16 * mt + 8 * (part % 2) + l / 4, rank = 16 * step + 8 * (part / 2) + 2 * (l % 4);
          bool there = rank < RANKS;
          split2<HT>(there ? sums[row * RANKS + rank] : 0, there ? sums[row * RANKS + rank + 1] : 0, f[part]);
        }
        UNROLL for (int term = 0; term < HT; term++)
          fragments[((mt * steps + rank0 / 16 + step) * HT + term) * 32 + l] = make_uint4(f[0][term], f[1][term], f[2][term], f[3][term]);
      }
      __syncthreads();
    }
    if (p.y) up(p, fragments, row0);
  }
};
