//! SwiGLU: `swiglu_*` of `decoder.metal`.

use candle_core::DType;

use super::{Binding, Launch, Plan, Slot, Source, narrow, params, type_suffix};
use crate::Result;

const OP: &str = "swiglu";

params! {
    /// `ElementParams` of decoder.metal.
    pub struct Params {
        /// Elements of each tensor.
        pub count: u32,
    }
}

/// `y = silu(gate) · up`.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn forward(count: usize, dtype: DType) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    plan("swiglu_forward", vec![Read(Slot::Gate), Read(Slot::Up), Write(Slot::Y), Params], count, dtype)
}

/// `dgate` and `dup`.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn backward(count: usize, dtype: DType) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    let bindings = vec![Read(Slot::Gate), Read(Slot::Up), Read(Slot::G), Write(Slot::Dgate), Write(Slot::Dup), Params];
    plan("swiglu_backward", bindings, count, dtype)
}

fn plan(kernel: &str, bindings: Vec<Binding>, count: usize, dtype: DType) -> Result<Plan> {
    if count == 0 {
        return Ok(Plan::default());
    }
    let params = self::Params { count: narrow(OP, "the number of elements", count)? }.bytes();
    let kernel = format!("{kernel}{}", type_suffix(&[dtype]));
    let launch = Launch::over_elements(Source::Decoder, kernel, bindings, params, count);
    Ok(Plan { launches: vec![launch], ..Plan::default() })
}
