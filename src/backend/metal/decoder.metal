// The decoder's ops beside its products and attention, on Apple GPUs. src/backend/metal/plan/ has the launches, a file an op.
//
//   rms_norm       y = cast(x rstd) w, rstd = 1 / sqrt(mean(x^2) + eps); with a residual x is their sum, rounded.
//                  dx += rstd (g w - x' mean(g w x')), dw += the sum over rows of g cast(x'), x' = x rstd
//                  x, residual, sum, y, g, dx [m, n]; w [n] of their dtype or f32; rstd [m], dw [n] f32
//   swiglu         y = silu(gate) up; dgate = g up silu'(gate), dup = g silu(gate); all of one shape and dtype
//   rope           in place: y1 = x1 cos - s x2 sin, y2 = x2 cos + s x1 sin over the halves of a head; s = -1 rotates back
//                  x [T, H, D]; cos, sin [P, D / 2] f32; a position a token
//   embedding      y[t] = table[ids[t]], or y[ids[t]] = x[t]; dtable[id] += the g[t] of id's tokens, in order; dtable f32
//
// dtypes are f32, f16 or bf16 where none is said; arithmetic is f32, rounded once. A second reading of a row of some thousand
// elements comes from the cache. Bytes (e: of an element of m n, or of the op's own count):
//
//   kernel            memory                            least
//   rms_norm_forward  2 m n e (4 m n e with a residual) the same
//   rms_norm_backward 4 m n e; dw: 2 m n e more         4 m n e for both
//   swiglu            3 e forward, 5 e backward         the same
//   rope              2 e and the tables                the same
//   embedding         2 e; backward e + 8 a distinct id the same

struct RmsNormParams {
    uint rows;           // m
    uint width;          // n
    float eps;
    uint rows_per_part;  // of dw: rows that one partial sum covers
    uint parts;
};

// y and rstd of one row, of which each thread has the sum of its squares.
template <typename T, typename W>
METAL_FUNC void write_normalized(device const T* x, device const W* weight, device T* y, device float* rstd,
                                 float squares, uint row, threadgroup float* shared, constant RmsNormParams& params,
                                 Place place) {
    uint width = params.width;
    float scale = 1.0f / sqrt(group_sum(squares, shared, place) / float(width) + params.eps);
    if (place.index == 0) {
        rstd[row] = scale;
    }
    ulong start = ulong(row) * width;
    for (uint i = place.index; i < width; i += threads(place)) {
        y[start + i] = T(float(T(float(x[start + i]) * scale)) * float(weight[i]));
    }
}

