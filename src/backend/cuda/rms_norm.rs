//! RMS norm on CUDA: `rms_norm.cuh`. Shapes and dtypes were checked by `custom_ops::rms_norm`.

use candle_core::{DType, Tensor};

use super::device::{Gpu, Held, Kernel, Module, View, address, cuda_device, empty, scratch, tensor, typed, uninit};
use crate::Result;

const OP: &str = "rms_norm";
/// Row ranges that dweight is summed in.
const RANGES: usize = 32;

/// The kernel `<op>_<dtype>_<dtype of the weight>_<8 or 1 elements an access>`.
macro_rules! instance {
    ($op:literal, $x:expr, $w:expr, $fits:expr) => {
        Kernel::Named(
            Module::Decoder,
            match ($x, $w, $fits) {
                (DType::BF16, DType::BF16, true) => concat!($op, "_bf16_bf16_8"),
                (DType::BF16, DType::BF16, false) => concat!($op, "_bf16_bf16_1"),
                (DType::BF16, _, true) => concat!($op, "_bf16_f32_8"),
                (DType::BF16, _, false) => concat!($op, "_bf16_f32_1"),
                (DType::F16, DType::F16, true) => concat!($op, "_f16_f16_8"),
                (DType::F16, DType::F16, false) => concat!($op, "_f16_f16_1"),
                (DType::F16, _, true) => concat!($op, "_f16_f32_8"),
                (DType::F16, _, false) => concat!($op, "_f16_f32_1"),
                (_, _, true) => concat!($op, "_f32_f32_8"),
                (_, _, false) => concat!($op, "_f32_f32_1"),
            },
        )
    };
}

#[repr(C)]
struct Args {
    x: u64,
    residual: u64,
    w: u64,
    sum: u64,
    y: u64,
    rstd: u64,
    n: i64,
    eps: f32,
}

#[repr(C)]
struct BackwardArgs {
    x: u64,
    w: u64,
    g: u64,
    dx: u64,
    rstd: u64,
    parts: u64,
    m: i64,
    n: i64,
    rows: i32,
}

/// `(sum, y, rstd)` of `x + residual`; without a residual there is no sum.
pub fn forward(
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
    m: usize,
) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let device = cuda_device(OP, x)?;
    if m == 0 {
        let none = || empty(device, x.shape(), x.dtype());
        let sum = if residual.is_some() { Some(none()?) } else { None };
        return Ok((sum, none()?, empty(device, 0, DType::F32)?));
    }
    let n = x.elem_count() / m;
    let like = || Ok::<_, crate::Error>(tensor(uninit(device, x.shape(), x.dtype())?, x.shape()));
    let (sum, y) = (if residual.is_some() { Some(like()?) } else { None }, like()?);
    let rstd = tensor(uninit(device, &m.into(), DType::F32)?, m);
    let views = [Held::of(OP, "x", x)?.view, Held::of(OP, "weight", weight)?.view];
    let residual = Held::option(OP, "residual", residual)?.map(|residual| residual.view);
    let args = Args {
        x: views[0].ptr,
        residual: residual.map_or(0, |residual| residual.ptr),
        w: views[1].ptr,
        sum: Held::option(OP, "sum", sum.as_ref())?.map_or(0, |sum| sum.view.ptr),
        y: Held::of(OP, "y", &y)?.view.ptr,
        rstd: Held::of(OP, "rstd", &rstd)?.view.ptr,
        n: n as i64,
        eps: eps as f32,
    };
    let fits = n.is_multiple_of(8) && views.iter().chain(&residual).all(View::aligned);
    let kernel = instance!("rms_norm_forward", x.dtype(), weight.dtype(), fits);
    // SAFETY: `Args` mirrors the kernel's; every tensor has m rows of n; memory is of this stream.
    unsafe { Gpu::of(device)?.launch(kernel, [m, 1], warps(n), 0, &device.cuda_stream(), &args)? };
    Ok((sum, y, rstd))
}

/// Adds to dx and, where it is given, to dweight `[n]` f32.
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    g: &Tensor,
    dx: &Tensor,
    dweight: Option<&Tensor>,
    m: usize,
) -> Result<()> {
    if m == 0 {
        return Ok(());
    }
    let device = cuda_device(OP, x)?;
    let (gpu, stream, n) = (Gpu::of(device)?, device.cuda_stream(), x.elem_count() / m);
    let views = [
        Held::of(OP, "x", x)?.view,
        Held::of(OP, "weight", weight)?.view,
        Held::of(OP, "g", g)?.view,
        Held::of(OP, "dx", dx)?.view,
    ];
    let rows = m.div_ceil(RANGES);
    let ranges = m.div_ceil(rows);
    let parts = scratch(device, if dweight.is_some() { ranges * n } else { 1 })?;
    let args = BackwardArgs {
        x: views[0].ptr,
        w: views[1].ptr,
        g: views[2].ptr,
        dx: views[3].ptr,
        rstd: Held::of(OP, "rstd", rstd)?.view.ptr,
        parts: address(&parts, &stream),
        m: m as i64,
        n: n as i64,
        rows: rows as i32,
    };
    if let Some(dweight) = dweight {
        let kernel = typed!(Decoder, "rms_norm_weight", x.dtype());
        // SAFETY: `BackwardArgs` mirrors the kernel's; parts has room for every range.
        unsafe { gpu.launch(kernel, [n.div_ceil(256), ranges], 8, 0, &stream, &args)? };
        let sum = SumColumns {
            parts: args.parts,
            to: Held::of(OP, "dweight", dweight)?.view.ptr,
            n: n as i64,
            count: ranges as i32,
        };
        let kernel = Kernel::Named(Module::Decoder, "rms_norm_weight_sum");
        // SAFETY: `SumColumns` mirrors the kernel's; dweight has n elements.
        unsafe { gpu.launch(kernel, gpu.blocks(n), 8, 0, &stream, &sum)? };
    }
    let fits = n.is_multiple_of(8) && views.iter().all(View::aligned);
    let kernel = instance!("rms_norm_backward", x.dtype(), weight.dtype(), fits);
    // SAFETY: as above.
    unsafe { gpu.launch(kernel, [m, 1], warps(n), 0, &stream, &args) }
}

/// Sums of columns over ranges of rows, of this op and of `dora`.
#[repr(C)]
pub(super) struct SumColumns {
    pub parts: u64,
    pub to: u64,
    pub n: i64,
    pub count: i32,
}

/// Warps of a block that makes a row of n.
fn warps(n: usize) -> usize {
    n.div_ceil(8 * 32).clamp(1, 8)
}
