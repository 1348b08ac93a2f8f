//! The LoRA delta: `Δ = s · (drop(x) A) B` (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021).
//!
//! x `[.., k]`, A `[k, r]`, B `[r, n]`, Δ and g `[.., n]`; s = alpha / r. With h = drop(x) A and u = s · g Bᵀ:
//! `dA = drop(x)ᵀ u`, `dB = s · hᵀ g`, `dx = drop(u Aᵀ)`; drop is PEFT's inverted dropout on the adapter's input.
//!
//! x is f32, f16 or bf16; A and B share a dtype, f32 or x's. Δ has x's dtype, h is f32, sums are f32. g and dx are f32 or of
//! x's dtype; dA and dB are f32. x may have any rank from 1, any strides, and no rows at all.

use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp3, DType, Layout, MetalStorage, Shape, Tensor};

use super::check::{self, with_last};
use crate::backend::cpu::floats::{Floats, Held, gather, storage_of, tensor_of, update_f32};
use crate::backend::cpu::fused_lora::{Lora, Wanted};
use crate::backend::dropout::Dropout;
use crate::backend::{cpu, cuda, fallback, metal};
use crate::{Error, Result};

const OP: &str = "fused_lora";

/// Where gradients go: each is added to in place. A `None` is not computed.
///
/// The three may be views of one buffer, but must share none with the inputs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sink<'a> {
    /// Of x's shape, f32 or of x's dtype.
    pub dx: Option<&'a Tensor>,
    /// `[k, r]`, f32.
    pub da: Option<&'a Tensor>,
    /// `[r, n]`, f32.
    pub db: Option<&'a Tensor>,
}

/// `s · (drop(x) A) B`, `[.., n]`, of x's dtype. At most a tile of h exists at any time.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn delta(x: &Tensor, a: &Tensor, b: &Tensor, s: f64, dropout: Option<Dropout>) -> Result<Tensor> {
    let size = Size::of(OP, x, a, b, dropout)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        return cuda::fused_lora::delta(x, a, b, s, dropout, size.cuda()?);
    }
    let shape = with_last(x.dims(), size.n);
    if !x.device().is_cpu() {
        match metal::fused_lora::delta(x, a, b, s, dropout) {
            Ok(y) => return Ok(y),
            Err(reason) => fallback::allow(OP, x.device(), &reason.to_string())?,
        }
        return composite(&x.detach(), &a.detach(), &b.detach(), s, dropout);
    }
    let (x, a, b) = (x.contiguous()?, a.contiguous()?, b.contiguous()?);
    let y = with_lora(OP, &x, &a, &b, s, dropout, &size, |lora| Ok(lora.delta()))?;
    tensor_of(y, shape, x.dtype())
}

/// `y += s · (drop(x) A) B` in place; returns `h = drop(x) A`, `[m, r]` f32, for [`backward`]. y is contiguous, `[.., n]`,
/// f32 or of x's dtype.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn add_into(y: &Tensor, x: &Tensor, a: &Tensor, b: &Tensor, s: f64, dropout: Option<Dropout>) -> Result<Tensor> {
    let size = Size::of(OP, x, a, b, dropout)?;
    check::gradient(OP, "y", y, &with_last(x.dims(), size.n), x)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        return cuda::fused_lora::add_into(y, x, a, b, s, dropout, size.cuda()?);
    }
    if !x.device().is_cpu() {
        match metal::fused_lora::add_into(y, x, a, b, s, dropout) {
            Ok(h) => return Ok(h),
            Err(reason) => fallback::allow(OP, x.device(), &reason.to_string())?,
        }
        let (x, a, b) = (x.detach(), a.detach(), b.detach());
        let h = project(&x, &a, dropout)?;
        fallback::accumulate(y, &(h.matmul(&b.to_dtype(DType::F32)?)? * s)?)?;
        return Ok(h);
    }
    let (x, a, b) = (x.contiguous()?, a.contiguous()?, b.contiguous()?);
    with_lora(OP, &x, &a, &b, s, dropout, &size, |lora| {
        let h = update_f32(OP, "y", y, |y| Ok(lora.add_delta_keeping_h(y)))?;
        tensor_of(h, (size.m, size.r), DType::F32)
    })
}

