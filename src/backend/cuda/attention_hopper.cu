// Instances of attention_hopper.cuh: attention_<forward | backward_queries | backward_keys>_<D>.
#include "attention_hopper.cuh"

#define KERNEL(NAME, GROUPS, BLOCKS, CALL) \
  extern "C" __global__ void __launch_bounds__(attention_hopper::GROUP * GROUPS, BLOCKS) NAME(const __grid_constant__ attention::Args args) { CALL(args); }

KERNEL(attention_forward_64, 2, 2, (attention_hopper::forward<64, 64, 2>))
KERNEL(attention_forward_128, 2, 1, (attention_hopper::forward<128, 64, 2>))
KERNEL(attention_backward_queries_64, 2, 1, (attention_hopper::backward_queries<64, 64, 2>))
KERNEL(attention_backward_queries_128, 2, 1, (attention_hopper::backward_queries<128, 64, 2>))
KERNEL(attention_backward_keys_64, 2, 1, (attention_hopper::backward_keys<64, 64, 2>))
KERNEL(attention_backward_keys_128, 2, 1, (attention_hopper::backward_keys<128, 64, 2>))
