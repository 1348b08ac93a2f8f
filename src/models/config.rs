//! What `config.json` says about a model of the Llama family.
//!
//! Keys and their meanings are Hugging Face transformers'. A key that changes what the model computes and is not understood
//! here is refused by name; keys that are about something else (training, dtype, generation) are let pass.

use std::f64::consts::PI;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// How rotary frequencies are changed for longer contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// Over 0.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a blend between.
    Llama3 {
        /// Over 0.
        factor: f64,
        /// Wavelengths over `original_max_position_embeddings / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Wavelengths under `original_max_position_embeddings / high_freq_factor` are high.
        high_freq_factor: f64,
        /// The context that the model was first trained with.
        original_max_position_embeddings: usize,
    },
    /// Each frequency divided by a number of its own, as GGUF files state Llama 3.1's scaling.
    Divisors(Vec<f32>),
}

/// The sizes and variants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `llama`, `mistral`, `qwen2` or `qwen3`.
    pub model_type: String,
    /// V.
    pub vocab_size: usize,
    /// H.
    pub hidden_size: usize,
    /// Of the gated MLP.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// The longest context.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// The base of the rotary frequencies.
    pub rope_theta: f64,
    /// What is done to the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on o.
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k.
    pub qk_norm: bool,
    /// How many keys a query sees, itself included.
    pub sliding_window: Option<usize>,
    /// The first layer with the sliding window.
    pub sliding_window_from_layer: usize,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
}

/// The largest value taken for a size: beyond any model, and products of two stay far from overflow.
const LARGEST: usize = 1 << 28;

/// Keys that have no bearing on the forward pass as it is built here, or that are read elsewhere.
const HARMLESS: &str = "\
    architectures model_type torch_dtype dtype transformers_version use_cache initializer_range \
    attention_dropout pretraining_tp pad_token_id bos_token_id eos_token_id unk_token_id _name_or_path \
    name_or_path is_llama_config transformers.js_config return_dict output_attentions \
    output_hidden_states chunk_size_feed_forward id2label label2id task_specific_params problem_type \
    finetuning_task max_window_layers \
    _attn_implementation auto_map use_return_dict max_length temperature top_p do_sample layer_types \
    use_sliding_window cross_attention_hidden_size gradient_checkpointing unsloth_version unsloth_fixed \
    sep_token_id decoder_start_token_id is_decoder attn_implementation hidden_dropout bad_words_ids \
    torchscript quantization_config_backup";

/// What an object of rotary scaling may hold.
const ROPE_KEYS: [&str; 8] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
];

struct Reader<'a> {
    map: &'a Map<String, Value>,
    read: Vec<&'static str>,
    problems: Vec<String>,
}

impl Reader<'_> {
    fn value(&mut self, key: &'static str) -> Option<&Value> {
        self.read.push(key);
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn size_or(&mut self, key: &'static str, default: Option<usize>) -> usize {
        let found = self.value(key).map(|value| (value.as_u64(), value.to_string()));
        let problem = match found {
            None => match default {
                Some(value) => return value,
                None => format!("{key} is missing"),
            },
            Some((Some(value), _)) if (1..=LARGEST as u64).contains(&value) => return value as usize,
            Some((_, text)) => format!("{key} is {text}; it must be a whole number from 1 to {LARGEST}"),
        };
        self.problems.push(problem);
        1
    }

    fn float_or(&mut self, key: &'static str, default: f64) -> f64 {
        let Some(value) = self.value(key).map(|value| (value.as_f64(), value.to_string())) else { return default };
        match value {
            (Some(number), _) if number > 0.0 && number.is_finite() => number,
            (_, text) => {
                self.problems.push(format!("{key} is {text}; it must be a number over 0"));
                default
            }
        }
    }

    fn token_ids(&mut self, key: &'static str) -> Vec<u32> {
        token_ids(key, self.map.get(key)).unwrap_or_else(|problem| {
            self.problems.push(problem);
            Vec::new()
        })
    }

    fn flag_or(&mut self, key: &'static str, default: bool) -> bool {
        let Some(value) = self.value(key).map(|value| (value.as_bool(), value.to_string())) else { return default };
        value.0.unwrap_or_else(|| {
            self.problems.push(format!("{key} is {}; it must be true or false", value.1));
            default
        })
    }
}

