//! Which kernels of `kernels.metal` one call of the LoRA op launches, with which tiles, grids, threadgroup memory and parameters.

use candle_core::DType;

use super::{Binding, LANES, Launch, Plan, Slot, Source, THREADGROUP_BYTES, narrow, params, type_suffix};
use crate::backend::dropout::Dropout;
use crate::{Error, Result};

const OP: &str = "fused_lora";

// The constants of kernels.metal, in floats.
const DEPTH: usize = 16;
const RANK_BLOCK: usize = 32;
const COLUMNS: usize = 32;

params! {
    /// `LoraParams` of kernels.metal.
    pub struct Params {
        /// The product of all but the last two dimensions of x.
        pub batch_size: u32,
        /// m = batch_size · seq_len.
        pub seq_len: u32,
        /// k
        pub in_features: u32,
        /// r
        pub rank: u32,
        /// n
        pub out_features: u32,
        /// s
        pub scaling: f32,
        /// An element is dropped where its word is under this; 0: no dropout.
        pub dropout_threshold: u32,
        /// 1 / (1 - p).
        pub dropout_scale: f32,
        /// The seed, low word.
        pub seed_low: u32,
        /// The seed, high word.
        pub seed_high: u32,
        /// The stream, low word.
        pub stream_low: u32,
        /// The stream, high word.
        pub stream_high: u32,
        /// Rows that one partial sum of dA or dB covers.
        pub rows_per_chunk: u32,
        /// How many partial sums there are.
        pub chunks: u32,
        /// Elements of each.
        pub elements: u32,
    }
}

/// The sizes and dtypes of one call.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// All but the last two dimensions of x, multiplied.
    pub batch: usize,
    /// m = batch · seq.
    pub seq: usize,
    /// Columns of x.
    pub k: usize,
    /// The rank.
    pub r: usize,
    /// Columns of B.
    pub n: usize,
    /// s = alpha / r.
    pub s: f64,
    /// On x.
    pub dropout: Option<Dropout>,
    /// Of x.
    pub x: DType,
    /// Of A and B: f32 or x's.
    pub adapter: DType,
}

/// How rows are cut into threadgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tile {
    /// One row, by simdgroup reductions: decoding.
    Row,
    /// 8 rows, by simdgroup matrices: enough threadgroups for every core from some tens of rows on.
    Short,
    /// 32 rows, by simdgroup matrices: A and B are read a quarter as often, where rows are plenty.
    Tall,
}

impl Tile {
    /// The tile for m rows and rank r.
    ///
    /// A tall tile keeps 32 · r floats in threadgroup memory: over rank 64 that would leave a core one threadgroup.
    pub fn choose(m: usize, r: usize) -> Self {
        match m {
            0..=4 => Self::Row,
            2048.. if r <= 64 => Self::Tall,
            _ => Self::Short,
        }
    }

    /// Rows of a threadgroup.
    pub fn rows(self) -> usize {
        match self {
            Self::Row => 1,
            Self::Short => 8,
            Self::Tall => 32,
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Row => "_row",
            Self::Short => "",
            Self::Tall => "_tall",
        }
    }

    /// Floats of threadgroup memory: for the threadgroup, and more for each simdgroup.
    fn floats(self, r: usize) -> (usize, usize) {
        let padded = r.next_multiple_of(8);
        match self {
            Self::Row => (r, r),
            Self::Short | Self::Tall => {
                let rows = self.rows();
                (rows * padded, (DEPTH * (rows + padded.min(RANK_BLOCK))).max(rows * COLUMNS))
            }
        }
    }

    /// Simdgroups of a threadgroup and its bytes of memory. `width` is the longest loop that simdgroups share: k or n.
    fn simdgroups(self, r: usize, width: usize) -> Result<(usize, usize)> {
        // Work of less than two slices of the contraction, or four columns a thread, is not worth a simdgroup.
        let (share, most) = match self {
            Self::Row => (4 * LANES, 16),
            Self::Short => (2 * COLUMNS, 8),
            Self::Tall => (2 * COLUMNS, 4),
        };
        let (floats, each) = self.floats(r);
        let room = (THREADGROUP_BYTES / size_of::<f32>()).saturating_sub(floats) / each;
        if room == 0 {
            return Err(Error::op(OP, format!("rank {r} needs more threadgroup memory than an Apple GPU has")));
        }
        let simdgroups = width.div_ceil(share).min(most).min(room);
        let bytes = (floats + simdgroups * each) * size_of::<f32>();
        Ok((simdgroups, bytes.next_multiple_of(16)))
    }
}

impl Call {
    /// m
    pub fn rows(&self) -> usize {
        self.batch * self.seq
    }

