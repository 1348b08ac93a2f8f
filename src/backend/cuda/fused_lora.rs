//! The LoRA delta and its gradients on CUDA: `fused_lora.cuh` and `fused_lora_backward.cuh`, which hold the formulas.
//!
//! Shapes, dtypes and devices were checked by `custom_ops::fused_lora`. `fused_lora_launch.rs` chooses instances and tiles; here is what the op makes of them.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{CudaStorage, DType, Layout, Shape, Tensor};

use super::device::{Gpu, Held, View, address, cuda_device, empty, scratch, tensor, uninit};
use super::fused_lora_launch::{Call, MAX_RANKS, Mask, Parts, types};
use super::shared_linear::{self, AdapterViews, PartViews, Wanted};
use crate::backend::custom_ops::fused_lora::Sink;
use crate::backend::dropout::Dropout;
use crate::{Error, Result};

const OP: &str = "fused_lora";
/// Ranks up to which the kernels here are the fastest; with more their instructions bind them, and those of `shared_linear` pass.
const FEW_RANKS: usize = 32;

/// The sizes of one call: m rows of x; k, r and n columns of x, A and B.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Rows of x.
    pub m: usize,
    /// Columns of x.
    pub k: usize,
    /// The rank.
    pub r: usize,
    /// Columns of y.
    pub n: usize,
}

impl Size {
    /// From `[m, k, r, n]`.
    ///
    /// # Errors
    /// When k, r or n is over 2³⁰.
    pub fn new([m, k, r, n]: [usize; 4]) -> Result<Self> {
        if [k, r, n].iter().any(|&size| size > 1 << 30) {
            return Err(Error::op(OP, format!("k {k}, r {r} and n {n} must be at most 2³⁰ on CUDA")));
        }
        Ok(Self { m, k, r, n })
    }
}

/// `s · (drop(x) A) B`; see `custom_ops::fused_lora::delta`.
///
/// # Errors
/// When memory or the launch is refused.
pub fn delta(x: &Tensor, a: &Tensor, b: &Tensor, s: f64, dropout: Option<Dropout>, size: Size) -> Result<Tensor> {
    let shape = with_last(x, size.n);
    let device = cuda_device(OP, x)?;
    if size.m == 0 {
        return empty(device, shape, x.dtype());
    }
    let (x, a, b) = (x.contiguous()?, a.contiguous()?, b.contiguous()?);
    let (x, a, b) = (Held::of(OP, "x", &x)?, Held::of(OP, "a", &a)?, Held::of(OP, "b", &b)?);
    let y = storage_delta(device, [x.view, a.view, b.view], s, dropout, size, None)?;
    Ok(tensor(y, shape))
}

/// The delta as storage, of one row where x has none; `h`, `[m, r]` f32, is written where given.
pub(super) fn storage_delta(
    device: &CudaDevice,
    [x, a, b]: [View; 3],
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
    h: Option<View>,
) -> Result<CudaStorage> {
    if size.m > 0 && size.r > FEW_RANKS && dropout.is_none() {
        let adapter = AdapterViews { a, b, r: size.r, s, dropout };
        let part = PartViews { w: None, bias: None, n: size.n, adapter: Some(adapter) };
        if let Some(mut all) = shared_linear::storage_forward_into(device, x, size.m, size.k, &[part], h, None)?
            && let Some((y, _)) = all.pop()
        {
            return Ok(y);
        }
    }
    let storage = uninit(device, &Shape::from((size.m.max(1), size.n)), x.dtype)?;
    if size.m == 0 {
        return Ok(storage);
    }
    let y = View::of(OP, "y", &storage, &Layout::contiguous((size.m, size.n)))?;
    let call = Call { gpu: Gpu::of(device)?, stream: &device.cuda_stream(), dropout, size };
    call.forward([x, a, b], s, Some(y), false, h)?;
    Ok(storage)
}

