//! A frozen linear layer with its adapter: `y = x Wᵀ + bias + s · (drop(x) A) B`.
//!
//! Shapes and dtypes are those of [`mod@super::linear`] and [`mod@super::fused_lora`]; y is rounded to x's dtype once. With
//! h = drop(x) A and u = s · g Bᵀ: `dx = g W + drop(u Aᵀ)`, `dA = drop(x)ᵀ u`, `dB = s · hᵀ g`. W and bias are frozen: their
//! gradients are never computed.
//! On CUDA, f16 and bf16 sums over large matrices round the adapter's part before the base's is added.

use std::sync::OnceLock;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Shape, Tensor};

use super::check::with_last;
use super::fused_lora::{self, Sink, Size};
use super::linear;
use super::weight::{Frozen, Weight};
use crate::backend::cpu;
use crate::backend::cpu::floats::{Floats, Held, storage_of, tensor_of};
use crate::backend::cpu::fused_lora::Lora;
use crate::backend::cuda;
use crate::backend::dropout::Dropout;
use crate::{Error, Result};

const OP: &str = "lora_linear";

/// One of several linears that share an input.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// W `[n, k]`.
    pub w: Weight<'a>,
    /// `[n]`.
    pub bias: Option<&'a Tensor>,
    /// Its adapter.
    pub adapter: Option<Adapter<'a>>,
}

/// The adapter of a [`Part`].
#[derive(Debug, Clone, Copy)]
pub struct Adapter<'a> {
    /// A `[k, r]`.
    pub a: &'a Tensor,
    /// B `[r, n]`.
    pub b: &'a Tensor,
    /// s.
    pub s: f64,
    /// Of the adapter's input.
    pub dropout: Option<Dropout>,
}

/// [`forward`] of up to three linears of one input, as q, k and v or gate and up; without an adapter [`linear::forward`] and no h.
/// On GPUs of compute capability 9.0 they take one pass over x and one launch for their products.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn forward_shared(x: &Tensor, parts: &[Part]) -> Result<Vec<(Tensor, Option<Tensor>)>> {
    check_parts(x, parts)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) && few_of_blocks(x, parts) {
        return forward_few_of_blocks(x, parts);
    }
    if let Some(dense) = Dense::of(x, parts)? {
        return forward_shared(x, &dense.parts(parts));
    }
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device())
        && x.elem_count() > 0
        && let Some(all) = cuda::shared_linear::forward(x, parts)?
    {
        return Ok(all);
    }
    if x.device().is_cpu() && few(x, parts) {
        return forward_few(x, parts);
    }
    let one = |part: &Part| match part.adapter {
        Some(Adapter { a, b, s, dropout }) => {
            forward(x, part.w, part.bias, a, b, s, dropout).map(|(y, h)| (y, Some(h)))
        }
        None => linear::forward(x, part.w, part.bias).map(|y| (y, None)),
    };
    parts.iter().map(one).collect()
}

/// Whether x has the few rows that are multiplied by quantized weights as they are, on CUDA.
#[cfg(feature = "cuda")]
fn few_of_blocks(x: &Tensor, parts: &[Part]) -> bool {
    let rows = parts.first().map_or(0, |part| x.elem_count() / part.w.dims()[1]);
    (1..=cuda::few_rows::MOST).contains(&rows) && parts.iter().any(|part| matches!(part.w, Weight::Quantized(_)))
}

/// [`forward_shared`] for [`few_of_blocks`]: the adapter's part is added to y, which is rounded once more then.
#[cfg(feature = "cuda")]
fn forward_few_of_blocks(x: &Tensor, parts: &[Part]) -> Result<Vec<(Tensor, Option<Tensor>)>> {
    let one = |part: &Part| {
        let y = linear::forward(x, part.w, part.bias)?;
        let add = |Adapter { a, b, s, dropout }| fused_lora::add_into(&y, x, a, b, s, dropout);
        let h = part.adapter.map(add).transpose()?;
        Ok((y, h))
    };
    parts.iter().map(one).collect()
}

/// On a GPU, quantized weights as tensors that live for one call.
struct Dense(Vec<Option<Tensor>>);

impl Dense {
    /// `None` where nothing is quantized, and on the CPU, which widens them a tile at a time.
    fn of(x: &Tensor, parts: &[Part]) -> Result<Option<Self>> {
        if x.device().is_cpu() || !parts.iter().any(|part| matches!(part.w, Weight::Quantized(_))) {
            return Ok(None);
        }
        let dense = parts.iter().map(|part| match part.w {
            Weight::Quantized(_) => part.w.to_dense(x.dtype()).map(Some),
            Weight::Dense(_) => Ok(None),
        });
        Ok(Some(Self(dense.collect::<Result<_>>()?)))
    }

