// The fast path of attention.cuh, which has the formulas: f16 and bf16 on tensor cores, head sizes that are multiples of 8 up to D.
//
// Scores are made in tiles of 64 rows, 16 a warp, and never leave registers: the accumulators of one product are the left operand of
// the next, rounded to the input's dtype as in FlashAttention-2 (Dao, 2023). exp is exp2 with scale log2(e) folded in. Tiles that no
// query of a block sees are skipped; only those at an edge are masked.
//
//   forward           a block: 64 queries of a head, over tiles of keys
//   backward_queries  a block: 64 queries of a head, over tiles of keys; dq
//   backward_keys     a block: 64 keys of a key head, over tiles of queries of all its heads; dk, dv, summed in registers
//   delta             δ, a warp a row
// Blocks are of heads in x and of tiles in y, those with the most work first for all heads.
// The backward's scores are made twice, so that no two blocks add to one place: the same bits in every run.
// Bytes: q, o (g, dq) once; k and v once a block, from L2. Operations: 4 D a score forward, 14 D backward.
#pragma once
#include "attention.cuh"

namespace attention {

constexpr int ROWS = 64, TILE_THREADS = 128;
constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ uint32_t shared_at(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void matrices(uint32_t at, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ void matrices_transposed(uint32_t at, uint32_t (&to)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}

// d += a (16 x 16) b (16 x 8).
template <class T> __device__ __forceinline__ void product(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> __device__ __forceinline__ void product<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <> __device__ __forceinline__ void product<F16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <class T> __device__ __forceinline__ uint32_t pair(float low, float high) {
  Pack<T, 2> two{{narrow<T>(low), narrow<T>(high)}};
  return *(uint32_t*)&two;
}

// A tile in shared memory: rows of D elements and 16 bytes more, so that eight rows of a column lie in different banks.
template <class T, int D> struct Tile {
  static constexpr int PITCH = 2 * D + 16;
  uint32_t at;

  // `count` rows of `dim` from `from`, `stride` elements apart; zeros after, up to N rows and D elements.
  template <int N> __device__ __forceinline__ void fetch(const T* from, int64_t stride, int count, int dim) const {
    for (int i = threadIdx.x; i < N * (D / 8); i += TILE_THREADS) {
      int r = i / (D / 8), c = i % (D / 8) * 8;
      bool valid = r < count && c < dim;
      copy16(at + r * PITCH + 2 * c, valid ? from + r * stride + c : from, valid);
    }
  }
  // 16 x 16 from row r, column c, as a left operand.
  __device__ __forceinline__ void left(int r, int c, uint32_t (&to)[4]) const {
    int lane = threadIdx.x % 32;
    matrices(at + (r + lane % 16) * PITCH + 2 * (c + lane / 16 * 8), to);
  }
  // As the right operand of a product over columns: rows r.. (to[0], to[1]) and r + 8.. (to[2], to[3]), columns c .. c + 16.
  __device__ __forceinline__ void right(int r, int c, uint32_t (&to)[4]) const {
    int lane = threadIdx.x % 32;
    matrices(at + (r + lane % 8 + lane / 16 * 8) * PITCH + 2 * (c + lane / 8 % 2 * 8), to);
  }
  // As the right operand of a product over rows: columns c.. (to[0], to[1]) and c + 8.. (to[2], to[3]), rows r .. r + 16.
  __device__ __forceinline__ void right_transposed(int r, int c, uint32_t (&to)[4]) const {
    int lane = threadIdx.x % 32;
    matrices_transposed(at + (r + lane % 16) * PITCH + 2 * (c + lane / 16 * 8), to);
  }
};

// scores (+)= left rows · right rowsᵀ: 16 rows of `left` from `row`, N rows of `right`.
template <class T, int D, int N> __device__ __forceinline__ void products(float (&scores)[N / 8][4], const Tile<T, D>& left, int row, const Tile<T, D>& right) {
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) scores[j][e] = 0.f;
#pragma unroll
  for (int c = 0; c < D; c += 16) {
    uint32_t a[4];
    left.left(row, c, a);
#pragma unroll
    for (int j = 0; j < N / 8; j += 2) {
      uint32_t b[4];
      right.right(8 * j, c, b);
      product<T>(scores[j], a, b[0], b[1]);
      product<T>(scores[j + 1], a, b[2], b[3]);
    }
  }
}

// sums += scores · right, for N rows of `right`.
template <class T, int D, int N> __device__ __forceinline__ void weighted(float (&sums)[D / 8][4], const float (&scores)[N / 8][4], const Tile<T, D>& right) {
#pragma unroll
  for (int k = 0; k < N / 16; k++) {
    const float *s0 = scores[2 * k], *s1 = scores[2 * k + 1];
    uint32_t a[4] = {pair<T>(s0[0], s0[1]), pair<T>(s0[2], s0[3]), pair<T>(s1[0], s1[1]), pair<T>(s1[2], s1[3])};
#pragma unroll
    for (int j = 0; j < D / 8; j += 2) {
      uint32_t b[4];
      right.right_transposed(16 * k, 8 * j, b);
      product<T>(sums[j], a, b[0], b[1]);
      product<T>(sums[j + 1], a, b[2], b[3]);
    }
  }
}

// 16 rows of sums times `factor` to rows from `row` on, of which `count` are there.
template <class T, int D> __device__ __forceinline__ void write_rows(T* to, int64_t stride, const float (&sums)[D / 8][4], float factor0, float factor1, int row, int count, int dim) {
  int lane = threadIdx.x % 32, r = row + lane / 4;
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    int c = 8 * j + 2 * (lane % 4);
    if (c >= dim) continue;
    if (r < count) *(uint32_t*)(to + r * stride + c) = pair<T>(factor0 * sums[j][0], factor0 * sums[j][1]);
    if (r + 8 < count) *(uint32_t*)(to + (r + 8) * stride + c) = pair<T>(factor1 * sums[j][2], factor1 * sums[j][3]);
  }
}

// What a block of R queries knows of itself.
template <int R> struct QueryBlock {
  Sequence s;
  int first, count;        // of its queries in the sequence
  int position;            // of the first
  int key_begin, key_end;  // that any of its queries sees
  int head, kv_head;

  __device__ __forceinline__ QueryBlock(const Args& args) {
    s = args.sequences[args.tiles[2 * blockIdx.y]];
    first = args.tiles[2 * blockIdx.y + 1];
    count = min(R, (int)s.q_len - first);
    position = (int)s.k_len - (int)s.q_len + first;
    key_end = position + count;
    key_begin = (int)max((int64_t)0, (int64_t)position - args.window + 1);
    head = blockIdx.x;
    kv_head = head / (args.q_heads / args.kv_heads);
  }
  template <class T> __device__ __forceinline__ const T* queries(const void* q, const Args& args) const {
    return (const T*)q + ((int64_t)(s.q_start + first) * args.q_heads + head) * args.dim;
  }
  template <class T> __device__ __forceinline__ const T* keys(const void* k, const Args& args, int key) const {
    return (const T*)k + ((int64_t)(s.k_start + key) * args.kv_heads + kv_head) * args.dim;
  }
  __device__ __forceinline__ int64_t row(const Args& args, int i) const { return (int64_t)(s.q_start + first + i) * args.q_heads + head; }
  // Whether every query sees all of the keys [key, key + n).
  __device__ __forceinline__ bool all_see(const Args& args, int key, int n) const {
    return key + n <= position + 1 && (int64_t)key > (int64_t)position + count - 1 - args.window;
  }
  __device__ __forceinline__ bool sees(const Args& args, int i, int key) const {
    return key <= position + i && (int64_t)key > (int64_t)position + i - args.window;
  }
};

// What a block of R keys knows of itself: it goes over the queries that see any of them in tiles of n, head after head of its group.
template <int R> struct KeyBlock {
  Sequence s;
  int first, count;        // of its keys in the sequence
  int before;              // a query's position less its place
  int kv_head, group;
  int tiles_begin, tiles, steps;
  int64_t row;             // of its first key

  __device__ __forceinline__ KeyBlock(const Args& args, int n) {
    s = args.sequences[args.tiles[2 * blockIdx.y]];
    first = args.tiles[2 * blockIdx.y + 1];
    count = min(R, (int)s.k_len - first);
    before = (int)s.k_len - (int)s.q_len;
    kv_head = blockIdx.x;
    group = args.q_heads / args.kv_heads;
    int begin = max(0, first - before), end = (int)min((int64_t)s.q_len, (int64_t)first + count - 1 + args.window - before);
    tiles_begin = begin / n;
    tiles = max(0, (end + n - 1) / n - tiles_begin);
    steps = tiles * group;
    row = (int64_t)(s.k_start + first) * args.kv_heads + kv_head;
  }
  // Of a step: which tile of queries, of which head of the group.
  struct Place {
    int tile = 0, head = 0;
  };
  __device__ __forceinline__ void advance(Place& place) const {
    if (++place.tile == tiles) place.tile = 0, place.head++;
  }
  __device__ __forceinline__ int query(Place place, int n) const { return (tiles_begin + place.tile) * n; }
  __device__ __forceinline__ int64_t query_row(const Args& args, Place place, int n) const {
    return (int64_t)(s.q_start + query(place, n)) * args.q_heads + kv_head * group + place.head;
  }
  // Whether all of the queries [query, query + n) see every key.
  __device__ __forceinline__ bool all_see(const Args& args, int query, int n) const {
    return query + n <= (int)s.q_len && first + count - 1 <= before + query && (int64_t)first > (int64_t)before + query + n - 1 - args.window;
  }
  __device__ __forceinline__ bool seen(const Args& args, int key, int query) const {
    int place = before + query;
    return query < (int)s.q_len && first + key <= place && (int64_t)(first + key) > (int64_t)place - args.window;
  }
};

// N keys a tile.
template <class T, int D, int N> __device__ __forceinline__ void forward_tiles(const Args& args) {
  extern __shared__ __align__(16) uint8_t memory[];
  constexpr int PITCH = Tile<T, D>::PITCH;
  QueryBlock<ROWS> block(args);
  uint32_t base = shared_at(memory);
  Tile<T, D> q{base};
  auto k = [&](int tile) { return Tile<T, D>{base + (ROWS + tile % 2 * N) * PITCH}; };
  auto v = [&](int tile) { return Tile<T, D>{base + (ROWS + (2 + tile % 2) * N) * PITCH}; };
  int warp_row = 16 * (threadIdx.x / 32), lane = threadIdx.x % 32;
  int64_t q_stride = (int64_t)args.q_heads * args.dim, kv_stride = (int64_t)args.kv_heads * args.dim;
  int begin = block.key_begin / N, end = (block.key_end + N - 1) / N;
  auto fetch = [&](int tile) {
    int key = tile * N, count = min(N, (int)block.s.k_len - key);
    k(tile).template fetch<N>(block.template keys<T>(args.k, args, key), kv_stride, count, args.dim);
    v(tile).template fetch<N>(block.template keys<T>(args.v, args, key), kv_stride, count, args.dim);
    copies_commit();
  };
  q.template fetch<ROWS>(block.template queries<T>(args.q, args), q_stride, block.count, args.dim);
  fetch(begin);
  float o[D / 8][4], most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, scale = args.scale * LOG2E;
#pragma unroll
  for (int j = 0; j < D / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) o[j][e] = 0.f;
  for (int tile = begin; tile < end; tile++) {
    if (tile + 1 < end) {
      fetch(tile + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();
    float s[N / 8][4];
    products<T, D, N>(s, q, warp_row, k(tile));
    bool whole = block.all_see(args, tile * N, N);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int i = warp_row + lane / 4 + 8 * half;
      float larger = most[half];
#pragma unroll
      for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = s[j][2 * half + e];
          score *= scale;
          if (!whole && !block.sees(args, i, tile * N + 8 * j + 2 * (lane % 4) + e)) score = -INFINITY;
          larger = fmaxf(larger, score);
        }
      larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 2));
      float shift = larger == -INFINITY ? 0.f : larger, kept = exp2f(most[half] - shift);
      most[half] = larger;
      sum[half] *= kept;
#pragma unroll
      for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& score = s[j][2 * half + e];
          score = exp2f(score - shift);
          sum[half] += score;
        }
#pragma unroll
      for (int j = 0; j < D / 8; j++) o[j][2 * half] *= kept, o[j][2 * half + 1] *= kept;
    }
    weighted<T, D, N>(o, s, v(tile));
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    int i = warp_row + lane / 4 + 8 * half;
    if (lane % 4 == 0 && i < block.count) args.lse[block.row(args, i)] = (most[half] + log2f(sum[half])) / LOG2E;
  }
  write_rows<T, D>((T*)args.to_o + block.row(args, 0) * args.dim, q_stride, o, 1.f / sum[0], 1.f / sum[1], warp_row, block.count, args.dim);
}