/// The delta and h, `[m, r]` f32, for [`gradients`].
///
/// # Errors
/// When memory or the launch is refused.
pub fn forward(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
) -> Result<(Tensor, Tensor)> {
    let shape = with_last(x, size.n);
    let device = cuda_device(OP, x)?;
    if size.m == 0 {
        return Ok((empty(device, shape, x.dtype())?, empty(device, (0, size.r), DType::F32)?));
    }
    let h = tensor(uninit(device, &Shape::from((size.m, size.r)), DType::F32)?, (size.m, size.r));
    let (x, a, b) = (x.contiguous()?, a.contiguous()?, b.contiguous()?);
    let (x, a, b) = (Held::of(OP, "x", &x)?, Held::of(OP, "a", &a)?, Held::of(OP, "b", &b)?);
    let h_view = Held::of(OP, "h", &h)?.view;
    let y = storage_delta(device, [x.view, a.view, b.view], s, dropout, size, Some(h_view))?;
    Ok((tensor(y, shape), h))
}

/// `y += s · (drop(x) A) B`, and h; see `custom_ops::fused_lora::add_into`.
///
/// # Errors
/// When memory or the launch is refused, or y is not contiguous.
pub fn add_into(
    y: &Tensor,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
) -> Result<Tensor> {
    let device = cuda_device(OP, x)?;
    if size.m == 0 {
        return empty(device, (0, size.r), DType::F32);
    }
    let h = tensor(uninit(device, &Shape::from((size.m, size.r)), DType::F32)?, (size.m, size.r));
    let (x, a, b) = (x.contiguous()?, a.contiguous()?, b.contiguous()?);
    let (x, a, b) = (Held::of(OP, "x", &x)?, Held::of(OP, "a", &a)?, Held::of(OP, "b", &b)?);
    let (y, h_view) = (Held::of(OP, "y", y)?, Held::of(OP, "h", &h)?.view);
    let call = Call { gpu: Gpu::of(device)?, stream: &device.cuda_stream(), dropout, size };
    call.forward([x.view, a.view, b.view], s, Some(y.view), true, Some(h_view))?;
    Ok(h)
}

/// The delta for an op on Candle's tape, whose arguments are contiguous `(storage, layout)`; and h, for [`gradients`].
pub(crate) fn taped(
    [x, a, b]: [(&CudaStorage, &Layout); 3],
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
) -> Result<(CudaStorage, Tensor)> {
    let device = &x.0.device;
    if size.m == 0 {
        let x = View::of(OP, "x", x.0, x.1)?;
        return Ok((storage_delta(device, [x; 3], s, dropout, size, None)?, empty(device, (0, size.r), DType::F32)?));
    }
    let h = tensor(uninit(device, &Shape::from((size.m, size.r)), DType::F32)?, (size.m, size.r));
    let h_view = Held::of(OP, "h", &h)?.view;
    let (x, a, b) = (View::of(OP, "x", x.0, x.1)?, View::of(OP, "a", a.0, a.1)?, View::of(OP, "b", b.0, b.1)?);
    Ok((storage_delta(device, [x, a, b], s, dropout, size, Some(h_view))?, h))
}

/// The delta of x in any layout, for adapters that are an op's state.
pub(crate) fn with_state(
    storage: &CudaStorage,
    layout: &Layout,
    a: &Tensor,
    b: &Tensor,
    s: f64,
    size: Size,
) -> Result<CudaStorage> {
    let (a, b) = (Held::of(OP, "a", a)?, Held::of(OP, "b", b)?);
    let gathered = match layout.is_contiguous() {
        true => None,
        false => {
            let mut gathered = uninit(&storage.device, layout.shape(), storage.dtype())?;
            storage.copy_strided_src(&mut gathered, 0, layout)?;
            Some(gathered)
        }
    };
    let x = match &gathered {
        Some(gathered) => View::of(OP, "x", gathered, &Layout::contiguous(layout.shape()))?,
        None => View::of(OP, "x", storage, layout)?,
    };
    storage_delta(&storage.device, [x, a.view, b.view], s, None, size, None)
}

