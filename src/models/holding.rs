//! What the weights of a base are held in.

use std::collections::HashMap;

use candle_core::{DType, Device};

use super::ModelConfig;
use super::block::LINEAR_NAMES;
use crate::backend::quantized::{Kind, Quantize};
use crate::{Error, Result};

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

    /// Refuses kinds whose blocks do not make up a weight's rows.
    ///
    /// # Errors
    /// One error lists every such weight.
    pub fn check(&self, config: &ModelConfig) -> Result<()> {
        let wrong = |(name, shape): &(String, Vec<usize>)| {
            let kind = self.kinds.get(name)?;
            let (k, block) = (*shape.last()?, kind.block_len());
            (!k.is_multiple_of(block)).then(|| format!("{name} has rows of {k}, {} blocks of {block}", kind.name()))
        };
        let wrong: Vec<String> = config.weight_shapes().iter().filter_map(wrong).collect();
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Error::setting("quantize", format!("does not fit the model: {}; give none", wrong.join("; "))))
    }

    /// Says where weights are of another kind than an option asks for.
    pub fn differs_from(&self, quantize: Quantize) -> Option<String> {
        let wanted = quantize.kind(Kind::Q4K.block_len())?;
        let others = self.kinds.values().filter(|kind| **kind != wanted).count();
        let (wanted, all) = (wanted.name(), self.kinds.len());
        (others > 0).then(|| {
            format!(
                "{others} of {all} linears are quantized to q8_0, since their rows are not made of {wanted}'s blocks"
            )
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(hidden: usize) -> ModelConfig {
        let json = serde_json::json!({"model_type": "llama", "hidden_size": hidden, "num_hidden_layers": 2, "vocab_size": 10,
            "num_attention_heads": 2, "intermediate_size": 256});
        ModelConfig::from_value("config.json".as_ref(), &json).unwrap()
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let holding = |hidden, quantize| Holding::linears(&config(hidden), quantize, DType::F32);
        assert!(holding(128, Quantize::Nf4).check(&config(128)).is_ok());
        assert_eq!(holding(128, Quantize::Nf4).differs_from(Quantize::Nf4), None);
        let error = holding(96, Quantize::Nf4).check(&config(96)).unwrap_err().to_string();
        assert!(error.contains("layers.0.self_attn.q_proj") && error.contains("layers.1.mlp.up_proj"), "{error}");
        assert!(error.contains("rows of 96") && !error.contains("down_proj"), "{error}");
        // Twelve have rows of 128; down_proj's are 256.
        let note = holding(128, Quantize::Q4K).differs_from(Quantize::Q4K).unwrap();
        assert!(note.contains("12 of 14") && note.contains("q8_0"), "{note}");
    }

    #[test]
    fn bytes_are_those_of_blocks_and_of_what_is_dense() {
        let (config, nf4) = (config(128), Holding::linears(&config(128), Quantize::Nf4, DType::BF16));
        let linears = 2 * (4 * 128 * 128 + 3 * 128 * 256);
        let dense = 2 * 10 * 128 + 5 * 128;
        assert_eq!(nf4.bytes(&config), linears / 64 * 36 + 2 * dense);
        assert_eq!(Holding::dense(DType::F32).bytes(&config), 4 * (linears + dense));
        assert_eq!(nf4.describe(), "bf16 with 14 of nf4");
    }
}
