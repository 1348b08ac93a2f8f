// Instances of what reads quantized weights: dequantize_<kind>_<dtype>, few_rows_<kind>_<dtype>_<most rows>.
#include "few_rows.cuh"

using elements::Bf16;
using elements::F16;

#define KERNEL(K, t, T)                                                                     \
  extern "C" __global__ void __launch_bounds__(256) dequantize_##K##_##t(                   \
      const __grid_constant__ dequantize::Args args) {                                      \
    dequantize::run<dequantize::K, T>(args);                                                \
  }
#define ROWS(K, t, T, M)                                                                    \
  extern "C" __global__ void __launch_bounds__(128) few_rows_##K##_##t##_##M(               \
      const __grid_constant__ few_rows::Args args) {                                        \
    few_rows::forward<dequantize::K, T, M>(args);                                           \
  }
#define TYPE(K, t, T) KERNEL(K, t, T) ROWS(K, t, T, 1) ROWS(K, t, T, 4)
#define KIND(K) TYPE(K, f32, float) TYPE(K, f16, F16) TYPE(K, bf16, Bf16)

KIND(q8_0)
KIND(q4_0)
KIND(q4_1)
KIND(q5_0)
KIND(q5_1)
KIND(q4_k)
KIND(q5_k)
KIND(q6_k)
KIND(nf4)
KIND(affine4)
KIND(affine8)
