// Instances: of attention.cuh attention_<forward | backward_queries | backward_keys>_<dtype>, of attention_tiles.cuh the same with _<D>.
#include "attention_tiles.cuh"

#define TYPE(t, T)                                                                                                                  \
  extern "C" __global__ void attention_forward_##t(const __grid_constant__ attention::Args args) { attention::forward<T>(args); }      \
  extern "C" __global__ void attention_backward_queries_##t(const __grid_constant__ attention::Args args) { attention::backward_queries<T>(args); } \
  extern "C" __global__ void attention_backward_keys_##t(const __grid_constant__ attention::Args args) { attention::backward_keys<T>(args); }

TYPE(f32, float)
TYPE(f16, elements::F16)
TYPE(bf16, elements::Bf16)

#define TILES(t, T, D, FORWARD, QUERIES, KEYS)                                                                                                \
  extern "C" __global__ void __launch_bounds__(attention::TILE_THREADS) attention_forward_##t##_##D(const __grid_constant__ attention::Args args) { \
    attention::forward_tiles<T, D, FORWARD>(args);                                                                                             \
  }                                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(attention::TILE_THREADS) attention_backward_queries_##t##_##D(const __grid_constant__ attention::Args args) { \
    attention::backward_queries_tiles<T, D, QUERIES>(args);                                                                                    \
  }                                                                                                                                           \
  extern "C" __global__ void __launch_bounds__(attention::TILE_THREADS, 2) attention_backward_keys_##t##_##D(const __grid_constant__ attention::Args args) { \
    attention::backward_keys_tiles<T, D, KEYS>(args);                                                                                          \
  }
#define SIZES(t, T)                                                                                                                  \
  TILES(t, T, 64, 64, 64, 64)                                                                                                        \
  TILES(t, T, 96, 64, 64, 32)                                                                                                        \
  TILES(t, T, 128, 64, 32, 32)                                                                                                       \
  extern "C" __global__ void attention_delta_##t(const __grid_constant__ attention::Args args) { attention::delta_rows<T>(args); }

SIZES(f16, elements::F16)
SIZES(bf16, elements::Bf16)
