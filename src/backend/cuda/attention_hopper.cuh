// attention_tiles.cuh for bf16 on Hopper (compute capability 9.0a): the same blocks of queries and keys and the same order of sums, with the
// products of a warpgroup (wgmma) in place of a warp's. The formulas and the kernels' parts are there.
//
// A block has GROUPS warpgroups of 64 rows each, which share every tile of the other side. Scores go from accumulators to the next product
// as its left operand, in registers. Tiles lie as wgmma reads them: 64 columns a row of 128 bytes, 16-byte pieces swizzled.
#pragma once
#include "attention_tiles.cuh"
#include "hopper.cuh"

namespace attention_hopper {
using namespace attention;
using hopper::descriptor;
using hopper::multiply_begin;
using hopper::multiply_commit;
using hopper::multiply_wait;

constexpr int GROUP = 128;  // threads of a warpgroup, which has 64 rows

// d (+)= left (64 x 16) · right (16 x N), both in rows of the outer dimension, in shared memory.
template <int N> __device__ __forceinline__ void scores_product(float (&d)[N / 2], uint64_t left, uint64_t right, int add);
template <> __device__ __forceinline__ void scores_product<64>(float (&d)[32], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{ .reg .pred p;\n"
      "setp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
      : R32(d, 0)
      : "l"(left), "l"(right), "r"(add));
}
template <> __device__ __forceinline__ void scores_product<128>(float (&d)[64], uint64_t left, uint64_t right, int add) {
  asm volatile(
      "{ .reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0; }"
      : R32(d, 0), R32(d, 32)
      : "l"(left), "l"(right), "r"(add));
}

// d += a (64 x 16, registers) · right (16 x N), right in rows of the inner dimension.
template <int N> __device__ __forceinline__ void weighted_product(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t right);
template <> __device__ __forceinline__ void weighted_product<64>(float (&d)[32], const uint32_t (&a)[4], uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : R32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right));
}
template <> __device__ __forceinline__ void weighted_product<128>(float (&d)[64], const uint32_t (&a)[4], uint64_t right) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : R32(d, 0), R32(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(right));
}

