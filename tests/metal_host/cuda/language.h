// What the kernels use of the Metal Shading Language, for NVIDIA GPUs: a warp stands for a simdgroup, a block for a
// threadgroup. Address spaces are taken out of the text before: nvcc has meanings of its own for `device` and `constant`.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define __METAL_VERSION__ 310
#define METAL_FUNC __device__ inline
#define kernel __device__
#define uchar unsigned char
#define bfloat __nv_bfloat16
// CUDA has types of these names that are made in another way.
#define uint2 metal::vec2<uint>
#define uint3 metal::vec3<uint>
#define uint4 metal::vec4<uint>
#define ulong2 metal::vec2<ulong>
#define float4 metal::vec4<float>

namespace metal {

template <typename T>
struct vec2 {
    T x, y;
    __device__ vec2(T x, T y) : x(x), y(y) {}
};

template <typename T>
struct vec3 {
    T x, y, z;
    __device__ vec3(T x, T y, T z) : x(x), y(y), z(z) {}
};

template <typename T>
struct vec4 {
    T x, y, z, w;
    __device__ explicit vec4(T all) : x(all), y(all), z(all), w(all) {}
    __device__ vec4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    __device__ T& operator[](uint i) { return *(&x + i); }
};

__device__ inline uint mulhi(uint a, uint b) { return __umulhi(a, b); }

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
__device__ inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
__device__ inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

__device__ inline float simd_sum(float value) {
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

__device__ inline float simd_max(float value) {
    for (int offset = 16; offset > 0; offset /= 2) {
        float other = __shfl_xor_sync(~0u, value, offset);
        value = other > value ? other : value;
    }
    return value;
}

// A lane holds elements (lane / 4, lane % 4 * 2) and the one after it.
struct simdgroup_float8x8 {
    float own[2];
};

__device__ inline uint own_row() { return threadIdx.x % 32 / 4; }
__device__ inline uint own_column() { return threadIdx.x % 4 * 2; }

template <typename T, int N>
__device__ inline simdgroup_float8x8 make_filled_simdgroup_matrix(T value) {
    static_assert(N == 8, "Metal has 8x8 matrices");
    return {{value, value}};
}

__device__ inline void simdgroup_load(simdgroup_float8x8& matrix, const float* source, ulong row_length,
                                      ulong2 origin = ulong2(0, 0), bool transpose = false) {
    source += origin.y * row_length + origin.x;
    for (uint e = 0; e < 2; e++) {
        uint row = own_row(), column = own_column() + e;
        matrix.own[e] = transpose ? source[column * row_length + row] : source[row * row_length + column];
    }
}

__device__ inline void simdgroup_store(const simdgroup_float8x8& matrix, float* target, ulong row_length) {
    for (uint e = 0; e < 2; e++) target[own_row() * row_length + own_column() + e] = matrix.own[e];
}

__device__ inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, const simdgroup_float8x8& a,
                                                     const simdgroup_float8x8& b, const simdgroup_float8x8& c) {
    float sums[2] = {c.own[0], c.own[1]};
    for (uint i = 0; i < 8; i++) {
        float left = __shfl_sync(~0u, a.own[i % 2], own_row() * 4 + i / 2);
        for (uint e = 0; e < 2; e++) sums[e] += left * __shfl_sync(~0u, b.own[e], i * 4 + own_column() / 2);
    }
    d.own[0] = sums[0];
    d.own[1] = sums[1];
}

}  // namespace metal
