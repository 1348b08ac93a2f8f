//! Cases of quantized weights: the blocks of a random matrix, and the values that they stand for.
#![allow(dead_code)]

use candle_core::DType;
use metal_candle::backend::metal::plan::{Slot, dequantize};
use metal_candle::backend::quantized::Kind;

use crate::common::blocks::blocks;
use crate::run::{Run, want};

/// `rows` rows of `blocks_of_row` blocks.
pub fn dequantized(kind: Kind, rows: usize, blocks_of_row: usize, dtype: DType) -> Run {
    let k = blocks_of_row * kind.block_len();
    let (w, values) = blocks(kind, (rows, k), 1);
    Run::new(
        format!("dequantize, {}, {rows} rows of {blocks_of_row} blocks, {dtype:?}", kind.name()),
        dequantize::blocks(kind, rows * k, dtype).unwrap(),
        &[(Slot::Weight, w.bytes())],
        vec![want(Slot::Y, dtype, values)],
    )
}
