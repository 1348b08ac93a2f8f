// The loss of rows of logits z [c, V] f32: loss = logsumexp(z) - z[target], P = scale (softmax(z) - onehot) in the dtype of the hidden
// state. The logits are a chunk's; whole, they never exist.
// Bytes: z twice, P once. A block makes a row.
#pragma once
#include "elements.cuh"

namespace cross_entropy {
using namespace elements;

struct Args {
  const float* logits;
  const uint32_t* targets;  // of the chunk's rows
  float* losses;
  void* p;  // null: the loss alone
  int64_t vocab;
  float scale;
};

template <class T> __device__ __forceinline__ void rows(const Args& args) {
  __shared__ float maxima[32], sums[32];
  const float* z = args.logits + blockIdx.x * args.vocab;
  float most = -INFINITY, sum = 0.f;
  for (int64_t i = threadIdx.x; i < args.vocab; i += blockDim.x) {
    float v = z[i];
    if (v > most) sum = sum * __expf(most - v) + 1.f, most = v;
    else sum += __expf(v - most);
  }
  // Of the warp, then of the block; a thread without an element has sum 0. NaN stays.
  auto join = [](float& most, float& sum, float other_most, float other_sum) {
    float larger = fmaxf(most, other_most);
    sum = (sum != 0.f ? sum * __expf(most - larger) : 0.f) + (other_sum != 0.f ? other_sum * __expf(other_most - larger) : 0.f);
    most = larger;
  };
#pragma unroll
  for (int step = 16; step > 0; step /= 2) join(most, sum, __shfl_xor_sync(0xffffffffu, most, step), __shfl_xor_sync(0xffffffffu, sum, step));
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = most, sums[threadIdx.x / 32] = sum;
  __syncthreads();
  most = -INFINITY, sum = 0.f;
  for (int i = 0; i < blockDim.x / 32; i++) join(most, sum, maxima[i], sums[i]);
  float lse = most + logf(sum);
  uint32_t target = args.targets[blockIdx.x];
  if (threadIdx.x == 0) args.losses[blockIdx.x] = lse - z[target];
  if (!args.p) return;
  T* p = (T*)args.p + blockIdx.x * args.vocab;
  for (int64_t i = threadIdx.x; i < args.vocab; i += blockDim.x) p[i] = narrow<T>(args.scale * (__expf(z[i] - lse) - (i == target ? 1.f : 0.f)));
}

}  // namespace cross_entropy
