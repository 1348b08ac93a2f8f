//! The trained tensors, all in one f32 buffer, so that the optimizer takes one pass over everything.
//!
//! The block is `[3, n]`: values, first moments, second moments. Gradients are `[n]`. Each tensor of the model is a view into
//! them, so what the optimizer writes is what the next forward pass reads.

use std::ops::Range;

use candle_core::{DType, Device, Shape, Tensor};

use crate::backend::custom_ops::adamw::{self, AdamW};
use crate::models::linear::Parameter;
use crate::{Error, Result};

/// The trained tensors with their gradients and optimizer moments.
pub struct Params {
    block: Tensor,
    grads: Tensor,
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    shape: Shape,
    range: Range<usize>,
}

impl Params {
    /// Copies the initial values, in the order given.
    pub fn new(initial: &[(String, Tensor)], device: &Device) -> Result<Self> {
        let mut entries = Vec::with_capacity(initial.len());
        let mut end = 0;
        for (name, tensor) in initial {
            let range = end..end + tensor.elem_count();
            end = range.end;
            entries.push(Entry { name: name.clone(), shape: tensor.shape().clone(), range });
        }
        if end == 0 {
            return Err(Error::setting("target_modules", "nothing is left to train"));
        }
        let block = Tensor::zeros((3, end), DType::F32, device)?;
        let params = Self { block, grads: Tensor::zeros(end, DType::F32, device)?, entries };
        let values = params.block.flatten_all()?;
        for ((_, tensor), entry) in initial.iter().zip(&params.entries) {
            let flat = tensor.to_device(device)?.to_dtype(DType::F32)?.flatten_all()?.contiguous()?;
            values.slice_set(&flat, 0, entry.range.start)?;
        }
        Ok(params)
    }

    /// The trained tensors' names with their views, in order.
    pub fn named(&self) -> Result<Vec<(&str, Parameter)>> {
        let values = self.block.narrow(0, 0, 1)?.flatten_all()?;
        let view = |all: &Tensor, entry: &Entry| {
            all.narrow(0, entry.range.start, entry.range.len())?.reshape(&entry.shape).map_err(Error::from)
        };
        let entries = self.entries.iter();
        entries
            .map(|entry| {
                let parameter = Parameter { value: view(&values, entry)?, grad: Some(view(&self.grads, entry)?) };
                Ok((entry.name.as_str(), parameter))
            })
            .collect()
    }

    /// Number of trained values.
    pub fn len(&self) -> usize {
        self.grads.elem_count()
    }

    /// Number of trained tensors.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Never true: [`Params::new`] refuses to make an empty one.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sets all gradients to zero.
    pub fn zero_gradients(&self) -> Result<()> {
        Ok(self.grads.zero_set()?)
    }

    /// The global norm of the gradients. Not finite when one of them is not.
    pub fn gradient_norm(&self) -> Result<f64> {
        Ok(adamw::squared_norm(&self.grads)?.sqrt())
    }

    /// One optimizer step, the `t`th from 1, with gradients multiplied by `scale`.
    pub fn step(&self, optimizer: &AdamW, scale: f32, t: usize) -> Result<()> {
        adamw::step(&self.block, &self.grads, scale, t, optimizer)
    }

    /// Values and moments `[3, n]`, for checkpoints.
    pub fn block(&self) -> &Tensor {
        &self.block
    }

    /// Puts back what [`Params::block`] gave.
    pub fn restore(&self, block: &Tensor) -> Result<()> {
        if block.shape() != self.block.shape() {
            let (found, wanted) = (block.shape(), self.block.shape());
            return Err(Error::op("restore", format!("the checkpoint holds {found:?} values, this run {wanted:?}")));
        }
        Ok(self.block.slice_set(block, 0, 0)?)
    }
}
