// The linears of one input with their adapters, on the tensor cores of Hopper (compute capability 9.0a):
//
//   forward   y_j = x W_jᵀ + bias_j + (s_j h_j) B_j     for up to three linears j, with h_j = x A_j; also + a residual
//   backward  dx (+)= Σ_j g_j W_j + Σ_j u_j A_jᵀ        with u_j = s_j g_j B_jᵀ
//
// Shapes: x [m, k], W_j [n_j, k], A_j [k, r_j], B_j [r_j, n_j]; x, W, y, g, dx bf16 (y also f16, for logits), sums f32. k and n_j are multiples of 8.
//
// Both are sums of products over segments of the inner dimension in one accumulator. The adapters are the last segment: 64 columns
// more of the inner dimension for r up to 21 (32 for bf16 adapters), and no pass over y or dx. Its factors are bf16 terms
// (linear_terms.cuh): h and f32 adapters keep their precision.
//
// Bytes: x, W and y once. Operations: 2 m n (k + 64), rounded up to tiles.
//
// A block makes 128 x 256 of an output at a time, and the two blocks of a cluster share the tile of W. One thread asks the copy
// engine for tiles of 64 of the inner dimension; two warpgroups multiply, 64 rows each. Blocks stay on their multiprocessors.
#pragma once
#include "hopper.cuh"

namespace linear {
using namespace hopper;

constexpr int TILE_M = 128, TILE_N = 256;
constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS), STAGES = 4;
constexpr int LEFT_BYTES = TILE_M * TILE_K * 2, RIGHT_BYTES = TILE_N * TILE_K * 2, STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
constexpr int CHUNK_BYTES = 64 * 64 * 2, CHUNKS = 2;  // an output leaves in rounds of two chunks of 64 x 64 a warpgroup
constexpr int SHARED = STAGES * STAGE_BYTES + CONSUMERS * CHUNKS * CHUNK_BYTES + 1024;
constexpr int GROUP = 8;  // pairs of row tiles that are in work together
constexpr int MAX_MAPS = 14, MAX_SEGMENTS = 6, MAX_OUTPUTS = 3;

// A part of the inner dimension: `tiles` tiles of 64 columns of the left factor.
struct Segment {
  int left, right;  // their maps
  int tiles;
  int adapter;      // the right factor lies in rows of the inner dimension. Such segments come last
};

struct Output {
  int map;
  int first_segment, segments;
  int columns, column_tiles;
  int first_tile;         // in clusters, over all outputs
  int half;               // the output is f16
  const uint16_t* bias;   // null: none
  const uint16_t* added;  // as the output; null: none
};

struct Args {
  CUtensorMap maps[MAX_MAPS];
  Segment segments[MAX_SEGMENTS];
  Output outputs[MAX_OUTPUTS];
  int64_t rows;
  int output_count, row_pairs, tiles;
};

// Which tile of which output.
struct Place {
  int output, row_pair, column;
};

// Eight pairs of row tiles by all columns, so that what is in flight reads few rows of x and of W.
__device__ __forceinline__ Place place(const Args& args, int tile) {
  int output = 0;
  while (output + 1 < args.output_count && tile >= args.outputs[output + 1].first_tile) output++;
  int columns = args.outputs[output].column_tiles, at = tile - args.outputs[output].first_tile;
  int group = at / (GROUP * columns), inside = at % (GROUP * columns);
  int height = min(GROUP, args.row_pairs - group * GROUP);
  return {output, group * GROUP + inside % height, inside / height};
}

// bias and what is added, into the accumulators of 64 x 256.
__device__ __forceinline__ void add_memory(const Args& args, const Output& to, float (&d)[128], int64_t row, int column) {
  int thread = threadIdx.x % 128, lane = thread % 32;
#pragma unroll
  for (int j = 0; j < 32; j++) {
    int c = column + 8 * j + 2 * (lane % 4);
    if (c >= to.columns) continue;
    if (to.bias) {
      float low = bf16_value(to.bias[c]), high = bf16_value(to.bias[c + 1]);
      d[4 * j] += low, d[4 * j + 1] += high, d[4 * j + 2] += low, d[4 * j + 3] += high;
    }
    if (!to.added) continue;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int64_t r = row + 16 * (thread / 32) + lane / 4 + 8 * half;
      if (r >= args.rows) continue;
      uint32_t pair = *(const uint32_t*)(to.added + r * to.columns + c);
      d[4 * j + 2 * half] += __uint_as_float(pair << 16), d[4 * j + 2 * half + 1] += __uint_as_float(pair & 0xffff0000u);
    }
  }
}

