// What the kernels use of the Metal Shading Language, for a CPU's C++ compiler.
//
// Address spaces mean nothing to a CPU; with CHECK_ADDRESS_SPACES Clang checks them and nothing is run.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __METAL_VERSION__ 310
#define METAL_FUNC inline
#define kernel
#define thread
#ifdef CHECK_ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define threadgroup __attribute__((address_space(2)))
#define constant __attribute__((address_space(3)))
#else
#define device
#define threadgroup
#define constant
#endif

using uint = uint32_t;
using uchar = uint8_t;
using ushort = uint16_t;
using ulong = uint64_t;

namespace metal {

// A vector of N elements with the names of MSL; what is not used here is not there.
template <typename T>
struct vec2 {
    T x, y;
    vec2(T x, T y) : x(x), y(y) {}
};

template <typename T>
struct vec3 {
    T x, y, z;
    vec3(T x, T y, T z) : x(x), y(y), z(z) {}
};

template <typename T>
struct vec4 {
    T x, y, z, w;
    explicit vec4(T all) : x(all), y(all), z(all), w(all) {}
    vec4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
    T& operator[](uint i) {
        if (i > 3) host::fail("a vector of four has no such element", 0);
        return *(&x + i);
    }
};

using uint2 = vec2<uint>;
using uint3 = vec3<uint>;
using uint4 = vec4<uint>;
using ulong2 = vec2<ulong>;
using float4 = vec4<float>;

#ifdef CHECK_ADDRESS_SPACES
// Built-in types: Clang has no member functions in other address spaces.
using half = short;
using bfloat = unsigned short;
#else
// IEEE binary16, rounded to nearest even.
struct half {
    uint16_t bits;
    half() = default;
    explicit half(float value) {
        uint32_t f;
        memcpy(&f, &value, 4);
        uint32_t sign = f >> 16 & 0x8000, magnitude = f & 0x7fffffff;
        if (magnitude > 0x7f800000) {
            bits = uint16_t(sign | 0x7e00);
        } else if (magnitude >= 0x477ff000) {
            bits = uint16_t(sign | 0x7c00);
        } else if (magnitude < 0x38800000) {
            // Under the smallest normal number: in units of 2^-24, by the processor's own rounding to nearest even.
            float absolute = std::fabs(value);
            bits = uint16_t(sign | uint32_t(std::nearbyint(absolute * 16777216.0f)));
        } else {
            uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
            bits = uint16_t(sign | (rounded - 0x38000000) >> 13);
        }
    }
    explicit operator float() const {
        int exponent = bits >> 10 & 31;
        float fraction = float(bits & 1023);
        float magnitude = exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                          : exponent == 0 ? fraction * std::ldexp(1.0f, -24)
                                          : std::ldexp(1024 + fraction, exponent - 25);
        return bits & 0x8000 ? -magnitude : magnitude;
    }
};

// The upper half of a float, rounded to nearest even.
struct bfloat {
    uint16_t bits;
    bfloat() = default;
    explicit bfloat(float value) {
        uint32_t f;
        memcpy(&f, &value, 4);
        bits = value != value ? uint16_t(f >> 16 | 0x40) : uint16_t((f + 0x7fff + (f >> 16 & 1)) >> 16);
    }
    explicit operator float() const {
        uint32_t f = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &f, 4);
        return value;
    }
};
#endif

inline uint min(uint a, uint b) { return a < b ? a : b; }
inline uint max(uint a, uint b) { return a > b ? a : b; }
using std::exp;
using std::log;
using std::sqrt;
inline uint mulhi(uint a, uint b) { return uint(ulong(a) * b >> 32); }

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

inline void check_flags(mem_flags flags, int line) {
    if (flags != mem_flags::mem_threadgroup) host::fail("a barrier that does not order threadgroup memory", line);
}

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
    check_flags(flags, line);
    host::wait_for(host::Wait::Threadgroup, line);
}

inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
    check_flags(flags, line);
    host::wait_for(host::Wait::Simdgroup, line);
}

