//! Launches of the LoRA kernels of `fused_lora.cuh` and `fused_lora_backward.cuh`: instances, tiles, grids and shared memory.

use candle_core::DType;
use candle_core::cuda_backend::cudarc::driver::CudaStream;

use super::device::{Gpu, Kernel, View};
use super::fused_lora::Size;
use crate::backend::dropout::Dropout;
use crate::{Error, Result};

const OP: &str = "fused_lora";
/// Columns that a warp of the backward kernels owns.
const WARP_COLUMNS: usize = 64;
/// Ranks that one launch computes at most; more take several.
pub(super) const MAX_RANKS: usize = 64;

/// As the kernels' own struct.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Mask {
    seed: u64,
    stream: u64,
    threshold: u32,
    on: i32,
}

impl Mask {
    /// The mask, and the factor of what it keeps.
    pub(super) fn of(dropout: Option<Dropout>) -> (Self, f32) {
        match dropout {
            Some(dropout) => {
                let Dropout { p, seed, stream } = dropout;
                (Self { seed, stream, threshold: dropout.threshold(), on: 1 }, 1.0 / (1.0 - p))
            }
            None => (Self::default(), 1.0),
        }
    }
}

#[repr(C)]
struct ForwardArgs {
    x: u64,
    a: u64,
    b: u64,
    y: u64,
    h: u64,
    parts: u64,
    m: i64,
    dropout: Mask,
    k: i32,
    r: i32,
    n: i32,
    part_count: i32,
    column_span: i32,
    stages: i32,
    s: f32,
    kept_scale: f32,
    y_f32: i32,
    add: i32,
    a_vec: i32,
    b_vec: i32,
}

#[repr(C)]
struct OutputArgs {
    g: u64,
    b: u64,
    h: u64,
    u_parts: u64,
    db_parts: u64,
    m: i64,
    n: i32,
    r: i32,
    rank0: i32,
    rows: i32,
    stages: i32,
    b_vec: i32,
    s: f32,
}

#[repr(C)]
struct InputArgs {
    x: u64,
    a: u64,
    u_parts: u64,
    dx: u64,
    da_parts: u64,
    m: i64,
    dropout: Mask,
    k: i32,
    r: i32,
    rank0: i32,
    u_part_count: i32,
    rows: i32,
    stages: i32,
    kept_scale: f32,
    dx_f32: i32,
    add: i32,
}

#[repr(C)]
#[derive(Default)]
struct ReduceArgs {
    parts: [u64; 2],
    to: [u64; 2],
    count: [i32; 2],
    columns: [i32; 2],
    transposed: [i32; 2],
    scale: [f32; 2],
    r: i32,
    add: i32,
}

/// The kernels' name for activations and an adapter.
pub(super) fn types(x: View, adapter: View) -> Result<&'static str> {
    match (x.dtype, adapter.dtype) {
        (DType::BF16, DType::BF16) => Ok("bf16_bf16"),
        (DType::BF16, DType::F32) => Ok("bf16_f32"),
        (DType::F16, DType::F16) => Ok("f16_f16"),
        (DType::F16, DType::F32) => Ok("f16_f32"),
        (DType::F32, DType::F32) => Ok("f32_f32"),
        (x, adapter) => Err(Error::op(OP, format!("no kernel for activations {x:?} with adapters {adapter:?}"))),
    }
}

/// bf16 terms of an f32 operand.
const FINE: usize = 3;

/// By the kernels' name: bf16 terms of the adapter, and 16-byte loads of 8 activations.
fn terms(types: &str) -> Terms {
    let (x, adapter) = types.split_once('_').unwrap_or((types, types));
    let adapter = match adapter {
        "bf16" => 1,
        "f16" => 2,
        _ => FINE,
    };
    Terms { adapter, vectors: if x == "f32" { 2 } else { 1 } }
}

struct Terms {
    adapter: usize,
    vectors: usize,
}

/// Ranks of the smallest instance for r.
fn ranks(r: usize, vector: bool) -> usize {
    match r {
        ..=8 if vector => 8,
        ..=16 => 16,
        ..=32 if vector => 32,
        _ => MAX_RANKS,
    }
}

/// What the row blocks of a backward kernel left of a gradient, `[count, r, columns]`, and where `scale` times its sum goes.
pub(super) struct Parts {
    pub(super) parts: u64,
    pub(super) to: View,
    pub(super) count: usize,
    pub(super) columns: usize,
    pub(super) scale: f32,
}

