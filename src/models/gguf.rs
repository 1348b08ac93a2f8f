//! Models in llama.cpp's GGUF files: configuration, tokenizer and chat template from the metadata, weights as they are or dequantized
//! at load.
//!
//! Keys and tensor names are those of llama.cpp's `convert_hf_to_gguf.py`. A key that changes what the model computes and is not
//! understood here is refused by name.

mod compare;
mod container;
pub mod export;
mod form;
mod metadata;
mod order;
mod tokenizer;
mod vocabulary;
mod writer;

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;

use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::{Device, Tensor};
use memmap2::Mmap;
use rayon::prelude::*;
use serde_json::{Map, json};

use self::container::{Container, TensorView, Value, list};
pub(crate) use self::order::in_file_order;
use self::order::{permuted_heads, unpermute, unpermute_blocks};
use super::Holding;
use super::config::{ModelConfig, RopeScaling};
use super::linear::BaseWeight;
use super::tokenizer::TextTokenizer;
use super::weights::{check, check_count};
use crate::backend::quantized::{Kind, QuantizedTensor};
use crate::{Error, Result};

/// llama.cpp's names of the sizes, and `config.json`'s.
const SIZES: [(&str, &str); 8] = [
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("vocab_size", "vocab_size"),
];

/// What no model can do without; llama.cpp has defaults for the other sizes.
const REQUIRED: [&str; 5] =
    ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"];

/// Keys under the architecture's name that are read apart from [`SIZES`], or that change nothing.
const OTHERS: [&str; 11] = [
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "attention.causal",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
];

/// llama.cpp's names of a block's parts, and Hugging Face's.
const PARTS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Divisors of the rotary frequencies: not a weight.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// Whether a file says that it is GGUF, by its first bytes.
pub fn is_gguf(path: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    let mut file = File::open(path).map_err(Error::io(path))?;
    match std::io::Read::read_exact(&mut file, &mut magic) {
        Ok(()) => Ok(&magic == b"GGUF"),
        Err(_) => Ok(false),
    }
}

/// The configuration and tokenizer of a file.
///
/// # Errors
/// A file that is cut short or broken, one of another family, a key that is not understood, an unknown tokenizer.
pub fn open(path: &Path) -> Result<(ModelConfig, TextTokenizer)> {
    with_container(path, |container| {
        let mut config = read_config(path, container)?;
        let (tokenizer, special) = tokenizer::read(container).map_err(|problem| Error::file(path, problem))?;
        config.eos_token_ids = special.stop;
        config.bos_token_id = special.bos;
        let tokenizer = TextTokenizer::new(tokenizer, special.texts, &config.eos_token_ids)?;
        Ok((config, tokenizer))
    })
}

/// The kinds of the weights that are quantized in a file and can stay so, by their Hugging Face names.
///
/// # Errors
/// A file that is cut short or broken.
pub fn kinds(path: &Path, config: &ModelConfig) -> Result<HashMap<String, Kind>> {
    with_container(path, |container| {
        check_count(path, config, container.tensors.len())?;
        let views: HashMap<&str, &TensorView> = container.tensors.iter().map(|view| (view.name, view)).collect();
        let kind = |name: &str| {
            let view = views.get(file_name(name).as_str())?;
            Kind::of_ggml(view.dtype).filter(|_| view.shape.len() == 2)
        };
        let shapes = config.weight_shapes();
        Ok(shapes
            .into_iter()
            .filter_map(|(name, _)| Some((kind(&name)?, name)))
            .map(|(kind, name)| (name, kind))
            .collect())
    })
}