impl ModelConfig {
    /// Reads `config.json`, and `generation_config.json` beside it for the tokens that end a text.
    ///
    /// # Errors
    /// One error lists every key that is missing, has a value that cannot be used, or is not understood.
    pub fn from_json(path: &Path) -> Result<Self> {
        let mut config = Self::from_value(path, &read_json(path)?)?;
        let generation = path.with_file_name("generation_config.json");
        if generation.exists() {
            let json = read_json(&generation)?;
            let ids = token_ids("eos_token_id", json.get("eos_token_id"));
            for id in ids.map_err(|problem| Error::file(&generation, problem))? {
                if !config.eos_token_ids.contains(&id) {
                    config.eos_token_ids.push(id);
                }
            }
        }
        Ok(config)
    }

    /// As [`ModelConfig::from_json`], from parsed JSON; `path` is for messages.
    pub fn from_value(path: &Path, json: &Value) -> Result<Self> {
        let Value::Object(map) = json else { return Err(Error::file(path, "is not a JSON object")) };
        let model_type = map.get("model_type").and_then(Value::as_str).unwrap_or_default().to_string();
        let (qkv_bias, qk_norm, windows) = match model_type.as_str() {
            "llama" => (false, false, false),
            "mistral" => (false, false, true),
            "qwen2" => (true, false, true),
            "qwen3" => (false, true, true),
            other => {
                let known = "llama (Llama 2, 3, SmolLM2), mistral, qwen2 (Qwen2, Qwen2.5) and qwen3";
                let problem = format!("model_type '{other}' is not known; {known} are");
                return Err(Error::file(path, problem));
            }
        };
        let mut reader = Reader { map, read: Vec::new(), problems: Vec::new() };
        let hidden_size = reader.size_or("hidden_size", None);
        let num_layers = reader.size_or("num_hidden_layers", None);
        let num_heads = reader.size_or("num_attention_heads", None);
        let num_kv_heads = reader.size_or("num_key_value_heads", Some(num_heads));
        // Only Qwen3 has a default of its own; the others divide.
        let head_dim = if model_type == "qwen3" { 128 } else { hidden_size / num_heads };
        let head_dim = reader.size_or("head_dim", Some(head_dim.max(1)));
        let attention_bias = reader.flag_or("attention_bias", qkv_bias);
        let mut config = Self {
            vocab_size: reader.size_or("vocab_size", None),
            intermediate_size: reader.size_or("intermediate_size", None),
            max_position_embeddings: reader.size_or("max_position_embeddings", Some(2048)),
            rms_norm_eps: reader.float_or("rms_norm_eps", 1e-6),
            rope_theta: reader.float_or("rope_theta", 10_000.0),
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: reader.flag_or("tie_word_embeddings", false),
            // Qwen2 has its biases whatever the key says, and none on o; the others have all or none.
            qkv_bias: qkv_bias || attention_bias,
            o_bias: attention_bias && model_type != "qwen2",
            mlp_bias: reader.flag_or("mlp_bias", false),
            qk_norm,
            sliding_window: None,
            sliding_window_from_layer: 0,
            eos_token_ids: reader.token_ids("eos_token_id"),
            bos_token_id: reader.token_ids("bos_token_id").first().copied(),
            model_type,
            hidden_size,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
        };
        config.read_rope(&mut reader);
        config.read_window(&mut reader, windows);
        if let Some(act) =
            reader.value("hidden_act").filter(|act| !["silu", "swish"].contains(&act.as_str().unwrap_or("")))
        {
            let problem = format!("hidden_act is {act}; only silu is known");
            reader.problems.push(problem);
        }
        if !num_heads.is_multiple_of(num_kv_heads) {
            let problem = format!("{num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly");
            reader.problems.push(problem);
        }
        if !head_dim.is_multiple_of(2) {
            reader.problems.push(format!("head_dim is {head_dim}; the rotary embedding needs an even one"));
        }
        if head_dim.saturating_mul(num_heads) > LARGEST {
            reader.problems.push(format!("{num_heads} heads of {head_dim} are too many"));
        }
        if let Some(value) = map.get("quantization_config").filter(|value| !value.is_null() && !is_read(value)) {
            let advice = "take the model's unquantized files or a GGUF file";
            reader.problems.push(format!("quantization_config is {value}, and such weights are not read; {advice}"));
        }
        let known = |key: &str| {
            reader.read.contains(&key)
                || HARMLESS.split_whitespace().any(|harmless| harmless == key)
                || ["quantization_config", "quantization"].contains(&key)
        };
        let idle = |value: &Value| {
            value.is_null() || *value == Value::Bool(false) || value.as_array().is_some_and(Vec::is_empty)
        };
        let strange: Vec<&str> =
            map.iter().filter(|(key, value)| !known(key) && !idle(value)).map(|(key, _)| key.as_str()).collect();
        if !strange.is_empty() {
            let keys = strange.join(", ");
            reader.problems.push(format!("not understood, so what they change would be missed: {keys}"));
        }
        if reader.problems.is_empty() { Ok(config) } else { Err(Error::file(path, reader.problems.join("; "))) }
    }

