// Rows by index. forward: y[t] = table[ids[t]]; scatter: y[ids[t]] = x[t]; backward: dtable[id] += Σ g[t] over the tokens of an id, in
// their order.
// table, x, y, g [.., H] f32, f16 or bf16; dtable f32. Bytes: each row read and written once.
#pragma once
#include "elements.cuh"

namespace embedding {
using namespace elements;

struct Args {
  const void* from;
  void* to;
  const uint32_t* ids;
  int64_t width;
  int scatter;
};

// A block moves a row.
template <class T, int N> __device__ __forceinline__ void rows(const Args& args) {
  int64_t here = blockIdx.x, there = args.ids[here];
  const T* from = (const T*)args.from + (args.scatter ? here : there) * args.width;
  T* to = (T*)args.to + (args.scatter ? there : here) * args.width;
  for (int64_t i = N * threadIdx.x; i < args.width; i += N * blockDim.x) *(Pack<T, N>*)(to + i) = *(const Pack<T, N>*)(from + i);
}

struct BackwardArgs {
  const void* g;
  float* dtable;
  const uint32_t *ids, *starts, *tokens;  // distinct ids; where the tokens of each start, and their end
  int64_t width;
};

// A block sums the tokens of an id.
template <class T> __device__ __forceinline__ void backward(const BackwardArgs& args) {
  float* to = args.dtable + (int64_t)args.ids[blockIdx.x] * args.width;
  uint32_t first = args.starts[blockIdx.x], end = args.starts[blockIdx.x + 1];
  for (int64_t i = threadIdx.x; i < args.width; i += blockDim.x) {
    float sum = to[i];
    for (uint32_t token = first; token < end; token++) sum += widen(((const T*)args.g)[args.tokens[token] * args.width + i]);
    to[i] = sum;
  }
}

}  // namespace embedding
