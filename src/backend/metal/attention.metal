// Causal attention with grouped heads over sequences laid end to end, on Apple GPUs. src/backend/metal/plan/attention.rs has
// the launches.
//
//   o = softmax(scale q k^T) v, lse = log of the denominator          q, o, g, dq [Tq, Hq, D]; k, v, dk, dv [Tk, Hk, D]
//   P = exp(scale q k^T - lse), delta = rowsum(g o)                   lse, delta [Tq, Hq] f32
//   dS = P (g v^T - delta); dq = scale dS k, dk = scale dS^T q, dv = P^T g
//
// q, k, v, o, g and their gradients are f32, f16 or bf16; arithmetic is f32. Scores live in threadgroup memory, eight rows of
// queries (or keys) a simdgroup against a block of the other side, which the threadgroup's simdgroups share. Forward rescales
// what it has when a row's largest score grows (online softmax). A key's gradients are summed by its own simdgroup, over heads
// and queries in order, so nothing is added from two places.
//
// SIZE is D, padded; BLOCK rows of the other side are staged at a time. A row of no sequence has o = 0 and lse = -infinity.
// A number that is not finite reaches the rows that share a block or a simdgroup with its own, seen or not: 0 times NaN is NaN.
//
//   kernel   memory, n: rows of a threadgroup (8 a simdgroup)            least              operations  least
//   forward  q, o once; k, v (Tq / n) Hq / Hk / 2 times                  q, k, v, o once    4 L D       the same
//   queries  q, o, g, dq once; k, v as above                             q, k, v, o, g, dq  6 L D       the same
//   keys     k, v, dk, dv once; q once and g twice for each n keys       all once           8 L D       4 L D (P and dS known)
//
// For one sequence. L: the pairs of query and key that see each other, of all heads. What is read again comes from the cache.
// The blocks on the diagonal are computed whole. For SIZE 256, `keys` runs twice, for half of the columns each.

