// The loss and the optimizer, on Apple GPUs. src/backend/metal/plan/ has the launches. All tensors and sums are f32.
//
//   adamw          m += (1 - b1)(g - m), v = b2 v + (1 - b2) g^2, p = decay p - step m / (sqrt(v) / root + eps), in place
//                  on a block [3, n] of values, first and second moments; g [n] is scaled first, which clips it
//   cross_entropy  of rows of logits z [c, V]: loss = logsumexp(z) - z[target], z = scale (softmax(z) - onehot) in place
//
// Bytes: adamw_step 28 a value and adamw_squares 4, the least possible. cross_entropy_rows 12 a logit, 4 for the loss alone:
// the logits of a chunk go through memory, since the products on both sides of it are Candle's.

struct AdamWParams {
    uint count;  // n
    float gradient_scale;
    float decay;  // 1 - lr weight_decay
    float beta2;
    float one_minus_beta1;
    float one_minus_beta2;
    float step_size;         // lr / (1 - beta1^t)
    float root_correction2;  // sqrt(1 - beta2^t)
    float epsilon;
};

// The block [3, n]: values, first and second moments.
template <typename T>
kernel void adamw_step(
    device T* block [[buffer(0)]], device const T* gradients [[buffer(1)]],
    constant AdamWParams& params [[buffer(2)]], uint3 group [[threadgroup_position_in_grid]],
    uint index [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]], uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {index, lane, simdgroup, simdgroups};
    device T* first = block + params.count;
    device T* second = first + params.count;
    for (uint i = 0; i < ELEMENTS; i++) {
        uint at = element(group.x, i, place);
        if (at < params.count) {
            T g = gradients[at] * params.gradient_scale;
            T m = first[at] + params.one_minus_beta1 * (g - first[at]);
            T v = params.beta2 * second[at] + params.one_minus_beta2 * g * g;
            T denominator = sqrt(v) / params.root_correction2 + params.epsilon;
            block[at] = params.decay * block[at] - params.step_size * m / denominator;
            first[at] = m;
            second[at] = v;
        }
    }
}

struct SquaresParams {
    uint count;
    uint parts;  // threadgroups
};

// parts[group] = a sum of squares; the host adds the parts in f64. There is no f64 here: a thread carries what its sum lost
// in rounding (Kahan, 1965). A gradient above 1.8e19 makes the sum infinite.
template <typename T>
kernel void adamw_squares(
    device const T* gradients [[buffer(0)]], device T* parts [[buffer(1)]],
    constant SquaresParams& params [[buffer(2)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {index, lane, simdgroup, simdgroups};
    T sum = 0.0f;
    T lost = 0.0f;
    for (ulong i = group.x * threads(place) + index; i < params.count; i += params.parts * threads(place)) {
        T term = gradients[i] * gradients[i] - lost;
        T next = sum + term;
        lost = (next - sum) - term;
        sum = next;
    }
    sum = group_sum(sum, shared, place);
    if (index == 0) {
        parts[group.x] = sum;
    }
}

struct CrossEntropyParams {
    uint vocabulary;  // V
    uint gradient;    // 1: logits become the gradient; 0: the loss alone
    float scale;
};

// One threadgroup a row. `shared` has two floats for each simdgroup.
template <typename T>
kernel void cross_entropy_rows(
    device T* logits [[buffer(0)]], device const uint* targets [[buffer(1)]], device float* losses [[buffer(2)]],
    constant CrossEntropyParams& params [[buffer(3)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {index, lane, simdgroup, simdgroups};
    device T* z = logits + ulong(group.x) * params.vocabulary;
    float most = -INFINITY;
    float sum = 0.0f;
    for (uint i = index; i < params.vocabulary; i += threads(place)) {
        float value = z[i];
        // A NaN is larger than nothing: it reaches the sum.
        if (value > most) {
            sum *= exp(most - value);
            most = value;
        }
        sum += value == most ? 1.0f : exp(value - most);  // -inf is no NaN
    }
    float largest = group_max(most, shared, place);
    sum = group_sum(most < largest ? sum * exp(most - largest) : sum, shared + simdgroups, place);
    float log_sum = largest + log(sum);
    uint target = targets[group.x];
    if (params.gradient == 0) {
        if (index == 0) {
            losses[group.x] = log_sum - z[target];
        }
        return;
    }
    for (uint i = index; i < params.vocabulary; i += threads(place)) {
        float value = z[i];
        // By the thread that overwrites it.
        if (i == target) {
            losses[group.x] = log_sum - value;
        }
        z[i] = params.scale * (exp(value - log_sum) - (i == target ? 1.0f : 0.0f));
    }
}

INSTANTIATE("adamw_step", adamw_step, float)
INSTANTIATE("adamw_squares", adamw_squares, float)
INSTANTIATE("cross_entropy_rows", cross_entropy_rows, float)
