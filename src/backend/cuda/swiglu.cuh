// SwiGLU: y = silu(gate) up; dgate = g up σ(gate) (1 + gate (1 - σ(gate))), dup = g silu(gate). All of one shape and dtype.
// Bytes: forward two read and one written, backward three read and two written.
#pragma once
#include "elements.cuh"

namespace swiglu {
using namespace elements;

struct Args {
  const void *gate, *up, *g;
  void *y, *dgate, *dup;
  int64_t count;
};

template <class T, int N> __device__ __forceinline__ void forward(const Args& args) {
  for (int64_t i = N * grid_first(); i < args.count; i += N * grid_step()) {
    float a[N], b[N], y[N];
    load((const T*)args.gate + i, a), load((const T*)args.up + i, b);
#pragma unroll
    for (int j = 0; j < N; j++) y[j] = a[j] / (1.f + __expf(-a[j])) * b[j];
    store((T*)args.y + i, y);
  }
}

template <class T, int N> __device__ __forceinline__ void backward(const Args& args) {
  for (int64_t i = N * grid_first(); i < args.count; i += N * grid_step()) {
    float a[N], b[N], g[N], da[N], db[N];
    load((const T*)args.gate + i, a), load((const T*)args.up + i, b), load((const T*)args.g + i, g);
#pragma unroll
    for (int j = 0; j < N; j++) {
      float sigma = 1.f / (1.f + __expf(-a[j]));
      da[j] = g[j] * b[j] * sigma * (1.f + a[j] * (1.f - sigma));
      db[j] = g[j] * a[j] * sigma;
    }
    store((T*)args.dgate + i, da), store((T*)args.dup + i, db);
  }
}

}  // namespace swiglu
