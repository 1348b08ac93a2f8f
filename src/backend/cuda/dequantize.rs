//! Blocks to elements on CUDA: `dequantize.cuh`. The dtype was checked by `custom_ops::dequantize`.

use candle_core::{DType, Tensor};

use super::device::{Gpu, Held, Kernel, cuda_device, tensor, typed, uninit};
use crate::Result;
use crate::backend::quantized::{Kind, QuantizedTensor};

const OP: &str = "dequantize";

#[repr(C)]
struct Args {
    blocks: u64,
    w: u64,
    count: i64,
}

/// W `[n, k]` in `dtype`.
pub fn dequantize(w: &QuantizedTensor, dtype: DType) -> Result<Tensor> {
    let device = cuda_device(OP, w.bytes())?;
    let gpu = Gpu::of(device)?;
    let &[n, k] = w.dims();
    let dense = tensor(uninit(device, &(n, k).into(), dtype)?, (n, k));
    let (blocks, count) = (Held::bytes(OP, "w", w.bytes())?.view.ptr, n * k);
    let args = Args { blocks, w: Held::of(OP, "w", &dense)?.view.ptr, count: count as i64 };
    // SAFETY: `Args` mirrors the kernels'; the blocks are those of `count` elements, whole groups of 32; memory is of this stream.
    unsafe { gpu.launch(kernel(w.kind(), dtype), gpu.blocks(count / 8), 8, 0, &device.cuda_stream(), &args)? };
    Ok(dense)
}

fn kernel(kind: Kind, dtype: DType) -> Kernel {
    match kind {
        Kind::Q8_0 => typed!(Dequantize, "dequantize_q8_0", dtype),
        Kind::Q4_0 => typed!(Dequantize, "dequantize_q4_0", dtype),
        Kind::Q4_1 => typed!(Dequantize, "dequantize_q4_1", dtype),
        Kind::Q5_0 => typed!(Dequantize, "dequantize_q5_0", dtype),
        Kind::Q5_1 => typed!(Dequantize, "dequantize_q5_1", dtype),
        Kind::Q4K => typed!(Dequantize, "dequantize_q4_k", dtype),
        Kind::Q5K => typed!(Dequantize, "dequantize_q5_k", dtype),
        Kind::Q6K => typed!(Dequantize, "dequantize_q6_k", dtype),
        Kind::Nf4 => typed!(Dequantize, "dequantize_nf4", dtype),
        Kind::Affine4 => typed!(Dequantize, "dequantize_affine4", dtype),
        Kind::Affine8 => typed!(Dequantize, "dequantize_affine8", dtype),
    }
}
