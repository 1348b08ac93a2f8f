// A product with a quantized weight for a few rows of x, as decoding has them: y = x Wᵀ + bias.
// x [m, k] and y [m, n] f32, f16 or bf16, m up to M; W [n, k] in blocks of a kind (`dequantize.cuh`); bias [n] f32. Sums are f32.
// Bytes: the blocks once; x is read from the caches. A warp makes a column of y, a lane eight neighbours of a row of W at a time.
#pragma once
#include "dequantize.cuh"

namespace few_rows {
using namespace elements;

struct Args {
  const void* x;
  const unsigned char* blocks;
  const float* bias;  // null for none
  void* y;
  int64_t k, n;
  int m;
};

template <class K, class T, int M> __device__ __forceinline__ void forward(const Args& args) {
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = dequantize::NF4[threadIdx.x];
  __syncthreads();
  int64_t row = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, k = args.k;
  if (row >= args.n) return;
  const unsigned char* blocks = args.blocks + row * (k / K::len) * K::bytes;
  float sum[M] = {};
#pragma unroll 2
  for (int64_t i = threadIdx.x % 32 * 8; i < k; i += 256) {
    float w[8];
    int place = (int)(i % K::len);
    K::eight(blocks + i / K::len * K::bytes, place / 32, place % 32, table, w);
#pragma unroll
    for (int at = 0; at < M; at++) {
      if (at >= args.m) break;
      float x[8];
      load((const T*)args.x + at * k + i, x);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[at] += x[j] * w[j];
    }
  }
#pragma unroll
  for (int at = 0; at < M; at++) {
    float total = warp_sum(sum[at]);
    if (at < args.m && threadIdx.x % 32 == 0) ((T*)args.y)[at * args.n + row] = narrow<T>(total + (args.bias ? args.bias[row] : 0.f));
  }
}

}  // namespace few_rows
