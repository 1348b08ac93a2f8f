// h = x A of up to three adapters in one pass over x, on Hopper (compute capability 9.0a); as well u = g Bᵀ.
//
// Shapes: x [m, k] bf16, the adapters' terms [.., k] bf16 (linear_terms.cuh), h_j [m, r_j] f32, k is a multiple of 8. A launch makes N of the Σ r_j
// columns, from `from` on.
// Leaves the terms of s_j h_j beside h_j, as the products of linear.cuh take them.
// Bytes: x and h once; the adapters' terms come from L2 once for 128 rows.
//
// A block makes 64 rows of h. One thread asks the copy engine for tiles of 64 columns of x and of the terms, whose halves the two blocks
// of a cluster share; one warpgroup multiplies.
#pragma once
#include "hopper.cuh"

namespace project {
using namespace hopper;

constexpr int ROWS = 64, THREADS = 128 + 32, MAX_ADAPTERS = 3;
constexpr int X_BYTES = ROWS * TILE_K * 2;

struct Adapter {
  float* h;         // [m, r], unscaled; null: not wanted
  uint16_t* terms;  // [m, width], at this adapter's first column: the terms of s h, `block` columns apart; null: not wanted
  int r, width, block;
  int zeros;        // columns after each block that this adapter clears
  float s;
};

struct Args {
  CUtensorMap x, a;  // tiles of 64 rows; of N rows
  Adapter adapters[MAX_ADAPTERS];
  int64_t rows;
  int adapter_count, tiles;
  int from;
  int low;     // row of the adapters' second terms; past the end for bf16 adapters, which have none
  int blocks;  // 3, or 2 for bf16 adapters
};

template <int N> struct Kernel {
  static constexpr int STAGE_BYTES = X_BYTES + 2 * N * TILE_K * 2;
  static constexpr int STAGES = 192 * 1024 / STAGE_BYTES, SHARED = STAGES * STAGE_BYTES + 1024;

  static __device__ __forceinline__ void leave(const Args& args, const float (&p)[N], int64_t row) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      int64_t at = row + 16 * (threadIdx.x / 32) + lane / 4 + 8 * (i / 2 % 2);
      int c = args.from + 8 * (i / 4) + 2 * (lane % 4) + i % 2, adapter = 0;
      while (adapter < args.adapter_count && c >= args.adapters[adapter].r) c -= args.adapters[adapter++].r;
      if (adapter == args.adapter_count || at >= args.rows) continue;
      const Adapter& to = args.adapters[adapter];
      float h = p[i] + p[i + N / 2], scaled = to.s * h;
      if (to.h) to.h[at * to.r + c] = h;
      if (!to.terms) continue;
      uint16_t* terms = to.terms + at * to.width + c;
      uint16_t high = to_bf16(scaled);
      terms[0] = high;
      terms[to.block] = to_bf16(scaled - bf16_value(high));
      if (args.blocks == 3) terms[2 * to.block] = high;
      if (c == to.r - 1)
        for (int j = 0; j < args.blocks * to.zeros; j++) terms[j / to.zeros * to.block + j % to.zeros + 1] = 0;
    }
  }

  static __device__ __forceinline__ void run(const Args& args) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    uint32_t tiles = (shared_address(memory) + 1023) & ~1023u, rank = cluster_rank();
    int64_t row = (int64_t)blockIdx.x * ROWS;
    if (threadIdx.x == 0) {
      for (int i = 0; i < STAGES; i++) {
        barrier_init(shared_address(&full[i]), 1);
        barrier_init(shared_address(&empty[i]), CLUSTER);
      }
      barrier_init_done();
    }
    cluster_sync();
    take_turn();
    Ring<STAGES> ring;
    if (threadIdx.x == 128) {
      for (int k = 0; k < args.tiles; k++, ring.advance()) {
        barrier_wait(shared_address(&empty[ring.slot]), ring.parity ^ 1);
        uint32_t barrier = shared_address(&full[ring.slot]), stage = tiles + ring.slot * STAGE_BYTES;
        barrier_expect(barrier, STAGE_BYTES);
        load_tile(stage, &args.x, k * TILE_K, (int)row, barrier);
        load_tile_shared(stage + X_BYTES + rank * (N * TILE_K * 2), &args.a, k * TILE_K, args.from + (rank ? args.low : 0), barrier);
      }
    } else if (threadIdx.x < 128) {
      float p[N];
#pragma unroll
      for (int i = 0; i < N; i++) p[i] = 0.f;
      int before = 0;
      for (int k = 0; k < args.tiles; k++, ring.advance()) {
        barrier_wait(shared_address(&full[ring.slot]), ring.parity);
        uint64_t left = descriptor(tiles + ring.slot * STAGE_BYTES, 16, 1024);
        uint64_t right = descriptor(tiles + ring.slot * STAGE_BYTES + X_BYTES, 16, 1024);
        multiply_begin();
#pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) multiply_narrow<2 * N>(p, left + 2 * i, right + 2 * i);
        multiply_commit();
        if (k > 0) {
          multiply_wait<1>();
          if (threadIdx.x < CLUSTER) barrier_arrive(shared_address(&empty[before]), threadIdx.x);
        }
        before = ring.slot;
      }
      multiply_wait<0>();
      leave(args, p, row);
    }
    cluster_sync();
  }
};

}  // namespace project
