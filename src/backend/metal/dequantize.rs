//! Quantized blocks to elements on Apple GPUs. The dtype was checked by `custom_ops::dequantize`.

use candle_core::{DType, Tensor};

use super::encode::{Operand, allocate, run};
use super::plan::{Slot, dequantize as plan};
use crate::Result;
use crate::backend::quantized::QuantizedTensor;

const OP: &str = "dequantize";

/// W `[n, k]` in `dtype`.
pub fn dequantize(w: &QuantizedTensor, dtype: DType) -> Result<Tensor> {
    let &[n, k] = w.dims();
    let plan = plan::blocks(w.kind(), n * k, dtype)?;
    let blocks = Operand::whole(OP, "w", w.bytes())?;
    let device = blocks.device().clone();
    let dense = allocate(OP, &device, n * k, dtype)?;
    run(OP, &device, plan, [(Slot::Weight, blocks), (Slot::Y, dense.clone())])?;
    Ok(dense.tensor((n, k)))
}
