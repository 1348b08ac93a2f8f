// Instances of attention.cuh: attention_<forward | backward_queries | backward_keys>_<dtype>.
#include "attention.cuh"

#define TYPE(t, T)                                                                                                                  \
  extern "C" __global__ void attention_forward_##t(const __grid_constant__ attention::Args args) { attention::forward<T>(args); }      \
  extern "C" __global__ void attention_backward_queries_##t(const __grid_constant__ attention::Args args) { attention::backward_queries<T>(args); } \
  extern "C" __global__ void attention_backward_keys_##t(const __grid_constant__ attention::Args args) { attention::backward_keys<T>(args); }

TYPE(f32, float)
TYPE(f16, elements::F16)
TYPE(bf16, elements::Bf16)
