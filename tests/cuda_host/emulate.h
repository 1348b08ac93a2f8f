// CUDA's threads and the few instructions that the LoRA kernels use, on the CPU, so that their source text runs where there is
// no GPU. Threads are fibers; a fiber runs until it meets the others of its warp or block. Shared memory starts as NaN,
// asynchronous copies land as late as they may, and the order of the warps is the caller's, so that a missing wait or barrier
// shows as a wrong result.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define HOST_PRIMITIVES
#define __device__
#define __forceinline__ inline
#define __restrict__

struct uint4 { uint32_t x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Dim { int x = 1, y = 1, z = 1; };

struct Copy { void* to; uint4 value; };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Dim thread;
  bool done = false, at_barrier = false;
  std::vector<std::vector<Copy>> groups;
};

struct Warp {
  uint32_t slots[2][32][8];
  int arrived = 0, generation = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  Dim index, size, grid;
  std::function<void()> body;
};
inline Block* block;

#define threadIdx (block->current->thread)
#define blockIdx (block->index)
#define blockDim (block->size)
#define gridDim (block->grid)

inline void yield() { swapcontext(&block->current->context, &block->scheduler); }
inline void __syncthreads() {
  block->current->at_barrier = true;
  while (block->current->at_barrier) yield();
}
// Gives `mine` to the warp and returns everybody's.
inline uint32_t (*exchange(const uint32_t (&mine)[8]))[8] {
  Warp& warp = block->warps[threadIdx.x / 32];
  int generation = warp.generation;
  memcpy(warp.slots[generation % 2][threadIdx.x % 32], mine, sizeof mine);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    warp.generation++;
  }
  while (warp.generation == generation) yield();
  return warp.slots[generation % 2];
}
inline void __syncwarp() {
  uint32_t none[8] = {};
  exchange(none);
}

inline uint32_t __float_as_uint(float v) { uint32_t d; memcpy(&d, &v, 4); return d; }
inline float __uint_as_float(uint32_t v) { float d; memcpy(&d, &v, 4); return d; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint64_t)a * b >> 32; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t both = (uint64_t)b << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; i++) d |= (uint32_t)(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return d;
}
template <class T> T __ldg(const T* p) {
  if ((uintptr_t)p % sizeof(T)) { fprintf(stderr, "misaligned load of %zu bytes\n", sizeof(T)); abort(); }
  return *p;
}
inline float bf16_of(uint32_t v) { return __uint_as_float(v << 16); }
inline uint32_t round_bf16(float v) {
  uint32_t u = __float_as_uint(v);
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline uint32_t to_bf16x2(float low, float high) { return round_bf16(low) | round_bf16(high) << 16; }
inline uint32_t to_f16x2(float low, float high) {
  auto bits = [](float v) { _Float16 h = (_Float16)v; uint16_t u; memcpy(&u, &h, 2); return (uint32_t)u; };
  return bits(low) | bits(high) << 16;
}
inline float from_f16(uint16_t v) { _Float16 h; memcpy(&h, &v, 2); return (float)h; }

inline float __shfl_sync(uint32_t, float v, int lane) { return __uint_as_float(exchange({__float_as_uint(v)})[lane][0]); }
inline float __shfl_xor_sync(uint32_t, float v, int mask) { return __shfl_sync(0, v, threadIdx.x % 32 ^ mask); }
inline void let_next_start() {}
inline void wait_for_previous() {}
inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  auto all = exchange({a0, a1, a2, a3, b0, b1, 0, 0});
  auto at = [](uint32_t pair, int i) { return bf16_of(i % 2 ? pair >> 16 : pair & 0xffff); };
  int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    int row = lane / 4, column = 2 * (lane % 4) + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++)
      sum += at(all[row * 4 + k % 8 / 2][i / 2 + 2 * (k / 8)], k) * at(all[column * 4 + k % 8 / 2][4 + k / 8], k);
    d[i] += sum;
  }
}
inline uint32_t transpose8x8(uint32_t v) {
  auto all = exchange({v});
  int row = threadIdx.x % 32 / 4, column = 2 * (threadIdx.x % 4);
  auto at = [&](int r, int c) { return all[r * 4 + c / 2][0] >> (16 * (c % 2)) & 0xffff; };
  return at(column, row) | at(column + 1, row) << 16;
}
inline void load_transposed(uint32_t (&d)[4], const void* p) {
  uint64_t address = (uint64_t)p;
  auto all = exchange({(uint32_t)address, (uint32_t)(address >> 32)});
  int lane = threadIdx.x % 32;
  for (int matrix = 0; matrix < 4; matrix++) {
    uint32_t pair[2];
    for (int i = 0; i < 2; i++) {
      auto& from = all[8 * matrix + 2 * (lane % 4) + i];
      pair[i] = ((const uint16_t*)((uint64_t)from[1] << 32 | from[0]))[lane / 4];
    }
    d[matrix] = pair[0] | pair[1] << 16;
  }
}
inline void copy_async(void* to, const void* from, bool valid) {
  if (valid && ((uintptr_t)from % 16 || (uintptr_t)to % 16)) { fprintf(stderr, "misaligned copy\n"); abort(); }
  auto& groups = block->current->groups;
  if (groups.empty()) groups.emplace_back();
  Copy copy = {to, {}};
  if (valid) memcpy(&copy.value, from, 16);
  groups.back().push_back(copy);
}
inline void copy_async_once(void* to, const void* from, bool valid) { copy_async(to, from, valid); }
inline void copy_commit() {
  auto& groups = block->current->groups;
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}
template <int N> void copy_wait() {
  auto& groups = block->current->groups;
  while ((int)groups.size() > N + 1) {
    for (auto& copy : groups[0]) memcpy(copy.to, &copy.value, 16);
    groups.erase(groups.begin());
  }
}

inline void enter() {
  block->body();
  block->current->done = true;
  yield();
}

// Runs body(shared memory) in every thread of every block.
template <class F> void launch(Dim grid, int threads, size_t shared_bytes, bool reversed, F body) {
  std::vector<uint4> shared(shared_bytes / 16 + 1);
  for (int y = 0; y < grid.y; y++)
    for (int x = 0; x < grid.x; x++) {
      memset(shared.data(), 0xff, shared.size() * 16);
      Block here;
      block = &here;
      here.index = {x, y, 1};
      here.grid = grid;
      here.size = {threads, 1, 1};
      here.fibers.resize(threads);
      here.warps.resize(threads / 32);
      here.body = [&] { body((unsigned char*)shared.data()); };
      for (int i = 0; i < threads; i++) {
        Fiber& fiber = here.fibers[i];
        fiber.thread = {i, 0, 0};
        fiber.stack.resize(64 << 10);
        getcontext(&fiber.context);
        fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
      }
      for (size_t done = 0; done < here.fibers.size();) {
        for (int w = 0; w < threads / 32; w++) {
          int warp = reversed ? threads / 32 - 1 - w : w;
          for (bool running = true; running;) {
            running = false;
            for (int lane = 0; lane < 32; lane++) {
              Fiber& fiber = here.fibers[warp * 32 + lane];
              if (fiber.done || fiber.at_barrier) continue;
              here.current = &fiber;
              swapcontext(&here.scheduler, &fiber.context);
              running = true;
            }
          }
        }
        done = 0;
        for (auto& fiber : here.fibers) {
          done += fiber.done;
          fiber.at_barrier = false;
        }
      }
    }
}
