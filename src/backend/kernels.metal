// The LoRA delta and its gradients on Apple GPUs. src/backend/metal/plan.rs chooses kernels, tiles and grids.
//
//   x [m, k]  A [k, r]  B [r, n]  y, g [m, n]  h, u [m, r]  s = alpha / r; sums and h, u are f32
//   forward   y  = s (drop(x) A) B            add_into  y += s h B, h = drop(x) A written for backward
//   backward  u  = s g B^T   dx += drop(u A^T)   dA += drop(x)^T u   dB += s h^T g
//
// What each must move and compute (e: bytes of an element of its dtype; T: row tiles, m / 1, 8 or 32; C: row chunks)
// against the least possible. A and B count T times where each tile reads them again: those reads come from the
// system-level cache for T > 1, since A and B are small beside x and y.
//
//   kernel      memory                                         least                    operations       least
//   forward     m k e + m n e + T (k + n) r e                  T = 1                    2 m r (k + n)    the same
//   add_into    m k e + 2 m n e + 4 m r + T (k + n) r e        T = 1                    2 m r (k + n)    the same
//   project     m k e + 4 m r + T k r e  (u: n for k)          T = 1                    2 m r k          the same
//   expand      4 m r + 2 m k e + T k r e                      T = 1, m r unmoved       2 m r k          the same
//   gradient_a  m k e + 4 m r k/128 + 4 C k r                  m k e + 4 m r + 8 k r    2 m r k          the same
//   gradient_b  m n e + 4 m r n/128 + 4 C r n                  m n e + 4 m r + 8 r n    2 m r n          the same
//   sum         4 (C + 2) k r  (dB: n for k)                   C = 1: none              C k r            none
//
// Ranks are padded to a multiple of 8 (operations then count with the padded rank). For r over 32, project reads x, and
// gradient_a and gradient_b read x and g, r / 32 times: from cache after the first. A backward pass reads x once (dA) and
// g twice (u and dB); h and u go through memory.
//
// Apple7 (M1) and later: simdgroup_matrix and simdgroup reductions need no more. bf16 needs language version 3.1. At most
// 512 threads and 32 KiB of threadgroup memory, given by the host. Only scalars are loaded: tensors may start at any element.
// No floating-point atomics: every sum has one order, so equal inputs give equal bits.

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

// `Params` of plan.rs, field for field.
struct LoraParams {
    uint batch_size;         // the product of all but the last two dimensions of x
    uint seq_len;            // m = batch_size * seq_len
    uint in_features;        // k
    uint rank;               // r
    uint out_features;       // n
    float scaling;           // s
    uint dropout_threshold;  // an element is dropped where its word is under this; 0: no dropout
    float dropout_scale;     // 1 / (1 - p)
    uint seed_low;
    uint seed_high;
    uint stream_low;
    uint stream_high;
    uint rows_per_chunk;     // gradient_a, gradient_b: rows that one partial sum covers, a multiple of 8
    uint chunks;             // sum: how many partial sums there are
    uint elements;           // sum: elements of each
};

// Where a thread is.
struct Place {
    uint index;       // in the threadgroup
    uint lane;        // in the simdgroup
    uint simdgroup;   // in the threadgroup
    uint simdgroups;  // of the threadgroup
};

static constant constexpr const uint LANES = 32;
static constant constexpr const uint DEPTH = 16;        // of the contraction, staged at a time
static constant constexpr const uint RANK_BLOCKS = 4;   // 8x8 blocks of rank summed at a time
static constant constexpr const uint COLUMN_BLOCKS = 4; // 8x8 blocks of output columns of a simdgroup
static constant constexpr const uint COLUMNS = 8 * COLUMN_BLOCKS;

METAL_FUNC uint padded(uint rank) {
    return (rank + 7) / 8 * 8;
}

// Columns of the rank block at `first`, padded.
METAL_FUNC uint block_width(uint rank, uint first) {
    return min(padded(rank - first), 8 * RANK_BLOCKS);
}

// Dropout: Philox4x32-10 (Salmon et al., SC 2011). Key: the seed; counter: (element / 4, stream); word: element % 4.

