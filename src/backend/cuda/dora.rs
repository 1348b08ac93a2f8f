//! DoRA's scale on CUDA: `dora.cuh`. Shapes and dtypes were checked by `custom_ops::dora`.

use candle_core::{DType, Tensor};

use super::device::{
    Gpu, Held, Kernel, Module, View, address, cuda_device, empty, scratch, tensor, typed, uninit, wide,
};
use super::rms_norm::SumColumns;
use crate::Result;
use crate::backend::custom_ops::dora::SHORTEST;

const OP: &str = "dora";
/// Row ranges that a column is split in.
const RANGES: usize = 64;

#[repr(C)]
struct Args {
    u: u64,
    residual: u64,
    c: u64,
    bias: u64,
    y: u64,
    m: i64,
    n: i64,
    rows: i32,
}

#[repr(C)]
struct BackwardArgs {
    u: u64,
    g: u64,
    c: u64,
    norm: u64,
    du: u64,
    parts: u64,
    m: i64,
    n: i64,
    rows: i32,
}

/// `c ∘ u + bias (+ residual)`; c and bias `[n]` f32.
pub fn forward(u: &Tensor, c: &Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>, n: usize) -> Result<Tensor> {
    let device = cuda_device(OP, u)?;
    let m = u.elem_count() / n;
    if m == 0 {
        return empty(device, u.shape(), u.dtype());
    }
    let y = tensor(uninit(device, u.shape(), u.dtype())?, u.shape());
    let (of_u, of_c) = (Held::of(OP, "u", u)?, Held::of(OP, "c", c)?);
    let (bias, residual) = (Held::option(OP, "bias", bias)?, Held::option(OP, "residual", residual)?);
    let views = [Some(of_u.view), Some(of_c.view), bias.map(|bias| bias.view), residual.map(|residual| residual.view)];
    let [u_ptr, c_ptr, bias, residual] = views.map(|view| view.map_or(0, |view| view.ptr));
    let Grid { rows, blocks, fits } = Grid::of(m, n, views.iter().flatten());
    let y_ptr = Held::of(OP, "y", &y)?.view.ptr;
    let (m, n, rows) = (m as i64, n as i64, rows as i32);
    let args = Args { u: u_ptr, residual, c: c_ptr, bias, y: y_ptr, m, n, rows };
    let kernel = wide!("dora_forward", u.dtype(), fits);
    // SAFETY: `Args` mirrors the kernel's; matrices have m rows of n, vectors n; memory is of this stream.
    unsafe { Gpu::of(device)?.launch(kernel, blocks, 8, 0, &device.cuda_stream(), &args)? };
    Ok(y)
}

/// du; adds to dm `[n]` f32 where it is given.
pub fn backward(u: &Tensor, g: &Tensor, c: &Tensor, norm: &Tensor, dm: Option<&Tensor>, n: usize) -> Result<Tensor> {
    let device = cuda_device(OP, u)?;
    let m = u.elem_count() / n;
    if m == 0 {
        return empty(device, u.shape(), u.dtype());
    }
    let (gpu, stream) = (Gpu::of(device)?, device.cuda_stream());
    let du = tensor(uninit(device, u.shape(), u.dtype())?, u.shape());
    let held = [("u", u), ("g", g), ("c", c), ("norm", norm)].map(|(name, tensor)| Held::of(OP, name, tensor));
    let [of_u, of_g, of_c, of_norm] = held;
    let views = [of_u?.view, of_g?.view, of_c?.view, of_norm?.view];
    let Grid { rows, blocks, fits } = Grid::of(m, n, views.iter());
    let parts = dm.map(|_| scratch(device, blocks[1] * n)).transpose()?;
    let [u_ptr, g_ptr, c_ptr, norm_ptr] = views.map(|view| view.ptr);
    let args = BackwardArgs {
        u: u_ptr,
        g: g_ptr,
        c: c_ptr,
        norm: norm_ptr,
        du: Held::of(OP, "du", &du)?.view.ptr,
        parts: parts.as_ref().map_or(0, |parts| address(parts, &stream)),
        m: m as i64,
        n: n as i64,
        rows: rows as i32,
    };
    let kernel = wide!("dora_backward", u.dtype(), fits);
    // SAFETY: `BackwardArgs` mirrors the kernel's; matrices have m rows of n, vectors n, parts a row for each range.
    unsafe { gpu.launch(kernel, blocks, 8, 0, &stream, &args)? };
    if let Some(dm) = dm {
        let to = Held::of(OP, "dm", dm)?.view.ptr;
        let sum = SumColumns { parts: args.parts, to, n: n as i64, count: blocks[1] as i32 };
        let kernel = Kernel::Named(Module::Decoder, "rms_norm_weight_sum");
        // SAFETY: `SumColumns` mirrors the kernel's; dm has n elements.
        unsafe { gpu.launch(kernel, gpu.blocks(n), 8, 0, &stream, &sum)? };
    }
    Ok(du)
}

#[repr(C)]
struct NormArgs {
    p: u64,
    g: u64,
    b: u64,
    squares: u64,
    norm: u64,
    n: i64,
    r: i32,
    s: f32,
    shortest: f32,
}

/// The norms from P = `Aᵀ Wᵀ` `[r, n]`, and in f32 G = `Aᵀ A` `[r, r]`, B `[r, n]` and the squares `[n]`.
pub fn norms(p: &Tensor, g: &Tensor, b: &Tensor, squares: &Tensor, s: f64) -> Result<Tensor> {
    let device = cuda_device(OP, p)?;
    let (r, n) = p.dims2()?;
    let norm = tensor(uninit(device, &n.into(), DType::F32)?, n);
    let args = NormArgs {
        p: Held::of(OP, "p", p)?.view.ptr,
        g: Held::of(OP, "g", g)?.view.ptr,
        b: Held::of(OP, "b", b)?.view.ptr,
        squares: Held::of(OP, "squares", squares)?.view.ptr,
        norm: Held::of(OP, "norm", &norm)?.view.ptr,
        n: n as i64,
        r: r as i32,
        s: s as f32,
        shortest: SHORTEST as f32,
    };
    let kernel = typed!(Decoder, "dora_norms", p.dtype());
    // SAFETY: `NormArgs` mirrors the kernel's; the shapes are those above; memory is of this stream.
    unsafe { Gpu::of(device)?.launch(kernel, [n.div_ceil(128), 1], 4, 0, &device.cuda_stream(), &args)? };
    Ok(norm)
}

/// How columns and ranges of rows lie on blocks of 256 threads.
struct Grid {
    rows: usize,
    blocks: [usize; 2],
    /// Whether a thread takes eight columns.
    fits: bool,
}

impl Grid {
    fn of<'a>(m: usize, n: usize, mut views: impl Iterator<Item = &'a View>) -> Self {
        let fits = n.is_multiple_of(8) && views.all(View::aligned);
        let rows = m.div_ceil(RANGES);
        let columns = n.div_ceil(if fits { 8 } else { 1 });
        Self { rows, blocks: [columns.div_ceil(256), m.div_ceil(rows)], fits }
    }
}
