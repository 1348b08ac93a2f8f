//! AdamW and the gradient's norm: `adamw_*` of `training.metal`.

use super::{Binding, LANES, Launch, Plan, Slot, Source, narrow, params};
use crate::Result;
use crate::backend::cpu::adamw::Step;

const OP: &str = "adamw";
/// Most parts of a norm, whatever the GPU, so that the bits are the same on all.
const PARTS: usize = 256;
const THREADS: usize = 256;

params! {
    /// `AdamWParams` of training.metal.
    pub struct Params {
        /// n
        pub count: u32,
        /// Multiplies the gradient.
        pub gradient_scale: f32,
        /// `1 - lr · weight_decay`
        pub decay: f32,
        /// Decay of the second moment.
        pub beta2: f32,
        /// `1 - beta1`
        pub one_minus_beta1: f32,
        /// `1 - beta2`
        pub one_minus_beta2: f32,
        /// `lr / (1 - beta1ᵗ)`
        pub step_size: f32,
        /// `sqrt(1 - beta2ᵗ)`
        pub root_correction2: f32,
        /// Added to the denominator.
        pub epsilon: f32,
    }
}

params! {
    /// `SquaresParams` of training.metal.
    pub struct SquaresParams {
        /// n
        pub count: u32,
        /// Threadgroups, each of which makes one part.
        pub parts: u32,
    }
}

/// One step of [`Slot::Block`] `[3, n]` in place.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn step(n: usize, step: Step) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    if n == 0 {
        return Ok(Plan::default());
    }
    let params = self::Params {
        count: narrow(OP, "the number of values", n)?,
        gradient_scale: step.grad_scale,
        decay: step.decay,
        beta2: step.beta2,
        one_minus_beta1: step.one_minus_beta1,
        one_minus_beta2: step.one_minus_beta2,
        step_size: step.step_size,
        root_correction2: step.root_correction2,
        epsilon: step.epsilon,
    };
    let bindings = vec![Write(Slot::Block), Read(Slot::Grads), Params];
    let launch = Launch::over_elements(Source::Training, "adamw_step".to_string(), bindings, params.bytes(), n);
    Ok(Plan { launches: vec![launch], ..Plan::default() })
}

/// Parts of the norm of n gradients.
pub fn parts(n: usize) -> usize {
    n.div_ceil(THREADS).min(PARTS)
}

/// [`Slot::Parts`] `[parts(n)]`: sums of squares, which the host adds.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn squares(n: usize) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    if n == 0 {
        return Ok(Plan::default());
    }
    let launch = Launch {
        source: Source::Training,
        kernel: "adamw_squares".to_string(),
        bindings: vec![Read(Slot::Grads), Write(Slot::Parts), Params],
        params: SquaresParams { count: narrow(OP, "the number of values", n)?, parts: parts(n) as u32 }.bytes(),
        grid: [parts(n), 1, 1],
        threads: THREADS,
        threadgroup_bytes: THREADS / LANES * size_of::<f32>(),
    };
    Ok(Plan { launches: vec![launch], ..Plan::default() })
}