/// Exactly the tensors of [`ModelConfig::weight_shapes`], by their Hugging Face names, on `device`, held as `holding` says.
///
/// # Errors
/// One error lists every tensor that is missing, has another shape, or is not of this model.
pub fn load(
    path: &Path,
    config: &ModelConfig,
    holding: &Holding,
    device: &Device,
) -> Result<HashMap<String, BaseWeight>> {
    with_container(path, |container| {
        let (names, views) = weights_of(path, config, container)?;
        let tensors = names.into_par_iter().map(|name| {
            let weight = held(views[file_name(&name).as_str()], config, holding, &name)?;
            let weight = match weight {
                BaseWeight::Dense(parameter) => parameter.value.to_device(device)?.into(),
                BaseWeight::Quantized(blocks) => blocks.to_device(device)?.into(),
            };
            Ok((name, weight))
        });
        tensors.collect()
    })
}

/// The tensors that [`load`] gives, one after the other, on the CPU.
///
/// # Errors
/// As [`load`]; what `visit` returns.
pub fn visit(
    path: &Path,
    config: &ModelConfig,
    holding: &Holding,
    visit: &mut dyn FnMut(&str, BaseWeight) -> Result<()>,
) -> Result<()> {
    with_container(path, |container| {
        let (names, views) = weights_of(path, config, container)?;
        names.iter().try_for_each(|name| visit(name, held(views[file_name(name).as_str()], config, holding, name)?))
    })
}

/// Hugging Face's names of the weights, and the file's tensors by its own.
type Weights<'a> = (Vec<String>, HashMap<&'a str, &'a TensorView<'a>>);

fn weights_of<'a>(path: &Path, config: &ModelConfig, container: &'a Container) -> Result<Weights<'a>> {
    let found = container.tensors.iter().filter(|tensor| tensor.name != ROPE_FREQS);
    let found = found.map(|tensor| (tensor.name.to_string(), tensor.shape.clone())).collect();
    let names = check(path, config, found, file_name)?;
    Ok((names, container.tensors.iter().map(|view| (view.name, view)).collect()))
}

/// A weight as it is to be held, on the CPU, rows in this crate's order.
fn held(view: &TensorView, config: &ModelConfig, holding: &Holding, name: &str) -> Result<BaseWeight> {
    let heads = permuted_heads(config, name);
    let kind = holding.kinds.get(name).copied();
    if let Some(kind) = kind.filter(|kind| kind.ggml() == Some(view.dtype)) {
        let sizes = (view.shape[0], view.shape[1]);
        let blocks = QuantizedTensor::new(kind, view.data.to_vec(), sizes, &Device::Cpu)?;
        return Ok(unpermute_blocks(blocks, heads)?.into());
    }
    let mut tensor = dequantize(view)?;
    if let Some(heads) = heads {
        tensor = unpermute(&tensor, heads)?;
    }
    match kind {
        Some(kind) => Ok(QuantizedTensor::quantize(&tensor, kind)?.into()),
        None => Ok(tensor.to_dtype(holding.dtype)?.into()),
    }
}

fn with_container<T>(path: &Path, read: impl FnOnce(&Container) -> Result<T>) -> Result<T> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map is read-only and lives for one call; as with every reader of mapped weights, another program must not
    // shrink the file meanwhile.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    read(&Container::parse(&map).map_err(|problem| Error::file(path, problem))?)
}

fn architecture<'a>(path: &Path, container: &Container<'a>) -> Result<&'a str> {
    match container.get("general.architecture") {
        Some(Value::Text(name @ ("llama" | "mistral" | "qwen2" | "qwen3"))) => Ok(name),
        Some(other) => {
            let known = "llama (Llama, SmolLM2, Mistral), mistral, qwen2 (Qwen2, Qwen2.5) and qwen3";
            Err(Error::file(path, format!("general.architecture {other} is not known; {known} are")))
        }
        None => Err(Error::file(path, "has no general.architecture")),
    }
}

