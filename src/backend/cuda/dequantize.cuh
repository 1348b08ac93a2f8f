// Quantized blocks to elements: w = d code + m, by the scales of each block; the layouts are those of `backend::quantized`.
// `count` elements, a multiple of 32, of f32, f16 or bf16. Bytes: the blocks read, the elements written.
// A thread makes eight neighbours of a group of 32. Blocks lie on 2 bytes only, so codes are read two at a time.
#pragma once
#include "elements.cuh"

namespace dequantize {
using namespace elements;

struct Args {
  const unsigned char* blocks;
  void* w;
  int64_t count;
};

// NF4's sixteen values (QLoRA, appendix E).
__device__ const float NF4[16] = {-1.f,         -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.f,
                                  0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f, 0.44070983f,  0.562617f,    0.72295684f,   1.f};

__device__ __forceinline__ uint32_t two(const unsigned char* p) { return *(const uint16_t*)p; }
__device__ __forceinline__ uint32_t four(const unsigned char* p) { return two(p) | two(p + 2) << 16; }
__device__ __forceinline__ float half_at(const unsigned char* p) { return widen(*(const F16*)p); }
__device__ __forceinline__ float float_at(const unsigned char* p) { return *(const float*)p; }

// Eight bytes.
struct Eight {
  uint32_t low, high;
  __device__ __forceinline__ Eight(const unsigned char* p) : low(four(p)), high(four(p + 4)) {}
  __device__ __forceinline__ uint32_t operator[](int j) const { return (j < 4 ? low >> 8 * j : high >> 8 * (j - 4)) & 255; }
};

// Sixteen bytes hold the codes of 32 values: value j in the low half of byte j, value j + 16 in the high half.
__device__ __forceinline__ void nibbles(const unsigned char* codes, int first, int (&code)[8]) {
  Eight bytes(codes + first % 16);
#pragma unroll
  for (int j = 0; j < 8; j++) code[j] = bytes[j] >> (first < 16 ? 0 : 4) & 15;
}
__device__ __forceinline__ void fifth(uint32_t bits, int first, int (&code)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j++) code[j] |= (bits >> (first + j) & 1) << 4;
}
__device__ __forceinline__ void affine(const int (&code)[8], float d, float m, float (&to)[8]) {
#pragma unroll
  for (int j = 0; j < 8; j++) to[j] = d * code[j] + m;
}
__device__ __forceinline__ void bytes(const unsigned char* codes, bool negative, int (&code)[8]) {
  Eight eight(codes);
#pragma unroll
  for (int j = 0; j < 8; j++) code[j] = negative ? (signed char)eight[j] : (int)eight[j];
}

// The scale and the minimum of one of the eight groups of Q4_K and Q5_K.
__device__ __forceinline__ void k_scales(const unsigned char* block, int group, float& d, float& m) {
  const unsigned char* s = block + 4;
  int scale, min;
  if (group < 4) scale = s[group] & 63, min = s[group + 4] & 63;
  else scale = s[group + 4] & 15 | s[group - 4] >> 6 << 4, min = s[group + 4] >> 4 | s[group] >> 6 << 4;
  d = half_at(block) * scale, m = -half_at(block + 2) * min;
}

// The kinds: values and bytes of a block, and eight values from `first` on of a group.
#define KIND(NAME, LEN, BYTES)                                                                                       \
  struct NAME {                                                                                                     \
    static const int len = LEN, bytes = BYTES;                                                                      \
    static __device__ __forceinline__ void eight(const unsigned char*, int, int, const float*, float (&)[8]);       \
  };                                                                                                                \
  __device__ __forceinline__ void NAME::eight(const unsigned char* block, int group, int first, const float* table, float (&to)[8])

KIND(q8_0, 32, 34) {
  int code[8];
  dequantize::bytes(block + 2 + first, true, code);
  affine(code, half_at(block), 0.f, to);
}
KIND(q4_0, 32, 18) {
  int code[8];
  nibbles(block + 2, first, code);
  float d = half_at(block);
  affine(code, d, -8.f * d, to);
}
KIND(q4_1, 32, 20) {
  int code[8];
  nibbles(block + 4, first, code);
  affine(code, half_at(block), half_at(block + 2), to);
}
KIND(q5_0, 32, 22) {
  int code[8];
  nibbles(block + 6, first, code), fifth(four(block + 2), first, code);
  float d = half_at(block);
  affine(code, d, -16.f * d, to);
}
KIND(q5_1, 32, 24) {
  int code[8];
  nibbles(block + 8, first, code), fifth(four(block + 4), first, code);
  affine(code, half_at(block), half_at(block + 2), to);
}
KIND(q4_k, 256, 144) {
  float d, m;
  k_scales(block, group, d, m);
  Eight low(block + 16 + group / 2 * 32 + first);
#pragma unroll
  for (int j = 0; j < 8; j++) to[j] = d * (low[j] >> group % 2 * 4 & 15) + m;
}
KIND(q5_k, 256, 176) {
  float d, m;
  k_scales(block, group, d, m);
  Eight low(block + 48 + group / 2 * 32 + first), high(block + 16 + first);
#pragma unroll
  for (int j = 0; j < 8; j++) to[j] = d * (low[j] >> group % 2 * 4 & 15 | (high[j] >> group & 1) << 4) + m;
}
KIND(q6_k, 256, 210) {
  int half = group / 4, part = group % 4;
  Eight low(block + 64 * half + part % 2 * 32 + first), high(block + 128 + 32 * half + first);
  float d = half_at(block + 208) * (signed char)block[192 + 8 * half + 2 * part + first / 16];
#pragma unroll
  for (int j = 0; j < 8; j++) to[j] = d * ((int)(low[j] >> part / 2 * 4 & 15 | (high[j] >> 2 * part & 3) << 4) - 32);
}
KIND(nf4, 64, 36) {
  int code[8];
  nibbles(block + 4 + 16 * group, first, code);
  float d = float_at(block);
#pragma unroll
  for (int j = 0; j < 8; j++) to[j] = d * table[code[j]];
}
KIND(affine4, 32, 24) {
  int code[8];
  nibbles(block + 8, first, code);
  affine(code, float_at(block), float_at(block + 4), to);
}
KIND(affine8, 32, 40) {
  int code[8];
  dequantize::bytes(block + 8 + first, false, code);
  affine(code, float_at(block), float_at(block + 4), to);
}
#undef KIND

template <class K, class T> __device__ __forceinline__ void run(const Args& args) {
  // Shared memory serves sixteen places at once, whichever they are; constant memory one after the other.
  __shared__ float table[16];
  if (threadIdx.x < 16) table[threadIdx.x] = NF4[threadIdx.x];
  __syncthreads();
  for (int64_t i = 8 * grid_first(); i < args.count; i += 8 * grid_step()) {
    float v[8];
    int place = (int)(i % K::len);
    K::eight(args.blocks + i / K::len * K::bytes, place / 32, place % 32, table, v);
    store((T*)args.w + i, v);
  }
}

}  // namespace dequantize
