// What attention.metal's kernels share: its parameters, who sees whom, and the products of tiles. Its text is compiled behind
// this one. Rows of a tile are in threadgroup memory as f32, padded to SIZE columns; columns beyond the head are zero. What a
// simdgroup sums stays in registers: eight rows.

struct AttentionParams {
    uint queries;      // Tq
    uint keys;         // Tk
    uint sequences;
    uint query_heads;  // Hq
    uint key_heads;    // Hk
    uint size;         // D
    uint window;       // keys that a query sees at most
    float scale;
};

struct Sequence {
    uint q_start;
    uint q_len;
    uint k_start;
    uint k_len;
};

METAL_FUNC Sequence sequence_at(device const uint* sequences, uint i) {
    Sequence sequence = {sequences[4 * i], sequences[4 * i + 1], sequences[4 * i + 2], sequences[4 * i + 3]};
    return sequence;
}

struct Span {
    uint first;
    uint end;
};

METAL_FUNC bool inside(Span span, uint at) {
    return at >= span.first && at < span.end;
}

METAL_FUNC bool meets(Span span, uint first, uint count) {
    return first < span.end && first + count > span.first;
}

// The keys that rows `from` to `to` of q see, counted from the sequence's first.
METAL_FUNC Span keys_of(Sequence sequence, uint from, uint to, uint window) {
    Span span = {0, 0};
    from = max(from, sequence.q_start);
    to = min(to, sequence.q_start + sequence.q_len);
    if (from < to) {
        uint before = sequence.k_len - sequence.q_len;
        uint end = before + from - sequence.q_start + 1;
        span.first = end > window ? end - window : 0;
        span.end = before + to - sequence.q_start;
    }
    return span;
}

// The queries that see rows `from` to `to` of k, counted from the sequence's first.
METAL_FUNC Span queries_of(Sequence sequence, uint from, uint to, uint window) {
    Span span = {0, 0};
    from = max(from, sequence.k_start);
    to = min(to, sequence.k_start + sequence.k_len);
    if (from < to) {
        uint before = sequence.k_len - sequence.q_len;
        uint first = from - sequence.k_start;
        uint end = to - 1 - sequence.k_start + window;
        span.first = first > before ? first - before : 0;
        span.end = end > before ? min(end - before, sequence.q_len) : 0;
    }
    return span;
}

// ROWS rows of one head, [ROWS, SIZE], from `row` on, by the threads that share them. Rows from `end` on are zero.
template <uint ROWS, uint SIZE, typename T>
METAL_FUNC void stage(device const T* matrix, uint row, uint end, uint heads, uint head, uint size,
                      threadgroup float* to, uint index, uint count) {
    for (uint e = index; e < ROWS * SIZE; e += count) {
        uint i = e / SIZE;
        uint d = e % SIZE;
        bool is = row + i < end && d < size;
        to[e] = is ? float(matrix[(ulong(row + i) * heads + head) * size + d]) : 0.0f;
    }
}

// products = rows block^T: [8, SIZE] by [BLOCK, SIZE].
template <uint SIZE, uint BLOCK>
METAL_FUNC void multiply_rows(threadgroup const float* rows, threadgroup const float* block,
                              threadgroup float* products) {
    simdgroup_float8x8 sums[BLOCK / 8];
    UNROLL
    for (uint j = 0; j < BLOCK / 8; j++) {
        sums[j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    }
    for (uint d = 0; d < SIZE; d += 8) {
        simdgroup_float8x8 left;
        simdgroup_load(left, rows + d, SIZE);
        UNROLL
        for (uint j = 0; j < BLOCK / 8; j++) {
            simdgroup_float8x8 right;
            simdgroup_load(right, block + 8 * j * SIZE + d, SIZE, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(sums[j], left, right, sums[j]);
        }
    }
    UNROLL
    for (uint j = 0; j < BLOCK / 8; j++) {
        simdgroup_store(sums[j], products + 8 * j, BLOCK);
    }
}

// Eight rows of COLUMNS sums.
template <uint COLUMNS>
struct Rows {
    simdgroup_float8x8 sums[COLUMNS / 8];
};

template <uint COLUMNS>
METAL_FUNC void clear(thread Rows<COLUMNS>& rows) {
    UNROLL
    for (uint j = 0; j < COLUMNS / 8; j++) {
        rows.sums[j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    }
}

// rows += weights block: weights [8, BLOCK], block [BLOCK, SIZE], of which COLUMNS columns.
template <uint SIZE, uint BLOCK, uint COLUMNS>
METAL_FUNC void accumulate(thread Rows<COLUMNS>& rows, threadgroup const float* weights, threadgroup const float* block) {
    for (uint i = 0; i < BLOCK; i += 8) {
        simdgroup_float8x8 left;
        simdgroup_load(left, weights + i, BLOCK);
        UNROLL
        for (uint j = 0; j < COLUMNS / 8; j++) {
            simdgroup_float8x8 right;
            simdgroup_load(right, block + i * SIZE + 8 * j, SIZE);
            simdgroup_multiply_accumulate(rows.sums[j], left, right, rows.sums[j]);
        }
    }
}

// Each row by its factor on the diagonal of `factors`, [8, 8].
template <uint COLUMNS>
METAL_FUNC void rescale(thread Rows<COLUMNS>& rows, threadgroup const float* factors) {
    simdgroup_float8x8 left;
    simdgroup_load(left, factors, 8);
    UNROLL
    for (uint j = 0; j < COLUMNS / 8; j++) {
        simdgroup_float8x8 zero = make_filled_simdgroup_matrix<float, 8>(0.0f);
        simdgroup_multiply_accumulate(rows.sums[j], left, rows.sums[j], zero);
    }
}

template <uint SIZE, uint COLUMNS>
METAL_FUNC void store_rows(thread Rows<COLUMNS>& rows, threadgroup float* to) {
    UNROLL
    for (uint j = 0; j < COLUMNS / 8; j++) {
        simdgroup_store(rows.sums[j], to + 8 * j, SIZE);
    }
}

// COLUMNS columns from `column` on of eight rows of one head, times `scale`, to memory. `from` has rows of SIZE.
template <uint SIZE, uint COLUMNS, typename T>
METAL_FUNC void write_rows(device T* to, uint row, uint end, uint heads, uint head, uint size, uint column,
                           threadgroup const float* from, float scale, uint lane) {
    for (uint e = lane; e < 8 * COLUMNS; e += LANES) {
        uint i = e / COLUMNS;
        uint d = e % COLUMNS;
        if (row + i < end && column + d < size) {
            to[(ulong(row + i) * heads + head) * size + column + d] = T(scale * from[i * SIZE + d]);
        }
    }
}

