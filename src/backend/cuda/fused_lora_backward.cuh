// The LoRA delta, backward: u = s * g Bt, dB = s * ht g, dA = drop(x)t u, dx = drop(u At), each dB, dA, dx added or written.
//
// Two passes, each over one large matrix, and a sum of what their blocks leave:
//   output side  reads g [m, n] and h: u as parts [column blocks][m, r], dB as parts [row blocks][r, n]
//   input side   reads x [m, k] and the parts of u: dx [m, k], dA as parts [row blocks][r, k]
//   reduce       dB and dA from their parts, in a fixed order
// Bytes they must move: m n elements of g, m k of x and m k of dx (twice that where dx is added to); the rest stays in L2.
//
// A warp owns 64 columns and walks down the block's rows, 16 at a time. Its 16 x 64 tile is the left operand of u (rows by
// columns) and, transposed 8x8 by 8x8, the right operand of dB and dA, whose sums stay in registers to the end.
#pragma once
#include "fragments.cuh"

constexpr int WARP_COLUMNS = 64;

struct OutputArgs {
  const void *g, *b;
  const float* h;   // null: dB is not wanted
  float* u_parts;   // null: u is not wanted
  float* db_parts;
  int64_t m;
  int n, r, rank0;  // ranks rank0 .. rank0 + 8 NR are computed
  int rows;         // of a block, a multiple of 16
  int stages, b_vec;
  float s;
};

struct InputArgs {
  const void *x, *a;
  const float* u_parts;
  void* dx;         // null: not wanted
  float* da_parts;  // null: dA is not wanted, and x is not read
  int64_t m;
  Dropout dropout;
  int k, r, rank0, u_part_count;
  int rows, stages;
  float kept_scale;
  int dx_f32, add;
};