/// The gradients of the wanted ones of x, A and B: dx of x's dtype, dA and dB f32. Nothing is zeroed first.
///
/// # Errors
/// When memory or a launch is refused.
#[allow(clippy::too_many_arguments)]
pub fn gradients(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
    wanted: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let gradients = buffers(x, a, b, wanted)?;
    differentiate(x, a, b, h, g, s, dropout, size, &sink(&gradients), false)?;
    Ok(gradients)
}

/// Memory for the gradients of the wanted ones of x, A and B.
pub(super) fn buffers(x: &Tensor, a: &Tensor, b: &Tensor, wanted: [bool; 3]) -> Result<[Option<Tensor>; 3]> {
    let device = cuda_device(OP, x)?;
    let buffer = |wanted: bool, like: &Tensor, dtype| match wanted {
        true if like.elem_count() == 0 => empty(device, like.shape(), dtype).map(Some),
        true => Ok(Some(tensor(uninit(device, like.shape(), dtype)?, like.shape()))),
        false => Ok(None),
    };
    Ok([buffer(wanted[0], x, x.dtype())?, buffer(wanted[1], a, DType::F32)?, buffer(wanted[2], b, DType::F32)?])
}

pub(super) fn sink(gradients: &[Option<Tensor>; 3]) -> Sink<'_> {
    Sink { dx: gradients[0].as_ref(), da: gradients[1].as_ref(), db: gradients[2].as_ref() }
}

/// Adds the gradients to the sinks; see `custom_ops::fused_lora::backward`.
///
/// # Errors
/// When memory or a launch is refused, or a sink is not contiguous.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
    sink: &Sink,
) -> Result<()> {
    differentiate(x, a, b, h, g, s, dropout, size, sink, true)
}

/// Adds the gradients to the sinks, or with `add` false writes them.
#[allow(clippy::too_many_arguments)]
pub fn differentiate(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
    sink: &Sink,
    add: bool,
) -> Result<()> {
    let device = cuda_device(OP, x)?;
    if size.m == 0 {
        for sink in [sink.da, sink.db].into_iter().flatten().filter(|_| !add) {
            sink.detach().slice_set(&sink.zeros_like()?, 0, 0)?;
        }
        return Ok(());
    }
    let Size { m, k, r, n } = size;
    if r > FEW_RANKS && dropout.is_none() {
        let (a, b) = (a.contiguous()?, b.contiguous()?);
        let (a, b) = (Held::of(OP, "a", &a)?.view, Held::of(OP, "b", &b)?.view);
        let part = PartViews { w: None, bias: None, n, adapter: Some(AdapterViews { a, b, r, s, dropout }) };
        let (dx, sinks) = (sink.dx.map(|dx| (dx, add)), [(sink.da, sink.db)]);
        if shared_linear::backward_views(x, &[part], &Wanted { h: &[h], g: &[g], dx, sinks: &sinks, add })? {
            return Ok(());
        }
    }
    let stream = device.cuda_stream();
    let call = Call { gpu: Gpu::of(device)?, stream: &stream, dropout, size };
    let (x, a, b, g) = (x.contiguous()?, a.contiguous()?, b.contiguous()?, g.contiguous()?);
    // An f32 gradient of half-precision activations takes the f32 kernels, whose adapter is f32.
    let b_for_g = if g.dtype() == x.dtype() { b.clone() } else { b.to_dtype(DType::F32)? };
    let h = h.map(Tensor::contiguous).transpose()?;
    let whole = r <= MAX_RANKS;
    let a_transposed = if sink.dx.is_some() && !whole { Some(a.t()?.contiguous()?) } else { None };
    let (x, a, g) = (Held::of(OP, "x", &x)?, Held::of(OP, "a", &a)?, Held::of(OP, "g", &g)?);
    let (b, b_for_g) = (Held::of(OP, "b", &b)?, Held::of(OP, "b", &b_for_g)?);
    let dx = Held::option(OP, "dx", sink.dx)?.map(|dx| dx.view);
    let da = Held::option(OP, "da", sink.da)?.map(|da| da.view);
    let db = Held::option(OP, "db", sink.db)?.map(|db| db.view);

    let projected;
    let h = match (db, &h) {
        (None, _) => None,
        (Some(_), Some(h)) => Some(Held::of(OP, "h", h)?.view.ptr),
        (Some(_), None) => {
            projected = scratch(device, m * r)?;
            let ptr = address(&projected, &stream);
            call.forward([x.view, a.view, b.view], s, None, false, Some(View { ptr, dtype: DType::F32 }))?;
            Some(ptr)
        }
    };
    let wants_u = dx.is_some() || da.is_some();
    let output = call.grid(n, types(g.view, b_for_g.view)?, r)?;
    let input = call.grid(k, types(x.view, a.view)?, r)?;
    let u_parts = scratch(device, if wants_u { output.column_blocks * m * r } else { 1 })?;
    let db_parts = scratch(device, if db.is_some() { output.row_blocks * r * n } else { 1 })?;
    let da_parts = scratch(device, if da.is_some() { input.row_blocks * r * k } else { 1 })?;
    let (u_ptr, db_ptr, da_ptr) =
        (address(&u_parts, &stream), address(&db_parts, &stream), address(&da_parts, &stream));
    if wants_u || db.is_some() {
        call.output(&output, g.view, b_for_g.view, h, s, if wants_u { u_ptr } else { 0 }, db_ptr)?;
    }
    if da.is_some() || (dx.is_some() && whole) {
        let da_to = if da.is_some() { da_ptr } else { 0 };
        call.input(&input, x.view, a.view, u_ptr, output.column_blocks, dx.filter(|_| whole), add, da_to)?;
    }
    if let (Some(dx), Some(a)) = (dx, &a_transposed) {
        call.up(x.view, Held::of(OP, "a", a)?.view, u_ptr, output.column_blocks, dx, add)?;
    }
    let (_, kept) = Mask::of(dropout);
    let db = db.map(|to| Parts { parts: db_ptr, to, count: output.row_blocks, columns: n, scale: s as f32 });
    let da = da.map(|to| Parts { parts: da_ptr, to, count: input.row_blocks, columns: k, scale: kept });
    call.reduce([db, da], add)
}

