//! Launches of the kernels for compute capability 9.0: `linear.cuh`, `linear_project.cuh`, `linear_outer.cuh`, `linear_terms.cuh`,
//! which hold the formulas. bf16 activations and weights; what they are of was checked by the callers.

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, sys};

use super::device::{Gpu, Kernel, Module, View, failed};
use crate::Result;

/// Linears, or adapters, of one call.
pub const MOST: usize = 3;
const SEGMENTS: usize = 6;
const MAPS: usize = 14;
/// Ranks that a pass over x makes h of.
const PASS: usize = 64;
/// Dynamic shared memory of the kernels, as their sources compute it.
const LINEAR_SHARED: usize = 4 * (128 + 256) * 128 + 4 * 8192 + 1024;
const PROJECT_SHARED: usize = 192 * 1024 + 1024;

/// How the copy engine finds a matrix: 128 bytes that the driver makes.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Map([u64; 16]);

impl Map {
    const NONE: Self = Self([0; 16]);

    /// Of a bf16 matrix `[rows, columns]` without gaps, on 16 bytes, `columns` a multiple of 8; read or written in boxes of `tile`
    /// rows by 64 columns. What lies outside the matrix reads as zero.
    fn new(ptr: u64, rows: usize, columns: usize, tile: u32) -> Result<Self> {
        let mut map = Self::NONE;
        let (sizes, pitch) = ([columns as u64, rows as u64], [2 * columns as u64]);
        let (tile, steps) = ([64, tile], [1, 1]);
        // SAFETY: the map is 128 bytes on 128; the arrays have the lengths of a matrix and live through the call.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                ptr as *mut _,
                sizes.as_ptr(),
                pitch.as_ptr(),
                tile.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(|error| failed(format!("a map of {rows} x {columns} at {ptr:#x}: {error}")))?;
        Ok(map)
    }
}

/// A bf16 matrix without gaps.
#[derive(Debug, Clone, Copy)]
pub struct Matrix {
    pub ptr: u64,
    pub rows: usize,
    pub columns: usize,
}

impl Matrix {
    pub fn of(view: View, rows: usize, columns: usize) -> Self {
        Self { ptr: view.ptr, rows, columns }
    }
}

/// A term of an output's sum: `left · rightᵀ` forward, `left · right` backward and for adapters.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    pub left: Matrix,
    pub right: Matrix,
    pub adapter: bool,
}

