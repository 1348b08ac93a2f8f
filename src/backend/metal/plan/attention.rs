//! Attention: `attention.metal`.

use candle_core::DType;

use super::{Binding, LANES, Launch, Plan, Slot, Source, THREADGROUP_BYTES, narrow, params, type_suffix};
use crate::backend::custom_ops::attention::AttentionArgs;
use crate::{Error, Result};

const OP: &str = "attention";
/// Rows of a simdgroup.
const ROWS: usize = 8;
/// Most simdgroups of a threadgroup: they share the staged block.
const SIMDGROUPS: usize = 4;
/// Columns of dk and dv that a simdgroup can sum in registers.
const COLUMNS: usize = 128;

params! {
    /// `AttentionParams` of attention_tiles.metal.
    pub struct Params {
        /// Tq
        pub queries: u32,
        /// Tk
        pub keys: u32,
        /// How many there are.
        pub sequences: u32,
        /// Hq
        pub query_heads: u32,
        /// Hk
        pub key_heads: u32,
        /// D
        pub size: u32,
        /// Keys that a query sees at most.
        pub window: u32,
        /// Multiplies the scores.
        pub scale: f32,
    }
}

/// The sizes, the dtype and the op's own arguments of one call; sequences lie within queries and keys.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Rows of q.
    pub queries: usize,
    /// Rows of k and v.
    pub keys: usize,
    /// Heads of q.
    pub query_heads: usize,
    /// Heads of k and v.
    pub key_heads: usize,
    /// D
    pub size: usize,
    /// Of all tensors but lse.
    pub dtype: DType,
    /// Sequences, scale and window.
    pub args: AttentionArgs<'a>,
}

impl Call<'_> {
    /// `o` and `lse`.
    ///
    /// # Errors
    /// Sizes that the kernels cannot take.
    pub fn forward(&self) -> Result<Plan> {
        use Binding::{Params, Read, Write};
        let bindings = vec![
            Read(Slot::Q),
            Read(Slot::K),
            Read(Slot::V),
            Read(Slot::Sequences),
            Write(Slot::O),
            Write(Slot::Lse),
            Params,
        ];
        let (size, block) = self.instance()?;
        let each = ROWS * size + ROWS * block + ROWS * ROWS + LANES;
        self.plan(vec![self.launch("attention_forward", bindings, [self.queries, self.query_heads, 1], each)?])
    }

    /// `dq`, `dk` and `dv`.
    ///
    /// # Errors
    /// Sizes that the kernels cannot take.
    pub fn backward(&self) -> Result<Plan> {
        use Binding::{Params, Read, Write};
        let (size, block) = self.instance()?;
        let each = 2 * ROWS * (size + block);
        let queries = vec![
            Read(Slot::Q),
            Read(Slot::K),
            Read(Slot::V),
            Read(Slot::O),
            Read(Slot::G),
            Read(Slot::Lse),
            Read(Slot::Sequences),
            Write(Slot::Delta),
            Write(Slot::Dq),
            Params,
        ];
        let keys = vec![
            Read(Slot::Q),
            Read(Slot::K),
            Read(Slot::V),
            Read(Slot::G),
            Read(Slot::Lse),
            Read(Slot::Delta),
            Read(Slot::Sequences),
            Write(Slot::Dk),
            Write(Slot::Dv),
            Params,
        ];
        let parts = size.div_ceil(COLUMNS);
        let mut plan = self.plan(vec![
            self.launch("attention_queries", queries, [self.queries, self.query_heads, 1], each + LANES)?,
            self.launch("attention_keys", keys, [self.keys, self.key_heads, parts], each)?,
        ])?;
        plan.scratch.push((Slot::Delta, self.queries * self.query_heads));
        Ok(plan)
    }

    /// The padded head size, and rows of a block.
    fn instance(&self) -> Result<(usize, usize)> {
        match self.size {
            ..=32 => Ok((32, 16)),
            33..=64 => Ok((64, 16)),
            65..=96 => Ok((96, 16)),
            97..=128 => Ok((128, 16)),
            129..=256 => Ok((256, 8)),
            size => Err(Error::op(OP, format!("head size {size}; on Metal it is at most 256"))),
        }
    }

    fn params(&self) -> Result<Params> {
        let narrow = |name, value| narrow(OP, name, value);
        Ok(Params {
            queries: narrow("the number of queries", self.queries)?,
            keys: narrow("the number of keys", self.keys)?,
            sequences: narrow("the number of sequences", self.args.sequences.len())?,
            query_heads: narrow("the number of query heads", self.query_heads)?,
            key_heads: narrow("the number of key heads", self.key_heads)?,
            size: self.size as u32,
            window: self.args.window.map_or(i32::MAX as u32, |window| window.min(i32::MAX as usize) as u32),
            scale: self.args.scale,
        })
    }

    /// A launch over tiles of `rows` rows, heads, and parts of columns. `each`: floats of threadgroup memory for a simdgroup.
    fn launch(
        &self,
        kernel: &str,
        bindings: Vec<Binding>,
        [rows, heads, parts]: [usize; 3],
        each: usize,
    ) -> Result<Launch> {
        let (size, block) = self.instance()?;
        let room = (THREADGROUP_BYTES / size_of::<f32>() - size * block) / each;
        let simdgroups = room.min(SIMDGROUPS).min(rows.div_ceil(ROWS));
        Ok(Launch {
            source: Source::Attention,
            kernel: format!("{kernel}_{size}{}", type_suffix(&[self.dtype])),
            bindings,
            params: self.params()?.bytes(),
            grid: [rows.div_ceil(ROWS * simdgroups.max(1)), heads, parts],
            threads: simdgroups * LANES,
            threadgroup_bytes: ((size * block + simdgroups * each) * size_of::<f32>()).next_multiple_of(16),
        })
    }

    /// Those launches that have something to write.
    fn plan(&self, launches: Vec<Launch>) -> Result<Plan> {
        let mut table: Vec<u32> = Vec::with_capacity(4 * self.args.sequences.len());
        for sequence in self.args.sequences {
            let numbers = [sequence.q_start, sequence.q_len, sequence.k_start, sequence.k_len];
            table.extend(numbers.map(|number| number as u32));
        }
        // A buffer is never empty.
        table.resize(table.len().max(4), 0);
        let launches = launches.into_iter().filter(|launch| !launch.grid.contains(&0)).collect();
        Ok(Plan { launches, tables: vec![(Slot::Sequences, table)], ..Plan::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(size: usize) -> Call<'static> {
        let args = AttentionArgs { sequences: &[], scale: 1.0, window: None };
        Call { queries: 1000, keys: 1000, query_heads: 4, key_heads: 2, size, dtype: DType::F32, args }
    }

    #[test]
    fn every_head_size_fits_every_apple_gpu() {
        for size in 1..=256 {
            let launches = [call(size).forward().unwrap().launches, call(size).backward().unwrap().launches].concat();
            assert_eq!(launches.len(), 3);
            for launch in launches {
                assert!(launch.threadgroup_bytes <= THREADGROUP_BYTES && launch.threads >= LANES, "{launch:?}");
            }
        }
        let error = call(257).forward().unwrap_err().to_string();
        assert!(error.contains("257"), "{error}");
    }

    #[test]
    fn nothing_to_write_is_no_launch() {
        assert!(Call { queries: 0, ..call(64) }.forward().unwrap().launches.is_empty());
        let plan = Call { queries: 0, ..call(64) }.backward().unwrap();
        assert_eq!(plan.launches.len(), 1, "keys that no query sees have a gradient of zero");
    }
}
