//! The LoRA delta and its gradients on Apple GPUs: tensors to launches. Shapes and dtypes have been checked by the caller.

use candle_core::backend::BackendStorage;
use candle_core::{D, DType, Layout, MetalStorage, Shape, Tensor};

use super::encode::{Operand, allocate, run};
use super::pipelines::pipeline;
use super::plan::Slot;
use super::plan::fused_lora::Call;
use crate::Result;
use crate::backend::custom_ops::Sink;
use crate::backend::dropout::Dropout;

const OP: &str = "fused_lora";

/// Whether [`delta_op`] and [`backward`] can run on these tensors: makes all of their pipelines.
///
/// # Errors
/// Why not.
pub fn ready(x: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let x = Operand::of(OP, "x", x)?;
    let call = call([&x, &Operand::of(OP, "a", a)?, &Operand::of(OP, "b", b)?], 1.0, None)?;
    let plans = [call.delta()?, call.backward(call.x, Some(call.x), true, true, false)?];
    plans.iter().flat_map(|plan| &plan.launches).try_for_each(|launch| pipeline(x.device(), launch).map(drop))
}

/// `s · (drop(x) A) B`, of x's dtype.
///
/// # Errors
/// Kernels that do not compile, sizes beyond them, no memory.
pub fn delta(x: &Tensor, a: &Tensor, b: &Tensor, s: f64, dropout: Option<Dropout>) -> Result<Tensor> {
    let (storage, shape) = delta_of([Operand::of(OP, "x", x)?, Operand::of(OP, "a", a)?, Operand::of(OP, "b", b)?], s, dropout)?;
    Ok(super::encode::tensor(storage, shape))
}

/// [`delta`] of x, A and B as Candle gives them to an op.
///
/// # Errors
/// As [`delta`].
pub fn delta_op(
    inputs: [(&MetalStorage, &Layout); 3],
    s: f64,
    dropout: Option<Dropout>,
) -> Result<(MetalStorage, Shape)> {
    delta_of(inputs.map(|(storage, layout)| Operand { storage: storage.clone(), layout: layout.clone() }), s, dropout)
}

/// [`delta_op`] where A and B are tensors.
///
/// # Errors
/// As [`delta`].
pub fn delta_op1(x: &MetalStorage, layout: &Layout, a: &Tensor, b: &Tensor, s: f64) -> Result<(MetalStorage, Shape)> {
    let x = Operand { storage: x.clone(), layout: layout.clone() };
    delta_of([x, Operand::of(OP, "a", a)?, Operand::of(OP, "b", b)?], s, None)
}

fn delta_of(inputs: [Operand; 3], s: f64, dropout: Option<Dropout>) -> Result<(MetalStorage, Shape)> {
    let [x, a, b] = &inputs;
    let call = call([x, a, b], s, dropout)?;
    let device = x.device().clone();
    let y = allocate(OP, &device, call.rows() * call.n, call.x)?;
    let mut shape = x.layout.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = call.n;
    }
    let [x, a, b] = inputs;
    let tensors = [(Slot::X, x), (Slot::A, a), (Slot::B, b), (Slot::Y, y.clone())];
    run(OP, &device, call.delta()?, tensors)?;
    Ok((y.storage, shape.into()))
}

/// `y += s · (drop(x) A) B`; returns h = drop(x) A, `[m, r]` f32.
///
/// # Errors
/// As [`delta`]; y is then as it was.
pub fn add_into(y: &Tensor, x: &Tensor, a: &Tensor, b: &Tensor, s: f64, dropout: Option<Dropout>) -> Result<Tensor> {
    let [x, a, b] = [Operand::of(OP, "x", x)?, Operand::of(OP, "a", a)?, Operand::of(OP, "b", b)?];
    let call = call([&x, &a, &b], s, dropout)?;
    let device = x.device().clone();
    let h = allocate(OP, &device, call.rows() * call.r, DType::F32)?;
    let plan = call.add_into(y.dtype())?;
    let y = Operand::target(OP, "y", y)?;
    let tensors = [(Slot::X, x), (Slot::A, a), (Slot::B, b), (Slot::Y, y), (Slot::H, h.clone())];
    run(OP, &device, plan, tensors)?;
    let shape = (call.rows(), call.r);
    Ok(h.tensor(shape))
}

/// Adds the gradients that have somewhere to go.
///
/// # Errors
/// As [`delta`]; every buffer is then as it was.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    sink: &Sink,
) -> Result<()> {
    let [x, a, b] = [Operand::of(OP, "x", x)?, Operand::of(OP, "a", a)?, Operand::of(OP, "b", b)?];
    let call = call([&x, &a, &b], s, dropout)?;
    let device = x.device().clone();
    let dx = sink.dx.map(Tensor::dtype);
    let plan = call.backward(g.dtype(), dx, sink.da.is_some(), sink.db.is_some(), h.is_some())?;
    let mut tensors = vec![(Slot::X, x), (Slot::A, a), (Slot::B, b), (Slot::G, Operand::of(OP, "g", g)?)];
    if let Some(h) = h {
        tensors.push((Slot::H, Operand::of(OP, "h", h)?));
    }
    for (slot, name, target) in [(Slot::Dx, "dx", sink.dx), (Slot::Da, "da", sink.da), (Slot::Db, "db", sink.db)] {
        if let Some(target) = target {
            tensors.push((slot, Operand::target(OP, name, target)?));
        }
    }
    run(OP, &device, plan, tensors)
}

fn call([x, a, b]: [&Operand; 3], s: f64, dropout: Option<Dropout>) -> Result<Call> {
    let dims = x.layout.dims();
    let seq = if dims.len() > 1 { x.layout.shape().dim(D::Minus2)? } else { 1 };
    let batch = dims.iter().rev().skip(2).product();
    let ((k, r), (_, n)) = (a.layout.shape().dims2()?, b.layout.shape().dims2()?);
    Ok(Call { batch, seq, k, r, n, s, dropout, x: x.storage.dtype(), adapter: a.storage.dtype() })
}