/// `to = Σ segments + bias + added`. Adapters come last.
#[derive(Debug, Clone)]
pub struct Output {
    pub to: Matrix,
    /// Whether it is f16.
    pub half: bool,
    /// Of the output's shape, bf16; 0: none. It may be the output itself.
    pub added: u64,
    pub bias: u64,
    pub segments: Vec<Segment>,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SegmentArgs {
    left: i32,
    right: i32,
    tiles: i32,
    adapter: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct OutputArgs {
    map: i32,
    first_segment: i32,
    segments: i32,
    columns: i32,
    column_tiles: i32,
    first_tile: i32,
    half: i32,
    bias: u64,
    added: u64,
}

#[repr(C)]
struct LinearArgs {
    maps: [Map; MAPS],
    segments: [SegmentArgs; SEGMENTS],
    outputs: [OutputArgs; MOST],
    rows: i64,
    output_count: i32,
    row_pairs: i32,
    tiles: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ProjectAdapter {
    h: u64,
    terms: u64,
    r: i32,
    width: i32,
    block: i32,
    zeros: i32,
    s: f32,
}

#[repr(C)]
struct ProjectArgs {
    x: Map,
    a: Map,
    adapters: [ProjectAdapter; MOST],
    rows: i64,
    adapter_count: i32,
    tiles: i32,
    from: i32,
    low: i32,
    blocks: i32,
}

#[repr(C)]
struct OuterArgs {
    terms: Map,
    x: Map,
    parts: u64,
    row_tiles: i64,
    n: i32,
    range: i32,
    columns: [i32; 2],
    used: i32,
}

#[repr(C)]
struct SumArgs {
    parts: u64,
    to: u64,
    count: i32,
    rows: i32,
    first: i32,
    second: i32,
    ranks: i32,
    from: i32,
    r: i32,
    n: i32,
    transposed: i32,
    add: i32,
}

#[repr(C)]
#[derive(Default)]
struct AdapterTermsArgs {
    a: [u64; MOST],
    b: [u64; MOST],
    a_terms: u64,
    b_terms: [u64; MOST],
    r: [i32; MOST],
    n: [i32; MOST],
    count: i32,
    k: i32,
    block: i32,
    blocks: i32,
    f32: i32,
}

#[repr(C)]
struct PartTermsArgs {
    parts: u64,
    terms: u64,
    m: i64,
    count: i32,
    r: i32,
    width: i32,
    block: i32,
    blocks: i32,
    zeros: i32,
    scale: f32,
}

/// Columns or rows of one term of each of `ranks` values.
pub fn block(ranks: usize) -> usize {
    ranks.next_multiple_of(8)
}

/// Terms of some ranks of h or u: where they lie in a matrix `[m, blocks block]` of all terms.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// The matrix.
    pub all: Matrix,
    /// The first of these ranks.
    pub from: usize,
    /// These ranks.
    pub r: usize,
    /// All ranks of the matrix.
    pub ranks: usize,
    /// Terms of a value.
    pub blocks: usize,
}

impl Terms {
    fn ptr(&self) -> u64 {
        self.all.ptr + 2 * self.from as u64
    }

    /// Columns to clear after each block, by whoever writes the last rank.
    fn zeros(&self) -> usize {
        if self.from + self.r == self.ranks { block(self.ranks) - self.ranks } else { 0 }
    }
}

/// One adapter of [`Hopper::project`].
#[derive(Debug, Clone, Copy)]
pub struct Projected {
    /// `[m, r]` f32, unscaled; 0: not wanted.
    pub h: u64,
    /// Of s h.
    pub terms: Terms,
    pub s: f64,
}

/// One adapter of [`Hopper::adapter_terms`].
#[derive(Debug, Clone, Copy)]
pub struct AdapterFactors {
    pub a: u64,
    pub b: u64,
    pub r: usize,
    pub n: usize,
    /// `[blocks block, n]`; 0: not wanted.
    pub b_terms: u64,
}

/// A GPU of compute capability 9.0 and a stream.
pub struct Hopper<'a> {
    pub gpu: &'a Gpu,
    pub stream: &'a CudaStream,
}

impl Hopper<'_> {
    /// The outputs, of `rows` rows each. `backward`: right factors lie in rows of the inner dimension.
    pub fn linear(&self, backward: bool, rows: usize, outputs: &[Output]) -> Result<()> {
        let mut args = LinearArgs {
            maps: [Map::NONE; MAPS],
            segments: [SegmentArgs::default(); SEGMENTS],
            outputs: [OutputArgs::default(); MOST],
            rows: rows as i64,
            output_count: outputs.len() as i32,
            row_pairs: rows.div_ceil(256) as i32,
            tiles: 0,
        };
        let (mut maps, mut segments) = (0, 0);
        let mut lefts: Vec<(u64, i32)> = Vec::new();
        for (at, output) in args.outputs.iter_mut().zip(outputs) {
            let mut map = |matrix: Matrix, tile| {
                args.maps[maps] = Map::new(matrix.ptr, matrix.rows, matrix.columns, tile)?;
                maps += 1;
                Ok::<_, crate::Error>(maps as i32 - 1)
            };
            *at = OutputArgs {
                map: map(output.to, 64)?,
                first_segment: segments as i32,
                segments: output.segments.len() as i32,
                columns: output.to.columns as i32,
                column_tiles: output.to.columns.div_ceil(256) as i32,
                first_tile: args.tiles,
                half: output.half as i32,
                bias: output.bias,
                added: output.added,
            };
            for Segment { left, right, adapter } in &output.segments {
                let known = lefts.iter().find(|(ptr, _)| *ptr == left.ptr).map(|(_, map)| *map);
                let left_map = match known {
                    Some(known) => known,
                    None => map(*left, 128)?,
                };
                lefts.push((left.ptr, left_map));
                args.segments[segments] = SegmentArgs {
                    left: left_map,
                    right: map(*right, if backward || *adapter { 64 } else { 128 })?,
                    tiles: left.columns.div_ceil(64) as i32,
                    adapter: *adapter as i32,
                };
                segments += 1;
            }
            args.tiles += at.column_tiles * args.row_pairs;
        }
        let kernel = Kernel::Named(Module::Linear, if backward { "linear_backward" } else { "linear_forward" });
        let clusters = (self.gpu.sms / 2).min(args.tiles as usize);
        // SAFETY: `LinearArgs` mirrors the kernel's; the maps bound what is touched; memory is of this stream.
        unsafe { self.gpu.launch(kernel, [2 * clusters, 1], 12, LINEAR_SHARED, self.stream, &args) }
    }