/// Says the metadata in `config.json`'s keys, so that both forms pass the same checks.
fn read_config(path: &Path, container: &Container) -> Result<ModelConfig> {
    let architecture = architecture(path, container)?;
    let name = |key: &str| format!("{architecture}.{key}");
    let get = |key: &str| container.get(&name(key));
    let mut problems = Vec::new();
    let mut json = Map::new();
    for (key, hf_key) in SIZES {
        match get(key).map(|value| (same_in_all_layers(value), value)) {
            Some((Some(size), _)) => {
                json.insert(hf_key.to_string(), json!(size));
            }
            Some((None, value)) => problems.push(format!("{} is {value}; one whole number is read", name(key))),
            None if REQUIRED.contains(&key) => problems.push(format!("{} is missing", name(key))),
            None => {}
        }
    }
    let size = |json: &Map<_, serde_json::Value>, key: &str| json.get(key).and_then(serde_json::Value::as_u64);
    if let (Some(hidden), Some(heads @ 1..)) = (size(&json, "hidden_size"), size(&json, "num_attention_heads")) {
        json.entry("head_dim").or_insert(json!(hidden / heads));
    }
    let head_dim = size(&json, "head_dim");
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(value) = get(key).filter(|value| value.unsigned() != head_dim) {
            let width = head_dim.unwrap_or_default();
            problems.push(format!("{} is {value} where a head has {width}; only equal ones are known", name(key)));
        }
    }
    if let Some(embedding) = container.tensor("token_embd.weight") {
        json.entry("vocab_size").or_insert(json!(embedding.shape[0]));
    }
    for (key, hf_key) in [("attention.layer_norm_rms_epsilon", "rms_norm_eps"), ("rope.freq_base", "rope_theta")] {
        match get(key).map(|value| (value.float(), value)) {
            Some((Some(number), _)) => {
                json.insert(hf_key.to_string(), json!(shortest(number)));
            }
            Some((None, value)) => problems.push(format!("{} is {value}; it must be a number", name(key))),
            None if hf_key == "rms_norm_eps" => problems.push(format!("{} is missing", name(key))),
            None => {}
        }
    }

    let window = get("attention.sliding_window").filter(|value| !value.is_idle());
    let mut model_type = architecture;
    if let Some(window) = window {
        if architecture.starts_with("qwen") {
            let key = name("attention.sliding_window");
            problems.push(format!("{key} is {window}, and the file does not say which layers have the window"));
        }
        model_type = if architecture == "llama" { "mistral" } else { architecture };
        json.insert("sliding_window".to_string(), json!(window.unsigned()));
    }
    json.insert("model_type".to_string(), json!(model_type));
    json.insert("tie_word_embeddings".to_string(), json!(container.tensor("output.weight").is_none()));
    json.insert("attention_bias".to_string(), json!(container.tensor("blk.0.attn_q.bias").is_some()));
    json.insert("mlp_bias".to_string(), json!(container.tensor("blk.0.ffn_gate.bias").is_some()));

    let divisors = rope_divisors(container, head_dim, &mut problems);
    // llama.cpp takes a factor without a type for a linear one.
    let kind = match get("rope.scaling.type") {
        Some(Value::Text(kind)) => kind,
        Some(other) => {
            problems.push(format!("{} is {other}; it must be a string", name("rope.scaling.type")));
            "none"
        }
        None => "linear",
    };
    let factor = get("rope.scaling.factor").or_else(|| get("rope.scale_linear")).filter(|value| !value.is_idle());
    match (kind, factor) {
        ("none", _) | ("linear", None) => {}
        ("linear", Some(factor)) if divisors.is_none() => {
            json.insert("rope_scaling".to_string(), json!({"rope_type": "linear", "factor": factor.float()}));
        }
        ("linear", Some(factor)) => {
            problems.push(format!("{} is {factor} beside {ROPE_FREQS}; one is known", name("rope.scaling.factor")));
        }
        (other, _) => problems.push(format!("{} is '{other}'; none and linear are known", name("rope.scaling.type"))),
    }

    if let Some(value) = get("attention.causal").filter(|value| **value != Value::Bool(true)) {
        problems.push(format!("{} is {value}; only causal attention is known", name("attention.causal")));
    }
    if let Some(value) = container.get("general.type").filter(|value| **value != Value::Text("model")) {
        problems.push(format!("general.type is {value}; only a model is read"));
    }
    if let Some(parts) = container.get("split.count").filter(|value| value.unsigned().is_none_or(|count| count > 1)) {
        problems.push(format!("it is one of {parts} parts; join them with llama-gguf-split --merge"));
    }
    let known = |key: &str| SIZES.iter().any(|(size, _)| *size == key) || OTHERS.contains(&key);
    let prefix = name("");
    let strange = container.pairs().filter(|(key, value)| {
        !value.is_idle() && key.strip_prefix(&prefix).is_some_and(|key| !known(key) && key != "tensor_data_layout")
    });
    let strange: Vec<&str> = strange.map(|(key, _)| key).collect();
    if !strange.is_empty() {
        problems.push(format!("not understood, so what they change would be missed: {}", strange.join(", ")));
    }
    if !problems.is_empty() {
        return Err(Error::file(path, list(&problems)));
    }
    let mut config = ModelConfig::from_value(path, &json.into())?;
    if let Some(divisors) = divisors {
        config.rope_scaling = RopeScaling::Divisors(divisors);
    }
    Ok(config)
}