// R rows of D elements in shared memory, on 1024 bytes: D / 64 chunks of R rows of 128 bytes.
template <int D, int R> struct Tile {
  static constexpr int BYTES = R * D * 2;
  uint32_t at;

  // `count` rows of `dim` from `from`, `stride` elements apart, zeros after, by THREADS threads.
  template <int THREADS> __device__ __forceinline__ void fetch(const Bf16* from, int stride, int count, int dim) const {
    constexpr int PIECES = D / 8, ROWS_AT_ONCE = THREADS / PIECES;
    int row = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
    from += row * stride + 8 * piece;  // a tile's rows lie within 2^31 elements
    uint32_t to = at + piece / 8 * (R * 128) + row * 128 + ((piece % 8) ^ (row & 7)) * 16;
    static_assert(ROWS_AT_ONCE % 8 == 0, "a thread's pieces have one place in their rows");
    int there = 8 * piece < dim ? count - row : 0;
#pragma unroll
    for (int n = 0; n < (R + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; n++) {
      if (R % ROWS_AT_ONCE != 0 && n * ROWS_AT_ONCE + row >= R) break;
      bool valid = n * ROWS_AT_ONCE < there;
      copy16(to + n * (ROWS_AT_ONCE * 128), valid ? from + n * ROWS_AT_ONCE * stride : from, valid);
    }
  }
  // 16 columns from 16 i, of rows from `row`, as a factor in rows of the outer dimension.
  __device__ __forceinline__ uint64_t outer(int row, int i) const { return factor(i / 4 * (R * 128) + row * 128 + i % 4 * 32, 16); }
  // 16 rows from 16 i as a factor in rows of the inner dimension.
  __device__ __forceinline__ uint64_t inner(int i) const { return factor(i * (16 * 128), R * 128); }

 private:
  // `at` is made anew for each use: the compiler would else keep the descriptors of all a tile's pieces over the loop, in registers that
  // there are not.
  __device__ __forceinline__ uint64_t factor(int offset, int leading) const {
    uint32_t here = at;
    asm volatile("" : "+r"(here));
    return descriptor(here + offset, leading, 1024);
  }
};

// scores = 64 rows of `left` from `row` · the N rows of `right`, transposed.
template <int D, int R, int N> __device__ __forceinline__ void products(float (&scores)[N / 2], const Tile<D, R>& left, int row, const Tile<D, N>& right) {
#pragma unroll
  for (int i = 0; i < D / 16; i++) scores_product<N>(scores, left.outer(row, i), right.outer(0, i), i > 0);
}

// sums += scores · right. `operands` must live until the products are waited for.
template <int D, int N> __device__ __forceinline__ void weighted(float (&sums)[D / 2], const uint32_t (&operands)[N / 16][4], const Tile<D, N>& right) {
#pragma unroll
  for (int i = 0; i < N / 16; i++) weighted_product<D>(sums, operands[i], right.inner(i));
}

// Scores as left operands of 16 columns each.
template <int N> __device__ __forceinline__ void round_scores(const float (&scores)[N / 2], uint32_t (&operands)[N / 16][4]) {
#pragma unroll
  for (int i = 0; i < N / 16; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) operands[i][j] = pair<Bf16>(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
}

// The tiles of the other side go through four places. Warps are kept within half a tile of each other, not in step: one warpgroup's
// softmax then runs beside the other's products. In the middle of tile t, when all that reads tile t - 1 is done, a warp arrives for
// tile t + 1, whose copies it asked for a tile ago, and asks for tile t + 2, in the place of t - 2.
constexpr int PLACES = 4;
template <int THREADS, class Fetch> struct Ring {
  uint32_t barrier;
  int tiles;
  Fetch fetch;  // a tile's copies by this thread

  __device__ __forceinline__ Ring(uint64_t* at, int tiles, Fetch fetch) : barrier(shared_at(at)), tiles(tiles), fetch(fetch) {
    if (threadIdx.x == 0) {
      hopper::barrier_init(barrier, THREADS);
      hopper::barrier_init_done();
    }
    __syncthreads();
  }
  // Copies that were asked for before count as the first tile's.
  __device__ __forceinline__ void start() {
    fetch(0);
    copies_commit();
    if (tiles > 1) fetch(1);
    copies_commit();
    copies_wait<1>();
    arrive();
  }
  __device__ __forceinline__ void wait(int tile) const { hopper::barrier_wait(barrier, tile & 1); }
  __device__ __forceinline__ void middle(int tile) {
    copies_wait<0>();
    arrive();
    if (tile + 2 < tiles) fetch(tile + 2);
    copies_commit();
  }

 private:
  // This thread's copies are there, for the tensor cores too. One arrival a warp would do and is as fast; racecheck understands this.
  __device__ __forceinline__ void arrive() const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    hopper::barrier_arrive(barrier);
  }
};

__device__ __forceinline__ void copy4(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}

// Which of the N columns of a tile count in a row of scores: [low, low + width).
struct Seen {
  int low;
  unsigned width;
  __device__ __forceinline__ Seen(int64_t from, int64_t end, int n) {
    low = (int)max((int64_t)0, from);
    width = (unsigned)max((int64_t)0, min((int64_t)n, end) - low);
  }
  __device__ __forceinline__ bool has(int column) const { return (unsigned)(column - low) < width; }
};
// Keys from `key` on that query i of the block sees.
template <int R> __device__ __forceinline__ Seen seen_keys(const QueryBlock<R>& block, const Args& args, int i, int key, int n) {
  int64_t end = (int64_t)block.position + i + 1 - key;
  return Seen(end - args.window, end, n);
}
// Queries from `query` on that see key i of the block.
template <int R> __device__ __forceinline__ Seen seeing_queries(const KeyBlock<R>& block, const Args& args, int i, int query, int n) {
  int64_t from = (int64_t)block.first + i - block.before - query;
  return Seen(from, min((int64_t)block.s.q_len - query, from + args.window), n);
}

__device__ __forceinline__ float exp2_fast(float v) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
  return d;
}

