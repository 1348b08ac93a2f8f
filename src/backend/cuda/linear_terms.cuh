// The factors of the adapters' segments of linear.cuh, as bf16 terms.
//
// An f32 value v is hi(v) + lo(v) with hi(v) = bf16(v), lo(v) = bf16(v - hi(v)): 16 bits of it. A product of two such sums without
// lo lo is [hi | lo | hi] · [hi; hi; lo]: three blocks. Of a bf16 adapter lo is 0: two blocks.
//
// A block of Σ r ranks is as wide as the next multiple of 8, for the copy engine starts on 16 bytes only; what is between is zero.
//
//   adapters   of A_j [k, r_j], j = 1..J: rows [blocks block, k], block by block, A_jᵀ after A_jᵀ in each; of B_j [r_j, n_j]: rows
//              [blocks block_j, n_j]. Rows between blocks are left alone
//   parts      of u or h as parts [count][m, r]: the terms of their scaled sum, at the adapter's columns of [m, blocks block]
// Bytes: the adapters once, their terms once; the parts once.
#pragma once
#include "hopper.cuh"

namespace terms {
using namespace hopper;

constexpr int MAX_ADAPTERS = 3;

struct Adapters {
  const void *a[MAX_ADAPTERS], *b[MAX_ADAPTERS];
  uint16_t* a_terms;                // null: not wanted
  uint16_t* b_terms[MAX_ADAPTERS];  // null: not wanted
  int r[MAX_ADAPTERS], n[MAX_ADAPTERS];
  int count, k, block, blocks, f32;
};

__device__ __forceinline__ float value(const void* p, int64_t i, int f32) { return f32 ? ((const float*)p)[i] : bf16_value(((const uint16_t*)p)[i]); }

// v into row `row` of each of `blocks` blocks of `block` rows of `columns`.
__device__ __forceinline__ void write_blocks(uint16_t* to, float v, int64_t row, int64_t block, int64_t columns, int64_t column, int blocks) {
  uint16_t high = to_bf16(v);
  to[row * columns + column] = high;
  to[(block + row) * columns + column] = high;
  if (blocks == 3) to[(2 * block + row) * columns + column] = to_bf16(v - bf16_value(high));
}

__device__ __forceinline__ void adapters(const Adapters& args) {
  take_turn();
  int thread = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  int from = 0;
  for (int j = 0; j < args.count; j++) {
    int r = args.r[j], n = args.n[j];
    if (args.a_terms)
      for (int i = thread; i < args.k * r; i += step)
        write_blocks(args.a_terms, value(args.a[j], (int64_t)(i % args.k) * r + i / args.k, args.f32), from + i / args.k, args.block, args.k, i % args.k, args.blocks);
    if (args.b_terms[j])
      for (int i = thread; i < r * n; i += step) write_blocks(args.b_terms[j], value(args.b[j], i, args.f32), i / n, (r + 7) / 8 * 8, n, i % n, args.blocks);
    from += r;
  }
}

struct Parts {
  const float* parts;
  uint16_t* terms;  // at this adapter's first column
  int64_t m;
  int count, r;
  int width, block;   // columns of terms; from one term of a value to the next
  int blocks, zeros;  // columns after each block that this adapter clears
  float scale;
};

__device__ __forceinline__ void parts(const Parts& args) {
  take_turn();
  int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < args.m * args.r; i += step) {
    float sum = 0.f;
    for (int part = 0; part < args.count; part++) sum += args.parts[part * args.m * args.r + i];
    sum *= args.scale;
    int c = (int)(i % args.r);
    uint16_t* to = args.terms + i / args.r * args.width + c;
    uint16_t high = to_bf16(sum);
    to[0] = high;
    to[args.block] = to_bf16(sum - bf16_value(high));
    if (args.blocks == 3) to[2 * args.block] = high;
    if (c == args.r - 1)
      for (int i = 0; i < args.blocks * args.zeros; i++) to[i / args.zeros * args.block + i % args.zeros + 1] = 0;
  }
}

}  // namespace terms
