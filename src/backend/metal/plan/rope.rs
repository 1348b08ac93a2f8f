//! The rotary embedding: `rope_rotate` of `decoder.metal`.

use candle_core::DType;

use super::{Binding, Launch, Plan, Slot, Source, narrow, params, type_suffix};
use crate::Result;

const OP: &str = "rope";

params! {
    /// `RopeParams` of decoder.metal.
    pub struct Params {
        /// T H D / 2
        pub pairs: u32,
        /// H
        pub heads: u32,
        /// D / 2
        pub half_size: u32,
        /// 1, or -1 to rotate back.
        pub sign: f32,
    }
}

/// [`Slot::X`] `[T, H, D]` rotated in place; `positions` are within the tables.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn rotate(positions: &[u32], heads: usize, size: usize, dtype: DType, inverse: bool) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    let pairs = positions.len() * heads * (size / 2);
    if pairs == 0 {
        return Ok(Plan::default());
    }
    let params = self::Params {
        pairs: narrow(OP, "the number of pairs", pairs)?,
        heads: heads as u32,
        half_size: (size / 2) as u32,
        sign: if inverse { -1.0 } else { 1.0 },
    };
    let bindings = vec![Write(Slot::X), Read(Slot::Cos), Read(Slot::Sin), Read(Slot::Positions), Params];
    let kernel = format!("rope_rotate{}", type_suffix(&[dtype]));
    let launch = Launch::over_elements(Source::Decoder, kernel, bindings, params.bytes(), pairs);
    Ok(Plan { launches: vec![launch], tables: vec![(Slot::Positions, positions.to_vec())], ..Plan::default() })
}