METAL_FUNC uint4 philox(ulong block, constant LoraParams& params) {
    uint4 counter = uint4(uint(block), uint(block >> 32), params.stream_low, params.stream_high);
    uint2 key = uint2(params.seed_low, params.seed_high);
    for (uint i = 0; i < 10; i++) {
        uint first = mulhi(0xD2511F53u, counter.x);
        uint second = mulhi(0xCD9E8D57u, counter.z);
        counter = uint4(second ^ counter.y ^ key.x, 0xCD9E8D57u * counter.z,
                        first ^ counter.w ^ key.y, 0xD2511F53u * counter.x);
        key = uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
    }
    return counter;
}

// The factors of four elements from `index` on.
METAL_FUNC float4 dropout(ulong index, constant LoraParams& params) {
    if (params.dropout_threshold == 0) {
        return float4(1.0f);
    }
    float4 factors = float4(params.dropout_scale);
    uint4 words = philox(index / 4, params);
    for (uint i = 0; i < 4; i++) {
        uint word = uint((index + i) % 4);
        if (i > 0 && word == 0) {
            words = philox((index + i) / 4, params);
        }
        if (words[word] < params.dropout_threshold) {
            factors[i] = 0.0f;
        }
    }
    return factors;
}

// Copies ROWS x WIDTH elements of a row-major matrix with `columns` columns, from (row, column) on, to `stage`, by one
// simdgroup. Rows from `end` on and columns beyond the last are zero.
template <uint ROWS, uint WIDTH, bool DROP, typename T>
METAL_FUNC void stage_rows(device const T* matrix, uint row, uint end, uint column, uint columns,
                           threadgroup float* stage, constant LoraParams& params, uint lane) {
    for (uint four = lane; four < ROWS * WIDTH / 4; four += LANES) {
        uint i = four / (WIDTH / 4);
        uint j = four % (WIDTH / 4) * 4;
        float4 values = float4(0.0f);
        if (row + i < end && column + j < columns) {
            ulong index = ulong(row + i) * columns + column + j;
            float4 factors = DROP ? dropout(index, params) : float4(1.0f);
            for (uint e = 0; e < 4; e++) {
                if (column + j + e < columns) {
                    values[e] = float(matrix[index + e]) * factors[e];
                }
            }
        }
        for (uint e = 0; e < 4; e++) {
            stage[i * WIDTH + j + e] = values[e];
        }
    }
}

// A tile of ROWS rows, 8 or 32, by simdgroup matrices. Threadgroup memory: the tile of h, [ROWS, padded rank], then a stage
// for each simdgroup.
template <uint ROWS>
struct Tile {
    static METAL_FUNC uint stage_size(uint rank) {
        return max(DEPTH * (ROWS + block_width(rank, 0)), ROWS * COLUMNS);
    }

