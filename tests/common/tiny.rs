//! A tiny random Llama with a tokenizer of its own, in Hugging Face's layout, for tests that need a whole model and not a good one.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Tensor};
use metal_candle::models::ModelConfig;
use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// The token that ends a text.
pub const EOS: &str = "<|end|>";

/// 256 bytes, [`EOS`], and merges of [`TEXT`].
const VOCAB: usize = 300;

const TEXT: &str =
    "row 1 of the data has the value 2 and the next row of it has another value; a prompt asks, an answer follows";

/// Writes `config.json`, `model.safetensors` (f32, drawn from `seed`), `tokenizer.json` (byte-level BPE: any text can be written)
/// and `tokenizer_config.json` without a chat template, into a folder that it makes.
pub fn write_model(folder: &Path, seed: u64) {
    write_model_with(folder, seed, |_| ());
}

/// [`write_model`] with another configuration.
pub fn write_model_with(folder: &Path, seed: u64, change: impl FnOnce(&mut Value)) {
    fs::create_dir_all(folder).unwrap();
    let tokenizer = tokenizer();
    let vocab = tokenizer.get_vocab_size(true);
    tokenizer.save(folder.join("tokenizer.json"), false).unwrap();
    write_json(
        &folder.join("tokenizer_config.json"),
        &json!({"eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}),
    );
    let mut config = config(vocab, tokenizer.token_to_id(EOS).unwrap());
    change(&mut config);
    write_json(&folder.join("config.json"), &config);
    let config = ModelConfig::from_value(folder, &config).unwrap();
    candle_core::safetensors::save(&weights(&config, seed), folder.join("model.safetensors")).unwrap();
}

/// The model's `config.json`.
pub fn config(vocab: usize, eos: u32) -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "vocab_size": vocab,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
        "hidden_act": "silu", "eos_token_id": eos,
    })
}

/// Every weight of a configuration: norms about one, the rest about zero and small.
pub fn weights(config: &ModelConfig, seed: u64) -> HashMap<String, Tensor> {
    let shapes = config.weight_shapes().into_iter().enumerate();
    let weights = shapes.map(|(index, (name, shape))| {
        let (scale, shift) = if name.contains("norm") { (0.1, 1.0) } else { (0.2, 0.0) };
        let drawn = super::random(&shape, DType::F32, seed.wrapping_mul(1000).wrapping_add(index as u64));
        (name, drawn.affine(scale, shift).unwrap())
    });
    weights.collect()
}

/// The tokenizer: byte-level BPE.
pub fn tokenizer() -> Tokenizer {
    let mut tokenizer = Tokenizer::new(BPE::default());
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(bytes));
    tokenizer.with_decoder(Some(bytes));
    let trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(VOCAB)
        .special_tokens(vec![AddedToken::from(EOS, true)])
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect());
    let mut trainer = TrainerWrapper::BpeTrainer(trainer.build());
    tokenizer.train(&mut trainer, [TEXT].into_iter()).unwrap();
    tokenizer
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_string_pretty(value).unwrap()).unwrap();
}
