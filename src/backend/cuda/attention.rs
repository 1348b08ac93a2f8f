//! Attention on CUDA: `attention.cuh`. Shapes, dtypes and sequences were checked by `custom_ops::attention`.

use candle_core::{DType, Tensor};

use super::device::{Gpu, Held, Kernel, address, cuda_device, empty, tensor, typed, uninit};
use crate::backend::custom_ops::attention::AttentionArgs;
use crate::{Error, Result};

const OP: &str = "attention";
/// Elements of a head that a warp holds.
const MOST: usize = 256;
/// Warps of a block.
const WARPS: usize = 4;

#[repr(C)]
#[derive(Default)]
struct Args {
    q: u64,
    k: u64,
    v: u64,
    o: u64,
    g: u64,
    to_o: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    lse: u64,
    delta: u64,
    sequences: u64,
    of_query: u64,
    queries: i64,
    keys: i64,
    sequence_count: i32,
    q_heads: i32,
    kv_heads: i32,
    dim: i32,
    window: u32,
    scale: f32,
}

/// `(o, lse)`.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, call: AttentionArgs) -> Result<(Tensor, Tensor)> {
    let device = cuda_device(OP, q)?;
    let lse_shape = (q.dims()[0], q.dims()[1]);
    if q.elem_count() == 0 {
        return Ok((empty(device, q.shape(), q.dtype())?, empty(device, lse_shape, DType::F32)?));
    }
    let o = tensor(uninit(device, q.shape(), q.dtype())?, q.shape());
    let lse = tensor(uninit(device, &lse_shape.into(), DType::F32)?, lse_shape);
    with_args(q, k, v, call, |gpu, args| {
        args.to_o = Held::of(OP, "o", &o)?.view.ptr;
        args.lse = Held::of(OP, "lse", &lse)?.view.ptr;
        launch(gpu, q, typed!(Attention, "attention_forward", q.dtype()), q.dims()[0] * q.dims()[1], args)
    })?;
    Ok((o, lse))
}

/// `(dq, dk, dv)`.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    g: &Tensor,
    call: AttentionArgs,
) -> Result<(Tensor, Tensor, Tensor)> {
    let device = cuda_device(OP, q)?;
    let like = |x: &Tensor| match x.elem_count() {
        0 => empty(device, x.shape(), x.dtype()),
        _ => Ok(tensor(uninit(device, x.shape(), x.dtype())?, x.shape())),
    };
    let (dq, dk, dv) = (like(q)?, like(k)?, like(v)?);
    if q.elem_count() == 0 {
        return Ok((dq, dk.zeros_like()?, dv.zeros_like()?));
    }
    let delta = tensor(uninit(device, lse.shape(), DType::F32)?, lse.shape());
    with_args(q, k, v, call, |gpu, args| {
        args.o = Held::of(OP, "o", o)?.view.ptr;
        args.g = Held::of(OP, "g", g)?.view.ptr;
        args.lse = Held::of(OP, "lse", lse)?.view.ptr;
        args.delta = Held::of(OP, "delta", &delta)?.view.ptr;
        args.dq = Held::of(OP, "dq", &dq)?.view.ptr;
        launch(gpu, q, typed!(Attention, "attention_backward_queries", q.dtype()), q.dims()[0] * q.dims()[1], args)?;
        if k.elem_count() == 0 {
            return Ok(());
        }
        args.dk = Held::of(OP, "dk", &dk)?.view.ptr;
        args.dv = Held::of(OP, "dv", &dv)?.view.ptr;
        launch(gpu, q, typed!(Attention, "attention_backward_keys", q.dtype()), k.dims()[0] * k.dims()[1], args)
    })?;
    Ok((dq, dk, dv))
}

/// What all kernels of a call share.
fn with_args(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    call: AttentionArgs,
    run: impl FnOnce(&Gpu, &mut Args) -> Result<()>,
) -> Result<()> {
    let device = cuda_device(OP, q)?;
    let (gpu, stream) = (Gpu::of(device)?, device.cuda_stream());
    let (queries, dim) = (q.dims()[0], q.dims()[2]);
    if dim > MOST {
        return Err(Error::op(OP, format!("head size {dim}; on CUDA it is at most {MOST}")));
    }
    let mut of_query = vec![u32::MAX; queries];
    let mut table = Vec::with_capacity(4 * call.sequences.len());
    for (i, sequence) in call.sequences.iter().enumerate() {
        of_query[sequence.q_start..sequence.q_start + sequence.q_len].fill(i as u32);
        let numbers = [sequence.q_start, sequence.q_len, sequence.k_start, sequence.k_len];
        table.extend(numbers.map(|number| number as u32));
    }
    let (sequences, of_query) = (gpu.upload(device, &table)?, gpu.upload(device, &of_query)?);
    let mut args = Args {
        q: Held::of(OP, "q", q)?.view.ptr,
        k: Held::of(OP, "k", k)?.view.ptr,
        v: Held::of(OP, "v", v)?.view.ptr,
        sequences: address(&sequences, &stream),
        of_query: address(&of_query, &stream),
        queries: queries as i64,
        keys: k.dims()[0] as i64,
        sequence_count: call.sequences.len() as i32,
        q_heads: q.dims()[1] as i32,
        kv_heads: k.dims()[1] as i32,
        dim: dim as i32,
        window: call.window.map_or(u32::MAX, |window| window.min(u32::MAX as usize) as u32),
        scale: call.scale,
        ..Args::default()
    };
    run(gpu, &mut args)
}

fn launch(gpu: &Gpu, q: &Tensor, kernel: Kernel, rows: usize, args: &Args) -> Result<()> {
    let stream = cuda_device(OP, q)?.cuda_stream();
    // SAFETY: `Args` mirrors the kernels'; sequences lie within q and k; memory is of this stream.
    unsafe { gpu.launch(kernel, [rows.div_ceil(WARPS), 1], WARPS, 0, &stream, args) }
}
