// Instances of the forward kernels: lora_forward_<x>_<adapter>_<NR>_<MT>_<v or s>, lora_short_<x>_<adapter>_<ranks>.
#include "fused_lora.cuh"

#define FORWARD(NAME, T, W, NR, MT, VEC)                                                                \
  extern "C" __global__ void __launch_bounds__(256, 2) NAME(const __grid_constant__ ForwardArgs args) { \
    extern __shared__ __align__(16) unsigned char shared[];                                             \
    Forward<T, W, NR, MT, VEC>::run(args, shared);                                                      \
  }
#define SHORT(NAME, T, W, RANKS)                                                                        \
  extern "C" __global__ void __launch_bounds__(512, 1) NAME(const __grid_constant__ ForwardArgs args) { \
    __shared__ float shared[16][RANKS];                                                                 \
    Short<T, W, RANKS, 1>::run(args, shared);                                                           \
  }
#define TYPES(t, w, T, W)                                    \
  FORWARD(lora_forward_##t##_##w##_1_1_v, T, W, 1, 1, true)  \
  FORWARD(lora_forward_##t##_##w##_1_2_v, T, W, 1, 2, true)  \
  FORWARD(lora_forward_##t##_##w##_2_1_v, T, W, 2, 1, true)  \
  FORWARD(lora_forward_##t##_##w##_2_2_v, T, W, 2, 2, true)  \
  FORWARD(lora_forward_##t##_##w##_4_1_v, T, W, 4, 1, true)  \
  FORWARD(lora_forward_##t##_##w##_4_2_v, T, W, 4, 2, true)  \
  FORWARD(lora_forward_##t##_##w##_8_1_v, T, W, 8, 1, true)  \
  FORWARD(lora_forward_##t##_##w##_2_1_s, T, W, 2, 1, false) \
  FORWARD(lora_forward_##t##_##w##_8_1_s, T, W, 8, 1, false) \
  SHORT(lora_short_##t##_##w##_8, T, W, 8)                   \
  SHORT(lora_short_##t##_##w##_16, T, W, 16)

// More rows a block need the registers that only bf16's single term leaves.
#define MORE_TILES(t, w, T, W)                              \
  FORWARD(lora_forward_##t##_##w##_1_4_v, T, W, 1, 4, true) \
  FORWARD(lora_forward_##t##_##w##_2_4_v, T, W, 2, 4, true) \
  FORWARD(lora_forward_##t##_##w##_8_2_v, T, W, 8, 2, true)

TYPES(bf16, bf16, Bf16, Bf16)
TYPES(bf16, f32, Bf16, F32)
MORE_TILES(bf16, bf16, Bf16, Bf16)
MORE_TILES(bf16, f32, Bf16, F32)
TYPES(f16, f16, F16, F16)
TYPES(f16, f32, F16, F32)
TYPES(f32, f32, F32, F32)
