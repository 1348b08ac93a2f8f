//! Attention on CUDA: `attention_hopper.cuh` or `attention_tiles.cuh` where they take a call, else `attention.cuh`. Shapes, dtypes and sequences were checked by `custom_ops::attention`.

use candle_core::{DType, Tensor};

use super::device::{Gpu, Held, Kernel, Module, View, address, cuda_device, empty, tensor, typed, uninit};
use crate::backend::custom_ops::attention::{AttentionArgs, Sequence};
use crate::{Error, Result};

const OP: &str = "attention";
/// Elements of a head that a warp holds.
const MOST: usize = 256;
/// Warps of a block.
const WARPS: usize = 4;
/// Queries or keys of a block of the tiles' kernels.
const ROWS: usize = 64;

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
    tiles: u64,
}

/// The instance of the tiles' kernels for a call: its padded head size, the rows of a block, and the rows of the other side that each
/// kernel takes at a time.
#[derive(Clone, Copy)]
struct Instance {
    kind: Kind,
    size: usize,
    rows: usize,
    forward: usize,
    queries: usize,
    keys: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// bf16 on compute capability 9.0.
    Hopper,
    Bf16,
    F16,
}

impl Instance {
    fn of(gpu: &Gpu, q: View, others: &[View], dim: usize, call: &AttentionArgs) -> Option<Self> {
        let aligned = q.aligned() && others.iter().all(View::aligned);
        if !matches!(q.dtype, DType::BF16 | DType::F16) || !dim.is_multiple_of(8) || !aligned {
            return None;
        }
        // A block of that kind has 128 rows: too many for a token or two.
        let long = call.sequences.iter().any(|sequence| sequence.q_len > ROWS);
        if gpu.hopper && q.dtype == DType::BF16 && long && call.scale > 0.0 && matches!(dim, 1..=64 | 97..=128) {
            let size = if dim <= 64 { 64 } else { 128 };
            return Some(Self { kind: Kind::Hopper, size, rows: 2 * ROWS, forward: 64, queries: 64, keys: 64 });
        }
        let kind = if q.dtype == DType::F16 { Kind::F16 } else { Kind::Bf16 };
        match dim {
            ..=64 => Some(Self { kind, size: 64, rows: ROWS, forward: 64, queries: 64, keys: 64 }),
            65..=96 => Some(Self { kind, size: 96, rows: ROWS, forward: 64, queries: 64, keys: 32 }),
            97..=128 => Some(Self { kind, size: 128, rows: ROWS, forward: 64, queries: 32, keys: 32 }),
            _ => None,
        }
    }

    /// Shared memory for `blocks` tiles of the block's rows and the places of two of `other` rows: two, or four on Hopper.
    fn shared(&self, blocks: usize, other: usize) -> usize {
        match self.kind {
            Kind::Hopper => (blocks * self.rows + 8 * other) * 2 * self.size + 1024,
            _ => (blocks * self.rows + 4 * other) * (2 * self.size + 16),
        }
    }

    fn warps(&self) -> usize {
        self.rows / 16
    }

    fn kernel(&self, names: [&'static str; 8]) -> Kernel {
        let [h64, h128, b64, b96, b128, f64, f96, f128] = names;
        let (module, name) = match (self.kind, self.size) {
            (Kind::Hopper, 64) => (Module::AttentionHopper, h64),
            (Kind::Hopper, _) => (Module::AttentionHopper, h128),
            (Kind::Bf16, 64) => (Module::Attention, b64),
            (Kind::Bf16, 96) => (Module::Attention, b96),
            (Kind::Bf16, _) => (Module::Attention, b128),
            (Kind::F16, 64) => (Module::Attention, f64),
            (Kind::F16, 96) => (Module::Attention, f96),
            (Kind::F16, _) => (Module::Attention, f128),
        };
        Kernel::Named(module, name)
    }
}

macro_rules! instances {
    ($op:literal) => {
        [
            concat!($op, "_64"),
            concat!($op, "_128"),
            concat!($op, "_bf16_64"),
            concat!($op, "_bf16_96"),
            concat!($op, "_bf16_128"),
            concat!($op, "_f16_64"),
            concat!($op, "_f16_96"),
            concat!($op, "_f16_128"),
        ]
    };
}

/// Pairs of a sequence and the first of `step` of its rows, those with the most work first.
fn tiles(
    step: usize,
    call: &AttentionArgs,
    rows: impl Fn(&Sequence) -> usize,
    work: impl Fn(&Sequence, usize) -> usize,
) -> Vec<u32> {
    let mut all = Vec::new();
    for (i, sequence) in call.sequences.iter().enumerate() {
        all.extend((0..rows(sequence)).step_by(step).map(|first| (work(sequence, first), i as u32, first as u32)));
    }
    all.sort_by_key(|&(work, sequence, first)| (std::cmp::Reverse(work), sequence, first));
    all.into_iter().flat_map(|(_, sequence, first)| [sequence, first]).collect()
}

/// `(o, lse)`.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, call: AttentionArgs) -> Result<(Tensor, Tensor)> {
    let device = cuda_device(OP, q)?;
    let lse_shape = (q.dims()[0], q.dims()[1]);
    if q.elem_count() == 0 {
        return Ok((empty(device, q.shape(), q.dtype())?, empty(device, lse_shape, DType::F32)?));
    }
    // Queries outside every sequence are zero.
    let covered = call.sequences.iter().map(|sequence| sequence.q_len).sum::<usize>() == q.dims()[0];
    let (o, lse) = match covered {
        true => (
            tensor(uninit(device, q.shape(), q.dtype())?, q.shape()),
            tensor(uninit(device, &lse_shape.into(), DType::F32)?, lse_shape),
        ),
        false => (q.zeros_like()?, Tensor::full(f32::NEG_INFINITY, lse_shape, q.device())?),
    };
    with_args(q, k, v, call, |gpu, args| {
        args.to_o = Held::of(OP, "o", &o)?.view.ptr;
        args.lse = Held::of(OP, "lse", &lse)?.view.ptr;
        let others = [Held::of(OP, "k", k)?.view, Held::of(OP, "v", v)?.view];
        let Some(instance) = Instance::of(gpu, Held::of(OP, "q", q)?.view, &others, q.dims()[2], &call) else {
            return launch(gpu, q, typed!(Attention, "attention_forward", q.dtype()), q.dims()[0] * q.dims()[1], args);
        };
        let kernel = instance.kernel(instances!("attention_forward"));
        let shared = instance.shared(1, instance.forward);
        launch_tiles(gpu, q, kernel, instance, query_tiles(&call, instance.rows), q.dims()[1], shared, args)
    })?;
    Ok((o, lse))
}