/// The grid of a backward kernel over a matrix [m, columns].
pub(super) struct Grid {
    pub(super) types: &'static str,
    pub(super) ranks: [usize; 2],
    pub(super) warps: usize,
    pub(super) column_blocks: usize,
    pub(super) row_blocks: usize,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

pub(super) struct Call<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) stream: &'a CudaStream,
    pub(super) dropout: Option<Dropout>,
    pub(super) size: Size,
}

impl Call<'_> {
    /// y and h, each where given. `add`: y gets it added.
    pub(super) fn forward(
        &self,
        [x, a, b]: [View; 3],
        s: f64,
        y: Option<View>,
        add: bool,
        h: Option<View>,
    ) -> Result<()> {
        let Size { m, k, r, n } = self.size;
        let types = types(x, a)?;
        let vector = k.is_multiple_of(8) && n.is_multiple_of(8) && x.aligned() && y.is_none_or(|y| y.aligned());
        let (mask, kept_scale) = Mask::of(self.dropout);
        let mut args = ForwardArgs {
            x: x.ptr,
            a: a.ptr,
            b: b.ptr,
            y: y.map_or(0, |y| y.ptr),
            h: h.map_or(0, |h| h.ptr),
            parts: 0,
            m: m as i64,
            dropout: mask,
            k: k as i32,
            r: r as i32,
            n: n as i32,
            part_count: 0,
            column_span: n as i32,
            stages: 1,
            s: s as f32,
            kept_scale,
            y_f32: y.is_some_and(|y| y.is_f32()) as i32,
            add: add as i32,
            a_vec: (r.is_multiple_of(8) && a.aligned()) as i32,
            b_vec: (n.is_multiple_of(8) && b.aligned()) as i32,
        };
        if vector && r <= 16 && m <= 2 * self.gpu.sms && b.aligned() {
            // A thread takes 4 columns of x, then 4 of y.
            let warps = (k.max(n).div_ceil(4 * 32)).clamp(2, 16);
            let splits = (self.gpu.sms / m).clamp(1, n.div_ceil(128 * warps));
            args.column_span = (n.div_ceil(128 * warps).div_ceil(splits) * 128 * warps) as i32;
            let grid = [m, n.div_ceil(args.column_span as usize)];
            let kernel = Kernel::Short { types, ranks: if r <= 8 { 8 } else { 16 } };
            // SAFETY: `ForwardArgs` mirrors the kernel's; sizes and dtypes were checked; memory is of this stream.
            return unsafe { self.gpu.launch(kernel, grid, warps, 0, self.stream, &args) };
        }
        let ranks = ranks(r, vector);
        // The most rows a block for which three quarters of the multiprocessors still get one.
        let fills = |tiles: &usize| m.div_ceil(16 * tiles) * 4 >= self.gpu.sms * 3;
        let most = match (vector, ranks) {
            (true, ..=16) if x.dtype == DType::BF16 => 4,
            (true, ..=32) => 2,
            (true, _) if x.dtype == DType::BF16 => 2,
            _ => 1,
        };
        let tiles = [4, 2].into_iter().filter(|&tiles| tiles <= most).find(fills).unwrap_or(1);
        self.launch_forward(types, ranks, tiles, vector, args)
    }

    /// `y (+)= drop(u R)` from the parts of u, for R `[r, n]`; here the call's k and n have changed places.
    pub(super) fn up(&self, x: View, right: View, u_parts: u64, part_count: usize, y: View, add: bool) -> Result<()> {
        let Size { m, k, r, .. } = self.size;
        let types = types(x, right)?;
        let vector = k.is_multiple_of(8) && y.aligned();
        let (mask, kept) = Mask::of(self.dropout);
        let args = ForwardArgs {
            x: 0,
            a: 0,
            b: right.ptr,
            y: y.ptr,
            h: 0,
            parts: u_parts,
            m: m as i64,
            dropout: mask,
            k: 1,
            r: r as i32,
            n: k as i32,
            part_count: part_count as i32,
            column_span: k as i32,
            stages: 1,
            s: kept,
            kept_scale: 1.0,
            y_f32: y.is_f32() as i32,
            add: add as i32,
            a_vec: 0,
            b_vec: (vector && right.aligned()) as i32,
        };
        self.launch_forward(types, MAX_RANKS, 1, vector, args)
    }

    fn launch_forward(
        &self,
        types: &'static str,
        ranks: usize,
        tiles: usize,
        vector: bool,
        mut args: ForwardArgs,
    ) -> Result<()> {
        let (m, r, k, n) = (self.size.m, args.r as usize, args.k as usize, args.n as usize);
        let Terms { adapter, vectors } = terms(types);
        let steps = if ranks <= 32 { ranks.div_ceil(16) } else { r.div_ceil(16) };
        let fragments = tiles * steps * FINE * 512;
        let items = if vector { 2 * tiles * vectors * 512 } else { 0 };
        let buffer = adapter * 32 * 16 * ((ranks / 8) | 1);
        let shared = |warps: usize, stages: usize| {
            fragments + (warps * (stages * items + buffer)).max(warps * 16 * tiles * ranks * 4)
        };
        let budget = self.gpu.shared / 2 - 1024;
        let mut warps = k.max(n).div_ceil(32).clamp(1, 8);
        let mut stages = if vector { k.div_ceil(32 * warps).clamp(1, 2) } else { 1 };
        while shared(warps, stages) > budget && stages > 1 {
            stages -= 1;
        }
        while shared(warps, stages) > self.gpu.shared && warps > 1 {
            warps -= 1;
        }
        let row_blocks = m.div_ceil(16 * tiles);
        let chunks = n.div_ceil(32);
        let splits = if args.y == 0 { 1 } else { (2 * self.gpu.sms / row_blocks).clamp(1, chunks.div_ceil(warps)) };
        args.column_span = (chunks.div_ceil(splits) * 32) as i32;
        args.stages = stages as i32;
        let grid = [row_blocks, if args.y == 0 { 1 } else { n.div_ceil(args.column_span as usize) }];
        let kernel = Kernel::Forward { types, ranks, tiles, vector };
        // SAFETY: `ForwardArgs` mirrors the kernel's; sizes and dtypes were checked; memory is of this stream.
        unsafe { self.gpu.launch(kernel, grid, warps, shared(warps, stages), self.stream, &args) }
    }

    /// Blocks of the backward kernels: as many as fill the GPU once, with 16 warps an SM.
    pub(super) fn grid(&self, columns: usize, types: &'static str, r: usize) -> Result<Grid> {
        let ranks = [ranks(r.min(MAX_RANKS), true), ranks(r.min(MAX_RANKS), false)];
        let Terms { adapter, vectors } = terms(types);
        let most = ranks[0].max(ranks[1]);
        let fits = |warps: &usize| {
            let (tiles, stage) = (most.div_ceil(16), warps * 4 * vectors * 512);
            let output =
                adapter * most * (warps * WARP_COLUMNS * 2 + 64) + segment(most) * tiles * 3 * 512 + 128 * warps * most;
            let input = warps * 2 * tiles * adapter * 1024 + segment(most) * tiles * (6 * 512 + 64 * 16);
            output.max(input) + stage <= self.gpu.shared
        };
        let limit = columns.div_ceil(WARP_COLUMNS).min(if most <= 16 { 16 } else { 8 });
        let warps = (1..=limit).rev().find(fits).unwrap_or(1);
        let column_blocks = columns.div_ceil(WARP_COLUMNS * warps);
        let per_sm = (16 / warps).clamp(1, 4);
        let row_blocks = (self.gpu.sms * per_sm / column_blocks).clamp(1, self.size.m.div_ceil(16));
        let rows = self.size.m.div_ceil(row_blocks).next_multiple_of(16);
        Ok(Grid { types, ranks, warps, column_blocks, row_blocks: self.size.m.div_ceil(rows), rows, columns })
    }

    /// The most stages of the ring, up to 3, that fit beside `fixed` bytes.
    fn stages(&self, fixed: usize, stage: usize) -> Result<usize> {
        match (1..=3).rev().find(|stages| fixed + stages * stage <= self.gpu.shared) {
            Some(stages) => Ok(stages),
            None => Err(Error::op(OP, format!("this GPU's {} bytes of shared memory are too few", self.gpu.shared))),
        }
    }

    /// u and dB, as parts.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn output(
        &self,
        grid: &Grid,
        g: View,
        b: View,
        h: Option<u64>,
        s: f64,
        u_parts: u64,
        db_parts: u64,
    ) -> Result<()> {
        let Size { m, r, n, .. } = self.size;
        let vector = n.is_multiple_of(8) && g.aligned();
        let ranks = grid.ranks[!vector as usize];
        let Terms { adapter, vectors } = terms(grid.types);
        let (rank_tiles, segment) = (ranks.div_ceil(16), segment(ranks));
        let pitch = grid.warps * WARP_COLUMNS * 2 + 64;
        let fixed = adapter * ranks * pitch + segment * rank_tiles * 3 * 512 + 2 * grid.warps * 16 * ranks * 4;
        let stage = if vector { grid.warps * 4 * vectors * 512 } else { 0 };
        let stages = self.stages(fixed, stage)?;
        for rank0 in (0..r).step_by(ranks) {
            let args = OutputArgs {
                g: g.ptr,
                b: b.ptr,
                h: h.unwrap_or(0),
                u_parts,
                db_parts,
                m: m as i64,
                n: n as i32,
                r: r as i32,
                rank0: rank0 as i32,
                rows: grid.rows as i32,
                stages: stages as i32,
                b_vec: (n.is_multiple_of(8) && b.aligned()) as i32,
                s: s as f32,
            };
            let kernel = Kernel::Output { types: grid.types, ranks, vector };
            let blocks = [grid.column_blocks, grid.row_blocks];
            // SAFETY: `OutputArgs` mirrors the kernel's; sizes and dtypes were checked; memory is of this stream.
            unsafe { self.gpu.launch(kernel, blocks, grid.warps, fixed + stages * stage, self.stream, &args)? };
        }
        Ok(())
    }

    /// dx, and dA as parts, from the parts of u.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn input(
        &self,
        grid: &Grid,
        x: View,
        a: View,
        u_parts: u64,
        u_part_count: usize,
        dx: Option<View>,
        add: bool,
        da_parts: u64,
    ) -> Result<()> {
        let Size { m, k, r, .. } = self.size;
        let vector = grid.columns.is_multiple_of(8) && x.aligned() && dx.is_none_or(|dx| dx.aligned());
        let ranks = grid.ranks[!vector as usize];
        let Terms { adapter, vectors } = terms(grid.types);
        let (rank_tiles, segment) = (ranks.div_ceil(16), segment(ranks));
        let (mask, kept_scale) = Mask::of(self.dropout);
        let left = segment * (rank_tiles * 2 * FINE * 512 + 64 * 16 * rank_tiles);
        let fixed = grid.warps * 2 * rank_tiles * adapter * 1024 + left;
        let stage = if vector { grid.warps * 4 * vectors * 512 } else { 0 };
        let stages = self.stages(fixed, stage)?;
        for rank0 in (0..r).step_by(ranks) {
            if da_parts == 0 && rank0 > 0 {
                break;
            }
            let args = InputArgs {
                x: x.ptr,
                a: a.ptr,
                u_parts,
                dx: dx.map_or(0, |dx| dx.ptr),
                da_parts,
                m: m as i64,
                dropout: mask,
                k: k as i32,
                r: r as i32,
                rank0: rank0 as i32,
                u_part_count: u_part_count as i32,
                rows: grid.rows as i32,
                stages: stages as i32,
                kept_scale,
                dx_f32: dx.is_some_and(|dx| dx.is_f32()) as i32,
                add: add as i32,
            };
            let kernel = Kernel::Input { types: grid.types, ranks, vector };
            let blocks = [grid.column_blocks, grid.row_blocks];
            // SAFETY: `InputArgs` mirrors the kernel's; sizes and dtypes were checked; memory is of this stream.
            unsafe { self.gpu.launch(kernel, blocks, grid.warps, fixed + stages * stage, self.stream, &args)? };
        }
        Ok(())
    }

    /// dB and dA from their parts; dA's sink is transposed.
    pub(super) fn reduce(&self, work: [Option<Parts>; 2], add: bool) -> Result<()> {
        let mut args =
            ReduceArgs { r: self.size.r as i32, add: add as i32, transposed: [0, 1], ..ReduceArgs::default() };
        let mut blocks = 0;
        for (i, work) in work.into_iter().enumerate() {
            let Some(Parts { parts, to, count, columns, scale }) = work else { continue };
            (args.parts[i], args.to[i], args.count[i]) = (parts, to.ptr, count as i32);
            (args.columns[i], args.scale[i]) = (columns as i32, scale);
            blocks = blocks.max((self.size.r * columns).div_ceil(256).min(8 * self.gpu.sms));
        }
        if blocks == 0 {
            return Ok(());
        }
        // SAFETY: `ReduceArgs` mirrors the kernel's; the parts were written by the launches before, the sinks are [r, n], [k, r].
        unsafe { self.gpu.launch(Kernel::Reduce, [blocks, 2], 8, 0, self.stream, &args) }
    }
}

/// Row tiles of a segment, as `segment_tiles` in the kernels.
fn segment(ranks: usize) -> usize {
    match ranks {
        ..=16 => 16,
        17..=32 => 8,
        _ => 4,
    }
}
