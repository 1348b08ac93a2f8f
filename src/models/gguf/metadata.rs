//! What a GGUF file says of a model besides its tokenizer, from its configuration: the mirror of the reader in [`super`].

use candle_core::quantized::GgmlDType;

use super::writer::{Pairs, TensorInfo};
use super::{ROPE_FREQS, SIZES, architecture_of};
use crate::models::{ModelConfig, RopeScaling};

/// Writes the keys of a configuration, and returns what a reader should know of them.
///
/// # Errors
/// What the keys cannot say.
pub fn write(config: &ModelConfig, name: &str, pairs: &mut Pairs) -> Result<Vec<String>, String> {
    let architecture = architecture_of(config);
    pairs.text("general.architecture", architecture);
    pairs.text("general.type", "model");
    pairs.text("general.name", name);
    let key = |key: &str| format!("{architecture}.{key}");
    for (name, hf_name) in SIZES {
        pairs.u32(&key(name), whole(size(config, hf_name))?);
    }
    pairs.u32(&key("attention.value_length"), whole(config.head_dim)?);
    pairs.u32(&key("rope.dimension_count"), whole(config.head_dim)?);
    pairs.f32(&key("attention.layer_norm_rms_epsilon"), config.rms_norm_eps as f32);
    pairs.f32(&key("rope.freq_base"), config.rope_theta as f32);
    if let RopeScaling::Linear { factor } = config.rope_scaling {
        pairs.text(&key("rope.scaling.type"), "linear");
        pairs.f32(&key("rope.scaling.factor"), factor as f32);
    }
    let mut notes = Vec::new();
    if let Some(window) = config.sliding_window.filter(|_| config.sliding_window_from_layer < config.num_layers) {
        if config.model_type != "mistral" {
            let from = config.sliding_window_from_layer;
            return Err(format!(
                "has a sliding window of {window} from layer {from} on, which GGUF has no key for; where texts are no longer than \
                 the window, set use_sliding_window to false in config.json"
            ));
        }
        pairs.u32(&key("attention.sliding_window"), whole(window)?);
        notes.push(format!(
            "llama.cpp computes this model without its sliding window of {window}: longer texts come out differently there"
        ));
    }
    Ok(notes)
}

/// The value of a key of [`SIZES`].
fn size(config: &ModelConfig, hf_name: &str) -> usize {
    match hf_name {
        "num_hidden_layers" => config.num_layers,
        "max_position_embeddings" => config.max_position_embeddings,
        "hidden_size" => config.hidden_size,
        "intermediate_size" => config.intermediate_size,
        "num_attention_heads" => config.num_heads,
        "num_key_value_heads" => config.num_kv_heads,
        "head_dim" => config.head_dim,
        "vocab_size" => config.vocab_size,
        other => unreachable!("SIZES has {other}, which is written nowhere"),
    }
}

fn whole(size: usize) -> Result<u32, String> {
    u32::try_from(size).map_err(|_| format!("has a size of {size}, over 32 bits"))
}

/// The divisors of the rotary frequencies, where scaling stands as a tensor.
pub fn rope_divisors(config: &ModelConfig) -> Option<(TensorInfo, Vec<f32>)> {
    let divisors = match &config.rope_scaling {
        RopeScaling::None | RopeScaling::Linear { .. } => return None,
        RopeScaling::Divisors(divisors) => divisors.clone(),
        RopeScaling::Llama3 { .. } => {
            let plain = ModelConfig { rope_scaling: RopeScaling::None, ..config.clone() };
            plain.inv_freq().iter().zip(config.inv_freq()).map(|(plain, scaled)| plain / scaled).collect()
        }
    };
    let info = TensorInfo { name: ROPE_FREQS.to_string(), shape: vec![divisors.len()], dtype: GgmlDType::F32 };
    Some((info, divisors))
}
