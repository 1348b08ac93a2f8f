// The adapters' gradients from the terms of h and u, on Hopper (compute capability 9.0a): dB = (s h)ᵀ g, dA = xᵀ u.
//
// Shapes: terms [m, width] bf16 (linear_terms.cuh), of which 64 columns from each of `columns` are taken, the hi and the lo of up to 64
// ranks, or both of up to 32; x or g [m, n] bf16; parts [row ranges][64 M, n] f32, which `sum` adds up in a fixed order, hi and lo.
// n and width are multiples of 8.
// Bytes: x or g once; the terms once a column of blocks, from L2.
//
// A block makes 64 M by 256 of a row range's part: one thread asks the copy engine for tiles of 64 rows, M warpgroups multiply, 64
// ranks each.
#pragma once
#include "hopper.cuh"

namespace outer {
using namespace hopper;

constexpr int TILE_N = 256, STAGES = 4, CHUNK_BYTES = 64 * 64 * 2;

struct Args {
  CUtensorMap terms, x;  // tiles of 64 x 64
  float* parts;
  int64_t row_tiles;  // of 64
  int n, range;       // row tiles of a range
  int columns[2];     // of terms, where each warpgroup's 64 start: multiples of 8
  int used;           // of those 64
};

struct SumArgs {
  const float* parts;  // [count][rows, n]
  float* to;           // [r, n], or [n, r] where transposed
  int count, rows;
  int first, second;   // rows where the hi and the lo of `ranks` ranks start
  int ranks, from, r;  // `from`: where they lie among the r
  int n, transposed, add;
};

template <int M> struct Kernel {
  static constexpr int STAGE_BYTES = (M + 4) * CHUNK_BYTES, SHARED = STAGES * STAGE_BYTES + 1024, THREADS = 128 * (1 + M);

  static __device__ __forceinline__ void run(const Args& args) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    uint32_t tiles = (shared_address(memory) + 1023) & ~1023u;
    int column = blockIdx.x * TILE_N;
    int64_t first = (int64_t)blockIdx.y * args.range, end = min(args.row_tiles, first + args.range);
    if (threadIdx.x == 0) {
      for (int i = 0; i < STAGES; i++) {
        barrier_init(shared_address(&full[i]), 1);
        barrier_init(shared_address(&empty[i]), M);
      }
      barrier_init_done();
    }
    __syncthreads();
    take_turn();
    Ring<STAGES> ring;
    if (threadIdx.x < 128) {
      if (threadIdx.x == 0) {
        for (int64_t tile = first; tile < end; tile++, ring.advance()) {
          barrier_wait(shared_address(&empty[ring.slot]), ring.parity ^ 1);
          uint32_t barrier = shared_address(&full[ring.slot]), stage = tiles + ring.slot * STAGE_BYTES;
          barrier_expect(barrier, STAGE_BYTES);
          for (int i = 0; i < M; i++) load_tile(stage + i * CHUNK_BYTES, &args.terms, args.columns[i], (int)(64 * tile), barrier);
          for (int i = 0; i < 4; i++) load_tile(stage + (M + i) * CHUNK_BYTES, &args.x, column + 64 * i, (int)(64 * tile), barrier);
        }
      }
      return;
    }
    int group = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, lane = thread % 32, before = 0;
    float d[128];
#pragma unroll
    for (int i = 0; i < 128; i++) d[i] = 0.f;
    for (int64_t tile = first; tile < end; tile++, ring.advance()) {
      barrier_wait(shared_address(&full[ring.slot]), ring.parity);
      uint32_t stage = tiles + ring.slot * STAGE_BYTES;
      uint64_t left = descriptor(stage + group * CHUNK_BYTES, CHUNK_BYTES, 1024);
      uint64_t right = descriptor(stage + M * CHUNK_BYTES, CHUNK_BYTES, 1024);
      multiply_begin();
#pragma unroll
      for (int i = 0; i < 4; i++) multiply<true, true>(d, left + 128 * i, right + 128 * i);
      multiply_commit();
      if (tile > first) {
        multiply_wait<1>();
        if (thread == 0) barrier_arrive(shared_address(&empty[before]));
      }
      before = ring.slot;
    }
    multiply_wait<0>();
    float* parts = args.parts + (int64_t)blockIdx.y * (64 * M) * args.n;
#pragma unroll
    for (int i = 0; i < 64; i++) {
      int rank = 16 * (thread / 32) + lane / 4 + 8 * (i % 2), c = column + 8 * (i / 2) + 2 * (lane % 4);
      if (rank < args.used && c < args.n) *(float2*)(parts + (int64_t)(64 * group + rank) * args.n + c) = make_float2(d[2 * i], d[2 * i + 1]);
    }
  }
};

__device__ __forceinline__ void sum(const SumArgs& args) {
  take_turn();
  int64_t part = (int64_t)args.rows * args.n;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < args.ranks * args.n; i += gridDim.x * blockDim.x) {
    int rank = i / args.n, column = i % args.n;
    const float *high = args.parts + (int64_t)(args.first + rank) * args.n + column, *low = args.parts + (int64_t)(args.second + rank) * args.n + column;
    float total = 0.f;
#pragma unroll 4
    for (int j = 0; j < args.count; j++) total += high[j * part] + low[j * part];
    int64_t at = args.transposed ? (int64_t)column * args.r + args.from + rank : (int64_t)(args.from + rank) * args.n + column;
    args.to[at] = total + (args.add ? args.to[at] : 0.f);
  }
}

}  // namespace outer
