//! What an adapter puts into a decoder and takes out again: adapters of linears, and tensors that stand in for those of the base.

use super::Decoder;
use crate::models::block::LINEAR_NAMES;
use crate::models::linear::{Adapter, BaseWeight, Linear, Parameter};
use crate::{Error, Result};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// An adapter as a decoder takes it: checked, on its device, in the order of its linears.
#[derive(Debug, Clone, Default)]
pub struct Fitted {
    /// In the order of [`Decoder::linears`].
    pub linears: Vec<Option<Adapter>>,
    /// Tensors that were trained whole, by their names in the model.
    pub whole: Vec<(String, BaseWeight)>,
}

impl Decoder {
    /// No adapter on any linear.
    pub fn bare(&self) -> Fitted {
        Fitted { linears: vec![None; self.blocks.len() * LINEAR_NAMES.len()], whole: Vec::new() }
    }

    /// Attaches an adapter to the linear at a module path, in place of any it had.
    pub fn attach(&mut self, path: &str, adapter: Option<Adapter>) -> Result<()> {
        self.linear_mut(path)?.adapter = adapter;
        self.changed();
        Ok(())
    }

    /// Sets the adapters of all linears and the tensors that stand in for those of the base, in place of all that were set before.
    /// Tensors are shared, not copied.
    ///
    /// # Errors
    /// A list that is not as long as there are linears, a tensor that the model does not have; nothing is changed then.
    pub fn set_adapters(&mut self, adapters: &Fitted) -> Result<()> {
        let count = self.blocks.len() * LINEAR_NAMES.len();
        if adapters.linears.len() != count {
            let problem = format!("the model has {count} linears, the list {} adapters", adapters.linears.len());
            return Err(Error::setting("adapters", problem));
        }
        self.set_whole(&adapters.whole)?;
        let linears = self.blocks.iter_mut().flat_map(|block| block.linears_mut());
        for ((_, linear), adapter) in linears.zip(&adapters.linears) {
            linear.adapter.clone_from(adapter);
        }
        self.changed();
        Ok(())
    }

    /// The linear at a module path (`model.layers.0.self_attn.q_proj`).
    pub fn linear_mut(&mut self, path: &str) -> Result<&mut Linear> {
        let place = path.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let place = place.and_then(|(layer, name)| Some((layer.parse::<usize>().ok()?, name)));
        let linear = place.and_then(|(layer, name)| {
            let linears = self.blocks.get_mut(layer)?.linears_mut();
            linears.into_iter().find(|(linear, _)| *linear == name)
        });
        let (_, linear) = linear.ok_or_else(|| Error::setting(path, "the model has no linear of this name"))?;
        Ok(linear)
    }

    fn set_whole(&mut self, whole: &[(String, BaseWeight)]) -> Result<()> {
        let unknown: Vec<&str> =
            whole.iter().map(|(name, _)| name.as_str()).filter(|name| !self.has_tensor(name)).collect();
        if !unknown.is_empty() {
            return Err(Error::setting("adapter", format!("the model has no tensor {}", unknown.join(", "))));
        }
        for (name, before) in std::mem::take(&mut self.replaced).into_iter().rev() {
            self.put(&name, before)?;
        }
        // An embedding that was trained whole leaves a tied output projection as it was, as PEFT does.
        if self.head.is_none() && whole.iter().any(|(name, _)| name == EMBEDDING) {
            self.head = Some(self.embedding.clone());
            self.replaced.push((HEAD.to_string(), None));
        }
        for (name, weight) in whole {
            let before = self.put(name, Some(weight.clone()))?;
            self.replaced.push((name.clone(), before));
        }
        Ok(())
    }

    fn has_tensor(&mut self, name: &str) -> bool {
        name == EMBEDDING
            || name == HEAD
            || name.strip_suffix(".weight").is_some_and(|path| self.linear_mut(path).is_ok())
            || self.parameters_mut().iter().any(|(known, _)| known == name)
    }

    /// Puts a tensor in the place of one, which is returned; `None` ties the output projection to the embedding.
    fn put(&mut self, name: &str, weight: Option<BaseWeight>) -> Result<Option<BaseWeight>> {
        let Some(weight) = weight else { return Ok(self.head.take()) };
        if name == HEAD {
            return Ok(self.head.replace(weight));
        }
        if name == EMBEDDING {
            return Ok(Some(std::mem::replace(&mut self.embedding, weight)));
        }
        if let Some(path) = name.strip_suffix(".weight")
            && let Ok(linear) = self.linear_mut(path)
        {
            return Ok(Some(std::mem::replace(&mut linear.weight, weight)));
        }
        let slot = self.parameters_mut().into_iter().find(|(known, _)| known == name).map(|(_, slot)| slot);
        match (slot, weight) {
            (Some(slot), BaseWeight::Dense(parameter)) => {
                let before: Parameter = std::mem::replace(slot, parameter);
                Ok(Some(BaseWeight::Dense(before)))
            }
            _ => Err(Error::setting(name, "the model has no such tensor that could be replaced")),
        }
    }
}