    /// The rotary frequencies, one for each pair of a head's dimensions, scaling applied, as transformers computes them
    /// (`modeling_rope_utils.py`).
    pub fn inv_freq(&self) -> Vec<f32> {
        let base = self.rope_theta;
        let plain = (0..self.head_dim / 2).map(|i| 1.0 / base.powf(2.0 * i as f64 / self.head_dim as f64));
        let scaled = plain.enumerate().map(|(i, frequency)| match self.rope_scaling {
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Divisors(ref divisors) => frequency / divisors.get(i).map_or(1.0, |&divisor| divisor as f64),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let (context, wavelength) = (original_max_position_embeddings as f64, 2.0 * PI / frequency);
                if wavelength < context / high_freq_factor {
                    frequency
                } else if wavelength > context / low_freq_factor {
                    frequency / factor
                } else {
                    let smooth = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        });
        scaled.map(|frequency| frequency as f32).collect()
    }

    /// Every tensor of the model by its Hugging Face name, with its shape.
    pub fn weight_shapes(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let mut shapes = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_layers {
            let mut add = |name: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{layer}.{name}"), shape));
            add("input_layernorm.weight", vec![hidden]);
            add("post_attention_layernorm.weight", vec![hidden]);
            if self.qk_norm {
                add("self_attn.q_norm.weight", vec![self.head_dim]);
                add("self_attn.k_norm.weight", vec![self.head_dim]);
            }
            let linears = [
                ("self_attn.q_proj", queries, hidden, self.qkv_bias),
                ("self_attn.k_proj", keys, hidden, self.qkv_bias),
                ("self_attn.v_proj", keys, hidden, self.qkv_bias),
                ("self_attn.o_proj", hidden, queries, self.o_bias),
                ("mlp.gate_proj", inner, hidden, self.mlp_bias),
                ("mlp.up_proj", inner, hidden, self.mlp_bias),
                ("mlp.down_proj", hidden, inner, self.mlp_bias),
            ];
            for (name, n, k, bias) in linears {
                add(&format!("{name}.weight"), vec![n, k]);
                if bias {
                    add(&format!("{name}.bias"), vec![n]);
                }
            }
        }
        shapes.push(("model.norm.weight".to_string(), vec![hidden]));
        if !self.tie_word_embeddings {
            shapes.push(("lm_head.weight".to_string(), vec![self.vocab_size, hidden]));
        }
        shapes
    }

    /// transformers 5 keeps theta and scaling together in `rope_parameters`; before, `rope_theta` stood alone and
    /// `rope_scaling` held the rest.
    fn read_rope(&mut self, reader: &mut Reader) {
        let new = reader.value("rope_parameters").cloned();
        let old = reader.value("rope_scaling").cloned();
        let map = match new.or(old) {
            None => return,
            Some(Value::Object(map)) => map,
            Some(other) => {
                reader.problems.push(format!("the rotary scaling is {other}; it must be an object"));
                return;
            }
        };
        let number = |key: &str| map.get(key).and_then(Value::as_f64).filter(|number| *number > 0.0);
        if let Some(theta) = number("rope_theta") {
            self.rope_theta = theta;
        }
        let kind = map.get("rope_type").or(map.get("type")).and_then(Value::as_str).unwrap_or("default");
        let scaling = match kind {
            "default" => Some(RopeScaling::None),
            "linear" => number("factor").map(|factor| RopeScaling::Linear { factor }),
            "llama3" => (|| {
                Some(RopeScaling::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: number("low_freq_factor")?,
                    high_freq_factor: number("high_freq_factor")?,
                    original_max_position_embeddings: number("original_max_position_embeddings")? as usize,
                })
            })(),
            _ => {
                reader
                    .problems
                    .push(format!("the rotary scaling '{kind}' is not known; default, linear and llama3 are"));
                return;
            }
        };
        match scaling {
            Some(scaling) => self.rope_scaling = scaling,
            None => reader.problems.push(format!("the rotary scaling '{kind}' lacks one of its numbers")),
        }
        if number("partial_rotary_factor").is_some_and(|factor| factor != 1.0) {
            reader.problems.push("partial_rotary_factor is set; only whole heads are rotated here".to_string());
        }
        let strange: Vec<&str> = map.keys().map(String::as_str).filter(|key| !ROPE_KEYS.contains(key)).collect();
        if !strange.is_empty() {
            reader.problems.push(format!("not understood of the rotary scaling: {}", strange.join(", ")));
        }
    }

