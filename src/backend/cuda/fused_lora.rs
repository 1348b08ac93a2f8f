//! The LoRA delta and its gradients on CUDA: `fused_lora.cuh` and `fused_lora_backward.cuh`, which hold the formulas.
//!
//! Shapes, dtypes and devices were checked by `custom_ops::fused_lora`. Here instances, tiles and scratch are chosen.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream};
use candle_core::{CudaStorage, DType, Layout, Shape, Tensor};

use super::device::{Gpu, Held, Kernel, View, address, cuda_device, empty, scratch, tensor, uninit};
use super::shared_linear::{self, AdapterViews, PartViews, Wanted};
use crate::backend::custom_ops::fused_lora::Sink;
use crate::backend::dropout::Dropout;
use crate::{Error, Result};

const OP: &str = "fused_lora";
/// Columns that a warp of the backward kernels owns.
const WARP_COLUMNS: usize = 64;
/// Ranks up to which the kernels here are the fastest; with more their instructions bind them, and those of `shared_linear` pass.
const FEW_RANKS: usize = 32;
/// Ranks that one launch computes at most; more take several.
const MAX_RANKS: usize = 64;

/// As the kernels' own struct.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Mask {
    seed: u64,
    stream: u64,
    threshold: u32,
    on: i32,
}

impl Mask {
    /// The mask, and the factor of what it keeps.
    fn of(dropout: Option<Dropout>) -> (Self, f32) {
        match dropout {
            Some(dropout) => {
                let Dropout { p, seed, stream } = dropout;
                (Self { seed, stream, threshold: dropout.threshold(), on: 1 }, 1.0 / (1.0 - p))
            }
            None => (Self::default(), 1.0),
        }
    }
}

#[repr(C)]
struct ForwardArgs {
    x: u64,
    a: u64,
    b: u64,
    y: u64,
    h: u64,
    parts: u64,
    m: i64,
    dropout: Mask,
    k: i32,
    r: i32,
    n: i32,
    part_count: i32,
    column_span: i32,
    stages: i32,
    s: f32,
    kept_scale: f32,
    y_f32: i32,
    add: i32,
    a_vec: i32,
    b_vec: i32,
}

#[repr(C)]
struct OutputArgs {
    g: u64,
    b: u64,
    h: u64,
    u_parts: u64,
    db_parts: u64,
    m: i64,
    n: i32,
    r: i32,
    rank0: i32,
    rows: i32,
    stages: i32,
    b_vec: i32,
    s: f32,
}

#[repr(C)]
struct InputArgs {
    x: u64,
    a: u64,
    u_parts: u64,
    dx: u64,
    da_parts: u64,
    m: i64,
    dropout: Mask,
    k: i32,
    r: i32,
    rank0: i32,
    u_part_count: i32,
    rows: i32,
    stages: i32,
    kept_scale: f32,
    dx_f32: i32,
    add: i32,
}

#[repr(C)]
#[derive(Default)]
struct ReduceArgs {
    parts: [u64; 2],
    to: [u64; 2],
    count: [i32; 2],
    columns: [i32; 2],
    transposed: [i32; 2],
    scale: [f32; 2],
    r: i32,
    add: i32,
}

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
        if let Some(mut all) = shared_linear::storage_forward_into(device, x, size.m, size.k, &[part], h)?
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

/// The kernels' name for activations and an adapter.
fn types(x: View, adapter: View) -> Result<&'static str> {
    match (x.dtype, adapter.dtype) {
        (DType::BF16, DType::BF16) => Ok("bf16_bf16"),
        (DType::BF16, DType::F32) => Ok("bf16_f32"),
        (DType::F16, DType::F16) => Ok("f16_f16"),
        (DType::F16, DType::F32) => Ok("f16_f32"),
        (DType::F32, DType::F32) => Ok("f32_f32"),
        (x, adapter) => Err(Error::op(OP, format!("no kernel for activations {x:?} with adapters {adapter:?}"))),
    }
}

/// bf16 terms of an f32 operand.
const FINE: usize = 3;

/// By the kernels' name: bf16 terms of the adapter, and 16-byte loads of 8 activations.
fn terms(types: &str) -> Terms {
    let (x, adapter) = types.split_once('_').unwrap_or((types, types));
    let adapter = match adapter {
        "bf16" => 1,
        "f16" => 2,
        _ => FINE,
    };
    Terms { adapter, vectors: if x == "f32" { 2 } else { 1 } }
}

struct Terms {
    adapter: usize,
    vectors: usize,
}

/// Ranks of the smallest instance for r.
fn ranks(r: usize, vector: bool) -> usize {
    match r {
        ..=8 if vector => 8,
        ..=16 => 16,
        ..=32 if vector => 32,
        _ => MAX_RANKS,
    }
}