    // hidden = scale * left right: left [m, depth], right [depth, rank]; TRANSPOSED: right is stored [rank, depth].
    // Each simdgroup contracts every simdgroups-th slice of the depth; their sums are then added in order.
    template <bool TRANSPOSED, bool DROP, typename L, typename R>
    static METAL_FUNC void project(device const L* left, device const R* right, uint row, uint rows, uint depth,
                                   float scale, threadgroup float* shared, constant LoraParams& params, Place place) {
        uint rank = params.rank;
        uint size = stage_size(rank);
        threadgroup float* stages = shared + ROWS * padded(rank);
        threadgroup float* stage = stages + place.simdgroup * size;
        threadgroup float* right_stage = stage + ROWS * DEPTH;
        for (uint first = 0; first < rank; first += 8 * RANK_BLOCKS) {
            uint width = block_width(rank, first);
            simdgroup_float8x8 sums[ROWS / 8][RANK_BLOCKS];
            UNROLL
            for (uint i = 0; i < ROWS / 8; i++) {
                UNROLL
                for (uint j = 0; j < RANK_BLOCKS; j++) {
                    sums[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
                }
            }
            for (uint d = place.simdgroup * DEPTH; d < depth; d += place.simdgroups * DEPTH) {
                stage_rows<ROWS, DEPTH, DROP>(left, row, rows, d, depth, stage, params, place.lane);
                for (uint e = place.lane; e < DEPTH * width; e += LANES) {
                    // Neighbouring lanes read neighbouring elements.
                    uint i = TRANSPOSED ? e % DEPTH : e / width;
                    uint j = TRANSPOSED ? e / DEPTH : e % width;
                    uint at = TRANSPOSED ? (first + j) * depth + d + i : (d + i) * rank + first + j;
                    bool inside = d + i < depth && first + j < rank;
                    right_stage[i * width + j] = inside ? float(right[at]) : 0.0f;
                }
                simdgroup_barrier(mem_flags::mem_threadgroup);
                for (uint slice = 0; slice < DEPTH; slice += 8) {
                    simdgroup_float8x8 block[ROWS / 8];
                    UNROLL
                    for (uint i = 0; i < ROWS / 8; i++) {
                        simdgroup_load(block[i], stage + 8 * i * DEPTH + slice, DEPTH);
                    }
                    UNROLL
                    for (uint j = 0; j < RANK_BLOCKS; j++) {
                        if (8 * j < width) {
                            simdgroup_float8x8 right_block;
                            simdgroup_load(right_block, right_stage + slice * width + 8 * j, width);
                            UNROLL
                            for (uint i = 0; i < ROWS / 8; i++) {
                                simdgroup_multiply_accumulate(sums[i][j], block[i], right_block, sums[i][j]);
                            }
                        }
                    }
                }
                simdgroup_barrier(mem_flags::mem_threadgroup);
            }
            UNROLL
            for (uint i = 0; i < ROWS / 8; i++) {
                UNROLL
                for (uint j = 0; j < RANK_BLOCKS; j++) {
                    if (8 * j < width) {
                        simdgroup_store(sums[i][j], stage + 8 * i * width + 8 * j, width);
                    }
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint e = place.index; e < ROWS * width; e += LANES * place.simdgroups) {
                float sum = 0.0f;
                for (uint simdgroup = 0; simdgroup < place.simdgroups; simdgroup++) {
                    sum += stages[simdgroup * size + e];
                }
                uint i = e / width;
                uint j = first + e % width;
                // Columns beyond the rank stay zero whatever x holds: they meet the zero rows of the next product.
                shared[i * padded(rank) + j] = j < rank ? scale * sum : 0.0f;
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
        }
    }

    // Writes the tile of h to memory, [m, r].
    static METAL_FUNC void save(device float* hidden, uint row, uint rows, threadgroup const float* shared,
                                uint rank, Place place) {
        for (uint e = place.index; e < ROWS * rank; e += LANES * place.simdgroups) {
            uint i = e / rank;
            uint j = e % rank;
            if (row + i < rows) {
                hidden[ulong(row + i) * rank + j] = shared[i * padded(rank) + j];
            }
        }
    }

    // Reads the tile of h from memory.
    static METAL_FUNC void restore(device const float* hidden, uint row, uint rows, threadgroup float* shared,
                                   uint rank, Place place) {
        for (uint e = place.index; e < ROWS * padded(rank); e += LANES * place.simdgroups) {
            uint i = e / padded(rank);
            uint j = e % padded(rank);
            shared[e] = row + i < rows && j < rank ? hidden[ulong(row + i) * rank + j] : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    // output = scale * hidden right, or += with ADD: right [rank, columns]; TRANSPOSED: right is stored [columns, rank].
    // Each simdgroup makes every simdgroups-th block of columns.
    template <bool TRANSPOSED, bool ADD, bool DROP, typename R, typename O>
    static METAL_FUNC void expand(threadgroup float* shared, device const R* right, device O* output, uint row, uint rows,
                                  uint columns, float scale, constant LoraParams& params, Place place) {
        uint rank = params.rank;
        threadgroup float* stage = shared + ROWS * padded(rank) + place.simdgroup * stage_size(rank);
        for (uint c = place.simdgroup * COLUMNS; c < columns; c += place.simdgroups * COLUMNS) {
            simdgroup_float8x8 sums[ROWS / 8][COLUMN_BLOCKS];
            UNROLL
            for (uint i = 0; i < ROWS / 8; i++) {
                UNROLL
                for (uint j = 0; j < COLUMN_BLOCKS; j++) {
                    sums[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
                }
            }
            for (uint d = 0; d < rank; d += 8) {
                for (uint e = place.lane; e < 8 * COLUMNS; e += LANES) {
                    uint i = TRANSPOSED ? e % 8 : e / COLUMNS;
                    uint j = TRANSPOSED ? e / 8 : e % COLUMNS;
                    uint at = TRANSPOSED ? (c + j) * rank + d + i : (d + i) * columns + c + j;
                    bool inside = d + i < rank && c + j < columns;
                    stage[i * COLUMNS + j] = inside ? float(right[at]) : 0.0f;
                }
                simdgroup_barrier(mem_flags::mem_threadgroup);
                simdgroup_float8x8 block[ROWS / 8];
                UNROLL
                for (uint i = 0; i < ROWS / 8; i++) {
                    simdgroup_load(block[i], shared + 8 * i * padded(rank) + d, padded(rank));
                }
                UNROLL
                for (uint j = 0; j < COLUMN_BLOCKS; j++) {
                    simdgroup_float8x8 right_block;
                    simdgroup_load(right_block, stage + 8 * j, COLUMNS);
                    UNROLL
                    for (uint i = 0; i < ROWS / 8; i++) {
                        simdgroup_multiply_accumulate(sums[i][j], block[i], right_block, sums[i][j]);
                    }
                }
                simdgroup_barrier(mem_flags::mem_threadgroup);
            }
            UNROLL
            for (uint i = 0; i < ROWS / 8; i++) {
                UNROLL
                for (uint j = 0; j < COLUMN_BLOCKS; j++) {
                    simdgroup_store(sums[i][j], stage + 8 * i * COLUMNS + 8 * j, COLUMNS);
                }
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
            for (uint four = place.lane; four < ROWS * COLUMNS / 4; four += LANES) {
                uint i = four / (COLUMNS / 4);
                uint j = four % (COLUMNS / 4) * 4;
                if (row + i < rows && c + j < columns) {
                    ulong index = ulong(row + i) * columns + c + j;
                    float4 factors = DROP ? dropout(index, params) : float4(1.0f);
                    for (uint e = 0; e < 4; e++) {
                        if (c + j + e < columns) {
                            float value = scale * stage[i * COLUMNS + j + e] * factors[e];
                            output[index + e] = O(ADD ? float(output[index + e]) + value : value);
                        }
                    }
                }
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
        }
    }
};

// One row, by simdgroup reductions. Threadgroup memory: h, [rank], then the simdgroups' parts of it, [simdgroups, rank].
template <>
struct Tile<1> {
    template <bool TRANSPOSED, bool DROP, typename L, typename R>
    static METAL_FUNC void project(device const L* left, device const R* right, uint row, uint, uint depth, float scale,
                                   threadgroup float* shared, constant LoraParams& params, Place place) {
        uint rank = params.rank;
        threadgroup float* parts = shared + rank;
        ulong start = ulong(row) * depth;
        for (uint first = 0; first < rank; first += 8) {
            float sums[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
            for (uint d = place.simdgroup * LANES + place.lane; d < depth; d += place.simdgroups * LANES) {
                float value = float(left[start + d]);
                if (DROP) {
                    value *= dropout(start + d, params).x;
                }
                UNROLL
                for (uint j = 0; j < 8; j++) {
                    if (first + j < rank) {
                        sums[j] += value * float(right[TRANSPOSED ? (first + j) * depth + d : d * rank + first + j]);
                    }
                }
            }
            UNROLL
            for (uint j = 0; j < 8; j++) {
                float sum = simd_sum(sums[j]);
                if (place.lane == 0 && first + j < rank) {
                    parts[place.simdgroup * rank + first + j] = sum;
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint j = place.index; j < rank; j += LANES * place.simdgroups) {
            float sum = 0.0f;
            for (uint simdgroup = 0; simdgroup < place.simdgroups; simdgroup++) {
                sum += parts[simdgroup * rank + j];
            }
            shared[j] = scale * sum;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    static METAL_FUNC void save(device float* hidden, uint row, uint, threadgroup const float* shared, uint rank,
                                Place place) {
        for (uint j = place.index; j < rank; j += LANES * place.simdgroups) {
            hidden[ulong(row) * rank + j] = shared[j];
        }
    }

    static METAL_FUNC void restore(device const float* hidden, uint row, uint, threadgroup float* shared, uint rank,
                                   Place place) {
        for (uint j = place.index; j < rank; j += LANES * place.simdgroups) {
            shared[j] = hidden[ulong(row) * rank + j];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }

    template <bool TRANSPOSED, bool ADD, bool DROP, typename R, typename O>
    static METAL_FUNC void expand(threadgroup float* shared, device const R* right, device O* output, uint row, uint,
                                  uint columns, float scale, constant LoraParams& params, Place place) {
        uint rank = params.rank;
        for (uint c = place.index; c < columns; c += LANES * place.simdgroups) {
            float sum = 0.0f;
            for (uint j = 0; j < rank; j++) {
                sum += shared[j] * float(right[TRANSPOSED ? c * rank + j : j * columns + c]);
            }
            ulong index = ulong(row) * columns + c;
            float value = scale * sum;
            if (DROP) {
                value *= dropout(index, params).x;
            }
            output[index] = O(ADD ? float(output[index]) + value : value);
        }
    }
};

// y = s (drop(x) A) B. One threadgroup a tile of ROWS rows: x A is computed once for it and stays in threadgroup memory.
template <uint ROWS, typename X, typename W>
kernel void fused_lora_forward(
    device const X* input [[buffer(0)]],
    device const W* lora_a [[buffer(1)]],
    device const W* lora_b [[buffer(2)]],
    device X* output [[buffer(3)]],
    constant LoraParams& params [[buffer(4)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {thread_index, lane, simdgroup, simdgroups};
    uint rows = params.batch_size * params.seq_len;
    uint row = group.x * ROWS;
    Tile<ROWS>::template project<false, true>(input, lora_a, row, rows, params.in_features, 1.0f, shared, params, place);
    Tile<ROWS>::template expand<false, false, false>(shared, lora_b, output, row, rows, params.out_features,
                                                     params.scaling, params, place);
}

// y += s (drop(x) A) B, and h = drop(x) A for backward.
template <uint ROWS, typename X, typename W, typename Y>
kernel void fused_lora_add_into(
    device const X* input [[buffer(0)]],
    device const W* lora_a [[buffer(1)]],
    device const W* lora_b [[buffer(2)]],
    device Y* output [[buffer(3)]],
    constant LoraParams& params [[buffer(4)]],
    device float* hidden [[buffer(5)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {thread_index, lane, simdgroup, simdgroups};
    uint rows = params.batch_size * params.seq_len;
    uint row = group.x * ROWS;
    Tile<ROWS>::template project<false, true>(input, lora_a, row, rows, params.in_features, 1.0f, shared, params, place);
    Tile<ROWS>::save(hidden, row, rows, shared, params.rank, place);
    Tile<ROWS>::template expand<false, true, false>(shared, lora_b, output, row, rows, params.out_features,
                                                    params.scaling, params, place);
}

// h = drop(x) A, where backward has none from forward.
template <uint ROWS, typename X, typename W>
kernel void fused_lora_project_x(
    device const X* input [[buffer(0)]],
    device const W* lora_a [[buffer(1)]],
    device float* hidden [[buffer(2)]],
    constant LoraParams& params [[buffer(3)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {thread_index, lane, simdgroup, simdgroups};
    uint rows = params.batch_size * params.seq_len;
    uint row = group.x * ROWS;
    Tile<ROWS>::template project<false, true>(input, lora_a, row, rows, params.in_features, 1.0f, shared, params, place);
    Tile<ROWS>::save(hidden, row, rows, shared, params.rank, place);
}

// u = s g B^T.
template <uint ROWS, typename G, typename W>
kernel void fused_lora_project_g(
    device const G* gradient [[buffer(0)]],
    device const W* lora_b [[buffer(1)]],
    device float* hidden [[buffer(2)]],
    constant LoraParams& params [[buffer(3)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {thread_index, lane, simdgroup, simdgroups};
    uint rows = params.batch_size * params.seq_len;
    uint row = group.x * ROWS;
    Tile<ROWS>::template project<true, false>(gradient, lora_b, row, rows, params.out_features, params.scaling, shared,
                                              params, place);
    Tile<ROWS>::save(hidden, row, rows, shared, params.rank, place);
}

// dx += drop(u A^T).
template <uint ROWS, typename W, typename D>
kernel void fused_lora_expand(
    device const float* hidden [[buffer(0)]],
    device const W* lora_a [[buffer(1)]],
    device D* input_gradient [[buffer(2)]],
    constant LoraParams& params [[buffer(3)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {thread_index, lane, simdgroup, simdgroups};
    uint rows = params.batch_size * params.seq_len;
    uint row = group.x * ROWS;
    Tile<ROWS>::restore(hidden, row, rows, shared, params.rank, place);
    Tile<ROWS>::template expand<true, true, true>(shared, lora_a, input_gradient, row, rows, params.in_features, 1.0f,
                                                  params, place);
}

// A chunk's part of scale * wide^T narrow: wide [m, columns], narrow [m, rank]; written [columns, rank], or [rank, columns]
// with TRANSPOSED. group.x: 32 columns a simdgroup; group.y: the chunk of rows; group.z: 32 columns of rank.
template <bool TRANSPOSED, bool DROP, typename T>
METAL_FUNC void partial_gradient(device const T* wide, device const float* narrow, device float* partial, uint columns,
                                 float scale, threadgroup float* shared, constant LoraParams& params, uint3 group,
                                 Place place) {
    uint rank = params.rank;
    uint column = (group.x * place.simdgroups + place.simdgroup) * COLUMNS;
    uint first = group.z * 8 * RANK_BLOCKS;
    uint width = block_width(rank, first);
    uint start = group.y * params.rows_per_chunk;
    uint end = min(start + params.rows_per_chunk, params.batch_size * params.seq_len);
    if (column >= columns) {
        return;
    }
    threadgroup float* stage = shared + place.simdgroup * COLUMNS * 8 * RANK_BLOCKS;
    threadgroup float* narrow_stage = stage + 8 * COLUMNS;
    simdgroup_float8x8 sums[COLUMN_BLOCKS][RANK_BLOCKS];
    UNROLL
    for (uint i = 0; i < COLUMN_BLOCKS; i++) {
        UNROLL
        for (uint j = 0; j < RANK_BLOCKS; j++) {
            sums[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
        }
    }
    for (uint row = start; row < end; row += 8) {
        stage_rows<8, COLUMNS, DROP>(wide, row, end, column, columns, stage, params, place.lane);
        for (uint e = place.lane; e < 8 * width; e += LANES) {
            uint i = e / width;
            uint j = e % width;
            bool inside = row + i < end && first + j < rank;
            narrow_stage[e] = inside ? narrow[ulong(row + i) * rank + first + j] : 0.0f;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_float8x8 block[COLUMN_BLOCKS];
        UNROLL
        for (uint i = 0; i < COLUMN_BLOCKS; i++) {
            simdgroup_load(block[i], stage + 8 * i, COLUMNS, ulong2(0, 0), true);
        }
        UNROLL
        for (uint j = 0; j < RANK_BLOCKS; j++) {
            if (8 * j < width) {
                simdgroup_float8x8 narrow_block;
                simdgroup_load(narrow_block, narrow_stage + 8 * j, width);
                UNROLL
                for (uint i = 0; i < COLUMN_BLOCKS; i++) {
                    simdgroup_multiply_accumulate(sums[i][j], block[i], narrow_block, sums[i][j]);
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    UNROLL
    for (uint i = 0; i < COLUMN_BLOCKS; i++) {
        UNROLL
        for (uint j = 0; j < RANK_BLOCKS; j++) {
            if (8 * j < width) {
                simdgroup_store(sums[i][j], stage + 8 * i * width + 8 * j, width);
            }
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    device float* out = partial + ulong(group.y) * columns * rank;
    for (uint e = place.lane; e < COLUMNS * width; e += LANES) {
        uint i = TRANSPOSED ? e % COLUMNS : e / width;
        uint j = TRANSPOSED ? e / COLUMNS : e % width;
        if (column + i < columns && first + j < rank) {
            uint at = TRANSPOSED ? (first + j) * columns + column + i : (column + i) * rank + first + j;
            out[at] = scale * stage[i * width + j];
        }
    }
}

// The chunks' parts of dA = drop(x)^T u, [chunks, k, r].
template <typename X>
kernel void fused_lora_gradient_a(
    device const X* input [[buffer(0)]],
    device const float* hidden [[buffer(1)]],
    device float* partial [[buffer(2)]],
    constant LoraParams& params [[buffer(3)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {thread_index, lane, simdgroup, simdgroups};
    partial_gradient<false, true>(input, hidden, partial, params.in_features, 1.0f, shared, params, group, place);
}

// The chunks' parts of dB = s h^T g, [chunks, r, n].
template <typename G>
kernel void fused_lora_gradient_b(
    device const G* gradient [[buffer(0)]],
    device const float* hidden [[buffer(1)]],
    device float* partial [[buffer(2)]],
    constant LoraParams& params [[buffer(3)]],
    threadgroup float* shared [[threadgroup(0)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    Place place = {thread_index, lane, simdgroup, simdgroups};
    partial_gradient<true, false>(gradient, hidden, partial, params.out_features, params.scaling, shared, params, group,
                                  place);
}

// gradient += the chunks' parts, in order.
template <typename T>
kernel void fused_lora_sum(
    device const T* partial [[buffer(0)]],
    device T* gradient [[buffer(1)]],
    constant LoraParams& params [[buffer(2)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint simdgroups [[simdgroups_per_threadgroup]]) {
    uint element = group.x * simdgroups * LANES + simdgroup * LANES + lane;
    if (element >= params.elements) {
        return;
    }
    T sum = partial[element];
    for (uint chunk = 1; chunk < params.chunks; chunk++) {
        sum += partial[ulong(chunk) * params.elements + element];
    }
    gradient[element] += sum;
}

// Names: the function's, the tile's (none for 8 rows), the types' unless all are f32.
#define TILES(function, types, ...)                             \
    INSTANTIATE(#function "_row" types, function, 1, __VA_ARGS__) \
    INSTANTIATE(#function types, function, 8, __VA_ARGS__)        \
    INSTANTIATE(#function "_tall" types, function, 32, __VA_ARGS__)

// X: the dtype of x, and of y, g and dx where they are not f32; W: the dtype of A and B.
#define ADAPTER(x, w, X, W)                                  \
    TILES(fused_lora_forward, "_" #x "_" #w, X, W)           \
    TILES(fused_lora_add_into, "_" #x "_" #w "_f32", X, W, float) \
    TILES(fused_lora_add_into, "_" #x "_" #w "_" #x, X, W, X) \
    TILES(fused_lora_project_x, "_" #x "_" #w, X, W)         \
    TILES(fused_lora_project_g, "_" #x "_" #w, X, W)         \
    TILES(fused_lora_expand, "_" #w "_" #x, W, X)

TILES(fused_lora_forward, "", float, float)
TILES(fused_lora_add_into, "", float, float, float)
TILES(fused_lora_project_x, "", float, float)
TILES(fused_lora_project_g, "", float, float)
TILES(fused_lora_expand, "", float, float)
INSTANTIATE("fused_lora_gradient_a", fused_lora_gradient_a, float)
INSTANTIATE("fused_lora_gradient_b", fused_lora_gradient_b, float)
INSTANTIATE("fused_lora_sum", fused_lora_sum, float)

ADAPTER(f16, f32, half, float)
ADAPTER(f16, f16, half, half)
TILES(fused_lora_project_g, "_f32_f16", float, half)
TILES(fused_lora_expand, "_f16_f32", half, float)
INSTANTIATE("fused_lora_gradient_a_f16", fused_lora_gradient_a, half)
INSTANTIATE("fused_lora_gradient_b_f16", fused_lora_gradient_b, half)

#if __METAL_VERSION__ >= 310
ADAPTER(bf16, f32, bfloat, float)
ADAPTER(bf16, bf16, bfloat, bfloat)
TILES(fused_lora_project_g, "_f32_bf16", float, bfloat)
TILES(fused_lora_expand, "_bf16_f32", bfloat, float)
INSTANTIATE("fused_lora_gradient_a_bf16", fused_lora_gradient_a, bfloat)
INSTANTIATE("fused_lora_gradient_b_bf16", fused_lora_gradient_b, bfloat)
#endif
