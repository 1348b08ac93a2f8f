//! SwiGLU and GeGLU on Apple GPUs. Shapes and dtypes were checked by `custom_ops::swiglu`.

use candle_core::Tensor;

use super::encode::{Operand, allocate, run};
use super::plan::{Slot, swiglu as plan};
use crate::Result;
use crate::backend::custom_ops::swiglu::Activation;

const OP: &str = "swiglu";

/// `act(gate) · up`.
pub fn forward(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let (count, dtype) = (gate.elem_count(), gate.dtype());
    let [held, up] = [Operand::whole(OP, "gate", gate)?, Operand::whole(OP, "up", up)?];
    let device = held.device().clone();
    let y = allocate(OP, &device, count, dtype)?;
    let tensors = [(Slot::Gate, held), (Slot::Up, up), (Slot::Y, y.clone())];
    run(OP, &device, plan::forward(count, dtype, activation)?, tensors)?;
    Ok(y.tensor(gate.shape()))
}

/// `(dgate, dup)`.
pub fn backward(gate: &Tensor, up: &Tensor, g: &Tensor, activation: Activation) -> Result<(Tensor, Tensor)> {
    let (count, dtype) = (gate.elem_count(), gate.dtype());
    let [held, up, g] = [Operand::whole(OP, "gate", gate)?, Operand::whole(OP, "up", up)?, Operand::whole(OP, "g", g)?];
    let device = held.device().clone();
    let (dgate, dup) = (allocate(OP, &device, count, dtype)?, allocate(OP, &device, count, dtype)?);
    let tensors = [
        (Slot::Gate, held),
        (Slot::Up, up),
        (Slot::G, g),
        (Slot::Dgate, dgate.clone()),
        (Slot::Dup, dup.clone()),
    ];
    run(OP, &device, plan::backward(count, dtype, activation)?, tensors)?;
    Ok((dgate.tensor(gate.shape()), dup.tensor(gate.shape())))
}