// One threadgroup a tile of queries (x) of one head (y). Threadgroup memory: the block, then for each simdgroup its queries,
// scores, factors [8, 8] and a float a lane. Four lanes share a row's softmax.
template <uint SIZE, uint BLOCK, typename T>
kernel void attention_forward(
    device const T* q [[buffer(0)]], device const T* k [[buffer(1)]], device const T* v [[buffer(2)]],
    device const uint* sequences [[buffer(3)]], device T* o [[buffer(4)]], device float* lse [[buffer(5)]],
    constant AttentionParams& params [[buffer(6)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    uint tile = group.x * 8 * simdgroups;
    uint first = tile + 8 * simdgroup;
    uint head = group.y;
    uint key_head = head / (params.query_heads / params.key_heads);
    threadgroup float* block = shared;
    threadgroup float* rows = block + BLOCK * SIZE + simdgroup * (8 * SIZE + 8 * BLOCK + 64 + LANES);
    threadgroup float* scores = rows + 8 * SIZE;
    threadgroup float* factors = scores + 8 * BLOCK;
    threadgroup float* parts = factors + 64;
    uint own = lane / 4;
    stage<8, SIZE>(q, first, params.queries, params.query_heads, head, params.size, rows, lane, LANES);
    // The loop's first barrier comes before what reads or overwrites these; where there is no key, nothing does.
    bool any = false;
    factors[lane] = 0.0f;
    factors[lane + LANES] = 0.0f;
    Rows<SIZE> sums;
    clear(sums);
    float most = -INFINITY;
    float sum = 0.0f;  // of the lane's columns
    for (uint s = 0; s < params.sequences; s++) {
        Sequence sequence = sequence_at(sequences, s);
        Span all = keys_of(sequence, tile, tile + 8 * simdgroups, params.window);
        Span some = keys_of(sequence, first, first + 8, params.window);
        Span seen = keys_of(sequence, first + own, first + own + 1, params.window);
        uint end = sequence.k_start + all.end;
        for (uint key = all.first; key < all.end; key += BLOCK) {
            bool meet = meets(some, key, BLOCK);
            uint row = sequence.k_start + key;
            any = true;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            stage<BLOCK, SIZE>(k, row, end, params.key_heads, key_head, params.size, block, index, simdgroups * LANES);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (meet) {
                multiply_rows<SIZE, BLOCK>(rows, block, scores);
                simdgroup_barrier(mem_flags::mem_threadgroup);
                float larger = most;
                for (uint j = lane % 4; j < BLOCK; j += 4) {
                    float score = params.scale * scores[own * BLOCK + j];
                    larger = inside(seen, key + j) && score > larger ? score : larger;
                }
                parts[lane] = larger;
                simdgroup_barrier(mem_flags::mem_threadgroup);
                for (uint i = 0; i < 4; i++) {
                    larger = parts[4 * own + i] > larger ? parts[4 * own + i] : larger;
                }
                float kept = most < larger ? exp(most - larger) : 1.0f;
                sum *= kept;
                for (uint j = lane % 4; j < BLOCK; j += 4) {
                    float score = params.scale * scores[own * BLOCK + j];
                    float weight = inside(seen, key + j) ? exp(score - larger) : 0.0f;
                    scores[own * BLOCK + j] = weight;
                    sum += weight;
                }
                if (lane % 4 == 0) {
                    factors[9 * own] = kept;
                }
                most = larger;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            stage<BLOCK, SIZE>(v, row, end, params.key_heads, key_head, params.size, block, index, simdgroups * LANES);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (meet) {
                rescale(sums, factors);
                accumulate<SIZE, BLOCK>(sums, scores, block);
            }
        }
    }
    parts[lane] = sum;
    if (any) {
        store_rows<SIZE>(sums, rows);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0; i < 8; i++) {
        float total = parts[4 * i] + parts[4 * i + 1] + parts[4 * i + 2] + parts[4 * i + 3];
        ulong at = ulong(first + i) * params.query_heads + head;
        if (first + i < params.queries) {
            for (uint d = lane; d < params.size; d += LANES) {
                o[at * params.size + d] = T(total == 0.0f ? 0.0f : rows[i * SIZE + d] / total);
            }
            if (lane == 4 * i) {
                lse[at] = most + log(total);
            }
        }
    }
}

// dq, and delta for attention_keys. Tiles as in attention_forward; a simdgroup has its queries, their gradients, scores,
// products g v^T and a float a lane.
template <uint SIZE, uint BLOCK, typename T>
kernel void attention_queries(
    device const T* q [[buffer(0)]], device const T* k [[buffer(1)]], device const T* v [[buffer(2)]],
    device const T* o [[buffer(3)]], device const T* g [[buffer(4)]], device const float* lse [[buffer(5)]],
    device const uint* sequences [[buffer(6)]], device float* delta [[buffer(7)]], device T* dq [[buffer(8)]],
    constant AttentionParams& params [[buffer(9)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    uint tile = group.x * 8 * simdgroups;
    uint first = tile + 8 * simdgroup;
    uint head = group.y;
    uint key_head = head / (params.query_heads / params.key_heads);
    threadgroup float* block = shared;
    threadgroup float* rows = block + BLOCK * SIZE + simdgroup * (16 * SIZE + 16 * BLOCK + LANES);
    threadgroup float* gradients = rows + 8 * SIZE;
    threadgroup float* scores = gradients + 8 * SIZE;
    threadgroup float* products = scores + 8 * BLOCK;
    threadgroup float* parts = products + 8 * BLOCK;
    uint own = lane / 4;
    bool is = first + own < params.queries;
    ulong at = ulong(first + own) * params.query_heads + head;
    stage<8, SIZE>(q, first, params.queries, params.query_heads, head, params.size, rows, lane, LANES);
    stage<8, SIZE>(g, first, params.queries, params.query_heads, head, params.size, gradients, lane, LANES);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    float part = 0.0f;
    for (uint d = lane % 4; is && d < params.size; d += 4) {
        part += float(o[at * params.size + d]) * gradients[own * SIZE + d];
    }
    parts[lane] = part;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    float mean = parts[4 * own] + parts[4 * own + 1] + parts[4 * own + 2] + parts[4 * own + 3];
    float log_sum = is ? lse[at] : 0.0f;
    if (is && lane % 4 == 0) {
        delta[at] = mean;
    }
    Rows<SIZE> sums;
    clear(sums);
    for (uint s = 0; s < params.sequences; s++) {
        Sequence sequence = sequence_at(sequences, s);
        Span all = keys_of(sequence, tile, tile + 8 * simdgroups, params.window);
        Span some = keys_of(sequence, first, first + 8, params.window);
        Span seen = keys_of(sequence, first + own, first + own + 1, params.window);
        uint end = sequence.k_start + all.end;
        for (uint key = all.first; key < all.end; key += BLOCK) {
            bool meet = meets(some, key, BLOCK);
            uint row = sequence.k_start + key;
            threadgroup_barrier(mem_flags::mem_threadgroup);
            stage<BLOCK, SIZE>(v, row, end, params.key_heads, key_head, params.size, block, index, simdgroups * LANES);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (meet) {
                multiply_rows<SIZE, BLOCK>(gradients, block, products);
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            stage<BLOCK, SIZE>(k, row, end, params.key_heads, key_head, params.size, block, index, simdgroups * LANES);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (meet) {
                multiply_rows<SIZE, BLOCK>(rows, block, scores);
                simdgroup_barrier(mem_flags::mem_threadgroup);
                for (uint j = lane % 4; j < BLOCK; j += 4) {
                    uint e = own * BLOCK + j;
                    float weight = exp(params.scale * scores[e] - log_sum);
                    scores[e] = inside(seen, key + j) ? weight * (products[e] - mean) : 0.0f;
                }
                simdgroup_barrier(mem_flags::mem_threadgroup);
                accumulate<SIZE, BLOCK>(sums, scores, block);
            }
        }
    }
    store_rows<SIZE>(sums, rows);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    write_rows<SIZE, SIZE>(dq, first, params.queries, params.query_heads, head, params.size, 0, rows, params.scale, lane);
}

// COLUMNS columns (z) of dk and dv, after attention_queries. One threadgroup a tile of keys (x) of one head of theirs (y); a
// simdgroup has its keys and values, P^T and dS^T.
template <uint SIZE, uint BLOCK, uint COLUMNS, typename T>
kernel void attention_keys(
    device const T* q [[buffer(0)]], device const T* k [[buffer(1)]], device const T* v [[buffer(2)]],
    device const T* g [[buffer(3)]], device const float* lse [[buffer(4)]], device const float* delta [[buffer(5)]],
    device const uint* sequences [[buffer(6)]], device T* dk [[buffer(7)]], device T* dv [[buffer(8)]],
    constant AttentionParams& params [[buffer(9)]], threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]], uint index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    uint tile = group.x * 8 * simdgroups;
    uint first = tile + 8 * simdgroup;
    uint heads = params.query_heads / params.key_heads;
    uint column = group.z * COLUMNS;
    threadgroup float* block = shared;
    threadgroup float* keys = block + BLOCK * SIZE + simdgroup * (16 * SIZE + 16 * BLOCK);
    threadgroup float* values = keys + 8 * SIZE;
    threadgroup float* scores = values + 8 * SIZE;
    threadgroup float* products = scores + 8 * BLOCK;
    uint own = lane / 4;
    stage<8, SIZE>(k, first, params.keys, params.key_heads, group.y, params.size, keys, lane, LANES);
    stage<8, SIZE>(v, first, params.keys, params.key_heads, group.y, params.size, values, lane, LANES);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    Rows<COLUMNS> key_sums;
    clear(key_sums);
    Rows<COLUMNS> value_sums;
    clear(value_sums);
    for (uint s = 0; s < params.sequences; s++) {
        Sequence sequence = sequence_at(sequences, s);
        Span all = queries_of(sequence, tile, tile + 8 * simdgroups, params.window);
        Span some = queries_of(sequence, first, first + 8, params.window);
        Span seeing = queries_of(sequence, first + own, first + own + 1, params.window);
        uint end = sequence.q_start + all.end;
        for (uint head = group.y * heads; head < (group.y + 1) * heads; head++) {
            for (uint query = all.first; query < all.end; query += BLOCK) {
                bool meet = meets(some, query, BLOCK);
                uint row = sequence.q_start + query;
                threadgroup_barrier(mem_flags::mem_threadgroup);
                stage<BLOCK, SIZE>(g, row, end, params.query_heads, head, params.size, block, index, simdgroups * LANES);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (meet) {
                    multiply_rows<SIZE, BLOCK>(values, block, products);
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                stage<BLOCK, SIZE>(q, row, end, params.query_heads, head, params.size, block, index, simdgroups * LANES);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (meet) {
                    multiply_rows<SIZE, BLOCK>(keys, block, scores);
                    simdgroup_barrier(mem_flags::mem_threadgroup);
                    for (uint j = lane % 4; j < BLOCK; j += 4) {
                        uint e = own * BLOCK + j;
                        float weight = 0.0f;
                        float product = 0.0f;
                        if (inside(seeing, query + j)) {
                            ulong at = ulong(row + j) * params.query_heads + head;
                            weight = exp(params.scale * scores[e] - lse[at]);
                            product = weight * (products[e] - delta[at]);
                        }
                        scores[e] = weight;
                        products[e] = product;
                    }
                    simdgroup_barrier(mem_flags::mem_threadgroup);
                    accumulate<SIZE, BLOCK>(key_sums, products, block + column);
                }
                threadgroup_barrier(mem_flags::mem_threadgroup);
                stage<BLOCK, SIZE>(g, row, end, params.query_heads, head, params.size, block, index, simdgroups * LANES);
                threadgroup_barrier(mem_flags::mem_threadgroup);
                if (meet) {
                    accumulate<SIZE, BLOCK>(value_sums, scores, block + column);
                }
            }
        }
    }
    store_rows<SIZE>(key_sums, keys);
    store_rows<SIZE>(value_sums, values);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    write_rows<SIZE, COLUMNS>(dk, first, params.keys, params.key_heads, group.y, params.size, column, keys, params.scale,
                              lane);
    write_rows<SIZE, COLUMNS>(dv, first, params.keys, params.key_heads, group.y, params.size, column, values, 1.0f, lane);
}

// Names: the function's, SIZE, the dtype unless it is f32.
#define SIZES(name, suffix, X, SIZE, BLOCK, COLUMNS)                                     \
    INSTANTIATE("attention_forward_" name suffix, attention_forward, SIZE, BLOCK, X)     \
    INSTANTIATE("attention_queries_" name suffix, attention_queries, SIZE, BLOCK, X)     \
    INSTANTIATE("attention_keys_" name suffix, attention_keys, SIZE, BLOCK, COLUMNS, X)

#define ATTENTION(suffix, X)                    \
    SIZES("32", suffix, X, 32, 16, 32)          \
    SIZES("64", suffix, X, 64, 16, 64)          \
    SIZES("96", suffix, X, 96, 16, 96)          \
    SIZES("128", suffix, X, 128, 16, 128)       \
    SIZES("256", suffix, X, 256, 8, 128)

ATTENTION("", float)
ATTENTION("_f16", half)

#if __METAL_VERSION__ >= 310
ATTENTION("_bf16", bfloat)
#endif
