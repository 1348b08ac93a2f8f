// Instances of the decoder's small ops: <op>_<dtype>[_<dtype of the weight>]_<elements an access>.
#include "adamw.cuh"
#include "cross_entropy.cuh"
#include "dora.cuh"
#include "embedding.cuh"
#include "rms_norm.cuh"
#include "rope.cuh"
#include "swiglu.cuh"

using elements::Bf16;
using elements::F16;
typedef float F32;

#define KERNEL(NAME, ARGS, CALL) \
  extern "C" __global__ void NAME(const __grid_constant__ ARGS args) { CALL(args); }
#define WIDTHS(t, T, N)                                                            \
  KERNEL(rope_##t##_##N, rope::Args, (rope::rotate<T, N>))                          \
  KERNEL(swiglu_forward_##t##_##N, swiglu::Args, (swiglu::forward<false, T, N>))    \
  KERNEL(swiglu_backward_##t##_##N, swiglu::Args, (swiglu::backward<false, T, N>))  \
  KERNEL(geglu_forward_##t##_##N, swiglu::Args, (swiglu::forward<true, T, N>))      \
  KERNEL(geglu_backward_##t##_##N, swiglu::Args, (swiglu::backward<true, T, N>))    \
  KERNEL(dora_forward_##t##_##N, dora::Args, (dora::forward<T, N>))                 \
  KERNEL(dora_backward_##t##_##N, dora::BackwardArgs, (dora::backward<T, N>))       \
  KERNEL(embedding_rows_##t##_##N, embedding::Args, (embedding::rows<T, N>))
#define NORM(t, w, T, W, N)                                                                     \
  KERNEL(rms_norm_forward_##t##_##w##_##N, rms_norm::Args, (rms_norm::forward<T, W, N>))         \
  KERNEL(rms_norm_backward_##t##_##w##_##N, rms_norm::BackwardArgs, (rms_norm::backward<T, W, N>))
#define TYPE(t, T)                                                                           \
  WIDTHS(t, T, 1)                                                                            \
  WIDTHS(t, T, 8)                                                                            \
  NORM(t, f32, T, F32, 1)                                                                    \
  NORM(t, f32, T, F32, 8)                                                                    \
  KERNEL(rms_norm_weight_##t, rms_norm::BackwardArgs, (rms_norm::weight_parts<T>))            \
  KERNEL(dora_norms_##t, dora::NormArgs, (dora::norms<T>))                                    \
  KERNEL(embedding_backward_##t, embedding::BackwardArgs, (embedding::backward<T>))          \
  KERNEL(cross_entropy_##t, cross_entropy::Args, (cross_entropy::rows<float, T, 1>))

TYPE(f32, F32)
TYPE(f16, F16)
TYPE(bf16, Bf16)
NORM(f16, f16, F16, F16, 1)
NORM(f16, f16, F16, F16, 8)
NORM(bf16, bf16, Bf16, Bf16, 1)
NORM(bf16, bf16, Bf16, Bf16, 8)
KERNEL(cross_entropy_half, cross_entropy::Args, (cross_entropy::rows<F16, Bf16, 8>))
KERNEL(rms_norm_weight_sum, rms_norm::SumArgs, rms_norm::weight_sum)
KERNEL(adamw_step, adamw::Args, adamw::step)
KERNEL(sum_f64, adamw::SumArgs, adamw::sum)
