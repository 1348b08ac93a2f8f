//! Cross entropy with the output projection on CUDA: `cross_entropy.cuh` and products of chunks of rows. Shapes, dtypes and targets were
//! checked by `custom_ops::cross_entropy`.

use candle_core::{DType, Tensor};

use super::device::{Gpu, Held, View, address, cuda_device, empty, scratch, tensor, typed, uninit};
use super::{adamw, embedding, linear};
use crate::Result;
use crate::backend::custom_ops::cross_entropy::{Pending, chunk_rows};

const OP: &str = "cross_entropy";

#[repr(C)]
struct Args {
    logits: u64,
    targets: u64,
    losses: u64,
    p: u64,
    vocab: i64,
    scale: f32,
}

/// The loss over `counted` rows of hidden `[T, H]`, and with `scale` the gradient of hidden; dhead `[V, H]` f32 += where it is given.
pub fn run(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[u32],
    counted: &[usize],
    scale: Option<f32>,
    dhead: Option<&Tensor>,
) -> Result<(Pending, Option<Tensor>)> {
    let device = cuda_device(OP, hidden)?;
    for (name, tensor) in [("hidden", hidden), ("head", head)] {
        Held::of(OP, name, tensor)?;
    }
    let (tokens, width, vocab) = (hidden.dims()[0], hidden.dims()[1], head.dims()[0]);
    let dhidden = match scale {
        Some(_) if tokens == 0 => Some(empty(device, hidden.shape(), hidden.dtype())?),
        Some(_) if counted.len() == tokens => {
            Some(tensor(uninit(device, hidden.shape(), hidden.dtype())?, hidden.shape()))
        }
        Some(_) => Some(hidden.zeros_like()?),
        None => None,
    };
    if counted.is_empty() {
        return Ok((Pending::ready(0.0, 0), dhidden));
    }
    let (gpu, stream) = (Gpu::of(device)?, device.cuda_stream());
    let rows: Vec<u32> = counted.iter().map(|&row| row as u32).collect();
    let all = counted.len() == tokens;
    let gathered = match all {
        true => hidden.detach(),
        false => embedding::forward(hidden, &rows)?,
    };
    let wanted: Vec<u32> = counted.iter().map(|&row| targets[row]).collect();
    let wanted = gpu.upload(device, &wanted)?;
    let losses = tensor(uninit(device, &counted.len().into(), DType::F32)?, counted.len());
    let losses_ptr = Held::of(OP, "losses", &losses)?.view.ptr;
    let d_gathered = match (&dhidden, all) {
        (Some(dhidden), true) => Some(dhidden.clone()),
        (Some(_), false) => Some(tensor(uninit(device, gathered.shape(), hidden.dtype())?, gathered.shape())),
        (None, _) => None,
    };
    let chunk = chunk_rows(counted.len(), vocab, false);
    let logits = scratch(device, chunk * vocab)?;
    for start in (0..counted.len()).step_by(chunk) {
        let count = chunk.min(counted.len() - start);
        let x = gathered.narrow(0, start, count)?;
        let logits = View { ptr: address(&logits, &stream), dtype: DType::F32 };
        linear::logits(&x, head, logits, [count, width, vocab])?;
        let p = match scale {
            Some(_) => Some(tensor(uninit(device, &(count, vocab).into(), hidden.dtype())?, (count, vocab))),
            None => None,
        };
        let args = Args {
            logits: logits.ptr,
            targets: address(&wanted, &stream) + 4 * start as u64,
            losses: losses_ptr + 4 * start as u64,
            p: Held::option(OP, "p", p.as_ref())?.map_or(0, |p| p.view.ptr),
            vocab: vocab as i64,
            scale: scale.unwrap_or(0.0),
        };
        let kernel = typed!(Decoder, "cross_entropy", hidden.dtype());
        // SAFETY: `Args` mirrors the kernel's; logits and P have `count` rows of the vocabulary; memory is of this stream.
        unsafe { gpu.launch(kernel, [count, 1], 16, 0, &stream, &args)? };
        if let (Some(p), Some(d)) = (&p, &d_gathered) {
            linear::input_gradient(head, p, &d.narrow(0, start, count)?, false, [count, width, vocab])?;
            if dhead.is_some() {
                linear::backward(&x, head, p, None, dhead, None, [count, width, vocab])?;
            }
        }
    }
    if let (Some(dhidden), Some(d), false) = (&dhidden, &d_gathered, all) {
        embedding::move_rows(d, dhidden, &rows, true)?;
    }
    Ok((Pending::on_gpu(losses, counted.len()), dhidden))
}

/// The sum of the rows' losses. Waits for it.
pub(crate) fn sum(losses: &Tensor) -> Result<f64> {
    adamw::sum(cuda_device(OP, losses)?, Held::of(OP, "losses", losses)?.view.ptr, losses.elem_count(), false)
}