// Rounds the accumulators of 64 x 256 and sends them off, CHUNKS chunks at a time.
__device__ __forceinline__ void store(const CUtensorMap* map, const float (&d)[128], uint32_t staging, const Output& output, int row, int column, int consumer) {
  int thread = threadIdx.x % 128, lane = thread % 32, r = 16 * (thread / 32) + lane % 16;
  bool half = output.half;
  auto two = [&](float low, float high) { return half ? to_f16x2(low, high) : to_bf16x2(low, high); };
#pragma unroll
  for (int round = 0; round < 4 / CHUNKS; round++) {
    if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
#pragma unroll
    for (int j = 0; j < 8 * CHUNKS; j += 2) {
      const float* v = d + 4 * (8 * CHUNKS * round + j);
      int piece = (j % 8 + lane / 16) ^ (r & 7);
      store_matrices(staging + j / 8 * CHUNK_BYTES + r * 128 + piece * 16, two(v[0], v[1]), two(v[2], v[3]), two(v[4], v[5]), two(v[6], v[7]));
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" ::"r"(1 + consumer) : "memory");
    if (thread == 0) {
      for (int j = 0; j < CHUNKS; j++) {
        int c = column + 64 * (CHUNKS * round + j);
        if (c < output.columns) store_tile(map, staging + j * CHUNK_BYTES, c, row);
      }
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
}

struct Barriers {
  uint64_t full[STAGES], empty[STAGES];
};

// The thread that asks for tiles.
template <bool RIGHT_ROWS> __device__ __forceinline__ void produce(const Args& args, uint32_t tiles, Barriers& barriers) {
  uint32_t rank = cluster_rank();
  Ring<STAGES> ring;
  for (int tile = blockIdx.x / CLUSTER; tile < args.tiles; tile += gridDim.x / CLUSTER) {
    Place at = place(args, tile);
    const Output& to = args.outputs[at.output];
    int row = (CLUSTER * at.row_pair + rank) * TILE_M, column = at.column * TILE_N + (TILE_N / 2) * rank;
    for (int i = 0; i < to.segments; i++) {
      const Segment& segment = args.segments[to.first_segment + i];
      const CUtensorMap *left = &args.maps[segment.left], *right = &args.maps[segment.right];
      for (int k = 0; k < segment.tiles; k++, ring.advance()) {
        barrier_wait(shared_address(&barriers.empty[ring.slot]), ring.parity ^ 1);
        uint32_t barrier = shared_address(&barriers.full[ring.slot]), stage = tiles + ring.slot * STAGE_BYTES;
        barrier_expect(barrier, STAGE_BYTES);
        load_tile(stage, left, k * TILE_K, row, barrier);
        uint32_t half = stage + LEFT_BYTES + rank * (RIGHT_BYTES / 2);
        if (RIGHT_ROWS || segment.adapter) {
          for (int j = 0; j < 2; j++) load_tile_shared(half + j * (64 * 128), right, column + 64 * j, k * TILE_K, barrier);
        } else {
          load_tile_shared(half, right, k * TILE_K, column, barrier);
        }
      }
    }
  }
}

// `count` tiles of the inner dimension into d. RIGHT_ROWS: the right factor lies in rows of the inner dimension, else of the outer.
template <bool RIGHT_ROWS> __device__ __forceinline__ void accumulate(float (&d)[128], int count, uint32_t tiles, Barriers& barriers, Ring<STAGES>& ring) {
  int consumer = threadIdx.x / 128 - 1, thread = threadIdx.x % 128, before = 0;
  for (int k = 0; k < count; k++, ring.advance()) {
    barrier_wait(shared_address(&barriers.full[ring.slot]), ring.parity);
    uint32_t stage = tiles + ring.slot * STAGE_BYTES;
    uint64_t left = descriptor(stage + consumer * (64 * 128), 16, 1024);
    uint64_t right = descriptor(stage + LEFT_BYTES, RIGHT_ROWS ? 64 * 128 : 16, 1024);
    multiply_begin();
#pragma unroll
    for (int i = 0; i < TILE_K / 16; i++) multiply<false, RIGHT_ROWS>(d, left + 2 * i, right + (RIGHT_ROWS ? 128 : 2) * i);
    multiply_commit();
    if (k > 0) {
      multiply_wait<1>();
      if (thread < CLUSTER) barrier_arrive(shared_address(&barriers.empty[before]), thread);
    }
    before = ring.slot;
  }
  multiply_wait<0>();
  if (thread < CLUSTER && count > 0) barrier_arrive(shared_address(&barriers.empty[before]), thread);
}

// A warpgroup that multiplies.
template <bool RIGHT_ROWS> __device__ __forceinline__ void consume(const Args& args, uint32_t tiles, Barriers& barriers) {
  int consumer = threadIdx.x / 128 - 1;
  uint32_t staging = tiles + STAGES * STAGE_BYTES + consumer * (CHUNKS * CHUNK_BYTES);
  Ring<STAGES> ring;
  float d[128];
  for (int tile = blockIdx.x / CLUSTER; tile < args.tiles; tile += gridDim.x / CLUSTER) {
    Place at = place(args, tile);
    const Output& to = args.outputs[at.output];
    int row = (CLUSTER * at.row_pair + cluster_rank()) * TILE_M + 64 * consumer;
    int base = 0, adapter = 0;
    for (int i = 0; i < to.segments; i++) {
      const Segment& segment = args.segments[to.first_segment + i];
      (segment.adapter ? adapter : base) += segment.tiles;
    }
#pragma unroll
    for (int i = 0; i < 128; i++) d[i] = 0.f;
    accumulate<RIGHT_ROWS>(d, base, tiles, barriers, ring);
    if (adapter) accumulate<true>(d, adapter, tiles, barriers, ring);
    if (to.bias || to.added) add_memory(args, to, d, row, at.column * TILE_N);
    store(&args.maps[to.map], d, staging, to, row, at.column * TILE_N, consumer);
  }
  if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <bool RIGHT_ROWS> __device__ __forceinline__ void run(const Args& args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  __shared__ Barriers barriers;
  uint32_t tiles = (shared_address(memory) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      barrier_init(shared_address(&barriers.full[i]), 1);
      barrier_init(shared_address(&barriers.empty[i]), CONSUMERS * CLUSTER);
    }
    barrier_init_done();
  }
  cluster_sync();
  take_turn();
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) produce<RIGHT_ROWS>(args, tiles, barriers);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    consume<RIGHT_ROWS>(args, tiles, barriers);
  }
  // The other block's copies and arrivals come to this one's memory to the end.
  cluster_sync();
}

}  // namespace linear
