//! What the weights of a base are held in.

use std::collections::HashMap;

use candle_core::{DType, Device};

use super::ModelConfig;
use super::block::LINEAR_NAMES;
use crate::backend::quantized::{Kind, Quantize};

/// The dtype of what is not quantized, and with it of the activations; and the kinds of what is.
#[derive(Debug, Clone, PartialEq)]
pub struct Holding {
    /// f32, f16 or bf16.
    pub dtype: DType,
    /// By the weights' names.
    pub kinds: HashMap<String, Kind>,
}

impl Holding {
    /// Nothing quantized.
    pub fn dense(dtype: DType) -> Self {
        Self { dtype, kinds: HashMap::new() }
    }

    /// The linears of all blocks quantized as an option says; embedding and output projection stay dense, as QLoRA has it.
    pub fn linears(config: &ModelConfig, quantize: Quantize, dtype: DType) -> Self {
        let linears = config.weight_shapes().into_iter().filter(|(name, _)| is_linear(name));
        let kinds = linears.filter_map(|(name, shape)| Some((name, quantize.kind(shape[1])?))).collect();
        Self { dtype, kinds }
    }

    /// Bytes of a model's weights.
    pub fn bytes(&self, config: &ModelConfig) -> usize {
        config.weight_shapes().iter().map(|(name, shape)| self.bytes_of(name, shape.iter().product())).sum()
    }

    /// The most that is alive of dequantized weights in a product on a device: on the CPU rows are widened a tile at a time.
    pub fn widened(&self, config: &ModelConfig, device: &Device) -> usize {
        if device.is_cpu() {
            return 0;
        }
        let shapes = config.weight_shapes();
        // Linears of one input are dequantized together: q, k and v, or gate and up.
        let together: [&[&str]; 4] = [&LINEAR_NAMES[..3], &LINEAR_NAMES[3..4], &LINEAR_NAMES[4..6], &LINEAR_NAMES[6..]];
        let size = |name: &str| {
            let name = format!("model.layers.0.{name}.weight");
            let shape = shapes.iter().find(|(known, _)| *known == name).map(|(_, shape)| shape.iter().product());
            shape.filter(|_| self.kinds.contains_key(&name)).unwrap_or(0) * self.dtype.size_in_bytes()
        };
        together.iter().map(|names| names.iter().map(|name| size(name)).sum()).max().unwrap_or(0)
    }

    /// What the weights are held in, for a reader: `bf16`, or `bf16 with 210 of q4_1`.
    pub fn describe(&self) -> String {
        let mut counts: Vec<(String, usize)> = Kind::ALL
            .iter()
            .map(|kind| (kind.name().to_string(), self.kinds.values().filter(|held| *held == kind).count()))
            .filter(|(_, count)| *count > 0)
            .collect();
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let kinds: Vec<String> = counts.into_iter().map(|(name, count)| format!("{count} of {name}")).collect();
        match kinds.is_empty() {
            true => self.dtype.as_str().to_string(),
            false => format!("{} with {}", self.dtype.as_str(), kinds.join(", ")),
        }
    }

    fn bytes_of(&self, name: &str, elements: usize) -> usize {
        match self.kinds.get(name) {
            Some(kind) => elements / kind.block_len() * kind.block_bytes(),
            None => elements * self.dtype.size_in_bytes(),
        }
    }
}

/// Whether a weight's name is that of a linear of a block.
pub fn is_linear(name: &str) -> bool {
    LINEAR_NAMES.iter().any(|linear| name.strip_suffix(".weight").is_some_and(|path| path.ends_with(linear)))
}
