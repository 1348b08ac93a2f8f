// RMS norm: y = cast(x rstd) w, rstd = 1 / sqrt(mean(x²) + eps) over rows of n; with a residual x is the sum, rounded.
//   dx += rstd (g w - x̂ mean(g w x̂)), dweight += Σ over rows of g x̂, x̂ = x rstd
// x, residual, y, g, dx [m, n] f32, f16 or bf16; w [n] of that or f32; rstd [m] and dweight [n] f32. Sums are f32.
// Bytes: forward x, y (and residual, sum); backward x, g and dx twice. A block makes a row, whose second reading hits the cache.
#pragma once
#include "elements.cuh"

namespace rms_norm {
using namespace elements;

struct Args {
  const void *x, *residual, *w;  // residual: null for none
  void *sum, *y;
  float* rstd;
  int64_t n;
  float eps;
};

template <class T, class W, int N> __device__ __forceinline__ void forward(const Args& args) {
  __shared__ float shared[32];
  int64_t row = blockIdx.x, n = args.n;
  const T* x = (const T*)args.x + row * n;
  T *sum = (T*)args.sum + row * n, *y = (T*)args.y + row * n;
  float squares = 0.f;
  for (int64_t i = N * threadIdx.x; i < n; i += N * blockDim.x) {
    float v[N];
    load(x + i, v);
    if (args.residual) {
      float r[N];
      load((const T*)args.residual + row * n + i, r);
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = widen(narrow<T>(v[j] + r[j]));
      store(sum + i, v);
    }
#pragma unroll
    for (int j = 0; j < N; j++) squares += v[j] * v[j];
  }
  float rstd = rsqrtf(block_sum(squares, shared) / n + args.eps);
  if (threadIdx.x == 0) args.rstd[row] = rstd;
  const T* from = args.residual ? sum : x;
  for (int64_t i = N * threadIdx.x; i < n; i += N * blockDim.x) {
    float v[N], w[N];
    load(from + i, v);
    load((const W*)args.w + i, w);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = widen(narrow<T>(v[j] * rstd)) * w[j];
    store(y + i, v);
  }
}

struct BackwardArgs {
  const void *x, *w, *g;
  void* dx;
  const float* rstd;
  float* parts;  // of dweight, [row ranges, n]; null: not wanted
  int64_t m, n;
  int rows;  // of a range
};

template <class T, class W, int N> __device__ __forceinline__ void backward(const BackwardArgs& args) {
  __shared__ float shared[32];
  int64_t row = blockIdx.x, n = args.n;
  const T *x = (const T*)args.x + row * n, *g = (const T*)args.g + row * n;
  T* dx = (T*)args.dx + row * n;
  float rstd = args.rstd[row], dot = 0.f;
  for (int64_t i = N * threadIdx.x; i < n; i += N * blockDim.x) {
    float v[N], w[N], gv[N];
    load(x + i, v), load((const W*)args.w + i, w), load(g + i, gv);
#pragma unroll
    for (int j = 0; j < N; j++) dot += gv[j] * w[j] * v[j];
  }
  float mean = block_sum(dot, shared) * rstd / n;
  for (int64_t i = N * threadIdx.x; i < n; i += N * blockDim.x) {
    float v[N], w[N], gv[N], d[N];
    load(x + i, v), load((const W*)args.w + i, w), load(g + i, gv), load((const T*)dx + i, d);
#pragma unroll
    for (int j = 0; j < N; j++) d[j] += rstd * (gv[j] * w[j] - v[j] * rstd * mean);
    store(dx + i, d);
  }
}

// A thread sums a column of a range of rows.
template <class T> __device__ __forceinline__ void weight_parts(const BackwardArgs& args) {
  int64_t column = grid_first(), end = min(args.m, (int64_t)(blockIdx.y + 1) * args.rows);
  if (column >= args.n) return;
  float sum = 0.f;
  for (int64_t row = (int64_t)blockIdx.y * args.rows; row < end; row++)
    sum += widen(((const T*)args.g)[row * args.n + column]) * widen(narrow<T>(widen(((const T*)args.x)[row * args.n + column]) * args.rstd[row]));
  args.parts[blockIdx.y * args.n + column] = sum;
}

struct SumArgs {
  const float* parts;  // [count, n]
  float* to;
  int64_t n;
  int count;
};

__device__ __forceinline__ void weight_sum(const SumArgs& args) {
  for (int64_t i = grid_first(); i < args.n; i += grid_step()) {
    float sum = args.to[i];
    for (int part = 0; part < args.count; part++) sum += args.parts[part * args.n + i];
    args.to[i] = sum;
  }
}

}  // namespace rms_norm