    fn params(&self) -> Result<Params> {
        let narrow = |name, value| narrow(OP, name, value);
        narrow("k · r", self.k * self.r)?;
        narrow("r · n", self.r * self.n)?;
        narrow("m", self.rows())?;
        let dropout = self.dropout.unwrap_or(Dropout { p: 0.0, seed: 0, stream: 0 });
        Ok(Params {
            batch_size: narrow("batch", self.batch)?,
            seq_len: narrow("seq", self.seq)?,
            in_features: narrow("k", self.k)?,
            rank: narrow("r", self.r)?,
            out_features: narrow("n", self.n)?,
            scaling: self.s as f32,
            dropout_threshold: dropout.threshold(),
            dropout_scale: 1.0 / (1.0 - dropout.p),
            seed_low: dropout.seed as u32,
            seed_high: (dropout.seed >> 32) as u32,
            stream_low: dropout.stream as u32,
            stream_high: (dropout.stream >> 32) as u32,
            ..Params::default()
        })
    }

    /// A launch over tiles of rows. `types` are the kernel's, in order; the last is not named where all are f32.
    fn tiled(&self, function: &str, types: &[DType], bindings: Vec<Binding>) -> Result<Launch> {
        let tile = Tile::choose(self.rows(), self.r);
        let (simdgroups, threadgroup_bytes) = tile.simdgroups(self.r, self.k.max(self.n))?;
        Ok(Launch {
            source: Source::Lora,
            kernel: format!("{function}{}{}", tile.suffix(), type_suffix(types)),
            bindings,
            params: self.params()?.bytes(),
            grid: [self.rows().div_ceil(tile.rows()), 1, 1],
            threads: simdgroups * LANES,
            threadgroup_bytes,
        })
    }

    /// `y = s · (drop(x) A) B` in one launch.
    ///
    /// # Errors
    /// Sizes that the kernels cannot take.
    pub fn delta(&self) -> Result<Plan> {
        use Binding::{Params, Read, Write};
        let bindings = vec![Read(Slot::X), Read(Slot::A), Read(Slot::B), Write(Slot::Y), Params];
        let launch = self.tiled("fused_lora_forward", &[self.x, self.adapter], bindings)?;
        Ok(Plan { launches: self.unless_empty(vec![launch]), ..Plan::default() })
    }

    /// `y += s · (drop(x) A) B` in one launch; h = drop(x) A is written to [`Slot::H`]. `y` is the dtype of the output.
    ///
    /// # Errors
    /// Sizes that the kernels cannot take.
    pub fn add_into(&self, y: DType) -> Result<Plan> {
        use Binding::{Params, Read, Write};
        let bindings = vec![Read(Slot::X), Read(Slot::A), Read(Slot::B), Write(Slot::Y), Params, Write(Slot::H)];
        let launch = self.tiled("fused_lora_add_into", &[self.x, self.adapter, y], bindings)?;
        Ok(Plan { launches: self.unless_empty(vec![launch]), ..Plan::default() })
    }

    /// The wanted gradients, each added to its tensor. `g` and `dx` are dtypes; with `has_h`, [`Slot::H`] is there already.
    ///
    /// # Errors
    /// Sizes that the kernels cannot take.
    pub fn backward(&self, g: DType, dx: Option<DType>, da: bool, db: bool, has_h: bool) -> Result<Plan> {
        use Binding::{Params, Read, Write};
        let mut plan = Plan::default();
        if dx.is_some() || da {
            let bindings = vec![Read(Slot::G), Read(Slot::B), Write(Slot::U), Params];
            plan.launches.push(self.tiled("fused_lora_project_g", &[g, self.adapter], bindings)?);
            plan.scratch.push((Slot::U, self.rows() * self.r));
        }
        if let Some(dx) = dx {
            let bindings = vec![Read(Slot::U), Read(Slot::A), Write(Slot::Dx), Params];
            plan.launches.push(self.tiled("fused_lora_expand", &[self.adapter, dx], bindings)?);
        }
        if da {
            self.weight_gradient(
                "fused_lora_gradient_a",
                self.x,
                self.k,
                [Slot::X, Slot::U, Slot::PartialA, Slot::Da],
                &mut plan,
            )?;
        }
        if db {
            if !has_h {
                let bindings = vec![Read(Slot::X), Read(Slot::A), Write(Slot::H), Params];
                plan.launches.push(self.tiled("fused_lora_project_x", &[self.x, self.adapter], bindings)?);
                plan.scratch.push((Slot::H, self.rows() * self.r));
            }
            self.weight_gradient(
                "fused_lora_gradient_b",
                g,
                self.n,
                [Slot::G, Slot::H, Slot::PartialB, Slot::Db],
                &mut plan,
            )?;
        }
        plan.launches = self.unless_empty(plan.launches);
        Ok(plan)
    }

