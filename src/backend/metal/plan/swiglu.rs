//! SwiGLU and GeGLU: `swiglu_*` and `geglu_*` of `decoder.metal`.

use candle_core::DType;

use super::{Binding, Launch, Plan, Slot, Source, narrow, params, type_suffix};
use crate::Result;
use crate::backend::custom_ops::swiglu::Activation;

const OP: &str = "swiglu";

params! {
    /// `ElementParams` of decoder.metal.
    pub struct Params {
        /// Elements of each tensor.
        pub count: u32,
    }
}

/// `y = act(gate) · up`.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn forward(count: usize, dtype: DType, activation: Activation) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    plan("forward", activation, vec![Read(Slot::Gate), Read(Slot::Up), Write(Slot::Y), Params], count, dtype)
}

/// `dgate` and `dup`.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn backward(count: usize, dtype: DType, activation: Activation) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    let bindings = vec![Read(Slot::Gate), Read(Slot::Up), Read(Slot::G), Write(Slot::Dgate), Write(Slot::Dup), Params];
    plan("backward", activation, bindings, count, dtype)
}

fn plan(direction: &str, activation: Activation, bindings: Vec<Binding>, count: usize, dtype: DType) -> Result<Plan> {
    if count == 0 {
        return Ok(Plan::default());
    }
    let params = self::Params { count: narrow(OP, "the number of elements", count)? }.bytes();
    let op = match activation {
        Activation::Silu => "swiglu",
        Activation::GeluTanh => "geglu",
    };
    let kernel = format!("{op}_{direction}{}", type_suffix(&[dtype]));
    let launch = Launch::over_elements(Source::Decoder, kernel, bindings, params, count);
    Ok(Plan { launches: vec![launch], ..Plan::default() })
}
