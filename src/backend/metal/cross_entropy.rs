//! Cross entropy with the output projection on Apple GPUs: Candle's products of chunks of rows in f32, with a kernel between
//! them. Shapes, dtypes and targets were checked by `custom_ops::cross_entropy`.

use candle_core::{DType, Tensor};

use super::encode::{Operand, allocate, run};
use super::plan::{Slot, cross_entropy as plan};
use super::embedding;
use crate::Result;
use crate::backend::custom_ops::cross_entropy::Pending;
use crate::backend::fallback;

const OP: &str = "cross_entropy";
/// Bytes that a chunk's logits may take.
const CHUNK_BYTES: usize = 256 << 20;

/// The loss over `counted` rows of hidden `[T, H]`, and with `scale` the gradient of hidden; dhead `[V, H]` f32 += where it is
/// given.
pub fn loss(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[u32],
    counted: &[usize],
    scale: Option<f32>,
    dhead: Option<&Tensor>,
) -> Result<(Pending, Option<Tensor>)> {
    let device = Operand::whole(OP, "hidden", hidden)?.device().clone();
    Operand::whole(OP, "head", head)?;
    let dhidden = scale.map(|_| hidden.detach().zeros_like()).transpose()?;
    if counted.is_empty() {
        return Ok((Pending::ready(0.0, 0), dhidden));
    }
    let head = head.detach().to_dtype(DType::F32)?;
    let losses = allocate(OP, &device, counted.len(), DType::F32)?.tensor(counted.len());
    let chunk = (CHUNK_BYTES / (size_of::<f32>() * head.dims()[0])).clamp(1, counted.len());
    for (index, counted) in counted.chunks(chunk).enumerate() {
        let rows: Vec<u32> = counted.iter().map(|&row| row as u32).collect();
        let wanted: Vec<u32> = counted.iter().map(|&row| targets[row]).collect();
        let x = embedding::forward(hidden, &rows)?.to_dtype(DType::F32)?;
        let logits = x.matmul(&head.t()?)?;
        let tensors = [
            (Slot::Logits, Operand::whole(OP, "logits", &logits)?),
            (Slot::Losses, Operand::whole(OP, "losses", &losses.narrow(0, index * chunk, counted.len())?)?),
        ];
        run(OP, &device, plan::rows(&wanted, head.dims()[0], scale)?, tensors)?;
        if let Some(dhidden) = &dhidden {
            embedding::scatter(&logits.matmul(&head)?.to_dtype(hidden.dtype())?, &rows, dhidden)?;
            if let Some(dhead) = dhead {
                fallback::accumulate(dhead, &logits.t()?.matmul(&x)?)?;
            }
        }
    }
    Ok((Pending::on_gpu(losses, counted.len()), dhidden))
}