template <int D> __device__ __forceinline__ void write_sums(Bf16* to, int64_t stride, const float (&sums)[D / 2], float factor0, float factor1, int row, int count, int dim) {
  int lane = threadIdx.x % 32, r = row + lane / 4;
#pragma unroll
  for (int j = 0; j < D / 8; j++) {
    int c = 8 * j + 2 * (lane % 4);
    if (c >= dim) continue;
    if (r < count) *(uint32_t*)(to + r * stride + c) = pair<Bf16>(factor0 * sums[4 * j], factor0 * sums[4 * j + 1]);
    if (r + 8 < count) *(uint32_t*)(to + (r + 8) * stride + c) = pair<Bf16>(factor1 * sums[4 * j + 2], factor1 * sums[4 * j + 3]);
  }
}

__device__ __forceinline__ uint32_t aligned_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return (shared_at(memory) + 1023) & ~1023u;
}

// N keys a tile.
template <int D, int N, int GROUPS> __device__ __forceinline__ void forward(const Args& args) {
  constexpr int BLOCK_ROWS = 64 * GROUPS, THREADS = GROUP * GROUPS;
  __shared__ uint64_t barrier;
  QueryBlock<BLOCK_ROWS> block(args);
  uint32_t base = aligned_memory();
  constexpr int SIDE = Tile<D, N>::BYTES;
  Tile<D, BLOCK_ROWS> q{base};
  auto k = [&](int tile) { return Tile<D, N>{base + q.BYTES + tile % PLACES * SIDE}; };
  auto v = [&](int tile) { return Tile<D, N>{base + q.BYTES + (PLACES + tile % PLACES) * SIDE}; };
  int warp_row = 16 * (threadIdx.x / 32), group_row = 64 * (threadIdx.x / 128), lane = threadIdx.x % 32;
  int q_stride = args.q_heads * args.dim, kv_stride = args.kv_heads * args.dim;
  int begin = block.key_begin / N, tiles = (block.key_end + N - 1) / N - begin;
  auto fetch = [&](int tile) {
    int key = (begin + tile) * N, count = min(N, (int)block.s.k_len - key);
    k(tile).template fetch<THREADS>(block.template keys<Bf16>(args.k, args, key), kv_stride, count, args.dim);
    v(tile).template fetch<THREADS>(block.template keys<Bf16>(args.v, args, key), kv_stride, count, args.dim);
  };
  Ring<THREADS, decltype(fetch)> ring(&barrier, tiles, fetch);
  q.template fetch<THREADS>(block.template queries<Bf16>(args.q, args), q_stride, block.count, args.dim);
  ring.start();
  float s[N / 2], o[D / 2], most[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, kept[2], scale = args.scale * LOG2E;
  uint32_t operands[N / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; i++) o[i] = 0.f;
  // Scores become weights; what was summed before is to be multiplied by `kept`.
  auto soften = [&](int tile) {
    int key = (begin + tile) * N;
    bool whole = block.all_see(args, key, N);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (!whole) {
        Seen seen = seen_keys(block, args, warp_row + lane / 4 + 8 * half, key, N);
#pragma unroll
        for (int i = 0; i < N / 4; i++)
          if (!seen.has(i / 2 * 8 + 2 * (lane % 4) + i % 2)) s[i / 2 * 4 + 2 * half + i % 2] = -INFINITY;
      }
      float larger = most[half];
#pragma unroll
      for (int i = 0; i < N / 4; i++) larger = fmaxf(larger, s[i / 2 * 4 + 2 * half + i % 2]);
      larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 1));
      larger = fmaxf(larger, __shfl_xor_sync(0xffffffffu, larger, 2));
      float shift = larger == -INFINITY ? 0.f : larger * scale;
      kept[half] = exp2_fast(most[half] * scale - shift);
      most[half] = larger;
      sum[half] *= kept[half];
#pragma unroll
      for (int i = 0; i < N / 4; i++) {
        float& score = s[i / 2 * 4 + 2 * half + i % 2];
        score = exp2_fast(score * scale - shift);
        sum[half] += score;
      }
    }
  };
  ring.wait(0);
  multiply_begin();
  products<D, BLOCK_ROWS, N>(s, q, group_row, k(0));
  multiply_commit();
  multiply_wait<0>();
  soften(0);
  ring.middle(0);
  round_scores<N>(s, operands);
  for (int tile = 0; tile + 1 < tiles; tile++) {
    ring.wait(tile + 1);
    multiply_begin();
    products<D, BLOCK_ROWS, N>(s, q, group_row, k(tile + 1));
    multiply_commit();
    weighted<D, N>(o, operands, v(tile));
    multiply_commit();
    multiply_wait<1>();
    soften(tile + 1);
    multiply_wait<0>();
    ring.middle(tile + 1);
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] *= kept[i / 2 % 2];
    round_scores<N>(s, operands);
  }
  multiply_begin();
  weighted<D, N>(o, operands, v(tiles - 1));
  multiply_commit();
  multiply_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
    sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
    int i = warp_row + lane / 4 + 8 * half;
    if (lane % 4 == 0 && i < block.count) args.lse[block.row(args, i)] = most[half] * args.scale + logf(sum[half]);
  }
  write_sums<D>((Bf16*)args.to_o + block.row(args, 0) * args.dim, q_stride, o, 1.f / sum[0], 1.f / sum[1], warp_row, block.count, args.dim);
}