/// Tiles of queries: the later, the more keys.
fn query_tiles(call: &AttentionArgs, step: usize) -> Vec<u32> {
    tiles(
        step,
        call,
        |sequence| sequence.q_len,
        |sequence, first| {
            let end = sequence.k_len - sequence.q_len + (first + step).min(sequence.q_len);
            end.min(call.window.map_or(end, |window| window + step))
        },
    )
}

/// Tiles of keys: the earlier, the more queries.
fn key_tiles(call: &AttentionArgs, step: usize) -> Vec<u32> {
    tiles(
        step,
        call,
        |sequence| sequence.k_len,
        |sequence, first| {
            let before = sequence.k_len - sequence.q_len;
            let seeing = sequence.q_len - first.saturating_sub(before).min(sequence.q_len);
            seeing.min(call.window.map_or(seeing, |window| window + step))
        },
    )
}

/// Whether each key is in one sequence: `None` where some are in several, else whether all are in one.
fn keys_apart(call: &AttentionArgs, keys: usize) -> Option<bool> {
    let mut spans: Vec<(usize, usize)> = call.sequences.iter().map(|s| (s.k_start, s.k_start + s.k_len)).collect();
    spans.sort_unstable();
    let apart = spans.windows(2).all(|two| two[0].1 <= two[1].0);
    apart.then(|| spans.iter().map(|(start, end)| end - start).sum::<usize>() == keys)
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
    let covered = call.sequences.iter().map(|sequence| sequence.q_len).sum::<usize>() == q.dims()[0];
    let apart = keys_apart(&call, k.dims()[0]);
    let dq = if covered { like(q)? } else { q.zeros_like()? };
    let written = apart == Some(true) && q.elem_count() > 0;
    let (dk, dv) = if written { (like(k)?, like(v)?) } else { (k.zeros_like()?, v.zeros_like()?) };
    if q.elem_count() == 0 || k.elem_count() == 0 {
        return Ok((dq, dk, dv));
    }
    let delta = tensor(uninit(device, lse.shape(), DType::F32)?, lse.shape());
    with_args(q, k, v, call, |gpu, args| {
        args.o = Held::of(OP, "o", o)?.view.ptr;
        args.g = Held::of(OP, "g", g)?.view.ptr;
        args.lse = Held::of(OP, "lse", lse)?.view.ptr;
        args.delta = Held::of(OP, "delta", &delta)?.view.ptr;
        args.dq = Held::of(OP, "dq", &dq)?.view.ptr;
        args.dk = Held::of(OP, "dk", &dk)?.view.ptr;
        args.dv = Held::of(OP, "dv", &dv)?.view.ptr;
        let others = [Held::of(OP, "k", k)?.view, Held::of(OP, "v", v)?.view, Held::of(OP, "g", g)?.view];
        let (q_rows, k_rows) = (q.dims()[0] * q.dims()[1], k.dims()[0] * k.dims()[1]);
        let instance =
            Instance::of(gpu, Held::of(OP, "q", q)?.view, &others, q.dims()[2], &call).filter(|_| apart.is_some());
        let Some(instance) = instance else {
            launch(gpu, q, typed!(Attention, "attention_backward_queries", q.dtype()), q_rows, args)?;
            return launch(gpu, q, typed!(Attention, "attention_backward_keys", q.dtype()), k_rows, args);
        };
        launch(gpu, q, typed!(Attention, "attention_delta", q.dtype()), q_rows, args)?;
        let kernel = instance.kernel(instances!("attention_backward_queries"));
        let shared = instance.shared(2, instance.queries);
        launch_tiles(gpu, q, kernel, instance, query_tiles(&call, instance.rows), q.dims()[1], shared, args)?;
        let kernel = instance.kernel(instances!("attention_backward_keys"));
        let shared = instance.shared(2, instance.keys) + 16 * instance.keys;
        launch_tiles(gpu, q, kernel, instance, key_tiles(&call, instance.rows), k.dims()[1], shared, args)
    })?;
    Ok((dq, dk, dv))
}

/// A kernel over tiles, for each of `heads`.
#[allow(clippy::too_many_arguments)]
fn launch_tiles(
    gpu: &Gpu,
    q: &Tensor,
    kernel: Kernel,
    instance: Instance,
    tiles: Vec<u32>,
    heads: usize,
    shared: usize,
    args: &mut Args,
) -> Result<()> {
    if tiles.is_empty() {
        return Ok(());
    }
    let device = cuda_device(OP, q)?;
    let stream = device.cuda_stream();
    let there = gpu.upload(device, &tiles)?;
    args.tiles = address(&there, &stream);
    // SAFETY: `Args` mirrors the kernels'; tiles start within their sequences, which lie within q and k; memory is of this stream.
    unsafe { gpu.launch(kernel, [heads, tiles.len() / 2], instance.warps(), shared, &stream, args) }
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
