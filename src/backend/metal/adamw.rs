//! AdamW and the gradient's norm on Apple GPUs. Shapes and dtypes were checked by `custom_ops::adamw`.

use candle_core::{DType, Tensor};

use super::encode::{Operand, allocate, run};
use super::plan::{Slot, adamw as plan};
use crate::Result;
use crate::backend::cpu::adamw::Step;

const OP: &str = "adamw";

/// One step of `block` `[3, n]`.
pub fn step(block: &Tensor, grads: &Tensor, step: Step) -> Result<()> {
    let plan = plan::step(grads.elem_count(), step)?;
    let block = Operand::whole(OP, "block", block)?;
    let device = block.device().clone();
    run(OP, &device, plan, [(Slot::Block, block), (Slot::Grads, Operand::whole(OP, "grads", grads)?)])
}

/// The sum of squares of f32 `grads`. Waits for it.
pub fn squared_norm(grads: &Tensor) -> Result<f64> {
    let n = grads.elem_count();
    let grads = Operand::whole(OP, "grads", grads)?;
    let device = grads.device().clone();
    let parts = allocate(OP, &device, plan::parts(n), DType::F32)?;
    run(OP, &device, plan::squares(n)?, [(Slot::Grads, grads), (Slot::Parts, parts.clone())])?;
    if n == 0 {
        return Ok(0.0);
    }
    let parts = parts.tensor(plan::parts(n)).to_vec1::<f32>()?;
    Ok(parts.into_iter().map(f64::from).sum())
}
