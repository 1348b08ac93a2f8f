// AdamW's step over values, moments [n] f32 each and gradients [n] f32, in place; the sum of squares of gradients.
//   m += (1 - β1)(g - m), v = β2 v + (1 - β2) g², p = decay p - step_size m / (sqrt(v) / root_correction2 + ε)
// Bytes: four read and three written a value; the norm reads one.
#pragma once
#include "elements.cuh"

namespace adamw {
using namespace elements;

struct Args {
  float* block;  // [3, n]
  const float* grads;
  int64_t n;
  float grad_scale, decay, beta2, one_minus_beta1, one_minus_beta2, step_size, root_correction2, epsilon;
};

__device__ __forceinline__ void step(const Args& args) {
  for (int64_t i = grid_first(); i < args.n; i += grid_step()) {
    float g = args.grads[i] * args.grad_scale, p = args.block[i], m = args.block[args.n + i], v = args.block[2 * args.n + i];
    m += args.one_minus_beta1 * (g - m);
    v = args.beta2 * v + args.one_minus_beta2 * g * g;
    args.block[i] = args.decay * p - args.step_size * m / (sqrtf(v) / args.root_correction2 + args.epsilon);
    args.block[args.n + i] = m;
    args.block[2 * args.n + i] = v;
  }
}

struct SumArgs {
  const float* from;
  double* to;
  int64_t n;
  int square;
};

// Each block's sum, or with one block the whole, in an order that only the grid decides.
__device__ __forceinline__ void sum(const SumArgs& args) {
  __shared__ double shared[32];
  double sum = 0.;
  for (int64_t i = grid_first(); i < args.n; i += grid_step()) sum += args.square ? (double)args.from[i] * args.from[i] : (double)args.from[i];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < blockDim.x / 32; i++) sum += shared[i];
    args.to[blockIdx.x] = sum;
  }
}

}  // namespace adamw
