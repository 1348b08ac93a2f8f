//! Cross entropy with the output projection on CUDA: `cross_entropy.cuh` and products of chunks of rows. Shapes, dtypes and targets were
//! checked by `custom_ops::cross_entropy`.

use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use candle_core::{DType, Tensor};

use super::device::{Gpu, Held, Kernel, Module, View, address, cuda_device, empty, scratch, tensor, typed, uninit};
use super::{adamw, embedding, linear, shared_linear};
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
    // f16 where our own product makes it, with P in its place; else f32.
    let both = gathered.dtype() == DType::BF16 && head.dtype() == DType::BF16;
    let half = match both && gpu.hopper && vocab.is_multiple_of(8) {
        true => Some(tensor(uninit(device, &(chunk, vocab).into(), DType::BF16)?, (chunk, vocab))),
        false => None,
    };
    let half_ptr = Held::option(OP, "logits", half.as_ref())?.map_or(0, |half| half.view.ptr);
    let mut wide = None;
    for start in (0..counted.len()).step_by(chunk) {
        let count = chunk.min(counted.len() - start);
        let x = gathered.narrow(0, start, count)?;
        let sizes = [count, width, vocab];
        let (from, factor) = (Held::of(OP, "hidden", &x)?.view, Held::of(OP, "head", head)?.view);
        let taken = half.is_some() && shared_linear::logits(device, from, factor, half_ptr, sizes)?;
        let mut args = Args {
            logits: half_ptr,
            targets: address(&wanted, &stream) + 4 * start as u64,
            losses: losses_ptr + 4 * start as u64,
            p: 0,
            vocab: vocab as i64,
            scale: scale.unwrap_or(0.0),
        };
        let p = match (scale, &half) {
            (None, _) => None,
            (Some(_), Some(half)) if taken => Some(half.narrow(0, 0, count)?),
            (Some(_), _) => Some(tensor(uninit(device, &(count, vocab).into(), hidden.dtype())?, (count, vocab))),
        };
        args.p = Held::option(OP, "p", p.as_ref())?.map_or(0, |p| p.view.ptr);
        let kernel = if taken {
            Kernel::Named(Module::Decoder, "cross_entropy_half")
        } else {
            let wide: &CudaSlice<f32> = match &mut wide {
                Some(wide) => wide,
                none => none.insert(scratch(device, chunk * vocab)?),
            };
            args.logits = address(wide, &stream);
            linear::logits(&x, head, View { ptr: args.logits, dtype: DType::F32 }, sizes)?;
            typed!(Decoder, "cross_entropy", hidden.dtype())
        };
        // SAFETY: `Args` mirrors the kernel's; logits and P have `count` rows of the vocabulary; memory is of this stream.
        unsafe { gpu.launch(kernel, [count, 1], 16, 0, &stream, &args)? };
        if let (Some(p), Some(d)) = (&p, &d_gathered) {
            linear::input_gradient(head, p, &d.narrow(0, start, count)?, false, sizes)?;
            if dhead.is_some() {
                linear::backward(&x, head, p, None, dhead, None, sizes)?;
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
