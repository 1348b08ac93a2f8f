// Quantized blocks to elements, on Apple GPUs: w = d code + m, by the scales of each block. Behind common.metal; the layouts are those
// of src/backend/quantized.rs, the launch is src/backend/metal/plan/dequantize.rs.
//
// W of f32, f16 or bf16, rounded once from the f32 value; its number of elements is a multiple of 32. Bytes: the blocks read,
// the elements written. A thread makes eight neighbours, so that it reads a scale once; blocks lie on 2 bytes, those with
// scales of f32 on 4.

struct DequantizeParams {
    uint eighths;  // of the number of elements
};

METAL_FUNC float half_at(device const uchar* bytes) {
    return float(*(device const half*)bytes);
}

METAL_FUNC float float_at(device const uchar* bytes) {
    return *(device const float*)bytes;
}

METAL_FUNC float signed_byte(uint code) {
    return float(int(code ^ 128) - 128);
}

// Sixteen bytes hold the codes of 32 values: value j in the low half of byte j, value j + 16 in the high half.
METAL_FUNC uint nibble(device const uchar* codes, uint j) {
    return (codes[j % 16] >> (j < 16 ? 0 : 4)) & 15;
}

METAL_FUNC uint fifth_bit(device const uchar* bits, uint j) {
    return ((bits[j / 8] >> (j % 8)) & 1) << 4;
}

// d scale of one of the eight groups of Q4_K and Q5_K, and dmin minimum: twelve bytes hold both of 6 bits each.
METAL_FUNC float k_scale(device const uchar* block, uint group) {
    device const uchar* packed = block + 4;
    uint scale = group < 4 ? packed[group] & 63 : (packed[group + 4] & 15) | ((packed[group - 4] >> 6) << 4);
    return half_at(block) * float(scale);
}

METAL_FUNC float k_minimum(device const uchar* block, uint group) {
    device const uchar* packed = block + 4;
    uint minimum = group < 4 ? packed[group + 4] & 63 : (packed[group + 4] >> 4) | ((packed[group] >> 6) << 4);
    return half_at(block + 2) * float(minimum);
}

// The kinds: values and bytes of a block, and its i-th value.

struct Q8_0 {
    static constant constexpr const uint LENGTH = 32;
    static constant constexpr const uint BYTES = 34;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        return half_at(block) * signed_byte(block[2 + i]);
    }
};

struct Q4_0 {
    static constant constexpr const uint LENGTH = 32;
    static constant constexpr const uint BYTES = 18;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        return half_at(block) * (float(nibble(block + 2, i)) - 8.0f);
    }
};

struct Q4_1 {
    static constant constexpr const uint LENGTH = 32;
    static constant constexpr const uint BYTES = 20;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        return half_at(block) * float(nibble(block + 4, i)) + half_at(block + 2);
    }
};

struct Q5_0 {
    static constant constexpr const uint LENGTH = 32;
    static constant constexpr const uint BYTES = 22;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        return half_at(block) * (float(nibble(block + 6, i) | fifth_bit(block + 2, i)) - 16.0f);
    }
};

struct Q5_1 {
    static constant constexpr const uint LENGTH = 32;
    static constant constexpr const uint BYTES = 24;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        return half_at(block) * float(nibble(block + 8, i) | fifth_bit(block + 4, i)) + half_at(block + 2);
    }
};

struct Q4_K {
    static constant constexpr const uint LENGTH = 256;
    static constant constexpr const uint BYTES = 144;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        uint group = i / 32;
        uint code = (block[16 + group / 2 * 32 + i % 32] >> (group % 2 * 4)) & 15;
        return k_scale(block, group) * float(code) - k_minimum(block, group);
    }
};

struct Q5_K {
    static constant constexpr const uint LENGTH = 256;
    static constant constexpr const uint BYTES = 176;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        uint group = i / 32;
        uint low = (block[48 + group / 2 * 32 + i % 32] >> (group % 2 * 4)) & 15;
        uint high = (block[16 + i % 32] >> group) & 1;
        return k_scale(block, group) * float(low | (high << 4)) - k_minimum(block, group);
    }
};

