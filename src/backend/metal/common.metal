// What the other texts of this folder begin with: they are compiled behind this one.
//
// Apple7 (M1) and later; bf16 needs language version 3.1. Compiled without fast math: exp, log and sqrt are the precise ones
// and NaN stays NaN. Only scalars are loaded: tensors may start at any element. Sums are f32, each in one order; no atomics.

#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
using namespace metal;

// The checks that run this text elsewhere bring an INSTANTIATE of their own.
#ifndef INSTANTIATE
#define INSTANTIATE(name, function, ...) \
    template [[host_name(name)]] [[kernel]] decltype(function<__VA_ARGS__>) function<__VA_ARGS__>;
#endif

// Arrays of matrices must end up in registers.
#define UNROLL _Pragma("clang loop unroll(full)")

static constant constexpr const uint LANES = 32;

// Where a thread is.
struct Place {
    uint index;       // in the threadgroup
    uint lane;        // in the simdgroup
    uint simdgroup;   // in the threadgroup
    uint simdgroups;  // of the threadgroup
};

// Of the threadgroup.
METAL_FUNC uint threads(Place place) {
    return place.simdgroups * LANES;
}

static constant constexpr const uint ELEMENTS = 4;  // of a thread, in kernels over elements

// The i-th element of a thread, in a grid over elements. Neighbouring threads have neighbouring elements.
METAL_FUNC uint element(uint group, uint i, Place place) {
    return (group * ELEMENTS + i) * threads(place) + place.index;
}

// The sum over the threadgroup, in the order of its simdgroups; every thread gets it. `shared` has a float for each simdgroup.
METAL_FUNC float group_sum(float value, threadgroup float* shared, Place place) {
    float part = simd_sum(value);
    if (place.lane == 0) {
        shared[place.simdgroup] = part;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0.0f;
    for (uint simdgroup = 0; simdgroup < place.simdgroups; simdgroup++) {
        sum += shared[simdgroup];
    }
    return sum;
}

// The largest value of the threadgroup; every thread gets it. `shared` as above.
METAL_FUNC float group_max(float value, threadgroup float* shared, Place place) {
    float part = simd_max(value);
    if (place.lane == 0) {
        shared[place.simdgroup] = part;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float most = shared[0];
    for (uint simdgroup = 1; simdgroup < place.simdgroups; simdgroup++) {
        most = shared[simdgroup] > most ? shared[simdgroup] : most;
    }
    return most;
}