    /// h of `adapters`, from x `[m, k]` and the terms `[blocks block, k]` of their A.
    pub fn project(&self, x: Matrix, a_terms: u64, blocks: usize, adapters: &[Projected]) -> Result<()> {
        let ranks: usize = adapters.iter().map(|adapter| adapter.terms.r).sum();
        let pass = if ranks <= 16 { 16 } else { PASS };
        let kernel = if ranks <= 16 { "linear_project_16" } else { "linear_project_64" };
        let mut args = ProjectArgs {
            x: Map::new(x.ptr, x.rows, x.columns, 64)?,
            a: Map::new(a_terms, blocks * block(ranks), x.columns, pass as u32)?,
            adapters: [ProjectAdapter::default(); MOST],
            rows: x.rows as i64,
            adapter_count: adapters.len() as i32,
            tiles: x.columns.div_ceil(64) as i32,
            from: 0,
            low: 2 * block(ranks) as i32,
            blocks: blocks as i32,
        };
        for (to, Projected { h, terms, s }) in args.adapters.iter_mut().zip(adapters) {
            *to = ProjectAdapter {
                h: *h,
                terms: terms.ptr(),
                r: terms.r as i32,
                width: terms.all.columns as i32,
                block: block(terms.ranks) as i32,
                zeros: terms.zeros() as i32,
                s: *s as f32,
            };
        }
        for from in (0..ranks).step_by(pass) {
            args.from = from as i32;
            let (kernel, grid) = (Kernel::Named(Module::Linear, kernel), [2 * x.rows.div_ceil(128), 1]);
            // SAFETY: `ProjectArgs` mirrors the kernel's; h and terms have m rows; memory is of this stream.
            unsafe { self.gpu.launch(kernel, grid, 5, PROJECT_SHARED, self.stream, &args)? };
        }
        Ok(())
    }