/// Parts of u, `[count][m, r]`.
pub(super) type UParts = (CudaSlice<f32>, usize);

/// `h = drop(x) A` into h `[m, r]` f32; `[x, A, B]`.
pub(super) fn project_into(
    device: &CudaDevice,
    [x, a, b]: [View; 3],
    dropout: Option<Dropout>,
    size: Size,
    h: View,
) -> Result<()> {
    let call = Call { gpu: Gpu::of(device)?, stream: &device.cuda_stream(), dropout, size };
    call.forward([x, a, b], 1.0, None, false, Some(h))
}

/// What one pass over g gives: dB, written or added where it is given with h, and the parts of u where they are wanted.
#[allow(clippy::too_many_arguments)]
pub(super) fn output_side(
    device: &CudaDevice,
    g: View,
    b: View,
    h: Option<u64>,
    s: f64,
    size: Size,
    u: bool,
    db: Option<View>,
    add: bool,
) -> Result<Option<UParts>> {
    if !u && db.is_none() {
        return Ok(None);
    }
    let Size { m, r, n, .. } = size;
    let stream = device.cuda_stream();
    let call = Call { gpu: Gpu::of(device)?, stream: &stream, dropout: None, size };
    let grid = call.grid(n, types(g, b)?, r)?;
    let u_parts = scratch(device, if u { grid.column_blocks * m * r } else { 1 })?;
    let db_parts = scratch(device, if db.is_some() { grid.row_blocks * r * n } else { 1 })?;
    let (u_ptr, db_ptr) = (address(&u_parts, &stream), address(&db_parts, &stream));
    call.output(&grid, g, b, h, s, if u { u_ptr } else { 0 }, db_ptr)?;
    let db = db.map(|to| Parts { parts: db_ptr, to, count: grid.row_blocks, columns: n, scale: s as f32 });
    call.reduce([db, None], add)?;
    Ok(u.then_some((u_parts, grid.column_blocks)))
}

/// The shape of x with the last dimension `n`.
pub(super) fn with_last(x: &Tensor, n: usize) -> Vec<usize> {
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = n;
    }
    shape
}
