//! The rotary embedding on Apple GPUs. Shapes, dtypes and positions were checked by `custom_ops::rope`.

use candle_core::Tensor;

use super::encode::{Operand, run};
use super::plan::{Slot, rope as plan};
use crate::Result;

const OP: &str = "rope";

/// Rotates x `[T, H, D]` in place.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &[u32], inverse: bool) -> Result<()> {
    let plan = plan::rotate(positions, x.dims()[1], x.dims()[2], x.dtype(), inverse)?;
    let x = Operand::whole(OP, "x", x)?;
    let device = x.device().clone();
    let tensors =
        [(Slot::X, x), (Slot::Cos, Operand::whole(OP, "cos", cos)?), (Slot::Sin, Operand::whole(OP, "sin", sin)?)];
    run(OP, &device, plan, tensors)
}
