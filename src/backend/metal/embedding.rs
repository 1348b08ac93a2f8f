//! Rows by index on Apple GPUs. Shapes, dtypes and ids were checked by `custom_ops::embedding`.

use candle_core::Tensor;

use super::encode::{Operand, allocate, run};
use super::plan::{Slot, embedding as plan};
use crate::Result;

const OP: &str = "embedding";

/// `y[t] = table[ids[t]]`.
pub fn forward(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let (width, dtype) = (table.dims()[1], table.dtype());
    let plan = plan::gather(ids, width, dtype)?;
    let table = Operand::whole(OP, "table", table)?;
    let device = table.device().clone();
    let y = allocate(OP, &device, ids.len() * width, dtype)?;
    run(OP, &device, plan, [(Slot::Table, table), (Slot::Y, y.clone())])?;
    Ok(y.tensor((ids.len(), width)))
}

/// `y[ids[t]] = x[t]`, for ids that differ.
pub fn scatter(x: &Tensor, ids: &[u32], y: &Tensor) -> Result<()> {
    let plan = plan::scatter(ids, x.dims()[1], x.dtype())?;
    let x = Operand::whole(OP, "x", x)?;
    let device = x.device().clone();
    run(OP, &device, plan, [(Slot::X, x), (Slot::Y, Operand::whole(OP, "y", y)?)])
}

/// `dtable[ids[t]] += g[t]`.
pub fn backward(ids: &[u32], g: &Tensor, dtable: &Tensor) -> Result<()> {
    let plan = plan::backward(ids, g.dims()[1], g.dtype())?;
    let g = Operand::whole(OP, "g", g)?;
    let device = g.device().clone();
    run(OP, &device, plan, [(Slot::G, g), (Slot::Dtable, Operand::whole(OP, "dtable", dtable)?)])
}