template <int D, int N, int GROUPS> __device__ __forceinline__ void backward_queries(const Args& args) {
  constexpr int BLOCK_ROWS = 64 * GROUPS, THREADS = GROUP * GROUPS;
  __shared__ uint64_t barrier;
  QueryBlock<BLOCK_ROWS> block(args);
  uint32_t base = aligned_memory();
  constexpr int SIDE = Tile<D, N>::BYTES;
  Tile<D, BLOCK_ROWS> q{base}, g{base + q.BYTES};
  auto k = [&](int tile) { return Tile<D, N>{base + 2 * q.BYTES + tile % PLACES * SIDE}; };
  auto v = [&](int tile) { return Tile<D, N>{base + 2 * q.BYTES + (PLACES + tile % PLACES) * SIDE}; };
  int warp_row = 16 * (threadIdx.x / 32), group_row = 64 * (threadIdx.x / 128), lane = threadIdx.x % 32;
  int q_stride = args.q_heads * args.dim, kv_stride = args.kv_heads * args.dim;
  int begin = block.key_begin / N, tiles = (block.key_end + N - 1) / N - begin;
  auto fetch = [&](int tile) {
    int key = (begin + tile) * N, count = min(N, (int)block.s.k_len - key);
    k(tile).template fetch<THREADS>(block.template keys<Bf16>(args.k, args, key), kv_stride, count, args.dim);
    v(tile).template fetch<THREADS>(block.template keys<Bf16>(args.v, args, key), kv_stride, count, args.dim);
  };
  Ring<THREADS, decltype(fetch)> ring(&barrier, tiles, fetch);
  q.template fetch<THREADS>(block.template queries<Bf16>(args.q, args), q_stride, block.count, args.dim);
  g.template fetch<THREADS>(block.template queries<Bf16>(args.g, args), q_stride, block.count, args.dim);
  ring.start();
  float lse[2], delta[2], scale = args.scale * LOG2E, s[N / 2], dp[N / 2], dq[D / 2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int i = warp_row + lane / 4 + 8 * half;
    bool there = i < block.count;
    lse[half] = there ? args.lse[block.row(args, i)] * LOG2E : 0.f;
    delta[half] = there ? args.delta[block.row(args, i)] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < D / 2; i++) dq[i] = 0.f;
  auto probability = [&](int tile) {
    int first = (begin + tile) * N;
    bool whole = block.all_see(args, first, N);
#pragma unroll
    for (int i = 0; i < N / 2; i++) s[i] = exp2_fast(scale * s[i] - lse[i / 2 % 2]);
    if (whole) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Seen seen = seen_keys(block, args, warp_row + lane / 4 + 8 * half, first, N);
#pragma unroll
      for (int i = 0; i < N / 4; i++)
        if (!seen.has(i / 2 * 8 + 2 * (lane % 4) + i % 2)) s[i / 2 * 4 + 2 * half + i % 2] = 0.f;
    }
  };
  auto gradient = [&]() {
#pragma unroll
    for (int i = 0; i < N / 2; i++) s[i] *= dp[i] - delta[i / 2 % 2];
  };
  uint32_t operands[N / 16][4];
  ring.wait(0);
  multiply_begin();
  products<D, BLOCK_ROWS, N>(s, q, group_row, k(0));
  products<D, BLOCK_ROWS, N>(dp, g, group_row, v(0));
  multiply_commit();
  multiply_wait<0>();
  probability(0);
  gradient();
  ring.middle(0);
  round_scores<N>(s, operands);
  for (int tile = 0; tile + 1 < tiles; tile++) {
    ring.wait(tile + 1);
    multiply_begin();
    products<D, BLOCK_ROWS, N>(s, q, group_row, k(tile + 1));
    multiply_commit();
    products<D, BLOCK_ROWS, N>(dp, g, group_row, v(tile + 1));
    multiply_commit();
    weighted<D, N>(dq, operands, k(tile));
    multiply_commit();
    multiply_wait<2>();
    probability(tile + 1);
    multiply_wait<1>();
    gradient();
    multiply_wait<0>();
    ring.middle(tile + 1);
    round_scores<N>(s, operands);
  }
  multiply_begin();
  weighted<D, N>(dq, operands, k(tiles - 1));
  multiply_commit();
  multiply_wait<0>();
  write_sums<D>((Bf16*)args.dq + block.row(args, 0) * args.dim, q_stride, dq, args.scale, args.scale, warp_row, block.count, args.dim);
}

