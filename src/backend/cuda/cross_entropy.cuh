// The loss of rows of logits z [c, V] f32: loss = logsumexp(z) - z[target], P = scale (softmax(z) - onehot) in the dtype of the hidden
// state. The logits are a chunk's; whole, they never exist.
// Bytes: z twice, P once. A block makes a row.
// The other form takes logits in f16 and puts P, bf16, in their place: a third of the memory, and a row is still in the L2 cache when it is
// read again. f16 has three bits more than bf16 and ends at 65504, beyond which the loss is infinite.
#pragma once
#include "elements.cuh"

namespace cross_entropy {
using namespace elements;

struct Args {
  const void* logits;
  const uint32_t* targets;  // of the chunk's rows
  float* losses;
  void* p;  // null: the loss alone
  int64_t vocab;
  float scale;
};

// The largest value and the sum of exp(v - largest); a thread without an element has sum 0. NaN stays.
struct Softmax {
  float most = -INFINITY, sum = 0.f;

  template <int N> __device__ __forceinline__ void add(const float (&v)[N]) {
    float larger = most;
#pragma unroll
    for (int j = 0; j < N; j++) larger = fmaxf(larger, v[j]);
    if (larger > most) sum = sum != 0.f ? sum * __expf(most - larger) : 0.f, most = larger;
#pragma unroll
    for (int j = 0; j < N; j++) sum += __expf(v[j] - most);
  }
  __device__ __forceinline__ void join(float other_most, float other_sum) {
    float larger = fmaxf(most, other_most);
    sum = (sum != 0.f ? sum * __expf(most - larger) : 0.f) + (other_sum != 0.f ? other_sum * __expf(other_most - larger) : 0.f);
    most = larger;
  }
  // Of the block; every thread gets it.
  __device__ __forceinline__ float logsumexp() {
    __shared__ float maxima[32], sums[32];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      float other_most = __shfl_xor_sync(0xffffffffu, most, step), other_sum = __shfl_xor_sync(0xffffffffu, sum, step);
      join(other_most, other_sum);
    }
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = most, sums[threadIdx.x / 32] = sum;
    __syncthreads();
    most = -INFINITY, sum = 0.f;
    for (int i = 0; i < blockDim.x / 32; i++) join(maxima[i], sums[i]);
    return most + logf(sum);
  }
};

// Logits of type Z, N an access; P may be in their place.
template <class Z, class T, int N> __device__ __forceinline__ void rows(const Args& args) {
  const Z* z = (const Z*)args.logits + blockIdx.x * args.vocab;
  Softmax softmax;
  for (int64_t i = N * threadIdx.x; i < args.vocab; i += N * blockDim.x) {
    float v[N];
    load(z + i, v);
    softmax.add(v);
  }
  float lse = softmax.logsumexp();
  uint32_t target = args.targets[blockIdx.x];
  if (threadIdx.x == 0) args.losses[blockIdx.x] = lse - widen(z[target]);
  if (!args.p) return;
  __syncthreads();
  T* p = (T*)args.p + blockIdx.x * args.vocab;
  for (int64_t i = N * threadIdx.x; i < args.vocab; i += N * blockDim.x) {
    float v[N];
    load(z + i, v);
#pragma unroll
    for (int j = 0; j < N; j++) v[j] = args.scale * (__expf(v[j] - lse) - (i + j == target ? 1.f : 0.f));
    store(p + i, v);
  }
}

}  // namespace cross_entropy
