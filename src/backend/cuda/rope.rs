//! The rotary embedding on CUDA: `rope.cuh`. Shapes and dtypes were checked by `custom_ops::rope`.

use candle_core::Tensor;

use super::device::{Gpu, Held, View, address, cuda_device, wide};
use crate::Result;

const OP: &str = "rope";

#[repr(C)]
struct Args {
    x: u64,
    cos: u64,
    sin: u64,
    positions: u64,
    pairs: i64,
    heads: i32,
    half: i32,
    sign: f32,
}

/// Rotates x `[T, heads, D]`, not empty, in place.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &[u32], heads: usize, inverse: bool) -> Result<()> {
    let device = cuda_device(OP, x)?;
    let (gpu, stream) = (Gpu::of(device)?, device.cuda_stream());
    let positions = gpu.upload(device, positions)?;
    let views = [Held::of(OP, "x", x)?.view, Held::of(OP, "cos", cos)?.view, Held::of(OP, "sin", sin)?.view];
    let (pairs, half) = (x.elem_count() / 2, cos.dims()[1]);
    let args = Args {
        x: views[0].ptr,
        cos: views[1].ptr,
        sin: views[2].ptr,
        positions: address(&positions, &stream),
        pairs: pairs as i64,
        heads: heads as i32,
        half: half as i32,
        sign: if inverse { -1.0 } else { 1.0 },
    };
    let fits = half.is_multiple_of(8) && views.iter().all(View::aligned);
    let kernel = wide!("rope", x.dtype(), fits);
    let blocks = gpu.blocks(if fits { pairs / 8 } else { pairs });
    // SAFETY: `Args` mirrors the kernel's; every position is in the tables; memory is of this stream.
    unsafe { gpu.launch(kernel, blocks, 8, 0, &stream, &args) }
}