    /// `to (+)= termsᵀ x` for the ranks of each of `adapters` among the terms of `ranks` ranks: (first rank, r, sink f32 `[r, n]`, or
    /// `[n, r]` where `transposed`).
    #[allow(clippy::too_many_arguments)]
    pub fn outer(
        &self,
        device: &CudaDevice,
        terms: Matrix,
        ranks: usize,
        x: Matrix,
        adapters: &[(usize, usize, Option<u64>)],
        transposed: bool,
        add: bool,
    ) -> Result<()> {
        let row_tiles = x.rows.div_ceil(64);
        let column_blocks = x.columns.div_ceil(256);
        let range = row_tiles.div_ceil((self.gpu.sms / column_blocks).clamp(1, row_tiles));
        let ranges = row_tiles.div_ceil(range);
        // hi and lo in one warpgroup's 64 rows, or 64 ranks at a time in two.
        let together = block(ranks) <= 32;
        let groups = if together { 1 } else { 2 };
        let parts = super::device::scratch(device, ranges * 64 * groups * x.columns)?;
        let mut args = OuterArgs {
            terms: Map::new(terms.ptr, terms.rows, terms.columns, 64)?,
            x: Map::new(x.ptr, x.rows, x.columns, 64)?,
            parts: super::device::address(&parts, self.stream),
            row_tiles: row_tiles as i64,
            n: x.columns as i32,
            range: range as i32,
            columns: [0; 2],
            used: 64,
        };
        let name = if together { "linear_outer_64" } else { "linear_outer_128" };
        for from in (0..ranks).step_by(if together { ranks } else { 64 }) {
            args.columns = [from as i32, (block(ranks) + from) as i32];
            args.used = if together { 2 * block(ranks) } else { (ranks - from).min(64) } as i32;
            let (kernel, grid) = (Kernel::Named(Module::Linear, name), [column_blocks, ranges]);
            let shared = 4 * (groups + 4) * 8192 + 1024;
            // SAFETY: `OuterArgs` mirrors the kernel's; parts has room for every range; memory is of this stream.
            unsafe { self.gpu.launch(kernel, grid, 4 * (1 + groups), shared, self.stream, &args)? };
            let end = from + if together { ranks } else { 64 };
            for &(first, r, sink) in adapters {
                let (low, high) = (first.max(from), (first + r).min(end));
                let Some(sink) = sink.filter(|_| low < high) else { continue };
                let row = low - from;
                let sum = SumArgs {
                    parts: args.parts,
                    to: sink,
                    count: ranges as i32,
                    rows: 64 * groups as i32,
                    first: row as i32,
                    second: (row + if together { block(ranks) } else { 64 }) as i32,
                    ranks: (high - low) as i32,
                    from: (low - first) as i32,
                    r: r as i32,
                    n: x.columns as i32,
                    transposed: transposed as i32,
                    add: add as i32,
                };
                let blocks = ((high - low) * x.columns).div_ceil(256).min(8 * self.gpu.sms);
                let kernel = Kernel::Named(Module::Linear, "linear_outer_sum");
                // SAFETY: `SumArgs` mirrors the kernel's; the sink has r n elements.
                unsafe { self.gpu.launch(kernel, [blocks, 1], 8, 0, self.stream, &sum)? };
            }
        }
        Ok(())
    }

    /// The terms of A into `a_terms` `[blocks block, k]` (0: not wanted), and of B.
    pub fn adapter_terms(
        &self,
        adapters: &[AdapterFactors],
        k: usize,
        blocks: usize,
        f32: bool,
        a_terms: u64,
    ) -> Result<()> {
        let mut args = AdapterTermsArgs {
            a_terms,
            count: adapters.len() as i32,
            k: k as i32,
            block: block(adapters.iter().map(|adapter| adapter.r).sum()) as i32,
            blocks: blocks as i32,
            f32: f32 as i32,
            ..Default::default()
        };
        let mut most = 0;
        for (i, adapter) in adapters.iter().enumerate() {
            (args.a[i], args.b[i], args.b_terms[i]) = (adapter.a, adapter.b, adapter.b_terms);
            (args.r[i], args.n[i]) = (adapter.r as i32, adapter.n as i32);
            most = most.max(adapter.r * k.max(adapter.n));
        }
        let blocks = most.div_ceil(256).min(8 * self.gpu.sms);
        let kernel = Kernel::Named(Module::Linear, "linear_adapter_terms");
        // SAFETY: `AdapterTermsArgs` mirrors the kernel's; the factors are [k, r] and [r, n], their terms as documented.
        unsafe { self.gpu.launch(kernel, [blocks, 1], 8, 0, self.stream, &args) }
    }

    /// The terms of `scale` times the sum of f32 parts `[count][m, r]`.
    pub fn part_terms(&self, parts: u64, count: usize, scale: f64, terms: Terms) -> Result<()> {
        let m = terms.all.rows;
        let args = PartTermsArgs {
            parts,
            terms: terms.ptr(),
            m: m as i64,
            count: count as i32,
            r: terms.r as i32,
            width: terms.all.columns as i32,
            block: block(terms.ranks) as i32,
            blocks: terms.blocks as i32,
            zeros: terms.zeros() as i32,
            scale: scale as f32,
        };
        let blocks = (m * terms.r).div_ceil(256).min(8 * self.gpu.sms);
        let kernel = Kernel::Named(Module::Linear, "linear_part_terms");
        // SAFETY: `PartTermsArgs` mirrors the kernel's; parts and terms have m rows.
        unsafe { self.gpu.launch(kernel, [blocks, 1], 8, 0, self.stream, &args) }
    }
}