template <typename T, typename W>
kernel void rms_norm_forward(
    device const T* x [[buffer(0)]], device const W* weight [[buffer(1)]], device T* y [[buffer(2)]],
    device float* rstd [[buffer(3)]], constant RmsNormParams& params [[buffer(4)]],
    threadgroup float* shared [[threadgroup(0)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {index, lane, simdgroup, simdgroups};
    ulong start = ulong(group.x) * params.width;
    float squares = 0.0f;
    for (uint i = place.index; i < params.width; i += threads(place)) {
        float value = float(x[start + i]);
        squares += value * value;
    }
    write_normalized(x, weight, y, rstd, squares, group.x, shared, params, place);
}

template <typename T, typename W>
kernel void rms_norm_forward_add(
    device const T* x [[buffer(0)]], device const T* residual [[buffer(1)]], device const W* weight [[buffer(2)]],
    device T* sum [[buffer(3)]], device T* y [[buffer(4)]], device float* rstd [[buffer(5)]],
    constant RmsNormParams& params [[buffer(6)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {index, lane, simdgroup, simdgroups};
    ulong start = ulong(group.x) * params.width;
    float squares = 0.0f;
    for (uint i = place.index; i < params.width; i += threads(place)) {
        T rounded = T(float(x[start + i]) + float(residual[start + i]));
        sum[start + i] = rounded;
        squares += float(rounded) * float(rounded);
    }
    write_normalized(sum, weight, y, rstd, squares, group.x, shared, params, place);
}

template <typename T, typename W>
kernel void rms_norm_backward(
    device const T* x [[buffer(0)]], device const W* weight [[buffer(1)]], device const float* rstd [[buffer(2)]],
    device const T* gradient [[buffer(3)]], device T* input_gradient [[buffer(4)]],
    constant RmsNormParams& params [[buffer(5)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {index, lane, simdgroup, simdgroups};
    uint width = params.width;
    ulong start = ulong(group.x) * width;
    float scale = rstd[group.x];
    float dot = 0.0f;
    for (uint i = place.index; i < width; i += threads(place)) {
        dot += float(gradient[start + i]) * float(weight[i]) * float(x[start + i]);
    }
    float mean = group_sum(dot, shared, place) * scale / float(width);
    for (uint i = place.index; i < width; i += threads(place)) {
        float value = float(gradient[start + i]) * float(weight[i]) - float(x[start + i]) * scale * mean;
        input_gradient[start + i] = T(float(input_gradient[start + i]) + scale * value);
    }
}

// A thread sums a column of a range of rows: group.y. Parts [parts, n].
template <typename T>
kernel void rms_norm_weight_parts(
    device const T* x [[buffer(0)]], device const float* rstd [[buffer(1)]], device const T* gradient [[buffer(2)]],
    device float* parts [[buffer(3)]], constant RmsNormParams& params [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    uint column = group.x * simdgroups * LANES + index;
    uint end = min((group.y + 1) * params.rows_per_part, params.rows);
    if (column >= params.width) {
        return;
    }
    float sum = 0.0f;
    for (uint row = group.y * params.rows_per_part; row < end; row++) {
        ulong at = ulong(row) * params.width + column;
        sum += float(gradient[at]) * float(T(float(x[at]) * rstd[row]));
    }
    parts[ulong(group.y) * params.width + column] = sum;
}

// dw += the parts, in order.
template <typename T>
kernel void rms_norm_weight_sum(
    device const T* parts [[buffer(0)]], device T* weight_gradient [[buffer(1)]],
    constant RmsNormParams& params [[buffer(2)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
    uint column = group.x * simdgroups * LANES + index;
    if (column >= params.width) {
        return;
    }
    T sum = weight_gradient[column];
    for (uint part = 0; part < params.parts; part++) {
        sum += parts[ulong(part) * params.width + column];
    }
    weight_gradient[column] = sum;
}

struct ElementParams {
    uint count;
};

// Activations of a gated unit: `value` and `derivative` at z.
struct Silu {
    static METAL_FUNC float value(float z) {
        return z / (1.0f + exp(-z));
    }
    static METAL_FUNC float derivative(float z) {
        float sigmoid = 1.0f / (1.0f + exp(-z));
        return sigmoid * (1.0f + z * (1.0f - sigmoid));
    }
};

// In its tanh form: z sigmoid(w) with w = 2 sqrt(2 / pi) (z + 0.044715 z^3), since (1 + tanh(w / 2)) / 2 is the sigmoid of w.
struct Gelu {
    static METAL_FUNC float sigmoid(float z) {
        return 1.0f / (1.0f + exp(-1.595769f * z * (0.044715f * z * z + 1.0f)));
    }
    static METAL_FUNC float value(float z) {
        return z * sigmoid(z);
    }
    static METAL_FUNC float derivative(float z) {
        float s = sigmoid(z);
        return s * (1.0f + z * (1.0f - s) * 1.595769f * (0.134145f * z * z + 1.0f));
    }
};

template <typename A, typename T>
kernel void gated_forward(
    device const T* gate [[buffer(0)]], device const T* up [[buffer(1)]], device T* y [[buffer(2)]],
    constant ElementParams& params [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {index, lane, simdgroup, simdgroups};
    for (uint i = 0; i < ELEMENTS; i++) {
        uint at = element(group.x, i, place);
        if (at < params.count) {
            y[at] = T(A::value(float(gate[at])) * float(up[at]));
        }
    }
}

template <typename A, typename T>
kernel void gated_backward(
    device const T* gate [[buffer(0)]], device const T* up [[buffer(1)]], device const T* gradient [[buffer(2)]],
    device T* gate_gradient [[buffer(3)]], device T* up_gradient [[buffer(4)]],
    constant ElementParams& params [[buffer(5)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {index, lane, simdgroup, simdgroups};
    for (uint i = 0; i < ELEMENTS; i++) {
        uint at = element(group.x, i, place);
        if (at < params.count) {
            float z = float(gate[at]);
            float g = float(gradient[at]);
            gate_gradient[at] = T(g * float(up[at]) * A::derivative(z));
            up_gradient[at] = T(g * A::value(z));
        }
    }
}

struct RopeParams {
    uint pairs;      // T H D / 2
    uint heads;      // H
    uint half_size;  // D / 2
    float sign;      // s
};

template <typename T>
kernel void rope_rotate(
    device T* x [[buffer(0)]], device const float* cosines [[buffer(1)]], device const float* sines [[buffer(2)]],
    device const uint* positions [[buffer(3)]], constant RopeParams& params [[buffer(4)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {index, lane, simdgroup, simdgroups};
    for (uint i = 0; i < ELEMENTS; i++) {
        uint pair = element(group.x, i, place);
        if (pair < params.pairs) {
            uint head = pair / params.half_size;
            uint column = pair % params.half_size;
            ulong angle = ulong(positions[head / params.heads]) * params.half_size + column;
            float c = cosines[angle];
            float s = params.sign * sines[angle];
            ulong at = ulong(head) * 2 * params.half_size + column;
            float first = float(x[at]);
            float second = float(x[at + params.half_size]);
            x[at] = T(first * c - second * s);
            x[at + params.half_size] = T(second * c + first * s);
        }
    }
}

struct EmbeddingParams {
    uint width;  // H
};

// to[t] = from[ids[t]]. One threadgroup a token.
template <typename T>
kernel void embedding_gather(
    device const T* from [[buffer(0)]], device const uint* ids [[buffer(1)]], device T* to [[buffer(2)]],
    constant EmbeddingParams& params [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
    ulong read = ulong(ids[group.x]) * params.width;
    ulong write = ulong(group.x) * params.width;
    for (uint i = index; i < params.width; i += simdgroups * LANES) {
        to[write + i] = from[read + i];
    }
}

// to[ids[t]] = from[t], for ids that differ. One threadgroup a token.
template <typename T>
kernel void embedding_scatter(
    device const T* from [[buffer(0)]], device const uint* ids [[buffer(1)]], device T* to [[buffer(2)]],
    constant EmbeddingParams& params [[buffer(3)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
    ulong read = ulong(group.x) * params.width;
    ulong write = ulong(ids[group.x]) * params.width;
    for (uint i = index; i < params.width; i += simdgroups * LANES) {
        to[write + i] = from[read + i];
    }
}

// dtable[id] += the g[t] of id's tokens. One threadgroup a distinct id; its tokens lie from starts[i] to starts[i + 1].
template <typename T>
kernel void embedding_backward(
    device const T* gradient [[buffer(0)]], device const uint* ids [[buffer(1)]],
    device const uint* starts [[buffer(2)]], device const uint* tokens [[buffer(3)]],
    device float* table_gradient [[buffer(4)]], constant EmbeddingParams& params [[buffer(5)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    ulong write = ulong(ids[group.x]) * params.width;
    for (uint i = index; i < params.width; i += simdgroups * LANES) {
        float sum = table_gradient[write + i];
        for (uint t = starts[group.x]; t < starts[group.x + 1]; t++) {
            sum += float(gradient[ulong(tokens[t]) * params.width + i]);
        }
        table_gradient[write + i] = sum;
    }
}

// Names: the function's, then the dtypes unless all are f32. X: of activations; W: of the norm's weight.
#define NORM(suffix, X, W)                                                      \
    INSTANTIATE("rms_norm_forward" suffix, rms_norm_forward, X, W)              \
    INSTANTIATE("rms_norm_forward_add" suffix, rms_norm_forward_add, X, W)      \
    INSTANTIATE("rms_norm_backward" suffix, rms_norm_backward, X, W)

#define ACTIVATIONS(suffix, X)                                                  \
    INSTANTIATE("rms_norm_weight_parts" suffix, rms_norm_weight_parts, X)       \
    INSTANTIATE("swiglu_forward" suffix, gated_forward, Silu, X)                \
    INSTANTIATE("swiglu_backward" suffix, gated_backward, Silu, X)              \
    INSTANTIATE("geglu_forward" suffix, gated_forward, Gelu, X)                 \
    INSTANTIATE("geglu_backward" suffix, gated_backward, Gelu, X)               \
    INSTANTIATE("rope_rotate" suffix, rope_rotate, X)                           \
    INSTANTIATE("embedding_gather" suffix, embedding_gather, X)                 \
    INSTANTIATE("embedding_scatter" suffix, embedding_scatter, X)               \
    INSTANTIATE("embedding_backward" suffix, embedding_backward, X)

NORM("", float, float)
ACTIVATIONS("", float)
INSTANTIATE("rms_norm_weight_sum", rms_norm_weight_sum, float)

NORM("_f16_f16", half, half)
NORM("_f16_f32", half, float)
ACTIVATIONS("_f16", half)

#if __METAL_VERSION__ >= 310
NORM("_bf16_bf16", bfloat, bfloat)
NORM("_bf16_f32", bfloat, float)
ACTIVATIONS("_bf16", bfloat)
#endif
