//! RMS norm on Apple GPUs. Shapes and dtypes were checked by `custom_ops::rms_norm`.

use candle_core::{DType, Tensor};

use super::encode::{Operand, allocate, run};
use super::plan::Slot;
use super::plan::rms_norm::Call;
use crate::Result;

const OP: &str = "rms_norm";

fn call(x: &Tensor, weight: &Tensor, eps: f64) -> Call {
    let width = weight.elem_count();
    Call { rows: x.elem_count() / width, width, eps, x: x.dtype(), weight: weight.dtype() }
}

/// `(sum, y, rstd)` of `x + residual`; without a residual there is no sum.
pub fn forward(
    x: &Tensor,
    residual: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<(Option<Tensor>, Tensor, Tensor)> {
    let call = call(x, weight, eps);
    let shape = x.shape().clone();
    let x = Operand::whole(OP, "x", x)?;
    let device = x.device().clone();
    let like = || allocate(OP, &device, shape.elem_count(), call.x);
    let (y, rstd) = (like()?, allocate(OP, &device, call.rows, DType::F32)?);
    let weight = Operand::whole(OP, "weight", weight)?;
    let mut tensors =
        vec![(Slot::X, x), (Slot::Weight, weight), (Slot::Y, y.clone()), (Slot::Rstd, rstd.clone())];
    let mut sum = None;
    if let Some(residual) = residual {
        let made = like()?;
        tensors.extend([(Slot::Residual, Operand::whole(OP, "residual", residual)?), (Slot::Sum, made.clone())]);
        sum = Some(made);
    }
    run(OP, &device, call.forward(sum.is_some())?, tensors)?;
    Ok((sum.map(|sum| sum.tensor(&shape)), y.tensor(&shape), rstd.tensor(call.rows)))
}

/// Adds to dx and, where it is given, to dweight `[n]` f32.
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    g: &Tensor,
    dx: &Tensor,
    dweight: Option<&Tensor>,
) -> Result<()> {
    let plan = call(x, weight, 0.0).backward(dweight.is_some())?;
    let x = Operand::whole(OP, "x", x)?;
    let device = x.device().clone();
    let mut tensors = vec![
        (Slot::X, x),
        (Slot::Weight, Operand::whole(OP, "weight", weight)?),
        (Slot::Rstd, Operand::whole(OP, "rstd", rstd)?),
        (Slot::G, Operand::whole(OP, "g", g)?),
        (Slot::Dx, Operand::whole(OP, "dx", dx)?),
    ];
    if let Some(dweight) = dweight {
        tensors.push((Slot::Dweight, Operand::whole(OP, "dweight", dweight)?));
    }
    run(OP, &device, plan, tensors)
}
