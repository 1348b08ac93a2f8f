// Instances of attention_hopper.cuh: attention_<forward | backward_queries | backward_keys>_<D>.
#include "attention_hopper.cuh"

#define KERNEL(NAME, BLOCKS, CALL) \
  extern "C" __global__ void __launch_bounds__(attention_hopper::BLOCK_THREADS, BLOCKS) NAME(const __grid_constant__ attention::Args args) { CALL(args); }

KERNEL(attention_forward_64, 2, (attention_hopper::forward<64, 128>))
KERNEL(attention_forward_128, 1, (attention_hopper::forward<128, 128>))
KERNEL(attention_backward_queries_64, 2, (attention_hopper::backward_queries<64, 64>))
KERNEL(attention_backward_queries_128, 1, (attention_hopper::backward_queries<128, 64>))
KERNEL(attention_backward_keys_64, 1, (attention_hopper::backward_keys<64, 64>))
KERNEL(attention_backward_keys_128, 1, (attention_hopper::backward_keys<128, 64>))
