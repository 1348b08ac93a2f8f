//! AdamW and sums on CUDA: `adamw.cuh`. Shapes and dtypes were checked by `custom_ops::adamw`.

use candle_core::Tensor;
use candle_core::cuda_backend::CudaDevice;

use super::device::{Gpu, Held, Kernel, Module, address, cuda_device};
use crate::Result;
use crate::backend::cpu::adamw::Step;

const OP: &str = "adamw";
/// Blocks of the first level of a sum, whatever the GPU, so that the bits are the same on all.
const SUM_BLOCKS: usize = 256;

#[repr(C)]
struct Args {
    block: u64,
    grads: u64,
    n: i64,
    grad_scale: f32,
    decay: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    step_size: f32,
    root_correction2: f32,
    epsilon: f32,
}

#[repr(C)]
struct SumArgs {
    from: u64,
    to: u64,
    n: i64,
    square: i32,
}

/// One step of `block` `[3, n]`.
pub fn step(block: &Tensor, grads: &Tensor, step: Step) -> Result<()> {
    let n = grads.elem_count();
    if n == 0 {
        return Ok(());
    }
    let device = cuda_device(OP, block)?;
    let gpu = Gpu::of(device)?;
    let args = Args {
        block: Held::of(OP, "block", block)?.view.ptr,
        grads: Held::of(OP, "grads", grads)?.view.ptr,
        n: n as i64,
        grad_scale: step.grad_scale,
        decay: step.decay,
        beta2: step.beta2,
        one_minus_beta1: step.one_minus_beta1,
        one_minus_beta2: step.one_minus_beta2,
        step_size: step.step_size,
        root_correction2: step.root_correction2,
        epsilon: step.epsilon,
    };
    let kernel = Kernel::Named(Module::Decoder, "adamw_step");
    // SAFETY: `Args` mirrors the kernel's; block has 3 n elements, grads n; memory is of this stream.
    unsafe { gpu.launch(kernel, gpu.blocks(n), 8, 0, &device.cuda_stream(), &args) }
}

/// The sum of squares of contiguous f32 `grads`. Waits for it.
pub fn squared_norm(grads: &Tensor) -> Result<f64> {
    let device = cuda_device(OP, grads)?;
    sum(device, Held::of(OP, "grads", grads)?.view.ptr, grads.elem_count(), true)
}

/// The sum of n f32, or of their squares, in f64. Waits for it.
pub(super) fn sum(device: &CudaDevice, from: u64, n: usize, square: bool) -> Result<f64> {
    if n == 0 {
        return Ok(0.0);
    }
    let (gpu, stream) = (Gpu::of(device)?, device.cuda_stream());
    // SAFETY: the kernel writes one element for each block.
    let parts = unsafe { device.alloc::<f64>(SUM_BLOCKS) }?;
    let args = SumArgs { from, to: address(&parts, &stream), n: n as i64, square: square as i32 };
    let kernel = Kernel::Named(Module::Decoder, "sum_f64");
    // SAFETY: `SumArgs` mirrors the kernel's; memory is of this stream.
    unsafe { gpu.launch(kernel, [SUM_BLOCKS, 1], 8, 0, &stream, &args)? };
    Ok(device.clone_dtoh(&parts)?.iter().sum())
}