template <class T, int D, int N> __device__ __forceinline__ void backward_queries_tiles(const Args& args) {
  extern __shared__ __align__(16) uint8_t memory[];
  constexpr int PITCH = Tile<T, D>::PITCH;
  QueryBlock<ROWS> block(args);
  uint32_t base = shared_at(memory);
  Tile<T, D> q{base}, g{base + ROWS * PITCH};
  auto k = [&](int tile) { return Tile<T, D>{base + (2 * ROWS + tile % 2 * N) * PITCH}; };
  auto v = [&](int tile) { return Tile<T, D>{base + (2 * ROWS + (2 + tile % 2) * N) * PITCH}; };
  int warp_row = 16 * (threadIdx.x / 32), lane = threadIdx.x % 32;
  int64_t q_stride = (int64_t)args.q_heads * args.dim, kv_stride = (int64_t)args.kv_heads * args.dim;
  int begin = block.key_begin / N, end = (block.key_end + N - 1) / N;
  auto fetch = [&](int tile) {
    int key = tile * N, count = min(N, (int)block.s.k_len - key);
    k(tile).template fetch<N>(block.template keys<T>(args.k, args, key), kv_stride, count, args.dim);
    v(tile).template fetch<N>(block.template keys<T>(args.v, args, key), kv_stride, count, args.dim);
    copies_commit();
  };
  q.template fetch<ROWS>(block.template queries<T>(args.q, args), q_stride, block.count, args.dim);
  g.template fetch<ROWS>(block.template queries<T>(args.g, args), q_stride, block.count, args.dim);
  fetch(begin);
  float lse[2], delta[2], scale = args.scale * LOG2E, dq[D / 8][4];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int i = warp_row + lane / 4 + 8 * half;
    bool there = i < block.count;
    lse[half] = there ? args.lse[block.row(args, i)] * LOG2E : 0.f;
    delta[half] = there ? args.delta[block.row(args, i)] : 0.f;
  }
