//! Products of a few rows with a quantized weight on CUDA: `few_rows.cuh`. Shapes and dtypes were checked by `custom_ops::linear`.

use candle_core::{DType, Tensor};

use super::device::{Gpu, Held, Kernel, Module, View, cuda_device, tensor, uninit};
use super::fused_lora::with_last;
use crate::Result;
use crate::backend::quantized::{Kind, QuantizedTensor};

const OP: &str = "linear";
/// The most rows: from more on a product is faster with W made dense first.
pub const MOST: usize = 4;

#[repr(C)]
struct Args {
    x: u64,
    blocks: u64,
    bias: u64,
    y: u64,
    k: i64,
    n: i64,
    m: i32,
}

/// `x Wᵀ + bias`; `None` where x has no rows or too many. `[m, k, n]`.
pub fn forward(x: &Tensor, w: &QuantizedTensor, bias: Option<&Tensor>, sizes: [usize; 3]) -> Result<Option<Tensor>> {
    let [m, k, n] = sizes;
    if !(1..=MOST).contains(&m) {
        return Ok(None);
    }
    let device = cuda_device(OP, x)?;
    let x = match Held::of(OP, "x", x) {
        Ok(held) if View::aligned(&held.view) => x.clone(),
        // A copy lies where eight elements are one access.
        _ => x.force_contiguous()?,
    };
    let shape = with_last(&x, n);
    let y = tensor(uninit(device, &shape.clone().into(), x.dtype())?, shape);
    let bias = bias.map(|bias| bias.to_dtype(DType::F32)?.contiguous()).transpose()?;
    let args = Args {
        x: Held::of(OP, "x", &x)?.view.ptr,
        blocks: Held::bytes(OP, "w", w.bytes())?.view.ptr,
        bias: Held::option(OP, "bias", bias.as_ref())?.map_or(0, |bias| bias.view.ptr),
        y: Held::of(OP, "y", &y)?.view.ptr,
        k: k as i64,
        n: n as i64,
        m: m as i32,
    };
    let kernel = kernel(w.kind(), x.dtype(), m);
    // Four warps a block, each a column.
    let blocks = [n.div_ceil(4), 1];
    // SAFETY: `Args` mirrors the kernels'; x has m rows of k and lies on 16 bytes, W n rows of whole blocks; memory is of this stream.
    unsafe { Gpu::of(device)?.launch(kernel, blocks, 4, 0, &device.cuda_stream(), &args)? };
    Ok(Some(y))
}

/// The kernel `few_rows_<kind>_<dtype>_<1 or 4 rows>`.
macro_rules! instance {
    ($kind:literal, $dtype:expr, $one:expr) => {
        match ($dtype, $one) {
            (DType::BF16, true) => concat!("few_rows_", $kind, "_bf16_1"),
            (DType::BF16, false) => concat!("few_rows_", $kind, "_bf16_4"),
            (DType::F16, true) => concat!("few_rows_", $kind, "_f16_1"),
            (DType::F16, false) => concat!("few_rows_", $kind, "_f16_4"),
            (_, true) => concat!("few_rows_", $kind, "_f32_1"),
            (_, false) => concat!("few_rows_", $kind, "_f32_4"),
        }
    };
}

fn kernel(kind: Kind, dtype: DType, m: usize) -> Kernel {
    let one = m == 1;
    let name = match kind {
        Kind::Q8_0 => instance!("q8_0", dtype, one),
        Kind::Q4_0 => instance!("q4_0", dtype, one),
        Kind::Q4_1 => instance!("q4_1", dtype, one),
        Kind::Q5_0 => instance!("q5_0", dtype, one),
        Kind::Q5_1 => instance!("q5_1", dtype, one),
        Kind::Q4K => instance!("q4_k", dtype, one),
        Kind::Q5K => instance!("q5_k", dtype, one),
        Kind::Q6K => instance!("q6_k", dtype, one),
        Kind::Nf4 => instance!("nf4", dtype, one),
        Kind::Affine4 => instance!("affine4", dtype, one),
        Kind::Affine8 => instance!("affine8", dtype, one),
    };
    Kernel::Named(Module::Dequantize, name)
}
