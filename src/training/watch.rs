//! The first steps under watch: a run that learns nothing is stopped.

use std::collections::HashMap;

use candle_core::Tensor;

use super::params::Params;
use super::setup;
use crate::{Error, Result};

/// Looks at the first two steps of a process: every B must get a gradient in the first, and with B no longer zero every A must
/// get one and move in the second. Weights of full fine-tuning must get one at once; biases may not (softmax cancels that
/// of keys).
pub(super) struct Watch {
    /// Until the second step is done.
    initial: HashMap<String, Tensor>,
}

impl Watch {
    pub fn new(params: &Params) -> Result<Self> {
        // A copy of the values alone: `copy` would take the whole buffer that they are a view of.
        let named = params.named()?;
        let a = named.into_iter().filter(|(name, _)| name.ends_with(setup::A));
        let initial = a.map(|(name, parameter)| Ok((name.to_string(), parameter.value.force_contiguous()?)));
        Ok(Self { initial: initial.collect::<Result<_>>()? })
    }

    pub fn check_gradients(&self, params: &Params, step: usize, done: usize) -> Result<()> {
        if done > 2 {
            return Ok(());
        }
        let mut without = Vec::new();
        for (name, parameter) in params.named()? {
            let expected = if name.ends_with(setup::A) { done == 2 } else { !name.ends_with(".bias") };
            let Some(grad) = parameter.grad.filter(|_| expected) else { continue };
            if grad.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? == 0.0 {
                without.push(name.to_string());
            }
        }
        stop_with(step, "no gradient reaches", without)
    }

    pub fn check_movement(&mut self, params: &Params, step: usize, done: usize) -> Result<()> {
        if done != 2 {
            return Ok(());
        }
        let mut still = Vec::new();
        let first = std::mem::take(&mut self.initial);
        for (name, parameter) in params.named()? {
            let Some(initial) = first.get(name) else { continue };
            let moved = parameter.value.sub(initial)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            if moved == 0.0 {
                still.push(name.to_string());
            }
        }
        stop_with(step, "the optimizer did not move", still)
    }
}

fn stop_with(step: usize, what: &str, names: Vec<String>) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    Err(Error::Training {
        step,
        problem: format!("{what} {} of the trained tensors: {}", names.len(), names.join(", ")),
    })
}
