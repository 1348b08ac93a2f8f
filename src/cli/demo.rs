//! `metal-candle train` without a model: the one that ships with the program.

use serde_json::{Map, Value};

use super::Outcome;

/// Placeholder until the assets are there.
pub fn run(_flags: Map<String, Value>) -> Outcome {
    Err("the demo is not there yet".into())
}
