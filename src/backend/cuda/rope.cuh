// Rotary embedding, half-split, in place: y1 = x1 cos - s x2 sin, y2 = x2 cos + s x1 sin, with s = 1, or -1 for the inverse.
// x [T, H, D] f32, f16 or bf16; cos, sin [P, D / 2] f32; one position a token.
// Bytes: x read and written; the tables' rows come from the cache.
#pragma once
#include "elements.cuh"

namespace rope {
using namespace elements;

struct Args {
  void* x;
  const float *cos, *sin;
  const uint32_t* positions;
  int64_t pairs;  // T H D / 2
  int heads, half;
  float sign;
};

template <class T, int N> __device__ __forceinline__ void rotate(const Args& args) {
  for (int64_t i = N * grid_first(); i < args.pairs; i += N * grid_step()) {
    int64_t head = i / args.half, d = i % args.half;
    int64_t at = (int64_t)args.positions[head / args.heads] * args.half + d;
    T* x = (T*)args.x + head * 2 * args.half + d;
    float a[N], b[N], c[N], s[N], y1[N], y2[N];
    load((const T*)x, a), load((const T*)x + args.half, b), load(args.cos + at, c), load(args.sin + at, s);
#pragma unroll
    for (int j = 0; j < N; j++) {
      y1[j] = a[j] * c[j] - args.sign * b[j] * s[j];
      y2[j] = b[j] * c[j] + args.sign * a[j] * s[j];
    }
    store(x, y1), store(x + args.half, y2);
  }
}

}  // namespace rope