    fn parts<'a>(&'a self, parts: &[Part<'a>]) -> Vec<Part<'a>> {
        let one = |(part, dense): (&Part<'a>, &'a Option<Tensor>)| Part {
            w: dense.as_ref().map_or(part.w, Weight::Dense),
            ..*part
        };
        parts.iter().zip(&self.0).map(one).collect()
    }
}

/// Whether the products of all parts are those of a few rows with f32 sums, which go together.
fn few(x: &Tensor, parts: &[Part]) -> bool {
    let rows = parts.first().map_or(0, |part| x.elem_count() / part.w.dims()[1]);
    let of_bf16 = |part: &Part| matches!(part.w, Weight::Dense(w) if w.dtype() == DType::BF16);
    (1..=cpu::linear::FEW_ROWS).contains(&rows) && !(x.dtype() == DType::BF16 && parts.iter().any(of_bf16))
}

/// [`forward_shared`] for a few rows on the CPU.
fn forward_few(x: &Tensor, parts: &[Part]) -> Result<Vec<(Tensor, Option<Tensor>)>> {
    let x = x.contiguous()?;
    let held = Held::of(OP, "x", &x)?;
    let k = x.dims()[x.dims().len() - 1];
    let weights = parts.iter().map(|part| part.w.contiguous()).collect::<Result<Vec<_>>>()?;
    let weights = weights.iter().map(|w| Held::weight(OP, "w", w.borrow())).collect::<Result<Vec<_>>>()?;
    let weights: Vec<Floats> = weights.iter().map(Held::floats).collect();
    let products = cpu::linear::few_rows_shared(&held.floats(), &weights, k);
    let one = |(part, mut y): (&Part, Vec<f32>)| {
        if let Some(bias) = part.bias {
            let bias = bias.contiguous()?;
            let bias = Held::of(OP, "bias", &bias)?;
            let bias = bias.floats().to_f32();
            y.chunks_exact_mut(bias.len()).for_each(|y| y.iter_mut().zip(&*bias).for_each(|(y, bias)| *y += bias));
        }
        let h = match part.adapter {
            None => None,
            Some(Adapter { a, b, s, dropout }) => {
                let (a, b) = (a.contiguous()?, b.contiguous()?);
                let size = Size::of(OP, &x, &a, &b, dropout)?;
                let h = fused_lora::with_lora(OP, &x, &a, &b, s, dropout, &size, |lora| {
                    Ok(lora.add_delta_keeping_h(&mut y))
                })?;
                Some(tensor_of(h, (size.m, size.r), DType::F32)?)
            }
        };
        Ok((tensor_of(y, with_last(x.dims(), part.w.dims()[0]), x.dtype())?, h))
    };
    parts.iter().zip(products).map(one).collect()
}

/// [`forward_shared`] of one linear, with a residual of y's shape and dtype added to y. On GPUs of compute capability 9.0 before y is rounded,
/// elsewhere to the rounded y.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn forward_add(x: &Tensor, part: &Part, residual: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
    check_parts(x, std::slice::from_ref(part))?;
    super::check::gradient(OP, "residual", residual, &with_last(x.dims(), part.w.dims()[0]), x)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device())
        && few_of_blocks(x, std::slice::from_ref(part))
        && let Some((y, h)) = forward_few_of_blocks(x, std::slice::from_ref(part))?.pop()
    {
        return Ok((y.add(residual)?, h));
    }
    if let Some(dense) = Dense::of(x, std::slice::from_ref(part))? {
        return forward_add(x, &dense.parts(std::slice::from_ref(part))[0], residual);
    }
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device())
        && x.elem_count() > 0
        && let Some(made) = cuda::shared_linear::forward_add(x, part, residual)?
    {
        return Ok(made);
    }
    let mut made = forward_shared(x, std::slice::from_ref(part))?;
    let Some((y, h)) = made.pop() else { unreachable!("one output for each linear") };
    Ok((y.add(residual)?, h))
}

