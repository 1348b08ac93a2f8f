// CUDA's half-precision types on the CPU; see emulate.h.
#pragma once
struct __half { uint16_t bits; };
inline float __half2float(__half v) { return from_f16(v.bits); }
inline __half __float2half_rn(float v) { return {(uint16_t)to_f16x2(v, 0)}; }