/// A size stands once, or once a layer.
fn same_in_all_layers(value: &Value) -> Option<u64> {
    let Value::Numbers(numbers) = value else { return value.unsigned() };
    let first = numbers.iter().next()?.unsigned()?;
    numbers.iter().all(|value| value.unsigned() == Some(first)).then_some(first)
}

/// The shortest decimal that gives the same f32: 1e-5 was meant where 9.99999975e-6 is stored.
fn shortest(number: f64) -> f64 {
    (number as f32).to_string().parse().unwrap_or(number)
}

/// Llama 3.1's scaling stands as a tensor of divisors, one for each frequency.
fn rope_divisors(container: &Container, head_dim: Option<u64>, problems: &mut Vec<String>) -> Option<Vec<f32>> {
    let view = container.tensor(ROPE_FREQS)?;
    let divisors = dequantize(view).and_then(|tensor| Ok(tensor.flatten_all()?.to_vec1::<f32>()?));
    let fits = |divisors: &Vec<f32>| {
        Some(divisors.len() as u64 * 2) == head_dim
            && divisors.iter().all(|divisor| *divisor > 0.0 && divisor.is_finite())
    };
    match divisors.ok().filter(fits) {
        Some(divisors) => Some(divisors),
        None => {
            problems.push(format!("{ROPE_FREQS} {:?} does not hold a divisor over 0 for each frequency", view.shape));
            None
        }
    }
}

/// llama.cpp's name of a family.
pub(crate) fn architecture_of(config: &ModelConfig) -> &str {
    // Mistral's files are llama's, with a window.
    if config.model_type == "mistral" { "llama" } else { &config.model_type }
}

/// llama.cpp's name of a tensor from Hugging Face's.
pub(crate) fn file_name(name: &str) -> String {
    let layer = || {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (part, kind) = rest.rsplit_once('.')?;
        let (part, _) = PARTS.iter().find(|(_, hf_part)| *hf_part == part)?;
        Some(format!("blk.{layer}.{part}.{kind}"))
    };
    match name {
        "model.embed_tokens.weight" => "token_embd.weight".to_string(),
        "model.norm.weight" => "output_norm.weight".to_string(),
        "lm_head.weight" => "output.weight".to_string(),
        _ => layer().unwrap_or_else(|| name.to_string()),
    }
}

/// f32, on the CPU.
fn dequantize(view: &TensorView) -> Result<Tensor> {
    let quantized = qtensor_from_ggml(view.dtype, view.data, view.shape.clone(), &Device::Cpu)?;
    Ok(quantized.dequantize(&Device::Cpu)?)
}