/// The gradients of [`forward_shared`]: those of A and B are added to `sinks`, one pair for each part; x's, of x's dtype and the sum over
/// the parts, is returned where `input_gradient` asks for it. `h` and `g` have one entry for each part.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn backward_shared(
    x: &Tensor,
    parts: &[Part],
    h: &[Option<&Tensor>],
    g: &[&Tensor],
    sinks: &[(Option<&Tensor>, Option<&Tensor>)],
    input_gradient: bool,
) -> Result<Option<Tensor>> {
    check_parts(x, parts)?;
    if let Some(dense) = Dense::of(x, parts)? {
        return backward_shared(x, &dense.parts(parts), h, g, sinks, input_gradient);
    }
    if [h.len(), g.len(), sinks.len()] != [parts.len(); 3] {
        let (h, g, sinks) = (h.len(), g.len(), sinks.len());
        return Err(Error::op(
            OP,
            format!("{} linears with {h} h, {g} g and {sinks} sinks; one each is needed", parts.len()),
        ));
    }
    for (((part, h), g), (da, db)) in parts.iter().zip(h).zip(g).zip(sinks) {
        match part.adapter {
            Some(Adapter { a, b, dropout, .. }) => {
                let size = check_inputs(x, part.w, None, a, b, dropout)?;
                fused_lora::check_backward(OP, x, *h, g, &size, &Sink { dx: None, da: *da, db: *db })?;
            }
            None => super::check::gradient(OP, "g", g, &with_last(x.dims(), part.w.dims()[0]), x)?,
        }
    }
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) && x.elem_count() > 0 {
        let dx = match input_gradient {
            true => Some(cuda::linear::uninit_like(x)?),
            false => None,
        };
        let to = dx.as_ref().map(|dx| (dx, false));
        if cuda::shared_linear::backward(x, parts, &cuda::shared_linear::Wanted { h, g, dx: to, sinks, add: true })? {
            return Ok(dx);
        }
    }
    // The sum over the parts is f32 and rounded once.
    let zeros = || Tensor::zeros(x.shape(), if x.device().is_cpu() { DType::F32 } else { x.dtype() }, x.device());
    let dx = if input_gradient { Some(zeros()?) } else { None };
    for (i, part) in parts.iter().enumerate() {
        match part.adapter {
            Some(Adapter { a, b, s, dropout }) => {
                let sink = Sink { dx: dx.as_ref(), da: sinks[i].0, db: sinks[i].1 };
                backward(x, part.w, a, b, h[i], g[i], s, dropout, sink)?;
            }
            None => linear::backward(x, part.w, g[i], dx.as_ref(), None, None)?,
        }
    }
    dx.map(|dx| cpu::floats::cast(dx, x.dtype())).transpose()
}

/// `(y, h)`: y `[.., n]` of x's dtype, and `h = drop(x) A`, `[m, r]` f32, for [`backward`].
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn forward<'a>(
    x: &Tensor,
    w: impl Into<Weight<'a>>,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
) -> Result<(Tensor, Tensor)> {
    let w = w.into();
    let size = check_inputs(x, w, bias, a, b, dropout)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        return cuda::lora_linear::forward(x, &w.to_dense(x.dtype())?, bias, a, b, s, dropout, size.cuda()?);
    }
    let shape = with_last(x.dims(), size.n);
    if !x.device().is_cpu() {
        // The base product is Candle's own; the adapter is added to it in place.
        let base = linear::Size { m: size.m, k: size.k, n: size.n };
        let y =
            linear::composite(&x.detach(), &w.to_dense(x.dtype())?.detach(), bias, &base)?.detach().reshape(shape)?;
        let h = fused_lora::add_into(&y, x, a, b, s, dropout)?;
        return Ok((y, h));
    }
    let (x, a, b) = (x.contiguous()?, a.contiguous()?, b.contiguous()?);
    let frozen = Base { w: w.contiguous()?, bias: bias.map(Tensor::contiguous).transpose()? };
    let (y, h) = fused_lora::with_lora(OP, &x, &a, &b, s, dropout, &size, |lora| {
        let mut y = frozen.forward(&Held::of(OP, "x", &x)?.floats(), &size)?;
        let h = lora.add_delta_keeping_h(&mut y);
        Ok((y, h))
    })?;
    Ok((tensor_of(y, shape, x.dtype())?, tensor_of(h, (size.m, size.r), DType::F32)?))
}

/// Adds the gradients that have somewhere to go: `dx += g W + drop(u Aᵀ)`, dA and dB. `h` is what [`forward`] returned.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
#[allow(clippy::too_many_arguments)]
pub fn backward<'a>(
    x: &Tensor,
    w: impl Into<Weight<'a>>,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    sink: Sink,
) -> Result<()> {
    let w = w.into();
    let size = check_inputs(x, w, None, a, b, dropout)?;
    fused_lora::check_backward(OP, x, h, g, &size, &sink)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        let w = w.to_dense(x.dtype())?;
        return cuda::lora_linear::backward(x, &w, a, b, h, g, s, dropout, size.cuda()?, &sink, true);
    }
    if let Some(dx) = sink.dx {
        linear::backward(x, w, g, Some(dx), None, None)?;
    }
    fused_lora::backward(x, a, b, h, g, s, dropout, sink)
}

/// [`forward`] without dropout, on Candle's tape: x, A and B get gradients where they are tracked; W and bias get none, even
/// where they are variables. What is quantized stays so until backward.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn lora_linear<'a>(
    x: &Tensor,
    w: impl Into<Weight<'a>>,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    s: f64,
) -> Result<Tensor> {
    lora_linear_with_dropout(x, w, bias, a, b, s, None)
}

