// Instances of the backward kernels: lora_output_<g>_<adapter>_<NR>_<vec>, lora_input_<x>_<adapter>_<NR>_<vec>, lora_reduce.
#include "fused_lora_backward.cuh"

#define INSTANCE(SUFFIX, T, W, NR, VEC)                                                                                          \
  extern "C" __global__ void __launch_bounds__(NR < 4 ? 512 : 256, 1) lora_output_##SUFFIX(const __grid_constant__ OutputArgs args) { \
    extern __shared__ __align__(16) unsigned char shared[];                                                                      \
    Output<T, W, NR, VEC>::run(args, shared);                                                                                    \
  }                                                                                                                              \
  extern "C" __global__ void __launch_bounds__(NR < 4 ? 512 : 256, 1) lora_input_##SUFFIX(const __grid_constant__ InputArgs args) { \
    extern __shared__ __align__(16) unsigned char shared[];                                                                      \
    Input<T, W, NR, VEC>::run(args, shared);                                                                                     \
  }
#define TYPES(t, w, T, W)                  \
  INSTANCE(t##_##w##_1_v, T, W, 1, true)   \
  INSTANCE(t##_##w##_2_v, T, W, 2, true)   \
  INSTANCE(t##_##w##_4_v, T, W, 4, true)   \
  INSTANCE(t##_##w##_8_v, T, W, 8, true)   \
  INSTANCE(t##_##w##_2_s, T, W, 2, false)  \
  INSTANCE(t##_##w##_8_s, T, W, 8, false)

TYPES(bf16, bf16, Bf16, Bf16)
TYPES(bf16, f32, Bf16, F32)
TYPES(f16, f16, F16, F16)
TYPES(f16, f32, F16, F32)
TYPES(f32, f32, F32, F32)

extern "C" __global__ void __launch_bounds__(256) lora_reduce(const __grid_constant__ ReduceArgs args) { reduce(args); }