// The warp's 16 x 64 tiles, one after the other, through a ring that every lane fills and reads for itself.
template <class T, bool VEC> struct Tiles {
  static constexpr int ITEMS = VEC ? 4 * T::VECTORS : 0;
  typedef typename T::Raw X;
  const X* matrix;
  uint4* ring;
  int64_t m, row, end;  // `row` is the first row of the next tile to read
  int columns, column0, stages, slot, next;
  int64_t next_row;

  __device__ __forceinline__ Tiles(const void* matrix, uint4* ring, int64_t m, int64_t row, int64_t end, int columns, int column0, int stages)
      : matrix((const X*)matrix), ring(ring), m(m), row(row), end(end), columns(columns), column0(column0), stages(stages), slot(0), next(0), next_row(row) {
    if (VEC && matrix)
      for (int i = 0; i + 1 < stages; i++) issue();
  }

  __device__ __forceinline__ void issue() {
    int lane = threadIdx.x % 32;
    UNROLL for (int part = 0; part < 4; part++) {
      int64_t at = next_row + 8 * (part % 2) + lane / 4;
      int column = column0 + 32 * (part / 2) + 8 * (lane % 4);
      bool valid = at < end && column < columns;
      const X* from = valid ? matrix + at * columns + column : matrix;
      UNROLL for (int v = 0; v < T::VECTORS; v++)
        copy_async(ring + (next * ITEMS + part * T::VECTORS + v) * 32 + lane, (const uint4*)from + v, valid);
    }
    copy_commit();
    next_row += 16;
    next = next + 1 == stages ? 0 : next + 1;
  }

  // Starts the load that keeps the ring full and waits for the tile at `row`.
  __device__ __forceinline__ void wait() {
    if (VEC) {
      issue();
      copy_wait_all_but(stages - 1);
    }
  }

  // Rows 8 half + g, columns 8t.. of chunk 0 or 1.
  __device__ __forceinline__ Eight<T> eight(int chunk, int half) {
    int lane = threadIdx.x % 32;
    if (VEC) {
      Eight<T> e;
      UNROLL for (int v = 0; v < T::VECTORS; v++) e.v[v] = ring[(slot * ITEMS + (2 * chunk + half) * T::VECTORS + v) * 32 + lane];
      return e;
    }
    int64_t at = row + 8 * half + lane / 4;
    int column = column0 + 32 * chunk + 8 * (lane % 4);
    return load8<T, false>(matrix + at * columns + column, at < end ? columns - column : 0);
  }

  __device__ __forceinline__ void advance() {
    row += 16;
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
};

// Left operands of the products with 16-row tiles: fragments of value(row, rank), rows from 0, [row tile][rank tile][term][lane].
// OUTER: of Lt, for outer products; else of L itself.
template <bool OUTER, int TERMS, class F>
__device__ __forceinline__ void left_fragments(uint4* to, int row_tiles, int rank_tiles, F value) {
  for (int i = threadIdx.x; i < row_tiles * rank_tiles * 32; i += blockDim.x) {
    int l = i % 32, rank_tile = i / 32 % rank_tiles, row_tile = i / 32 / rank_tiles;
    uint32_t f[4][TERMS];
    UNROLL for (int part = 0; part < 4; part++) {
      int down = 8 * (part % 2) + l / 4, right = 8 * (part / 2) + 2 * (l % 4);
      int row = 16 * row_tile + (OUTER ? right : down), rank = 16 * rank_tile + (OUTER ? down : right);
      split2<TERMS>(value(row, rank), OUTER ? value(row + 1, rank) : value(row, rank + 1), f[part]);
    }
    UNROLL for (int term = 0; term < TERMS; term++)
      to[(i / 32 * TERMS + term) * 32 + l] = make_uint4(f[0][term], f[1][term], f[2][term], f[3][term]);
  }
}

// Row tiles whose left operands are in shared memory at a time: a segment.
template <int NR> constexpr int segment_tiles() { return NR <= 2 ? 16 : NR == 4 ? 8 : 4; }

// acc += Lt tile for one chunk of 32 columns; `top` and `bottom` are rows g and g + 8 of the tile.
template <class T, int RANK_TILES>
__device__ __forceinline__ void outer(float (&acc)[4][RANK_TILES][4], const uint4* left, const uint32_t (&top)[T::TERMS][4], const uint32_t (&bottom)[T::TERMS][4]) {
  int lane = threadIdx.x % 32;
  uint32_t b[T::TERMS][4][2];
  UNROLL for (int o = 0; o < T::TERMS; o++)
    UNROLL for (int j = 0; j < 4; j++) {
      b[o][j][0] = transpose8x8(top[o][j]);
      b[o][j][1] = transpose8x8(bottom[o][j]);
    }
  UNROLL for (int tile = 0; tile < RANK_TILES; tile++)
    UNROLL for (int i = 0; i < FINE; i++) {
      uint4 l = left[(tile * FINE + i) * 32 + lane];
      UNROLL for (int o = 0; o < T::TERMS; o++)
        if (i + o < FINE)
          UNROLL for (int j = 0; j < 4; j++) mma(acc[j][tile], l.x, l.y, l.z, l.w, b[o][j][0], b[o][j][1]);
    }
}

// The warp's sums of an outer product to `parts` [r, columns] of this row block.
template <bool VEC, int RANK_TILES>
__device__ __forceinline__ void store_outer(float* parts, const float (&acc)[2][4][RANK_TILES][4], int r, int rank0, int ranks, int columns, int column0) {
  int lane = threadIdx.x % 32;
  UNROLL for (int chunk = 0; chunk < 2; chunk++)
    UNROLL for (int tile = 0; tile < RANK_TILES; tile++)
      UNROLL for (int half = 0; half < 2; half++) {
        int in_block = 16 * tile + 8 * half + lane / 4, rank = rank0 + in_block, column = column0 + 32 * chunk + 8 * (lane % 4);
        if (in_block >= ranks || rank >= r) continue;
        float f[8];
        UNROLL for (int i = 0; i < 8; i++) f[i] = acc[chunk][i / 2][tile][2 * half + i % 2];
        store8_f32<VEC>(parts + (int64_t)rank * columns + column, f, columns - column);
      }
}

template <class T, class W, int NR, bool VEC> struct Output {
  static constexpr int RANKS = 8 * NR, RANK_TILES = (NR + 1) / 2, SEGMENT = segment_tiles<NR>(), XT = T::TERMS, BT = W::TERMS;
  typedef typename W::Raw A;

  static __device__ __forceinline__ void run(const OutputArgs& p, unsigned char* shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    int block_column = blockIdx.x * warps * WARP_COLUMNS, column0 = block_column + warp * WARP_COLUMNS;
    int64_t row0 = (int64_t)blockIdx.y * p.rows, end = row0 + p.rows < p.m ? row0 + p.rows : p.m;
    // Shared memory: B's columns of this block as bf16 terms; a segment of h's fragments; the warps' sums of u, twice; the ring.
    int pitch = warps * WARP_COLUMNS * 2 + 64;
    unsigned char* bt = shared;
    uint4* left = (uint4*)(bt + BT * RANKS * pitch);
    float* sums = (float*)(left + SEGMENT * RANK_TILES * FINE * 32);
    uint4* ring = (uint4*)(sums + 2 * warps * 16 * RANKS) + warp * p.stages * Tiles<T, VEC>::ITEMS * 32;
    wait_for_previous();
    let_next_start();
    Tiles<T, VEC> tiles(p.g, ring, p.m, row0, end, p.n, column0, p.stages);
    if (p.u_parts) {
      int eighths = warps * WARP_COLUMNS / 8;
      _Pragma("unroll 4") for (int i = threadIdx.x; i < RANKS * eighths; i += blockDim.x) {
        int rank = p.rank0 + i / eighths, column = block_column + i % eighths * 8;
        Eight<W> e = load8<W>((const A*)p.b + (int64_t)rank * p.n + column, rank < p.r ? p.n - column : 0, p.b_vec);
        uint32_t terms[BT][4];
        split8<W, BT>(e, terms);
        UNROLL for (int term = 0; term < BT; term++)
          *(uint4*)(bt + (term * RANKS + i / eighths) * pitch + i % eighths * 16) = make_uint4(terms[term][0], terms[term][1], terms[term][2], terms[term][3]);
      }
    }
    float db[2][4][RANK_TILES][4] = {};
    int buffer = 0;
    for (int64_t row = row0; row < end; row += 16, buffer ^= 1) {
      int tile = (int)(row - row0) / 16 % SEGMENT;
      if (tile == 0) {
        __syncthreads();
        if (p.h)
          left_fragments<true, FINE>(left, SEGMENT, RANK_TILES, [&](int i, int rank) {
            return row + i < end && p.rank0 + rank < p.r ? p.h[(row + i) * p.r + p.rank0 + rank] : 0.0f;
          });
        __syncthreads();
      }
      tiles.wait();
      float u[NR][4] = {};
      UNROLL for (int chunk = 0; chunk < 2; chunk++) {
        uint32_t top[XT][4], bottom[XT][4];
        split8<T, XT>(tiles.eight(chunk, 0), top);
        split8<T, XT>(tiles.eight(chunk, 1), bottom);
        if (p.u_parts) {
          UNROLL for (int q = 0; q < NR; q++)
            UNROLL for (int o = 0; o < BT; o++) {
              uint4 b = *(const uint4*)(bt + (o * RANKS + 8 * q + g) * pitch + (warp * WARP_COLUMNS + 32 * chunk + 8 * t) * 2);
              UNROLL for (int i = 0; i < XT; i++)
                if (i + o < FINE) {
                  mma(u[q], top[i][0], bottom[i][0], top[i][1], bottom[i][1], b.x, b.y);
                  mma(u[q], top[i][2], bottom[i][2], top[i][3], bottom[i][3], b.z, b.w);
                }
            }
        }
        if (p.h) outer<T, RANK_TILES>(db[chunk], left + tile * RANK_TILES * FINE * 32, top, bottom);
      }
      tiles.advance();
      float* mine = sums + (buffer * warps + warp) * 16 * RANKS;
      if (p.u_parts) {
        UNROLL for (int q = 0; q < NR; q++)
          UNROLL for (int half = 0; half < 2; half++)
            *(float2*)&mine[(8 * half + g) * RANKS + 8 * q + 2 * t] = make_float2(u[q][2 * half], u[q][2 * half + 1]);
      }
      __syncthreads();
      if (p.u_parts) {
        for (int i = threadIdx.x; i < 16 * RANKS; i += blockDim.x) {
          int64_t at = row + i / RANKS;
          int rank = p.rank0 + i % RANKS;
          float sum = 0;
          for (int w = 0; w < warps; w++) sum += sums[(buffer * warps + w) * 16 * RANKS + i];
          if (at < end && rank < p.r) p.u_parts[((int64_t)blockIdx.x * p.m + at) * p.r + rank] = p.s * sum;
        }
      }
    }
    if (VEC) copy_wait<0>();
    if (p.h) store_outer<VEC, RANK_TILES>(p.db_parts + (int64_t)blockIdx.y * p.r * p.n, db, p.r, p.rank0, RANKS, p.n, column0);
  }
};

template <class T, class W, int NR, bool VEC> struct Input {
  static constexpr int RANKS = 8 * NR, RANK_TILES = (NR + 1) / 2, SEGMENT = segment_tiles<NR>(), PITCH = 16 * RANK_TILES, XT = T::TERMS;
  static constexpr int UT = FINE, AT = least(W::TERMS, FINE);
  typedef typename W::Raw A;

  // u of a segment's rows, zeros beyond the block's rows and the ranks. Four ranks at a time where r allows.
  template <int WIDTH> static __device__ __forceinline__ void sum_parts(const InputArgs& p, float* sums, int64_t row, int64_t end) {
    constexpr int COUNT = SEGMENT * 16 * PITCH / WIDTH, UNROLLED = 4;
    for (int i0 = threadIdx.x; i0 < COUNT; i0 += 2 * blockDim.x) {
      float sum[2][WIDTH] = {};
      for (int part0 = 0; part0 < p.u_part_count; part0 += UNROLLED)
        UNROLL for (int e = 0; e < 2; e++) {
          int i = (i0 + e * blockDim.x) * WIDTH, rank = i % PITCH;
          int64_t at = row + i / PITCH;
          bool there = at < end && rank < RANKS && p.rank0 + rank < p.r && i < COUNT * WIDTH;
          const float* from = p.u_parts + ((int64_t)part0 * p.m + at) * p.r + p.rank0 + rank;
          UNROLL for (int part = 0; part < UNROLLED; part++) {
            if (!there || part0 + part >= p.u_part_count) continue;
            if constexpr (WIDTH == 4) {
              float4 v = __ldg((const float4*)(from + part * p.m * p.r));
              sum[e][0] += v.x, sum[e][1] += v.y, sum[e][2] += v.z, sum[e][3] += v.w;
            } else {
              sum[e][0] += __ldg(from + part * p.m * p.r);
            }
          }
        }
      UNROLL for (int e = 0; e < 2; e++)
        UNROLL for (int w = 0; w < WIDTH; w++)
          if (i0 + e * (int)blockDim.x < COUNT) sums[(i0 + e * blockDim.x) * WIDTH + w] = sum[e][w];
    }
  }

  static __device__ __forceinline__ void run(const InputArgs& p, unsigned char* shared) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    int column0 = (blockIdx.x * warps + warp) * WARP_COLUMNS;
    int64_t row0 = (int64_t)blockIdx.y * p.rows, end = row0 + p.rows < p.m ? row0 + p.rows : p.m;
    // Shared memory: A of the warps' columns as right operand of dx, by the warp that uses it; a segment of u's fragments
    // for dA and one for dx, and of u; the ring.
    constexpr int OUTER = RANK_TILES * FINE * 32, LEFT = RANK_TILES * UT * 32;
    uint4* at = (uint4*)shared + warp * 2 * RANK_TILES * AT * 64;
    uint4* left = (uint4*)shared + warps * 2 * RANK_TILES * AT * 64;
    uint4* left_dx = left + SEGMENT * OUTER;
    float* sums = (float*)(left_dx + SEGMENT * LEFT);
    uint4* ring = left_dx + SEGMENT * LEFT + SEGMENT * 16 * PITCH / 4 + warp * p.stages * Tiles<T, VEC>::ITEMS * 32;
    Tiles<T, VEC> tiles(p.da_parts ? p.x : nullptr, ring, p.m, row0, end, p.k, column0, p.stages);
    if (p.dx) {
      for (int i = 0; i < 2 * RANK_TILES * 2; i++) {
        int half = i % 2, tile = i / 2 % RANK_TILES, chunk = i / 2 / RANK_TILES, rank = p.rank0 + 16 * tile + 8 * half + 2 * t;
        uint32_t terms[4][AT];
        UNROLL for (int j = 0; j < 4; j++) {
          int column = column0 + 32 * chunk + 8 * (g / 2) + 2 * j + g % 2;
          const A* from = (const A*)p.a + (int64_t)column * p.r + rank;
          bool there = column < p.k && 16 * tile + 8 * half < RANKS;
          split2<AT>(there && rank < p.r ? W::widen(from[0]) : 0, there && rank + 1 < p.r ? W::widen(from[1]) : 0, terms[j]);
        }
        UNROLL for (int term = 0; term < AT; term++)
          at[(i * AT + term) * 32 + lane] = make_uint4(terms[0][term], terms[1][term], terms[2][term], terms[3][term]);
      }
    }
    wait_for_previous();  // x and A are older than the kernel that makes u
    let_next_start();
    float da[2][4][RANK_TILES][4] = {};
    for (int64_t row = row0; row < end; row += 16) {
      int segment_tile = (int)(row - row0) / 16 % SEGMENT;
      if (segment_tile == 0) {
        __syncthreads();
        if (p.r % 4 == 0) sum_parts<4>(p, sums, row, end);
        else sum_parts<1>(p, sums, row, end);
        __syncthreads();
        auto u = [&](int i, int rank) { return sums[i * PITCH + rank]; };
        if (p.da_parts) left_fragments<true, FINE>(left, SEGMENT, RANK_TILES, u);
        if (p.dx) left_fragments<false, UT>(left_dx, SEGMENT, RANK_TILES, u);
        __syncthreads();
      }
      if (p.da_parts) tiles.wait();
      UNROLL for (int chunk = 0; chunk < 2; chunk++) {
        int column = column0 + 32 * chunk + 8 * t;
        uint32_t kept[2] = {0xff, 0xff};
        if (p.dropout.on)
          UNROLL for (int half = 0; half < 2; half++) kept[half] = kept8((uint64_t)((row + 8 * half + g) * p.k + column), p.dropout);
        if (p.da_parts) {
          uint32_t x[2][XT][4];
          UNROLL for (int half = 0; half < 2; half++) {
            Eight<T> e = tiles.eight(chunk, half);
            if (p.dropout.on) keep8<T>(e, kept[half]);
            split8<T, XT>(e, x[half]);
          }
          outer<T, RANK_TILES>(da[chunk], left + segment_tile * OUTER, x[0], x[1]);
        }
        if (p.dx) {
          float acc[4][4] = {};
          UNROLL for (int tile = 0; tile < RANK_TILES; tile++) {
            uint4 u[UT];
            UNROLL for (int i = 0; i < UT; i++) u[i] = left_dx[segment_tile * LEFT + (tile * UT + i) * 32 + lane];
            UNROLL for (int o = 0; o < AT; o++) {
              if (o >= T::UP && !p.dx_f32) break;
              const uint4* a = at + ((chunk * RANK_TILES + tile) * 2 * AT + o) * 32 + lane;
              uint4 b0 = a[0], b1 = a[AT * 32];
              UNROLL for (int i = 0; i < UT; i++) {
                if (i + o >= T::UP && (i + o >= FINE || !p.dx_f32)) break;
                UNROLL for (int j = 0; j < 4; j++) mma(acc[j], u[i].x, u[i].y, u[i].z, u[i].w, word(b0, j), word(b1, j));
              }
            }
          }
          UNROLL for (int half = 0; half < 2; half++) {
            int64_t to = row + 8 * half + g;
            if (to >= end) continue;
            float f[8];
            UNROLL for (int i = 0; i < 8; i++) f[i] = kept[half] >> i & 1 ? p.kept_scale * acc[i / 2][2 * half + i % 2] : 0;
            put8<T, VEC>(p.dx, to * p.k + column, f, p.k - column, p.dx_f32, p.add);
          }
        }
      }
      if (p.da_parts) tiles.advance();
    }
    if (VEC) copy_wait<0>();
    if (p.da_parts) store_outer<VEC, RANK_TILES>(p.da_parts + (int64_t)blockIdx.y * p.r * p.k, da, p.r, p.rank0, RANKS, p.k, column0);
  }
};

struct ReduceArgs {
  const float* parts[2];  // [count, r, columns]
  float* to[2];           // [r, columns], or [columns, r] where transposed; null: nothing to do
  int count[2], columns[2], transposed[2];
  float scale[2];
  int r, add;
};

// to (+)= scale * sum of parts, in the order of the parts. blockIdx.y: which of the two.
__device__ __forceinline__ void reduce(const ReduceArgs& p) {
  wait_for_previous();
  int which = blockIdx.y, columns = p.columns[which];
  if (!p.to[which]) return;
  int64_t size = (int64_t)p.r * columns;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += (int64_t)gridDim.x * blockDim.x) {
    const float* from = p.parts[which] + i;
    float sum = 0;
    _Pragma("unroll 8") for (int part = 0; part < p.count[which]; part++) sum += from[part * size];
    int64_t at = p.transposed[which] ? i % columns * p.r + i / columns : i;
    p.to[which][at] = p.scale[which] * sum + (p.add ? p.to[which][at] : 0);
  }
}