/// [`lora_linear`] with dropout on the adapter's input.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn lora_linear_with_dropout<'a>(
    x: &Tensor,
    w: impl Into<Weight<'a>>,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
) -> Result<Tensor> {
    let w = w.into();
    let size = check_inputs(x, w, bias, a, b, dropout)?;
    let bias = bias.map(Tensor::detach);
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device())
        && size.m > 0
        && (w.differs_from(x.dtype()) || cuda::lora_linear::in_f32(x, size.cuda()?))
    {
        let [x32, a, b] = [x, a, b].map(|tensor| tensor.to_dtype(DType::F32));
        let w = w.to_dtype(DType::F32)?;
        let y = lora_linear_with_dropout(&x32?, w.borrow(), bias.as_ref(), &a?, &b?, s, dropout)?;
        return Ok(y.to_dtype(x.dtype())?);
    }
    if !x.device().is_cpu() && !cuda::takes(x.device()) {
        let base = linear::linear(x, w, bias.as_ref())?;
        return Ok((base + fused_lora::fused_lora_with_dropout(x, a, b, s, dropout)?)?);
    }
    let bias = bias.map(|bias| match cuda::takes(x.device()) {
        true => bias.to_dtype(x.dtype())?.contiguous(),
        false => bias.contiguous(),
    });
    let frozen = Base { w: w.contiguous()?, bias: bias.transpose()? };
    let op = Taped { frozen, s, dropout, size, h: OnceLock::new() };
    Ok(x.contiguous()?.apply_op3(&a.contiguous()?, &b.contiguous()?, op)?)
}

/// W and bias, contiguous.
struct Base {
    w: Frozen,
    bias: Option<Tensor>,
}

impl Base {
    /// `x Wᵀ + bias`, `[m, n]`.
    fn forward(&self, x: &Floats, size: &Size) -> Result<Vec<f32>> {
        let bias = self.bias.as_ref().map(|bias| Held::of(OP, "bias", bias)).transpose()?;
        let bias = bias.as_ref().map(|bias| bias.floats().to_f32());
        let w = Held::weight(OP, "w", self.w.borrow())?;
        Ok(cpu::linear::forward(x, &w.floats(), bias.as_deref(), size.m, size.k, size.n))
    }
}

/// The op on the tape; its arguments are contiguous.
struct Taped {
    frozen: Base,
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
        let values = Floats::of(OP, "x", x, x_layout)?;
        let mut y = self.frozen.forward(&values, &self.size)?;
        let lora = Lora::new(values, a, b, self.s, self.dropout, self.size.all());
        lora.add_delta(&mut y);
        Ok((storage_of(y, x.dtype()), with_last(x_layout.dims(), self.size.n).into()))
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
        let Base { w, bias } = &self.frozen;
        let (w, size) = (w.borrow().to_dense(x.dtype())?, self.size.cuda()?);
        let (y, h) = cuda::lora_linear::taped(inputs, &w, bias.as_ref(), self.s, self.dropout, size)?;
        let _ = self.h.set(h);
        Ok((y, with_last(x_layout.dims(), self.size.n).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (w, h) = (self.frozen.w.borrow(), self.h.get());
        #[cfg(feature = "cuda")]
        if cuda::takes(x.device()) {
            let (size, wanted) = (self.size.cuda()?, [x, a, b].map(Tensor::track_op));
            let w = w.to_dense(x.dtype())?;
            let [dx, da, db] = cuda::lora_linear::gradients(x, &w, a, b, h, g, self.s, self.dropout, size, wanted)?;
            return Ok((dx, fused_lora::cast(da, a)?, fused_lora::cast(db, b)?));
        }
        fused_lora::tape_gradients(x, a, b, |sink| backward(x, w, a, b, h, g, self.s, self.dropout, sink))
    }
}

fn check_parts(x: &Tensor, parts: &[Part]) -> Result<()> {
    for part in parts {
        match part.adapter {
            Some(Adapter { a, b, dropout, .. }) => {
                check_inputs(x, part.w, part.bias, a, b, dropout)?;
            }
            None => {
                linear::Size::of(OP, x, part.w, part.bias)?;
            }
        }
    }
    Ok(())
}

fn check_inputs(
    x: &Tensor,
    w: Weight,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    dropout: Option<Dropout>,
) -> Result<Size> {
    let base = linear::Size::of(OP, x, w, bias)?;
    let size = Size::of(OP, x, a, b, dropout)?;
    if base.n != size.n {
        let (w, b) = (w.dims(), b.dims());
        return Err(Error::op(OP, format!("w {w:?} does not fit b {b:?}: w must be [{}, {}]", size.n, size.k)));
    }
    Ok(size)
}