// What the lanes offer, joined in pairs; every lane gets it.
template <typename F>
inline float join_lanes(float value, F join, int line) {
    host::self().offered = value;
    host::wait_for(host::Wait::Simdgroup, line);
    uint first = host::now().current / host::LANE_COUNT * host::LANE_COUNT;
    float lanes[host::LANE_COUNT];
    for (uint i = 0; i < host::LANE_COUNT; i++) lanes[i] = host::now().fibers[first + i].offered;
    for (uint width = host::LANE_COUNT / 2; width > 0; width /= 2)
        for (uint i = 0; i < width; i++) lanes[i] = join(lanes[i], lanes[i + width]);
    // No lane may offer its next value before all have read this one.
    host::wait_for(host::Wait::Simdgroup, line);
    return lanes[0];
}

inline float simd_sum(float value, int line = __builtin_LINE()) {
    return join_lanes(value, [](float a, float b) { return a + b; }, line);
}

inline float simd_max(float value, int line = __builtin_LINE()) {
    return join_lanes(value, [](float a, float b) { return a > b ? a : b; }, line);
}

// A matrix that a simdgroup holds together. A lane holds two elements of a result; of a loaded matrix it holds all, so that
// a product needs no exchange. Loads and stores happen when a lane gets there, not when all have: a missing barrier shows.
struct simdgroup_float8x8 {
    float elements[64];
    bool whole = false;
};

inline uint own_element() {
    return host::now().current % host::LANE_COUNT * 2;
}

// Every lane must take the same operations; compared at the next barrier.
inline void trace(int line) {
    host::self().trace = host::self().trace * 0x9E3779B97F4A7C15u + uint64_t(line);
}

template <typename T, int N>
inline simdgroup_float8x8 make_filled_simdgroup_matrix(T value) {
    static_assert(N == 8, "Metal has 8x8 matrices");
    simdgroup_float8x8 matrix;
    for (float& element : matrix.elements) element = value;
    return matrix;
}

inline void simdgroup_load(simdgroup_float8x8& matrix, const threadgroup float* source, ulong row_length,
                           ulong2 origin = ulong2(0, 0), bool transpose = false, int line = __builtin_LINE()) {
    trace(line);
    source += origin.y * row_length + origin.x;
    for (uint i = 0; i < 8; i++)
        for (uint j = 0; j < 8; j++)
            matrix.elements[i * 8 + j] = transpose ? source[j * row_length + i] : source[i * row_length + j];
    matrix.whole = true;
}

inline void simdgroup_store(const simdgroup_float8x8& matrix, threadgroup float* target, ulong row_length,
                            int line = __builtin_LINE()) {
    trace(line);
    for (uint e = own_element(); e < own_element() + 2; e++) target[e / 8 * row_length + e % 8] = matrix.elements[e];
}

// All of a matrix of which each lane holds two elements.
inline simdgroup_float8x8 gather(const simdgroup_float8x8& matrix, int line) {
    host::self().matrix = matrix.elements;
    host::wait_for(host::Wait::Simdgroup, line);
    uint first = host::now().current / host::LANE_COUNT * host::LANE_COUNT;
    simdgroup_float8x8 whole;
    for (uint e = 0; e < 64; e++) whole.elements[e] = host::now().fibers[first + e / 2].matrix[e];
    whole.whole = true;
    // No lane may change its elements before all have read them.
    host::wait_for(host::Wait::Simdgroup, line);
    return whole;
}

// d = a b + c
inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, const simdgroup_float8x8& a, const simdgroup_float8x8& right,
                                          const simdgroup_float8x8& c, int line = __builtin_LINE()) {
    trace(line);
    if (!a.whole) host::fail("a product's left factor must be a loaded matrix", line);
    const simdgroup_float8x8 b = right.whole ? right : gather(right, line);
    for (uint e = own_element(); e < own_element() + 2; e++) {
        float sum = c.elements[e];
        for (uint i = 0; i < 8; i++) sum += a.elements[e / 8 * 8 + i] * b.elements[i * 8 + e % 8];
        d.elements[e] = sum;
    }
    d.whole = false;
}

}  // namespace metal