    /// Partial sums over chunks of rows, then their sum. `slots`: the wide and the narrow factor, the parts, the gradient.
    fn weight_gradient(
        &self,
        kernel: &str,
        wide: DType,
        columns: usize,
        slots: [Slot; 4],
        plan: &mut Plan,
    ) -> Result<()> {
        use Binding::{Params, Read, Write};
        const SIMDGROUPS: usize = 4;
        // Enough threadgroups for every core of the largest GPU, but chunks of at least 64 rows: each costs a pass over
        // memory of the gradient's size.
        let (column_groups, rank_groups) = (columns.div_ceil(SIMDGROUPS * COLUMNS), self.r.div_ceil(RANK_BLOCK));
        let wanted = 256_usize.div_ceil(column_groups * rank_groups);
        let chunks = wanted.min(self.rows().div_ceil(64)).max(1);
        let rows_per_chunk = self.rows().div_ceil(chunks).next_multiple_of(8).max(8);
        let chunks = self.rows().div_ceil(rows_per_chunk);
        let elements = columns * self.r;
        let params = self::Params {
            rows_per_chunk: rows_per_chunk as u32,
            chunks: chunks as u32,
            elements: elements as u32,
            ..self.params()?
        };
        let [wide_slot, narrow_slot, partial, gradient] = slots;
        plan.scratch.push((partial, chunks * elements));
        plan.launches.push(Launch {
            source: Source::Lora,
            kernel: format!("{kernel}{}", type_suffix(&[wide])),
            bindings: vec![Read(wide_slot), Read(narrow_slot), Write(partial), Params],
            params: params.bytes(),
            grid: [column_groups, chunks, rank_groups],
            threads: SIMDGROUPS * LANES,
            threadgroup_bytes: SIMDGROUPS * COLUMNS * RANK_BLOCK * size_of::<f32>(),
        });
        plan.launches.push(Launch {
            source: Source::Lora,
            kernel: "fused_lora_sum".to_string(),
            bindings: vec![Read(partial), Write(gradient), Params],
            params: params.bytes(),
            grid: [elements.div_ceil(256), 1, 1],
            threads: 256,
            threadgroup_bytes: 0,
        });
        Ok(())
    }

    fn unless_empty(&self, launches: Vec<Launch>) -> Vec<Launch> {
        if self.rows() == 0 { Vec::new() } else { launches }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(m: usize, k: usize, r: usize, n: usize) -> Call {
        Call { batch: 1, seq: m, k, r, n, s: 1.0, dropout: None, x: DType::F32, adapter: DType::F32 }
    }

    #[test]
    fn decode_prompt_and_batch_take_different_tiles() {
        let tile = |m| call(m, 1024, 16, 1024).delta().unwrap().launches[0].kernel.clone();
        assert_eq!(tile(1), "fused_lora_forward_row");
        assert_eq!(tile(128), "fused_lora_forward");
        assert_eq!(tile(8192), "fused_lora_forward_tall");
        assert_eq!(Tile::choose(8192, 256), Tile::Short);
    }

    #[test]
    fn every_rank_to_512_fits_every_apple_gpu() {
        for r in 1..=512 {
            for m in [1, 128, 8192] {
                for width in [1, 77, 512, 16384] {
                    let plan = call(m, width, r, 64).add_into(DType::F32).unwrap();
                    let launch = &plan.launches[0];
                    assert!(launch.threadgroup_bytes <= THREADGROUP_BYTES && launch.threads <= 512, "{launch:?}");
                    assert!(launch.threads >= LANES && launch.threads.is_multiple_of(LANES), "{launch:?}");
                }
            }
        }
        let error = call(128, 64, 4096, 64).delta().unwrap_err().to_string();
        assert!(error.contains("4096"), "{error}");
    }

    #[test]
    fn chunks_cover_every_row_once() {
        for m in [1, 7, 8, 64, 65, 129, 1000, 8192, 100_003] {
            let plan = call(m, 96, 8, 40).backward(DType::F32, None, true, true, true).unwrap();
            for launch in plan.launches.iter().filter(|launch| launch.kernel.contains("gradient")) {
                let at = std::mem::offset_of!(Params, rows_per_chunk);
                let rows = u32::from_ne_bytes(launch.params[at..at + 4].try_into().unwrap()) as usize;
                let chunks = launch.grid[1];
                assert!(chunks * rows >= m && (chunks - 1) * rows < m && rows.is_multiple_of(8), "{m}: {launch:?}");
            }
        }
    }

    #[test]
    fn no_rows_no_launches() {
        assert!(call(0, 8, 2, 8).delta().unwrap().launches.is_empty());
        assert!(
            call(0, 8, 2, 8).backward(DType::F32, Some(DType::F32), true, true, false).unwrap().launches.is_empty()
        );
    }

    #[test]
    fn counts_beyond_31_bits_are_refused() {
        let error = call(1, 1 << 30, 8, 8).delta().unwrap_err().to_string();
        assert!(error.contains("k · r"), "{error}");
    }
}
