// CUDA's bf16 on the CPU; see emulate.h.
#pragma once
struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 v) { return bf16_of(v.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return {(uint16_t)round_bf16(v)}; }