    /// Mistral has the window in all layers; Qwen2 and Qwen3 have it from `max_window_layers` on when `use_sliding_window`
    /// says so. `layer_types` states the same layer by layer and must agree with such a split.
    fn read_window(&mut self, reader: &mut Reader, windows: bool) {
        let window = reader.value("sliding_window").map(|window| (window.as_u64(), window.to_string()));
        if let Some((None, text)) = &window {
            reader.problems.push(format!("sliding_window is {text}; it must be a whole number"));
        }
        let window = window.and_then(|(window, _)| usize::try_from(window?).ok());
        let kinds = reader.map.get("layer_types").and_then(Value::as_array);
        let unknown =
            |kind: &&Value| !["full_attention", "sliding_attention"].contains(&kind.as_str().unwrap_or_default());
        if let Some(kind) = kinds.and_then(|kinds| kinds.iter().find(unknown)) {
            reader.problems.push(format!("layer_types has {kind}; full_attention and sliding_attention are known"));
        }
        let (map, qwen) = (reader.map, self.model_type.starts_with("qwen"));
        let used = !qwen || map.get("use_sliding_window").and_then(Value::as_bool).unwrap_or(false);
        let Some(window) = window.filter(|_| used) else { return };
        if !windows {
            reader.problems.push(format!("sliding_window is {window}, which {} does not have", self.model_type));
            return;
        }
        if window == 0 {
            reader.problems.push("sliding_window is 0; it must be 1 or more".to_string());
            return;
        }
        self.sliding_window = Some(window);
        if qwen {
            let from = map.get("max_window_layers").and_then(Value::as_u64).unwrap_or(28);
            self.sliding_window_from_layer = from as usize;
        }
        let Some(types) = map.get("layer_types").and_then(Value::as_array) else { return };
        let sliding: Vec<bool> = types.iter().map(|kind| kind.as_str() == Some("sliding_attention")).collect();
        let from = sliding.iter().position(|&sliding| sliding).unwrap_or(self.num_layers);
        if sliding.len() != self.num_layers || sliding[from.min(sliding.len())..].contains(&false) {
            reader
                .problems
                .push("layer_types mixes full and sliding attention in an order that is not known".to_string());
        }
        self.sliding_window_from_layer = from;
    }
}

/// Reads a JSON file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|error| Error::file(path, format!("is not JSON: {error}")))
}

/// A token's id, a list of them, or nothing.
fn token_ids(key: &str, value: Option<&Value>) -> Result<Vec<u32>, String> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match value {
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(Value::Null) | None => Some(Vec::new()),
        Some(value) => one(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| format!("{key} is {}; it must be a token's id or a list of them", value.unwrap_or(&Value::Null)))
}

/// bitsandbytes' NF4 and MLX's groups; which weights have them and how, the weights' file says.
fn is_read(quantization: &Value) -> bool {
    let has = |key: &str, wanted: &str| quantization.get(key).and_then(Value::as_str) == Some(wanted);
    let nf4 = has("quant_method", "bitsandbytes") && has("bnb_4bit_quant_type", "nf4");
    nf4 && quantization.get("load_in_4bit") == Some(&Value::Bool(true)) || has("mode", "affine")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_are_no_ids_are_refused_by_name() {
        let config = |eos: Value| {
            let json = serde_json::json!({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 2, "vocab_size": 10, "intermediate_size": 8, "eos_token_id": eos});
            ModelConfig::from_value("config.json".as_ref(), &json)
        };
        assert_eq!(config(serde_json::json!([2, 5])).unwrap().eos_token_ids, [2, 5]);
        assert!(config(Value::Null).unwrap().eos_token_ids.is_empty());
        for bad in [serde_json::json!("</s>"), serde_json::json!([2, -1]), serde_json::json!(1.5)] {
            let message = config(bad).unwrap_err().to_string();
            assert!(message.contains("eos_token_id"), "{message}");
        }
    }
}
