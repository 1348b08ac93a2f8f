//! Rows by index on CUDA: `embedding.cuh`. Shapes, dtypes and ids were checked by `custom_ops::embedding`.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::device::{Gpu, Held, address, cuda_device, empty, tensor, typed, uninit, wide};
use crate::Result;

const OP: &str = "embedding";

#[repr(C)]
struct Args {
    from: u64,
    to: u64,
    ids: u64,
    width: i64,
    scatter: i32,
}

#[repr(C)]
struct BackwardArgs {
    g: u64,
    dtable: u64,
    ids: u64,
    starts: u64,
    tokens: u64,
    width: i64,
}

/// `y[t] = table[ids[t]]`.
pub fn forward(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let (device, width) = (cuda_device(OP, table)?, table.dims()[1]);
    if ids.is_empty() || width == 0 {
        return empty(device, (ids.len(), width), table.dtype());
    }
    let y = tensor(uninit(device, &(ids.len(), width).into(), table.dtype())?, (ids.len(), width));
    move_rows(table, &y, ids, false)?;
    Ok(y)
}

/// `to[t] = from[ids[t]]`, or with `scatter` `to[ids[t]] = from[t]`.
pub(super) fn move_rows(from: &Tensor, to: &Tensor, ids: &[u32], scatter: bool) -> Result<()> {
    let device = cuda_device(OP, from)?;
    let (gpu, stream) = (Gpu::of(device)?, device.cuda_stream());
    let ids_there = gpu.upload(device, ids)?;
    let width = from.dims()[1];
    let (from_view, to_view) = (Held::of(OP, "table", from)?.view, Held::of(OP, "y", to)?.view);
    let ids_ptr = address(&ids_there, &stream);
    let args =
        Args { from: from_view.ptr, to: to_view.ptr, ids: ids_ptr, width: width as i64, scatter: scatter as i32 };
    let fits = width.is_multiple_of(8) && from_view.aligned() && to_view.aligned();
    let kernel = wide!("embedding_rows", from.dtype(), fits);
    let warps = (width / if fits { 8 } else { 1 }).div_ceil(32).clamp(1, 8);
    // SAFETY: `Args` mirrors the kernel's; ids are rows of the larger matrix; memory is of this stream.
    unsafe { gpu.launch(kernel, [ids.len(), 1], warps, 0, &stream, &args) }
}

/// `dtable[ids[t]] += g[t]`.
pub fn backward(ids: &[u32], g: &Tensor, dtable: &Tensor) -> Result<()> {
    if ids.is_empty() {
        return Ok(());
    }
    let device = cuda_device(OP, g)?;
    let (gpu, stream) = (Gpu::of(device)?, device.cuda_stream());
    let mut tokens_of: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (token, &id) in ids.iter().enumerate() {
        tokens_of.entry(id).or_default().push(token as u32);
    }
    let distinct: Vec<u32> = tokens_of.keys().copied().collect();
    let mut starts = vec![0];
    let mut tokens = Vec::with_capacity(ids.len());
    for of_id in tokens_of.values() {
        tokens.extend(of_id);
        starts.push(tokens.len() as u32);
    }
    let there = [gpu.upload(device, &distinct)?, gpu.upload(device, &starts)?, gpu.upload(device, &tokens)?];
    let [ids, starts, tokens] = [&there[0], &there[1], &there[2]].map(|slice| address(slice, &stream));
    let args = BackwardArgs {
        g: Held::of(OP, "g", g)?.view.ptr,
        dtable: Held::of(OP, "dtable", dtable)?.view.ptr,
        ids,
        starts,
        tokens,
        width: dtable.dims()[1] as i64,
    };
    let kernel = typed!(Decoder, "embedding_backward", g.dtype());
    // SAFETY: `BackwardArgs` mirrors the kernel's; ids are rows of dtable, tokens of g; memory is of this stream.
    unsafe { gpu.launch(kernel, [distinct.len(), 1], 8, 0, &stream, &args) }
}