#pragma unroll
  for (int j = 0; j < D / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) dq[j][e] = 0.f;
  for (int tile = begin; tile < end; tile++) {
    if (tile + 1 < end) {
      fetch(tile + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();
    float s[N / 8][4], dp[N / 8][4];
    products<T, D, N>(s, q, warp_row, k(tile));
    products<T, D, N>(dp, g, warp_row, v(tile));
    bool whole = block.all_see(args, tile * N, N);
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int i = warp_row + lane / 4 + 8 * (e / 2), key = tile * N + 8 * j + 2 * (lane % 4) + e % 2;
        float p = whole || block.sees(args, i, key) ? exp2f(scale * s[j][e] - lse[e / 2]) : 0.f;
        s[j][e] = p * (dp[j][e] - delta[e / 2]);
      }
    weighted<T, D, N>(dq, s, k(tile));
    __syncthreads();
  }
  write_rows<T, D>((T*)args.dq + block.row(args, 0) * args.dim, q_stride, dq, args.scale, args.scale, warp_row, block.count, args.dim);
}

// The tiles are of keys here; N queries at a time.
template <class T, int D, int N> __device__ __forceinline__ void backward_keys_tiles(const Args& args) {
  extern __shared__ __align__(16) uint8_t memory[];
  constexpr int PITCH = Tile<T, D>::PITCH;
  KeyBlock<ROWS> block(args, N);
  uint32_t base = shared_at(memory);
  Tile<T, D> k{base}, v{base + ROWS * PITCH};
  auto q = [&](int step) { return Tile<T, D>{base + (2 * ROWS + step % 2 * N) * PITCH}; };
  auto g = [&](int step) { return Tile<T, D>{base + (2 * ROWS + (2 + step % 2) * N) * PITCH}; };
  float* numbers = (float*)(memory + (2 * ROWS + 4 * N) * PITCH);  // lse and δ of the tile's queries, twice
  int warp_row = 16 * (threadIdx.x / 32), lane = threadIdx.x % 32;
  int64_t q_stride = (int64_t)args.q_heads * args.dim, kv_stride = (int64_t)args.kv_heads * args.dim;
  typename KeyBlock<ROWS>::Place fetched, counted;
  auto fetch = [&](int step) {
    int there = min(N, (int)block.s.q_len - block.query(fetched, N));
    int64_t row = block.query_row(args, fetched, N);
    block.advance(fetched);
    q(step).template fetch<N>((const T*)args.q + row * args.dim, q_stride, there, args.dim);
    g(step).template fetch<N>((const T*)args.g + row * args.dim, q_stride, there, args.dim);
    for (int i = threadIdx.x; i < N; i += TILE_THREADS) {
      numbers[(step % 2) * 2 * N + i] = i < there ? args.lse[row + (int64_t)i * args.q_heads] * LOG2E : 0.f;
      numbers[(step % 2) * 2 * N + N + i] = i < there ? args.delta[row + (int64_t)i * args.q_heads] : 0.f;
    }
    copies_commit();
  };
  k.template fetch<ROWS>((const T*)args.k + block.row * args.dim, kv_stride, block.count, args.dim);
  v.template fetch<ROWS>((const T*)args.v + block.row * args.dim, kv_stride, block.count, args.dim);
  float dk[D / 8][4], dv[D / 8][4], scale = args.scale * LOG2E;
#pragma unroll
  for (int j = 0; j < D / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) dk[j][e] = dv[j][e] = 0.f;
  if (block.steps > 0) fetch(0);
  for (int step = 0; step < block.steps; step++) {
    if (step + 1 < block.steps) {
      fetch(step + 1);
      copies_wait<1>();
    } else {
      copies_wait<0>();
    }
    __syncthreads();
    const float *lse = numbers + (step % 2) * 2 * N, *delta = lse + N;
    int query = block.query(counted, N);
    block.advance(counted);
    float p[N / 8][4], dp[N / 8][4];
    products<T, D, N>(p, k, warp_row, q(step));
    bool whole = block.all_see(args, query, N);
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int key = warp_row + lane / 4 + 8 * (e / 2), at = 8 * j + 2 * (lane % 4) + e % 2;
        p[j][e] = whole || block.seen(args, key, query + at) ? exp2f(scale * p[j][e] - lse[at]) : 0.f;
      }
    weighted<T, D, N>(dv, p, g(step));
    products<T, D, N>(dp, v, warp_row, g(step));
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) p[j][e] *= dp[j][e] - delta[8 * j + 2 * (lane % 4) + e % 2];
    weighted<T, D, N>(dk, p, q(step));
    __syncthreads();
  }
  write_rows<T, D>((T*)args.dk + block.row * args.dim, kv_stride, dk, args.scale, args.scale, warp_row, block.count, args.dim);
  write_rows<T, D>((T*)args.dv + block.row * args.dim, kv_stride, dv, 1.f, 1.f, warp_row, block.count, args.dim);
}

template <class T> __device__ __forceinline__ void delta_rows(const Args& args) {
  int64_t at = warp_row();
  if (at >= args.queries * args.q_heads) return;
  float g[MOST], o[MOST];
  row((const T*)args.g + at * args.dim, args.dim, g);
  row((const T*)args.o + at * args.dim, args.dim, o);
  float delta = dot(g, o);
  if (threadIdx.x % 32 == 0) args.delta[at] = delta;
}

}  // namespace attention