// The block is of keys here; N queries at a time.
template <int D, int N, int GROUPS> __device__ __forceinline__ void backward_keys(const Args& args) {
  constexpr int BLOCK_ROWS = 64 * GROUPS, THREADS = GROUP * GROUPS;
  __shared__ uint64_t barrier;
  __shared__ float numbers[PLACES * 2 * N];  // lse and delta of a tile's queries
  KeyBlock<BLOCK_ROWS> block(args, N);
  uint32_t base = aligned_memory();
  constexpr int SIDE = Tile<D, N>::BYTES;
  Tile<D, BLOCK_ROWS> k{base}, v{base + k.BYTES};
  auto q = [&](int step) { return Tile<D, N>{base + 2 * k.BYTES + step % PLACES * SIDE}; };
  auto g = [&](int step) { return Tile<D, N>{base + 2 * k.BYTES + (PLACES + step % PLACES) * SIDE}; };
  int warp_row = 16 * (threadIdx.x / 32), group_row = 64 * (threadIdx.x / 128), lane = threadIdx.x % 32;
  int q_stride = args.q_heads * args.dim, kv_stride = args.kv_heads * args.dim;
  static_assert(2 * N <= THREADS, "a number a thread");
  typename KeyBlock<BLOCK_ROWS>::Place fetched, counted;
  auto fetch = [&](int step) {
    int query = block.query(fetched, N), there = min(N, (int)block.s.q_len - query);
    int64_t row = block.query_row(args, fetched, N);
    block.advance(fetched);
    q(step).template fetch<THREADS>((const Bf16*)args.q + row * args.dim, q_stride, there, args.dim);
    g(step).template fetch<THREADS>((const Bf16*)args.g + row * args.dim, q_stride, there, args.dim);
    if (int i = threadIdx.x; i < 2 * N) {
      bool valid = i % N < there;
      const float* from = (i < N ? args.lse : args.delta) + row + (valid ? (int64_t)(i % N) * args.q_heads : 0);
      copy4(shared_at(numbers + step % PLACES * 2 * N + i), from, valid);
    }
  };
  Ring<THREADS, decltype(fetch)> ring(&barrier, block.steps, fetch);
  float p[N / 2], dp[N / 2], dk[D / 2], dv[D / 2], scale = args.scale * LOG2E;
#pragma unroll
  for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0.f;
  auto probability = [&](int step) {
    const float* lse = numbers + step % PLACES * 2 * N;
    int query = block.query(counted, N);
    block.advance(counted);
    bool whole = block.all_see(args, query, N);
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      int at = 8 * j + 2 * (lane % 4);
      float shift[2] = {lse[at] * LOG2E, lse[at + 1] * LOG2E};
#pragma unroll
      for (int e = 0; e < 4; e++) p[4 * j + e] = exp2_fast(scale * p[4 * j + e] - shift[e % 2]);
    }
    if (whole) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Seen seen = seeing_queries(block, args, warp_row + lane / 4 + 8 * half, query, N);
#pragma unroll
      for (int i = 0; i < N / 4; i++)
        if (!seen.has(i / 2 * 8 + 2 * (lane % 4) + i % 2)) p[i / 2 * 4 + 2 * half + i % 2] = 0.f;
    }
  };
  auto gradient = [&](int step) {
    const float* delta = numbers + step % PLACES * 2 * N + N;
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      int at = 8 * j + 2 * (lane % 4);
      float less[2] = {delta[at], delta[at + 1]};
#pragma unroll
      for (int e = 0; e < 4; e++) dp[4 * j + e] = p[4 * j + e] * (dp[4 * j + e] - less[e % 2]);
    }
  };
  if (block.steps > 0) {
    uint32_t operands[N / 16][4], gradients[N / 16][4];
    k.template fetch<THREADS>((const Bf16*)args.k + block.row * args.dim, kv_stride, block.count, args.dim);
    v.template fetch<THREADS>((const Bf16*)args.v + block.row * args.dim, kv_stride, block.count, args.dim);
    ring.start();
    ring.wait(0);
    multiply_begin();
    products<D, BLOCK_ROWS, N>(p, k, group_row, q(0));
    products<D, BLOCK_ROWS, N>(dp, v, group_row, g(0));
    multiply_commit();
    multiply_wait<0>();
    probability(0);
    gradient(0);
    ring.middle(0);
    round_scores<N>(p, operands);
    round_scores<N>(dp, gradients);
    for (int step = 0; step + 1 < block.steps; step++) {
      ring.wait(step + 1);
      multiply_begin();
      products<D, BLOCK_ROWS, N>(p, k, group_row, q(step + 1));
      multiply_commit();
      weighted<D, N>(dv, operands, g(step));
      multiply_commit();
      products<D, BLOCK_ROWS, N>(dp, v, group_row, g(step + 1));
      multiply_commit();
      weighted<D, N>(dk, gradients, q(step));
      multiply_commit();
      multiply_wait<3>();
      probability(step + 1);
      multiply_wait<2>();
      round_scores<N>(p, operands);
      multiply_wait<1>();
      gradient(step + 1);
      multiply_wait<0>();
      ring.middle(step + 1);
      round_scores<N>(dp, gradients);
    }
    multiply_begin();
    weighted<D, N>(dv, operands, g(block.steps - 1));
    weighted<D, N>(dk, gradients, q(block.steps - 1));
    multiply_commit();
    multiply_wait<0>();
  }
  write_sums<D>((Bf16*)args.dk + block.row * args.dim, kv_stride, dk, args.scale, args.scale, warp_row, block.count, args.dim);
  write_sums<D>((Bf16*)args.dv + block.row * args.dim, kv_stride, dv, 1.f, 1.f, warp_row, block.count, args.dim);
}

}  // namespace attention_hopper
