// Kernels of the linear and its adapter for compute capability 9.0a: linear.cuh, linear_project.cuh, linear_outer.cuh,
// linear_terms.cuh.
#include "linear.cuh"
#include "linear_outer.cuh"
#include "linear_project.cuh"
#include "linear_terms.cuh"

#define CLUSTERED(THREADS) __global__ void __cluster_dims__(hopper::CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)

extern "C" CLUSTERED(linear::THREADS) linear_forward(const __grid_constant__ linear::Args args) { linear::run<false>(args); }
extern "C" CLUSTERED(linear::THREADS) linear_backward(const __grid_constant__ linear::Args args) { linear::run<true>(args); }
// Up to 16 and up to 64 ranks of all adapters together.
extern "C" CLUSTERED(project::THREADS) linear_project_16(const __grid_constant__ project::Args args) { project::Kernel<16>::run(args); }
extern "C" CLUSTERED(project::THREADS) linear_project_64(const __grid_constant__ project::Args args) { project::Kernel<64>::run(args); }
// 64 and 128 columns of terms.
extern "C" __global__ void __launch_bounds__(outer::Kernel<1>::THREADS, 1) linear_outer_64(const __grid_constant__ outer::Args args) { outer::Kernel<1>::run(args); }
extern "C" __global__ void __launch_bounds__(outer::Kernel<2>::THREADS, 1) linear_outer_128(const __grid_constant__ outer::Args args) { outer::Kernel<2>::run(args); }
extern "C" __global__ void linear_outer_sum(const __grid_constant__ outer::SumArgs args) { outer::sum(args); }
extern "C" __global__ void linear_adapter_terms(const __grid_constant__ terms::Adapters args) { terms::adapters(args); }
extern "C" __global__ void linear_part_terms(const __grid_constant__ terms::Parts args) { terms::parts(args); }

static_assert(linear::SHARED + 1024 <= 227 * 1024 && project::Kernel<16>::SHARED + 1024 <= 227 * 1024 && project::Kernel<64>::SHARED + 1024 <= 227 * 1024,
              "a block's shared memory");
