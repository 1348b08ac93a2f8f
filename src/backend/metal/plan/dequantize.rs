//! Quantized blocks to elements: `dequantize.metal`.

use candle_core::DType;

use super::{Binding, ELEMENT_THREADS, Launch, Plan, Slot, Source, narrow, params, type_suffix};
use crate::Result;
use crate::backend::quantized::Kind;

const OP: &str = "dequantize";

/// Elements that a thread makes.
const OF_THREAD: usize = 8;

params! {
    /// `DequantizeParams` of dequantize.metal.
    pub struct Params {
        /// Of the number of elements.
        pub eighths: u32,
    }
}

/// W of `count` elements, whole blocks, in `dtype`.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn blocks(kind: Kind, count: usize, dtype: DType) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    if count == 0 {
        return Ok(Plan::default());
    }
    let eighths = count / OF_THREAD;
    let launch = Launch {
        source: Source::Dequantize,
        kernel: format!("dequantize_{}{}", kind.name(), type_suffix(&[dtype])),
        bindings: vec![Read(Slot::Weight), Write(Slot::Y), Params],
        params: self::Params { eighths: narrow(OP, "an eighth of the number of elements", eighths)? }.bytes(),
        grid: [eighths.div_ceil(ELEMENT_THREADS), 1, 1],
        threads: ELEMENT_THREADS,
        threadgroup_bytes: 0,
    };
    Ok(Plan { launches: vec![launch], ..Plan::default() })
}
