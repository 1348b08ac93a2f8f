// DoRA's scale: y = c u + bias + residual, by columns; du = c g, dm += Σ over rows of g u / norm.
// u, residual, y, g, du [m, n] f32, f16 or bf16; c, bias, norm and dm [n] f32. Sums are f32.
// Bytes: forward u and y (and the residual), backward u and g read, du written. A thread has N columns of a range of rows.
#pragma once
#include "elements.cuh"

namespace dora {
using namespace elements;

struct Args {
  const void *u, *residual;  // residual: null for none
  const float *c, *bias;     // bias: null for none
  void* y;
  int64_t m, n;
  int rows;  // of a range
};

template <class T, int N> __device__ __forceinline__ void forward(const Args& args) {
  int64_t column = N * grid_first(), end = min(args.m, (int64_t)(blockIdx.y + 1) * args.rows);
  if (column >= args.n) return;
  float c[N], bias[N] = {};
  load(args.c + column, c);
  if (args.bias) load(args.bias + column, bias);
  for (int64_t row = (int64_t)blockIdx.y * args.rows; row < end; row++) {
    int64_t at = row * args.n + column;
    float v[N], r[N] = {};
    load((const T*)args.u + at, v);
    if (args.residual) load((const T*)args.residual + at, r);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = c[j] * v[j] + bias[j] + r[j];
    store((T*)args.y + at, v);
  }
}

struct BackwardArgs {
  const void *u, *g;
  const float *c, *norm;
  void* du;
  float* parts;  // of dm, [row ranges, n]; null: not wanted
  int64_t m, n;
  int rows;  // of a range
};

template <class T, int N> __device__ __forceinline__ void backward(const BackwardArgs& args) {
  int64_t column = N * grid_first(), end = min(args.m, (int64_t)(blockIdx.y + 1) * args.rows);
  if (column >= args.n) return;
  float c[N], sum[N] = {};
  load(args.c + column, c);
  for (int64_t row = (int64_t)blockIdx.y * args.rows; row < end; row++) {
    int64_t at = row * args.n + column;
    float u[N], g[N];
    load((const T*)args.g + at, g);
    if (args.parts) {
      load((const T*)args.u + at, u);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += g[j] * u[j];
    }
#pragma unroll
    for (int j = 0; j < N; j++) g[j] *= c[j];
    store((T*)args.du + at, g);
  }
  if (!args.parts) return;
  float norm[N];
  load(args.norm + column, norm);
#pragma unroll
  for (int j = 0; j < N; j++) sum[j] /= norm[j];
  store(args.parts + blockIdx.y * args.n + column, sum);
}

// norm_j = sqrt(squares_j + Σ_q B_qj (2 s P + s² G B)_qj), P = Aᵀ Wᵀ [r, n] of T, G = Aᵀ A [r, r], B [r, n], squares and norm [n], f32.
// A thread makes a column; its r values of B come r times, from the caches but for the first.
struct NormArgs {
  const void* p;
  const float *g, *b, *squares;
  float* norm;
  int64_t n;
  int r;
  float s, shortest;
};

template <class T> __device__ __forceinline__ void norms(const NormArgs& args) {
  int64_t j = grid_first(), n = args.n;
  if (j >= n) return;
  float sum = args.squares[j];
  for (int q = 0; q < args.r; q++) {
    float own = 0.f;
    for (int p = 0; p < args.r; p++) own += args.g[q * args.r + p] * args.b[p * n + j];
    sum += args.b[q * n + j] * args.s * (2.f * widen(((const T*)args.p)[q * n + j]) + args.s * own);
  }
  args.norm[j] = fmaxf(sqrtf(fmaxf(sum, 0.f)), args.shortest);
}

}  // namespace dora