/// Adds the gradients that have somewhere to go. `h` is what [`add_into`] returned; without it, it is computed again where
/// dB needs it.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    sink: Sink,
) -> Result<()> {
    let size = Size::of(OP, x, a, b, dropout)?;
    check_backward(OP, x, h, g, &size, &sink)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        return cuda::fused_lora::backward(x, a, b, h, g, s, dropout, size.cuda()?, &sink);
    }
    if !x.device().is_cpu() {
        match metal::fused_lora::backward(x, a, b, h, g, s, dropout, &sink) {
            Ok(()) => return Ok(()),
            Err(reason) => fallback::allow(OP, x.device(), &reason.to_string())?,
        }
        return composite_backward(&x.detach(), &a.detach(), &b.detach(), h, g, s, dropout, &sink);
    }
    let (x, a, b, g) = (x.contiguous()?, a.contiguous()?, b.contiguous()?, g.contiguous()?);
    let h = h.map(Tensor::contiguous).transpose()?;
    // Every lock on an input is given back before the small sinks are written: they may share a buffer with each other.
    let (da, db) = with_lora(OP, &x, &a, &b, s, dropout, &size, |lora| {
        let g = Held::of(OP, "g", &g)?;
        let h = h.as_ref().map(|h| cpu::view::<f32>(OP, "h", h)).transpose()?;
        let gradients = |dx: Option<&mut [f32]>| {
            let wanted = Wanted { dx, da: sink.da.is_some(), db: sink.db.is_some() };
            Ok(lora.gradients(&g.floats(), h.as_deref(), wanted))
        };
        match sink.dx {
            Some(dx) => update_f32(OP, "dx", dx, |dx| gradients(Some(dx))),
            None => gradients(None),
        }
    })?;
    for (name, dst, gradient) in [("da", sink.da, da), ("db", sink.db, db)] {
        if let (Some(dst), Some(gradient)) = (dst, gradient) {
            cpu::update::<f32, ()>(OP, name, dst, |dst| {
                dst.iter_mut().zip(&gradient).for_each(|(dst, gradient)| *dst += gradient);
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// [`delta`] without dropout, on Candle's tape: x, A and B get gradients where they are tracked.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn fused_lora(x: &Tensor, a: &Tensor, b: &Tensor, s: f64) -> Result<Tensor> {
    fused_lora_with_dropout(x, a, b, s, None)
}

/// [`delta`] on Candle's tape: x, A and B get gradients where they are tracked.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn fused_lora_with_dropout(x: &Tensor, a: &Tensor, b: &Tensor, s: f64, dropout: Option<Dropout>) -> Result<Tensor> {
    let size = Size::of(OP, x, a, b, dropout)?;
    if !x.device().is_cpu()
        && !cuda::takes(x.device())
        && let Err(reason) = metal::fused_lora::ready(x, a, b)
    {
        fallback::allow(OP, x.device(), &reason.to_string())?;
        return composite(x, a, b, s, dropout);
    }
    let op = Taped { s, dropout, size, h: OnceLock::new() };
    Ok(x.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op)?)
}

/// The LoRA delta as an op of one argument, for inference: `input.apply_op1(op)`. Cheap to clone.
///
/// A and B are state, not arguments, so Candle's backward pass gives a gradient to the input only and **none to A and B**,
/// even where they are variables. Train with [`fused_lora`] or `training::LoRALayer`.
#[derive(Debug, Clone)]
pub struct FusedLoRAOp {
    a: Tensor,
    b: Tensor,
    s: f64,
}

impl FusedLoRAOp {
    /// `lora_a` `[k, r]`, `lora_b` `[r, n]`, `scaling` = alpha / r.
    ///
    /// # Errors
    /// When the two do not fit each other in shape, dtype or device.
    pub fn new(lora_a: Tensor, lora_b: Tensor, scaling: f32) -> Result<Self> {
        Self::with_scaling(lora_a, lora_b, scaling.into())
    }

    /// [`Self::new`] with the scaling in full precision: alpha / rank need not be a f32.
    pub(crate) fn with_scaling(lora_a: Tensor, lora_b: Tensor, s: f64) -> Result<Self> {
        check_adapter(OP, &lora_a, &lora_b)?;
        Ok(Self { a: lora_a.detach().contiguous()?, b: lora_b.detach().contiguous()?, s })
    }
}

impl CustomOp1 for FusedLoRAOp {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let size = Size::new(OP, layout.dims(), storage.dtype(), &self.a, &self.b)?;
        let (a, b) = (Held::of(OP, "a", &self.a)?, Held::of(OP, "b", &self.b)?);
        let gathered = if layout.is_contiguous() { None } else { Some(gather(OP, "x", storage, layout)?) };
        let x = match &gathered {
            Some(gathered) => Floats::of(OP, "x", gathered, &Layout::contiguous(layout.shape()))?,
            None => Floats::of(OP, "x", storage, layout)?,
        };
        let y = Lora::new(x, a.floats(), b.floats(), self.s, None, size.all()).delta();
        Ok((storage_of(y, storage.dtype()), with_last(layout.dims(), size.n).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let size = Size::new(OP, layout.dims(), storage.dtype(), &self.a, &self.b)?.cuda()?;
        let y = cuda::fused_lora::with_state(storage, layout, &self.a, &self.b, self.s, size)?;
        Ok((y, with_last(layout.dims(), size.n).into()))
    }

    fn metal_fwd(&self, storage: &MetalStorage, layout: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        Size::new(OP, layout.dims(), storage.dtype(), &self.a, &self.b)?;
        Ok(metal::fused_lora::delta_op1(storage, layout, &self.a, &self.b, self.s)?)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if cuda::takes(x.device()) && x.elem_count() > 0 {
            let size = Size::of(OP, x, &self.a, &self.b, None)?.cuda()?;
            let wanted = [true, false, false];
            let [dx, ..] = cuda::fused_lora::gradients(x, &self.a, &self.b, None, g, self.s, None, size, wanted)?;
            return Ok(dx);
        }
        let dx = x.zeros_like()?;
        backward(x, &self.a, &self.b, None, g, self.s, None, Sink { dx: Some(&dx), ..Sink::default() })?;
        Ok(Some(dx))
    }
}

/// The op on the tape; its arguments are contiguous.
struct Taped {
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
    /// What forward left for backward, where the device's kernel gives it.
    h: OnceLock<Tensor>,
}

impl CustomOp3 for Taped {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (a, b) = (Floats::of(OP, "a", a, a_layout)?, Floats::of(OP, "b", b, b_layout)?);
        let lora = Lora::new(Floats::of(OP, "x", x, x_layout)?, a, b, self.s, self.dropout, self.size.all());
        Ok((storage_of(lora.delta(), x.dtype()), with_last(x_layout.dims(), self.size.n).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let inputs = [(x, x_layout), (a, a_layout), (b, b_layout)];
        let (y, h) = cuda::fused_lora::taped(inputs, self.s, self.dropout, self.size.cuda()?)?;
        let _ = self.h.set(h);
        Ok((y, with_last(x_layout.dims(), self.size.n).into()))
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        x_layout: &Layout,
        a: &MetalStorage,
        a_layout: &Layout,
        b: &MetalStorage,
        b_layout: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        Ok(metal::fused_lora::delta_op([(x, x_layout), (a, a_layout), (b, b_layout)], self.s, self.dropout)?)
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let h = self.h.get();
        #[cfg(feature = "cuda")]
        if cuda::takes(x.device()) {
            let (size, wanted) = (self.size.cuda()?, [x, a, b].map(Tensor::track_op));
            let [dx, da, db] = cuda::fused_lora::gradients(x, a, b, h, g, self.s, self.dropout, size, wanted)?;
            return Ok((dx, cast(da, a)?, cast(db, b)?));
        }
        tape_gradients(x, a, b, |sink| backward(x, a, b, h, g, self.s, self.dropout, sink))
    }
}

/// Makes zero buffers for the tracked ones of x, A and B, lets `fill` add to them, and returns them in the arguments' dtypes.
pub(super) fn tape_gradients(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    fill: impl FnOnce(Sink) -> Result<()>,
) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let zeros = |tensor: &Tensor, dtype| match tensor.track_op() {
        true => Tensor::zeros(tensor.shape(), dtype, tensor.device()).map(Some),
        false => Ok(None),
    };
    let (dx, da, db) = (zeros(x, x.dtype())?, zeros(a, DType::F32)?, zeros(b, DType::F32)?);
    fill(Sink { dx: dx.as_ref(), da: da.as_ref(), db: db.as_ref() })?;
    Ok((dx, cast(da, a)?, cast(db, b)?))
}

/// A gradient in its argument's dtype.
pub(super) fn cast(gradient: Option<Tensor>, like: &Tensor) -> candle_core::Result<Option<Tensor>> {
    gradient.map(|gradient| gradient.to_dtype(like.dtype())).transpose()
}

/// m rows of x; k, r and n columns of x, A and B.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub m: usize,
    pub k: usize,
    pub r: usize,
    pub n: usize,
}

impl Size {
    /// Checks shapes, dtypes and devices.
    pub fn of(op: &'static str, x: &Tensor, a: &Tensor, b: &Tensor, dropout: Option<Dropout>) -> Result<Self> {
        let size = Self::new(op, x.dims(), x.dtype(), a, b)?;
        check::same_device(op, "a", a, "x", x)?;
        if let Some(Dropout { p, .. }) = dropout
            && !(0.0..1.0).contains(&p)
        {
            return Err(Error::op(op, format!("dropout {p} must be at least 0 and under 1")));
        }
        Ok(size)
    }

    /// Checks shapes and dtypes.
    fn new(op: &'static str, x: &[usize], dtype: DType, a: &Tensor, b: &Tensor) -> Result<Self> {
        let columns = check::last(op, "x", x)?;
        check::float_dtype(op, "x", dtype)?;
        let [k, r, n] = check_adapter(op, a, b)?;
        if columns != k {
            let a = a.dims();
            return Err(Error::op(op, format!("x {x:?} does not fit a {a:?}: x's last dimension must be {k}")));
        }
        if a.dtype() != DType::F32 && a.dtype() != dtype {
            let a = a.dtype();
            return Err(Error::op(op, format!("a and b have dtype {a:?}, but F32 or x's {dtype:?} is needed")));
        }
        Ok(Self { m: x.iter().product::<usize>() / k, k, r, n })
    }

    pub fn all(&self) -> [usize; 4] {
        [self.m, self.k, self.r, self.n]
    }

    /// As the CUDA kernels take it.
    #[cfg(feature = "cuda")]
    pub fn cuda(&self) -> Result<cuda::fused_lora::Size> {
        cuda::fused_lora::Size::new(self.all())
    }
}

/// Checks A against B; `[k, r, n]`.
pub(crate) fn check_adapter(op: &'static str, a: &Tensor, b: &Tensor) -> Result<[usize; 3]> {
    check::float(op, "a", a)?;
    if a.dtype() != b.dtype() {
        return Err(Error::op(op, format!("a has dtype {:?}, but b has {:?}", a.dtype(), b.dtype())));
    }
    check::same_device(op, "b", b, "a", a)?;
    match (a.dims(), b.dims()) {
        (&[k, r], &[rows, n]) if r == rows && k > 0 && r > 0 && n > 0 => Ok([k, r, n]),
        (a, b) => Err(Error::op(op, format!("a {a:?} and b {b:?} must be [k, r] and [r, n], none of them empty"))),
    }
}

/// Checks what [`backward`] takes beyond the inputs.
pub(super) fn check_backward(
    op: &'static str,
    x: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    size: &Size,
    sink: &Sink,
) -> Result<()> {
    check::gradient(op, "g", g, &with_last(x.dims(), size.n), x)?;
    if let Some(h) = h {
        check::sink(op, "h", h, &[size.m, size.r], x)?;
    }
    if let Some(dx) = sink.dx {
        check::gradient(op, "dx", dx, x.dims(), x)?;
    }
    if let Some(da) = sink.da {
        check::sink(op, "da", da, &[size.k, size.r], x)?;
    }
    if let Some(db) = sink.db {
        check::sink(op, "db", db, &[size.r, size.n], x)?;
    }
    Ok(())
}

/// Gives `f` the kernel's view of contiguous CPU tensors.
#[allow(clippy::too_many_arguments)]
pub(super) fn with_lora<R>(
    op: &'static str,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    size: &Size,
    f: impl FnOnce(&Lora) -> Result<R>,
) -> Result<R> {
    let (x, a, b) = (Held::of(op, "x", x)?, Held::of(op, "a", a)?, Held::of(op, "b", b)?);
    f(&Lora::new(x.floats(), a.floats(), b.floats(), s, dropout, size.all()))
}

/// `drop(x) A`, `[m, r]` f32, by Candle's ops.
pub(super) fn project(x: &Tensor, a: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    Ok(dropped(x, dropout)?.matmul(&a.to_dtype(DType::F32)?)?)
}

/// `drop(x)` as `[m, k]` f32, by Candle's ops.
fn dropped(x: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    let k = check::last(OP, "x", x.dims())?;
    let rows = x.to_dtype(DType::F32)?.reshape((x.elem_count() / k, k))?;
    Ok(match dropout {
        Some(dropout) => (rows * mask(x, k, dropout)?)?,
        None => rows,
    })
}

/// The factors of x's elements, `[m, k]` f32.
fn mask(x: &Tensor, k: usize, dropout: Dropout) -> Result<Tensor> {
    let factors: Vec<f32> = (0..x.elem_count() as u64).map(|index| dropout.factor(index)).collect();
    Ok(Tensor::from_vec(factors, (x.elem_count() / k, k), x.device())?)
}

/// The delta by Candle's ops, with Candle's gradients.
pub(super) fn composite(x: &Tensor, a: &Tensor, b: &Tensor, s: f64, dropout: Option<Dropout>) -> Result<Tensor> {
    let n = check::last(OP, "b", b.dims())?;
    let y = (project(x, a, dropout)?.matmul(&b.to_dtype(DType::F32)?)? * s)?;
    Ok(y.to_dtype(x.dtype())?.reshape(with_last(x.dims(), n))?)
}

/// The gradients by Candle's ops.
#[allow(clippy::too_many_arguments)]
fn composite_backward(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    sink: &Sink,
) -> Result<()> {
    let (k, n) = (check::last(OP, "x", x.dims())?, check::last(OP, "g", g.dims())?);
    let g = (g.to_dtype(DType::F32)?.reshape((g.elem_count() / n, n))? * s)?;
    let u = g.matmul(&b.to_dtype(DType::F32)?.t()?)?;
    if let Some(da) = sink.da {
        fallback::accumulate(da, &dropped(x, dropout)?.t()?.matmul(&u)?)?;
    }
    if let Some(db) = sink.db {
        let h = h.map_or_else(|| project(x, a, dropout), |h| Ok(h.clone()))?;
        fallback::accumulate(db, &h.t()?.matmul(&g)?)?;
    }
    if let Some(dx) = sink.dx {
        let through = u.matmul(&a.to_dtype(DType::F32)?.t()?)?;
        let through = match dropout {
            Some(dropout) => (through * mask(x, k, dropout)?)?,
            None => through,
        };
        fallback::accumulate(dx, &through)?;
    }
    Ok(())
}
