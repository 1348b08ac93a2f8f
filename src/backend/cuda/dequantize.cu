// Instances of the dequantization: dequantize_<kind>_<dtype>.
#include "dequantize.cuh"

using elements::Bf16;
using elements::F16;

#define KERNEL(K, t, T)                                                                     \
  extern "C" __global__ void __launch_bounds__(256) dequantize_##K##_##t(                   \
      const __grid_constant__ dequantize::Args args) {                                      \
    dequantize::run<dequantize::K, T>(args);                                                \
  }
#define KIND(K) KERNEL(K, f32, float) KERNEL(K, f16, F16) KERNEL(K, bf16, Bf16)

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
