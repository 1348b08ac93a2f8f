// SwiGLU, and with GELU GeGLU: y = act(gate) up; dgate = g up act'(gate), dup = g act(gate). All of one shape and dtype.
// act(z) = z σ(w): w = z for SiLU, w = 2 √(2/π) (z + 0.044715 z³) for GELU in its tanh form, since (1 + tanh(w/2)) / 2 = σ(w).
// Bytes: forward two read and one written, backward three read and two written, or three where y is wanted again. In place dgate takes
// the place of gate, dup of up and y of g: an element is read before it is written, by the same thread.
#pragma once
#include "elements.cuh"

namespace swiglu {
using namespace elements;

struct Args {
  const void *gate, *up, *g;
  void *y, *dgate, *dup;
  int64_t count;
};

// act(z); `slope`: its derivative.
template <bool GELU> __device__ __forceinline__ float activated(float z, float& slope) {
  const float scale = 1.5957691f;
  float w = GELU ? scale * z * (0.044715f * z * z + 1.f) : z, dw = GELU ? scale * (0.134145f * z * z + 1.f) : 1.f;
  float sigma = 1.f / (1.f + __expf(-w));
  slope = sigma * (1.f + z * (1.f - sigma) * dw);
  return z * sigma;
}

template <bool GELU, class T, int N> __device__ __forceinline__ void forward(const Args& args) {
  for (int64_t i = N * grid_first(); i < args.count; i += N * grid_step()) {
    float a[N], b[N], y[N], slope;
    load((const T*)args.gate + i, a), load((const T*)args.up + i, b);
#pragma unroll
    for (int j = 0; j < N; j++) y[j] = activated<GELU>(a[j], slope) * b[j];
    store((T*)args.y + i, y);
  }
}

template <bool GELU, class T, int N> __device__ __forceinline__ void backward(const Args& args) {
  for (int64_t i = N * grid_first(); i < args.count; i += N * grid_step()) {
    float a[N], b[N], g[N], y[N], da[N], db[N];
    load((const T*)args.gate + i, a), load((const T*)args.up + i, b), load((const T*)args.g + i, g);
#pragma unroll
    for (int j = 0; j < N; j++) {
      float slope, value = activated<GELU>(a[j], slope);
      da[j] = g[j] * b[j] * slope;
      db[j] = g[j] * value;
      y[j] = value * b[j];
    }
    store((T*)args.dgate + i, da), store((T*)args.dup + i, db);
    if (args.y) store((T*)args.y + i, y);
  }
}

}  // namespace swiglu