/// What the row blocks of a backward kernel left of a gradient, `[count, r, columns]`, and where `scale` times its sum goes.
struct Parts {
    parts: u64,
    to: View,
    count: usize,
    columns: usize,
    scale: f32,
}

/// The grid of a backward kernel over a matrix [m, columns].
struct Grid {
    types: &'static str,
    ranks: [usize; 2],
    warps: usize,
    column_blocks: usize,
    row_blocks: usize,
    rows: usize,
    columns: usize,
}

struct Call<'a> {
    gpu: &'a Gpu,
    stream: &'a CudaStream,
    dropout: Option<Dropout>,
    size: Size,
}

impl Call<'_> {
    /// y and h, each where given. `add`: y gets it added.
    fn forward(&self, [x, a, b]: [View; 3], s: f64, y: Option<View>, add: bool, h: Option<View>) -> Result<()> {
        let Size { m, k, r, n } = self.size;
        let types = types(x, a)?;
        let vector = k.is_multiple_of(8) && n.is_multiple_of(8) && x.aligned() && y.is_none_or(|y| y.aligned());
        let (mask, kept_scale) = Mask::of(self.dropout);
        let mut args = ForwardArgs {
            x: x.ptr,
            a: a.ptr,
            b: b.ptr,
            y: y.map_or(0, |y| y.ptr),
            h: h.map_or(0, |h| h.ptr),
            parts: 0,
            m: m as i64,
            dropout: mask,
            k: k as i32,
            r: r as i32,
            n: n as i32,
            part_count: 0,
            column_span: n as i32,
            stages: 1,
            s: s as f32,
            kept_scale,
            y_f32: y.is_some_and(|y| y.is_f32()) as i32,
            add: add as i32,
            a_vec: (r.is_multiple_of(8) && a.aligned()) as i32,
            b_vec: (n.is_multiple_of(8) && b.aligned()) as i32,
        };
        if vector && r <= 16 && m <= 2 * self.gpu.sms && b.aligned() {
            // A thread takes 4 columns of x, then 4 of y.
            let warps = (k.max(n).div_ceil(4 * 32)).clamp(2, 16);
            let splits = (self.gpu.sms / m).clamp(1, n.div_ceil(128 * warps));
            args.column_span = (n.div_ceil(128 * warps).div_ceil(splits) * 128 * warps) as i32;
            let grid = [m, n.div_ceil(args.column_span as usize)];
            let kernel = Kernel::Short { types, ranks: if r <= 8 { 8 } else { 16 } };
            // SAFETY: `ForwardArgs` mirrors the kernel's; sizes and dtypes were checked; memory is of this stream.
            return unsafe { self.gpu.launch(kernel, grid, warps, 0, self.stream, &args) };
        }
        let ranks = ranks(r, vector);
        // The most rows a block for which three quarters of the multiprocessors still get one.
        let fills = |tiles: &usize| m.div_ceil(16 * tiles) * 4 >= self.gpu.sms * 3;
        let most = match (vector, ranks) {
            (true, ..=16) if x.dtype == DType::BF16 => 4,
            (true, ..=32) => 2,
            (true, _) if x.dtype == DType::BF16 => 2,
            _ => 1,
        };
        let tiles = [4, 2].into_iter().filter(|&tiles| tiles <= most).find(fills).unwrap_or(1);
        self.launch_forward(types, ranks, tiles, vector, args)
    }

    /// `y (+)= drop(u R)` from the parts of u, for R `[r, n]`; here the call's k and n have changed places.
    fn up(&self, x: View, right: View, u_parts: u64, part_count: usize, y: View, add: bool) -> Result<()> {
        let Size { m, k, r, .. } = self.size;
        let types = types(x, right)?;
        let vector = k.is_multiple_of(8) && y.aligned();
        let (mask, kept) = Mask::of(self.dropout);
        let args = ForwardArgs {
            x: 0,
            a: 0,
            b: right.ptr,
            y: y.ptr,
            h: 0,
            parts: u_parts,
            m: m as i64,
            dropout: mask,
            k: 1,
            r: r as i32,
            n: k as i32,
            part_count: part_count as i32,
            column_span: k as i32,
            stages: 1,
            s: kept,
            kept_scale: 1.0,
            y_f32: y.is_f32() as i32,
            add: add as i32,
            a_vec: 0,
            b_vec: (vector && right.aligned()) as i32,
        };
        self.launch_forward(types, MAX_RANKS, 1, vector, args)
    }

    fn launch_forward(
        &self,
        types: &'static str,
        ranks: usize,
        tiles: usize,
        vector: bool,
        mut args: ForwardArgs,
    ) -> Result<()> {
        let (m, r, k, n) = (self.size.m, args.r as usize, args.k as usize, args.n as usize);
        let Terms { adapter, vectors } = terms(types);
        let steps = if ranks <= 32 { ranks.div_ceil(16) } else { r.div_ceil(16) };
        let fragments = tiles * steps * FINE * 512;
        let items = if vector { 2 * tiles * vectors * 512 } else { 0 };
        let buffer = adapter * 32 * 16 * ((ranks / 8) | 1);
        let shared = |warps: usize, stages: usize| {
            fragments + (warps * (stages * items + buffer)).max(warps * 16 * tiles * ranks * 4)
        };
        let budget = self.gpu.shared / 2 - 1024;
        let mut warps = k.max(n).div_ceil(32).clamp(1, 8);
        let mut stages = if vector { k.div_ceil(32 * warps).clamp(1, 2) } else { 1 };
        while shared(warps, stages) > budget && stages > 1 {
            stages -= 1;
        }
        while shared(warps, stages) > self.gpu.shared && warps > 1 {
            warps -= 1;
        }
        let row_blocks = m.div_ceil(16 * tiles);
        let chunks = n.div_ceil(32);
        let splits = if args.y == 0 { 1 } else { (2 * self.gpu.sms / row_blocks).clamp(1, chunks.div_ceil(warps)) };
        args.column_span = (chunks.div_ceil(splits) * 32) as i32;
        args.stages = stages as i32;
        let grid = [row_blocks, if args.y == 0 { 1 } else { n.div_ceil(args.column_span as usize) }];
        let kernel = Kernel::Forward { types, ranks, tiles, vector };
        // SAFETY: `ForwardArgs` mirrors the kernel's; sizes and dtypes were checked; memory is of this stream.
        unsafe { self.gpu.launch(kernel, grid, warps, shared(warps, stages), self.stream, &args) }
    }

    /// Blocks of the backward kernels: as many as fill the GPU once, with 16 warps an SM.
    fn grid(&self, columns: usize, types: &'static str, r: usize) -> Result<Grid> {
        let ranks = [ranks(r.min(MAX_RANKS), true), ranks(r.min(MAX_RANKS), false)];
        let Terms { adapter, vectors } = terms(types);
        let most = ranks[0].max(ranks[1]);
        let fits = |warps: &usize| {
            let (tiles, stage) = (most.div_ceil(16), warps * 4 * vectors * 512);
            let output =
                adapter * most * (warps * WARP_COLUMNS * 2 + 64) + segment(most) * tiles * 3 * 512 + 128 * warps * most;
            let input = warps * 2 * tiles * adapter * 1024 + segment(most) * tiles * (6 * 512 + 64 * 16);
            output.max(input) + stage <= self.gpu.shared
        };
        let limit = columns.div_ceil(WARP_COLUMNS).min(if most <= 16 { 16 } else { 8 });
        let warps = (1..=limit).rev().find(fits).unwrap_or(1);
        let column_blocks = columns.div_ceil(WARP_COLUMNS * warps);
        let per_sm = (16 / warps).clamp(1, 4);
        let row_blocks = (self.gpu.sms * per_sm / column_blocks).clamp(1, self.size.m.div_ceil(16));
        let rows = self.size.m.div_ceil(row_blocks).next_multiple_of(16);
        Ok(Grid { types, ranks, warps, column_blocks, row_blocks: self.size.m.div_ceil(rows), rows, columns })
    }

    /// The most stages of the ring, up to 3, that fit beside `fixed` bytes.
    fn stages(&self, fixed: usize, stage: usize) -> Result<usize> {
        match (1..=3).rev().find(|stages| fixed + stages * stage <= self.gpu.shared) {
            Some(stages) => Ok(stages),
            None => Err(Error::op(OP, format!("this GPU's {} bytes of shared memory are too few", self.gpu.shared))),
        }
    }

    /// u and dB, as parts.
    #[allow(clippy::too_many_arguments)]
    fn output(&self, grid: &Grid, g: View, b: View, h: Option<u64>, s: f64, u_parts: u64, db_parts: u64) -> Result<()> {
        let Size { m, r, n, .. } = self.size;
        let vector = n.is_multiple_of(8) && g.aligned();
        let ranks = grid.ranks[!vector as usize];
        let Terms { adapter, vectors } = terms(grid.types);
        let (rank_tiles, segment) = (ranks.div_ceil(16), segment(ranks));
        let pitch = grid.warps * WARP_COLUMNS * 2 + 64;
        let fixed = adapter * ranks * pitch + segment * rank_tiles * 3 * 512 + 2 * grid.warps * 16 * ranks * 4;
        let stage = if vector { grid.warps * 4 * vectors * 512 } else { 0 };
        let stages = self.stages(fixed, stage)?;
        for rank0 in (0..r).step_by(ranks) {
            let args = OutputArgs {
                g: g.ptr,
                b: b.ptr,
                h: h.unwrap_or(0),
                u_parts,
                db_parts,
                m: m as i64,
                n: n as i32,
                r: r as i32,
                rank0: rank0 as i32,
                rows: grid.rows as i32,
                stages: stages as i32,
                b_vec: (n.is_multiple_of(8) && b.aligned()) as i32,
                s: s as f32,
            };
            let kernel = Kernel::Output { types: grid.types, ranks, vector };
            let blocks = [grid.column_blocks, grid.row_blocks];
            // SAFETY: `OutputArgs` mirrors the kernel's; sizes and dtypes were checked; memory is of this stream.
            unsafe { self.gpu.launch(kernel, blocks, grid.warps, fixed + stages * stage, self.stream, &args)? };
        }
        Ok(())
    }

    /// dx, and dA as parts, from the parts of u.
    #[allow(clippy::too_many_arguments)]
    fn input(
        &self,
        grid: &Grid,
        x: View,
        a: View,
        u_parts: u64,
        u_part_count: usize,
        dx: Option<View>,
        add: bool,
        da_parts: u64,
    ) -> Result<()> {
        let Size { m, k, r, .. } = self.size;
        let vector = grid.columns.is_multiple_of(8) && x.aligned() && dx.is_none_or(|dx| dx.aligned());
        let ranks = grid.ranks[!vector as usize];
        let Terms { adapter, vectors } = terms(grid.types);
        let (rank_tiles, segment) = (ranks.div_ceil(16), segment(ranks));
        let (mask, kept_scale) = Mask::of(self.dropout);
        let left = segment * (rank_tiles * 2 * FINE * 512 + 64 * 16 * rank_tiles);
        let fixed = grid.warps * 2 * rank_tiles * adapter * 1024 + left;
        let stage = if vector { grid.warps * 4 * vectors * 512 } else { 0 };
        let stages = self.stages(fixed, stage)?;
        for rank0 in (0..r).step_by(ranks) {
            if da_parts == 0 && rank0 > 0 {
                break;
            }
            let args = InputArgs {
                x: x.ptr,
                a: a.ptr,
                u_parts,
                dx: dx.map_or(0, |dx| dx.ptr),
                da_parts,
                m: m as i64,
                dropout: mask,
                k: k as i32,
                r: r as i32,
                rank0: rank0 as i32,
                u_part_count: u_part_count as i32,
                rows: grid.rows as i32,
                stages: stages as i32,
                kept_scale,
                dx_f32: dx.is_some_and(|dx| dx.is_f32()) as i32,
                add: add as i32,
            };
            let kernel = Kernel::Input { types: grid.types, ranks, vector };
            let blocks = [grid.column_blocks, grid.row_blocks];
            // SAFETY: `InputArgs` mirrors the kernel's; sizes and dtypes were checked; memory is of this stream.
            unsafe { self.gpu.launch(kernel, blocks, grid.warps, fixed + stages * stage, self.stream, &args)? };
        }
        Ok(())
    }

    /// dB and dA from their parts; dA's sink is transposed.
    fn reduce(&self, work: [Option<Parts>; 2], add: bool) -> Result<()> {
        let mut args =
            ReduceArgs { r: self.size.r as i32, add: add as i32, transposed: [0, 1], ..ReduceArgs::default() };
        let mut blocks = 0;
        for (i, work) in work.into_iter().enumerate() {
            let Some(Parts { parts, to, count, columns, scale }) = work else { continue };
            (args.parts[i], args.to[i], args.count[i]) = (parts, to.ptr, count as i32);
            (args.columns[i], args.scale[i]) = (columns as i32, scale);
            blocks = blocks.max((self.size.r * columns).div_ceil(256).min(8 * self.gpu.sms));
        }
        if blocks == 0 {
            return Ok(());
        }
        // SAFETY: `ReduceArgs` mirrors the kernel's; the parts were written by the launches before, the sinks are [r, n], [k, r].
        unsafe { self.gpu.launch(Kernel::Reduce, [blocks, 2], 8, 0, self.stream, &args) }
    }
}

/// Row tiles of a segment, as `segment_tiles` in the kernels.
fn segment(ranks: usize) -> usize {
    match ranks {
        ..=16 => 16,
        17..=32 => 8,
        _ => 4,
    }
}
