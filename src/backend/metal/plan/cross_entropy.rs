//! The loss of rows of logits: `cross_entropy_rows` of `training.metal`.

use super::{Binding, Launch, Plan, Slot, Source, narrow, params};
use crate::Result;

const OP: &str = "cross_entropy";

params! {
    /// `CrossEntropyParams` of training.metal.
    pub struct Params {
        /// V
        pub vocabulary: u32,
        /// 1: logits become the gradient; 0: the loss alone.
        pub gradient: u32,
        /// Multiplies the gradient.
        pub scale: f32,
    }
}

/// [`Slot::Losses`] `[c]` of [`Slot::Logits`] `[c, V]` f32, which with `scale` become `scale · (softmax - onehot)`. Targets
/// are within the vocabulary.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn rows(targets: &[u32], vocabulary: usize, scale: Option<f32>) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    if targets.is_empty() {
        return Ok(Plan::default());
    }
    narrow(OP, "the number of rows", targets.len())?;
    let params = self::Params {
        vocabulary: narrow(OP, "the vocabulary", vocabulary)?,
        gradient: scale.is_some() as u32,
        scale: scale.unwrap_or(0.0),
    };
    let bindings = vec![Write(Slot::Logits), Read(Slot::Targets), Write(Slot::Losses), Params];
    let size = [targets.len(), vocabulary];
    let kernel = "cross_entropy_rows".to_string();
    let launch = Launch::over_rows(Source::Training, kernel, bindings, params.bytes(), size, 2);
    Ok(Plan { launches: vec![launch], tables: vec![(Slot::Targets, targets.to_vec())], ..Plan::default() })
}
