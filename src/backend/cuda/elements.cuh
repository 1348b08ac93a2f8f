// What the kernels of the decoder's ops share: elements of f32, f16 and bf16 as f32, alone or eight at a time, and sums of a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace elements {

typedef __half F16;
typedef __nv_bfloat16 Bf16;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(F16 v) { return __half2float(v); }
__device__ __forceinline__ float widen(Bf16 v) { return __bfloat162float(v); }
template <class T> __device__ __forceinline__ T narrow(float v);
template <> __device__ __forceinline__ float narrow<float>(float v) { return v; }
template <> __device__ __forceinline__ F16 narrow<F16>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ Bf16 narrow<Bf16>(float v) { return __float2bfloat16_rn(v); }

// `N` elements that lie together, moved as one access where N is not 1.
template <class T, int N> struct alignas(N * sizeof(T) > 16 ? 16 : N * sizeof(T)) Pack { T v[N]; };

template <int N, class T> __device__ __forceinline__ void load(const T* from, float (&to)[N]) {
  Pack<T, N> pack = *(const Pack<T, N>*)from;
#pragma unroll
  for (int i = 0; i < N; i++) to[i] = widen(pack.v[i]);
}
template <int N, class T> __device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; i++) pack.v[i] = narrow<T>(from[i]);
  *(Pack<T, N>*)to = pack;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// The sum over the block, of up to 1024 threads, in a fixed order; every thread gets it. `shared` has 32 floats, free before and after.
__device__ __forceinline__ float block_sum(float v, float* shared) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? shared[threadIdx.x % 32] : 0.f);
  __syncthreads();
  return sum;
}

// The first of a thread's elements in a grid, and how far apart they are.
__device__ __forceinline__ int64_t grid_first() { return (int64_t)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_step() { return (int64_t)gridDim.x * blockDim.x; }

}  // namespace elements