struct Q6_K {
    static constant constexpr const uint LENGTH = 256;
    static constant constexpr const uint BYTES = 210;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        uint part = i / 32 % 4;
        uint low = (block[i / 128 * 64 + part % 2 * 32 + i % 32] >> (part / 2 * 4)) & 15;
        uint high = (block[128 + i / 128 * 32 + i % 32] >> (2 * part)) & 3;
        return half_at(block + 208) * signed_byte(block[192 + i / 16]) * (float(low | (high << 4)) - 32.0f);
    }
};

// QLoRA, appendix E.
struct Nf4 {
    static constant constexpr const uint LENGTH = 64;
    static constant constexpr const uint BYTES = 36;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        const float values[16] = {-1.0f,        -0.6961928f,  -0.52507305f,  -0.3949175f,
                                  -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
                                  0.0795803f,   0.1609302f,   0.2461123f,    0.33791524f,
                                  0.44070983f,  0.562617f,    0.72295684f,   1.0f};
        return float_at(block) * values[nibble(block + 4 + i / 32 * 16, i % 32)];
    }
};

struct Affine4 {
    static constant constexpr const uint LENGTH = 32;
    static constant constexpr const uint BYTES = 24;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        return float_at(block) * float(nibble(block + 8, i)) + float_at(block + 4);
    }
};

struct Affine8 {
    static constant constexpr const uint LENGTH = 32;
    static constant constexpr const uint BYTES = 40;
    static METAL_FUNC float value(device const uchar* block, uint i) {
        return float_at(block) * float(block[8 + i]) + float_at(block + 4);
    }
};

template <typename K, typename T>
kernel void dequantize(
    device const uchar* blocks [[buffer(0)]], device T* w [[buffer(1)]],
    constant DequantizeParams& params [[buffer(2)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
    uint eighth = group.x * simdgroups * LANES + index;
    if (eighth >= params.eighths) {
        return;
    }
    device const uchar* block = blocks + ulong(eighth / (K::LENGTH / 8)) * K::BYTES;
    uint first = eighth % (K::LENGTH / 8) * 8;
    // All before the first is written: blocks and w might be the same memory, for all that the compiler knows.
    float values[8];
    for (uint i = 0; i < 8; i++) {
        values[i] = K::value(block, first + i);
    }
    ulong at = ulong(eighth) * 8;
    for (uint i = 0; i < 8; i++) {
        w[at + i] = T(values[i]);
    }
}

// Names: the kind's, then the dtype unless it is f32.
#define KINDS(suffix, T)                                          \
    INSTANTIATE("dequantize_q8_0" suffix, dequantize, Q8_0, T)       \
    INSTANTIATE("dequantize_q4_0" suffix, dequantize, Q4_0, T)       \
    INSTANTIATE("dequantize_q4_1" suffix, dequantize, Q4_1, T)       \
    INSTANTIATE("dequantize_q5_0" suffix, dequantize, Q5_0, T)       \
    INSTANTIATE("dequantize_q5_1" suffix, dequantize, Q5_1, T)       \
    INSTANTIATE("dequantize_q4_k" suffix, dequantize, Q4_K, T)       \
    INSTANTIATE("dequantize_q5_k" suffix, dequantize, Q5_K, T)       \
    INSTANTIATE("dequantize_q6_k" suffix, dequantize, Q6_K, T)       \
    INSTANTIATE("dequantize_nf4" suffix, dequantize, Nf4, T)         \
    INSTANTIATE("dequantize_affine4" suffix, dequantize, Affine4, T) \
    INSTANTIATE("dequantize_affine8" suffix, dequantize, Affine8, T)

KINDS("", float)
KINDS("_f16", half)

#if __METAL_VERSION__ >= 310
KINDS("_bf16", bfloat)
#endif
