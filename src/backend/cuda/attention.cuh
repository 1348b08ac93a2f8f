// Causal attention with grouped heads over sequences laid end to end, any head size up to 256, in f32 arithmetic:
//   o = softmax(scale q kᵀ) v, lse = log of the denominator; δ = rowsum(g ∘ o), P = exp(scale q kᵀ - lse), dS = P ∘ (g vᵀ - δ)
//   dq = scale dS k, dk = scale dSᵀ q, dv = Pᵀ g
// q, o, g, dq [Tq, Hq, D], k, v, dk, dv [Tk, Hkv, D] f32, f16 or bf16; lse, δ [Tq, Hq] f32.
//
// The path for every dtype and shape: a warp makes a row, its lanes share the head's D elements, and keys come one after the other. No
// atomics: a key's gradients are summed by its own warp, over the queries in order. attention_tiles.cuh is the fast path.
// Bytes: k and v once a query row, from the cache.
#pragma once
#include "elements.cuh"

namespace attention {
using namespace elements;

// As the op's own, in 32 bits.
struct Sequence {
  uint32_t q_start, q_len, k_start, k_len;
};

struct Args {
  const void *q, *k, *v, *o, *g;
  void *to_o, *dq, *dk, *dv;
  float *lse, *delta;
  const Sequence* sequences;
  const uint32_t* of_query;  // the sequence of each query; past the last: none
  int64_t queries, keys;
  int sequence_count, q_heads, kv_heads, dim;
  uint32_t window;  // past any length: none
  float scale;
  const uint32_t* tiles;  // of attention_tiles.cuh: pairs of a sequence and the first of 64 rows
};

// The keys that a query sees, as rows.
struct Keys {
  int64_t first, end;
};
__device__ __forceinline__ Keys keys_of(const Args& args, int64_t query) {
  uint32_t which = args.of_query[query];
  if (which >= (uint32_t)args.sequence_count) return {0, 0};
  Sequence s = args.sequences[which];
  int64_t end = (int64_t)s.k_len - s.q_len + (query - s.q_start) + 1;
  return {s.k_start + max((int64_t)0, end - (int64_t)args.window), s.k_start + end};
}

constexpr int MOST = 8;  // elements of a head that a lane holds

template <class T> __device__ __forceinline__ void row(const T* from, int dim, float (&to)[MOST]) {
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    int at = threadIdx.x % 32 + 32 * i;
    to[i] = at < dim ? widen(from[at]) : 0.f;
  }
}
template <class T> __device__ __forceinline__ void put(T* to, int dim, const float (&from)[MOST]) {
#pragma unroll
  for (int i = 0; i < MOST; i++) {
    int at = threadIdx.x % 32 + 32 * i;
    if (at < dim) to[at] = narrow<T>(from[i]);
  }
}
__device__ __forceinline__ float dot(const float (&a)[MOST], const float (&b)[MOST]) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < MOST; i++) sum += a[i] * b[i];
  return warp_sum(sum);
}

// The warp's row: of queries, or of keys.
__device__ __forceinline__ int64_t warp_row() { return ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32; }

template <class T> __device__ __forceinline__ void forward(const Args& args) {
  int64_t at = warp_row();
  if (at >= args.queries * args.q_heads) return;
  int64_t query = at / args.q_heads;
  int head = (int)(at % args.q_heads), kv_head = head / (args.q_heads / args.kv_heads);
  Keys seen = keys_of(args, query);
  float q[MOST], o[MOST] = {}, most = -INFINITY, sum = 0.f;
  row((const T*)args.q + at * args.dim, args.dim, q);
  for (int64_t key = seen.first; key < seen.end; key++) {
    float k[MOST], v[MOST];
    row((const T*)args.k + (key * args.kv_heads + kv_head) * args.dim, args.dim, k);
    row((const T*)args.v + (key * args.kv_heads + kv_head) * args.dim, args.dim, v);
    float score = args.scale * dot(q, k), larger = fmaxf(most, score);
    float kept = __expf(most - larger), p = __expf(score - larger);
    sum = sum * kept + p;
    most = larger;
#pragma unroll
    for (int i = 0; i < MOST; i++) o[i] = o[i] * kept + p * v[i];
  }
  float inverse = sum > 0.f ? 1.f / sum : 0.f;
#pragma unroll
  for (int i = 0; i < MOST; i++) o[i] *= inverse;
  put((T*)args.to_o + at * args.dim, args.dim, o);
  if (threadIdx.x % 32 == 0) args.lse[at] = most + logf(sum);
}

template <class T> __device__ __forceinline__ void backward_queries(const Args& args) {
  int64_t at = warp_row();
  if (at >= args.queries * args.q_heads) return;
  int64_t query = at / args.q_heads;
  int head = (int)(at % args.q_heads), kv_head = head / (args.q_heads / args.kv_heads);
  Keys seen = keys_of(args, query);
  float q[MOST], g[MOST], o[MOST], dq[MOST] = {};
  row((const T*)args.q + at * args.dim, args.dim, q);
  row((const T*)args.g + at * args.dim, args.dim, g);
  row((const T*)args.o + at * args.dim, args.dim, o);
  float delta = dot(g, o), lse = args.lse[at];
  if (threadIdx.x % 32 == 0) args.delta[at] = delta;
  for (int64_t key = seen.first; key < seen.end; key++) {
    float k[MOST], v[MOST];
    row((const T*)args.k + (key * args.kv_heads + kv_head) * args.dim, args.dim, k);
    row((const T*)args.v + (key * args.kv_heads + kv_head) * args.dim, args.dim, v);
    float ds = __expf(args.scale * dot(q, k) - lse) * (dot(g, v) - delta);
#pragma unroll
    for (int i = 0; i < MOST; i++) dq[i] += args.scale * ds * k[i];
  }
  put((T*)args.dq + at * args.dim, args.dim, dq);
}

// After backward_queries, which leaves δ.
template <class T> __device__ __forceinline__ void backward_keys(const Args& args) {
  int64_t at = warp_row();
  if (at >= args.keys * args.kv_heads) return;
  int64_t key = at / args.kv_heads;
  int kv_head = (int)(at % args.kv_heads), group = args.q_heads / args.kv_heads;
  float k[MOST], v[MOST], dk[MOST] = {}, dv[MOST] = {};
  row((const T*)args.k + at * args.dim, args.dim, k);
  row((const T*)args.v + at * args.dim, args.dim, v);
  for (int i = 0; i < args.sequence_count; i++) {
    Sequence s = args.sequences[i];
    int64_t place = key - s.k_start, before = (int64_t)s.k_len - s.q_len;
    if (place < 0 || place >= s.k_len) continue;
    int64_t end = min((int64_t)s.q_len, place + (int64_t)args.window - before);
    for (int64_t j = max((int64_t)0, place - before); j < end; j++) {
      for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        int64_t from = (s.q_start + j) * args.q_heads + head;
        float q[MOST], g[MOST];
        row((const T*)args.q + from * args.dim, args.dim, q);
        row((const T*)args.g + from * args.dim, args.dim, g);
        float p = __expf(args.scale * dot(q, k) - args.lse[from]), ds = p * (dot(g, v) - args.delta[from]);
#pragma unroll
        for (int e = 0; e < MOST; e++) {
          dk[e] += args.scale * ds * q[e];
          dv[e] += p * g[e];
        }
      }
    }
  }
  put((T*)args.dk + at * args.dim, args.dim, dk);
  put((T*)args.dv + at * args.dim, args.dim, dv);
}

}  // namespace attention
