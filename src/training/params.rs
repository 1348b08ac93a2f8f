//! The trained tensors, each group of one learning rate in one f32 buffer, so that the optimizer takes one pass over it.
//!
//! A group's block is `[3, n]`: values, first moments, second moments. Its gradients are `[n]`. Each tensor of the model is a view
//! into them, so what the optimizer writes is what the next forward pass reads.

use std::ops::Range;

use candle_core::{DType, Device, Shape, Tensor};

use crate::backend::custom_ops::adamw::{self, AdamW};
use crate::models::linear::Parameter;
use crate::{Error, Result};

/// The trained tensors with their gradients and optimizer moments.
pub struct Params {
    groups: Vec<Group>,
}

/// Tensors that are trained at one learning rate.
struct Group {
    /// Multiplies the learning rate.
    ratio: f64,
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
    /// One group at the learning rate itself: copies the initial values, in the order given.
    pub fn new(initial: &[(String, Tensor)], device: &Device) -> Result<Self> {
        Self::grouped(vec![(1.0, initial.to_vec())], device)
    }

    /// Groups, each with what multiplies its learning rate. A group without tensors is left out.
    ///
    /// # Errors
    /// Nothing to train; memory that is not there.
    pub fn grouped(initial: Vec<(f64, Vec<(String, Tensor)>)>, device: &Device) -> Result<Self> {
        let groups = initial.iter().filter(|(_, tensors)| !tensors.is_empty());
        let groups = groups.map(|(ratio, tensors)| Group::new(*ratio, tensors, device)).collect::<Result<Vec<_>>>()?;
        if groups.iter().all(|group| group.grads.elem_count() == 0) {
            return Err(Error::setting("target_modules", "nothing is left to train"));
        }
        Ok(Self { groups })
    }

    /// The trained tensors' names with their views, group by group, in order.
    pub fn named(&self) -> Result<Vec<(&str, Parameter)>> {
        let mut all = Vec::with_capacity(self.count());
        for group in &self.groups {
            let values = group.block.narrow(0, 0, 1)?.flatten_all()?;
            for entry in &group.entries {
                let view = |all: &Tensor| all.narrow(0, entry.range.start, entry.range.len())?.reshape(&entry.shape);
                all.push((entry.name.as_str(), Parameter { value: view(&values)?, grad: Some(view(&group.grads)?) }));
            }
        }
        Ok(all)
    }

    /// Number of trained values.
    pub fn len(&self) -> usize {
        self.groups.iter().map(|group| group.grads.elem_count()).sum()
    }

    /// Number of trained tensors.
    pub fn count(&self) -> usize {
        self.groups.iter().map(|group| group.entries.len()).sum()
    }

    /// Never true: [`Params::new`] refuses to make an empty one.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sets all gradients to zero.
    pub fn zero_gradients(&self) -> Result<()> {
        self.groups.iter().try_for_each(|group| Ok(group.grads.zero_set()?))
    }

    /// The global norm of the gradients. Not finite when one of them is not.
    pub fn gradient_norm(&self) -> Result<f64> {
        let squares = self.groups.iter().map(|group| adamw::squared_norm(&group.grads));
        Ok(squares.sum::<Result<f64>>()?.sqrt())
    }

    /// One optimizer step, the `t`th from 1, with gradients multiplied by `scale` and each group at its own learning rate.
    pub fn step(&self, optimizer: &AdamW, scale: f32, t: usize) -> Result<()> {
        self.groups.iter().try_for_each(|Group { ratio, block, grads, .. }| {
            let optimizer = AdamW { learning_rate: ratio * optimizer.learning_rate, ..*optimizer };
            adamw::step(block, grads, scale, t, &optimizer)
        })
    }

    /// Values and moments `[3, n]` of each group, for checkpoints.
    pub fn blocks(&self) -> Vec<Tensor> {
        self.groups.iter().map(|group| group.block.clone()).collect()
    }

    /// Puts back what [`Params::blocks`] gave.
    pub fn restore(&self, blocks: &[Tensor]) -> Result<()> {
        let shapes = |blocks: &mut dyn Iterator<Item = &Tensor>| blocks.map(|b| b.shape().clone()).collect::<Vec<_>>();
        let found = shapes(&mut blocks.iter());
        let wanted = shapes(&mut self.groups.iter().map(|group| &group.block));
        if found != wanted {
            return Err(Error::op("restore", format!("the checkpoint holds {found:?} values, this run {wanted:?}")));
        }
        self.groups.iter().zip(blocks).try_for_each(|(group, block)| Ok(group.block.slice_set(block, 0, 0)?))
    }
}

impl Group {
    fn new(ratio: f64, initial: &[(String, Tensor)], device: &Device) -> Result<Self> {
        let mut entries = Vec::with_capacity(initial.len());
        let mut end = 0;
        for (name, tensor) in initial {
            let range = end..end + tensor.elem_count();
            end = range.end;
            entries.push(Entry { name: name.clone(), shape: tensor.shape().clone(), range });
        }
        let block = Tensor::zeros((3, end), DType::F32, device)?;
        let values = block.flatten_all()?;
        for ((_, tensor), entry) in initial.iter().zip(&entries) {
            let flat = tensor.to_device(device)?.to_dtype(DType::F32)?.flatten_all()?.contiguous()?;
            values.slice_set(&flat, 0, entry.range.start)?;
        }
        let grads = Tensor::zeros(end, DType::F32, device)?;
        Ok(Self { ratio, block, grads, entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_one_set_with_rates_of_their_own() {
        let tensor = |value: f32| Tensor::full(value, (2, 3), &Device::Cpu).unwrap();
        let initial = vec![(1.0, vec![("a".to_string(), tensor(1.0))]), (4.0, vec![("b".to_string(), tensor(1.0))])];
        let params = Params::grouped(initial, &Device::Cpu).unwrap();
        assert_eq!((params.len(), params.count()), (12, 2));
        for (_, parameter) in params.named().unwrap() {
            parameter.grad.unwrap().slice_set(&tensor(0.5), 0, 0).unwrap();
        }
        assert!((params.gradient_norm().unwrap() - (12.0 * 0.25f64).sqrt()).abs() < 1e-6);
        let optimizer = AdamW { learning_rate: 0.01, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
        let before: Vec<Tensor> = params.blocks().iter().map(|block| block.copy().unwrap()).collect();
        params.step(&optimizer, 1.0, 1).unwrap();
        let moved: Vec<f32> = params
            .named()
            .unwrap()
            .iter()
            .map(|(_, p)| 1.0 - p.value.flatten_all().unwrap().to_vec1::<f32>().unwrap()[0])
            .collect();
        assert!((moved[0] - 0.01).abs() < 1e-5 && (moved[1] - 0.04).abs() < 1e-5, "{moved:?}");
        params.restore(&before).unwrap();
        assert!(params.restore(&before[..1]).is_err());
    }
}
