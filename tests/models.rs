//! A model folder opens whole or not at all: configuration, weights and tokenizer, and one error that lists all that is wrong.
#![allow(missing_docs)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use metal_candle::models::decoder::{Batch, Decoder};
use metal_candle::models::{ModelConfig, ModelFiles};
use serde_json::{Value, json};
use tempfile::TempDir;

struct Folder {
    path: PathBuf,
    _dropped_with_it: TempDir,
}

fn folder() -> Folder {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    common::tiny::write_model(&path, 7);
    Folder { path, _dropped_with_it: dir }
}

fn open(path: &Path) -> metal_candle::Result<ModelFiles> {
    ModelFiles::open(path.to_str().unwrap())
}

fn weights(path: &Path) -> metal_candle::Result<HashMap<String, Tensor>> {
    open(path)?.weights(DType::F32, &Device::Cpu)
}

/// Fails unless the error has every part.
#[track_caller]
fn refused<T>(result: metal_candle::Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("taken, though it should be refused for {parts:?}") };
    let error = error.to_string();
    for part in parts {
        assert!(error.contains(part), "'{part}' is not in: {error}");
    }
}

#[test]
fn a_folder_opens_and_runs() {
    let folder = folder();
    let model = open(&folder.path).unwrap();
    let text = "row 3 of the data: naïve 猫 \u{1f980}\n";
    let tokens = model.tokenizer.encode(text, false).unwrap();
    assert_eq!(model.tokenizer.decode(&tokens, true).unwrap(), text);
    assert!(tokens.len() < text.len() - 5, "the tokenizer merges nothing");
    assert_eq!(model.tokenizer.eos_token().unwrap().1, common::tiny::EOS);
    let decoder = Decoder::new(&model.config, weights(&folder.path).unwrap(), &Device::Cpu).unwrap();
    let count = tokens.len();
    let logits = decoder.logits(&Batch { tokens, targets: vec![0; count], lengths: vec![count] }).unwrap();
    let values = common::f64s(&logits);
    assert!(values.iter().all(|value| value.is_finite()) && values.iter().any(|value| value.abs() > 0.1));
}

#[test]
fn weights_come_in_the_dtype_that_is_asked_for() {
    let folder = folder();
    let whole = weights(&folder.path).unwrap();
    for dtype in [DType::F16, DType::BF16] {
        let rounded = open(&folder.path).unwrap().weights(dtype, &Device::Cpu).unwrap();
        for (name, tensor) in &whole {
            assert_eq!(rounded[name].dtype(), dtype);
            common::assert_close(name, &rounded[name], &common::f64s(tensor));
        }
    }
}

#[test]
fn shards_with_an_index_are_one_model() {
    let folder = folder();
    let whole = weights(&folder.path).unwrap();
    let single = folder.path.join("model.safetensors");
    let mut map = serde_json::Map::new();
    let mut names: Vec<&String> = whole.keys().collect();
    names.sort_unstable();
    for (part, names) in names.chunks(7).enumerate() {
        let file = format!("model-{part}.safetensors");
        map.extend(names.iter().map(|name| (name.to_string(), json!(file))));
        let tensors: HashMap<String, Tensor> = names.iter().map(|&name| (name.clone(), whole[name].clone())).collect();
        candle_core::safetensors::save(&tensors, folder.path.join(file)).unwrap();
    }
    fs::remove_file(&single).unwrap();
    refused(weights(&folder.path), &["has no model.safetensors"]);

    let index = folder.path.join("model.safetensors.index.json");
    let write =
        |map: &serde_json::Map<String, Value>| fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    write(&map);
    let sharded = weights(&folder.path).unwrap();
    assert_eq!(sharded.len(), whole.len());
    for (name, tensor) in &whole {
        assert_eq!(common::f64s(&sharded[name]), common::f64s(tensor), "{name}");
    }

    let mut outside = map.clone();
    outside.insert("x".into(), json!("../other.safetensors"));
    write(&outside);
    refused(weights(&folder.path), &["outside its folder", "../other.safetensors"]);
    fs::remove_file(folder.path.join("model-0.safetensors")).unwrap();
    fs::remove_file(folder.path.join("model-2.safetensors")).unwrap();
    write(&map);
    refused(weights(&folder.path), &["model-0.safetensors, model-2.safetensors"]);
    fs::write(&index, "{\"weight_map\": 3}").unwrap();
    refused(weights(&folder.path), &["weight_map"]);
}

#[test]
fn one_error_lists_every_tensor_that_does_not_fit() {
    let folder = folder();
    let mut tensors = weights(&folder.path).unwrap();
    tensors.remove("model.layers.1.mlp.up_proj.weight").unwrap();
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap();
    tensors.insert("model.norm.weight".into(), zeros(&[31]));
    tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), zeros(&[32]));
    // These two are let pass: a buffer of old files, and the copy of a tied embedding.
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), zeros(&[4]));
    tensors.insert("lm_head.weight".into(), zeros(&[300, 32]));
    candle_core::safetensors::save(&tensors, folder.path.join("model.safetensors")).unwrap();
    let parts = [
        "model.layers.1.mlp.up_proj.weight [48, 32] is missing",
        "model.norm.weight is [31], the configuration says [32]",
        "model.layers.0.self_attn.q_proj.bias is not of this model",
    ];
    refused(weights(&folder.path), &parts);
    let error = weights(&folder.path).unwrap_err().to_string();
    assert!(!error.contains("inv_freq") && !error.contains("lm_head"), "{error}");
}

#[test]
fn what_is_not_a_model_says_what_is() {
    let folder = folder();
    refused(ModelFiles::open("not/there/at/all"), &["is not there", "owner/name"]);
    let config = folder.path.join("config.json");
    refused(open(&config), &["is not a GGUF file"]);
    fs::remove_file(folder.path.join("tokenizer.json")).unwrap();
    refused(open(&folder.path), &["has no tokenizer.json"]);
    fs::remove_file(config).unwrap();
    fs::write(folder.path.join("x.gguf"), "").unwrap();
    refused(open(&folder.path), &["has no config.json", "x.gguf"]);
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused() {
    let folder = folder();
    let path = folder.path.join("config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json["vocab_size"] = json!(299);
    fs::write(path, json.to_string()).unwrap();
    refused(open(&folder.path), &["300 tokens", "299 rows"]);
}

/// `config.json` of the tiny model with other values; `null` takes a key away.
fn config(changes: Value) -> metal_candle::Result<ModelConfig> {
    let mut json = common::tiny::config(300, 0);
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    ModelConfig::from_value(Path::new("config.json"), &json)
}

#[test]
fn what_a_configuration_says_and_is_not_understood_is_refused_by_name() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
    let cases = [
        (json!({"model_type": "gemma3"}), "model_type 'gemma3' is not known; llama"),
        (json!({"model_type": null}), "model_type '' is not known"),
        (json!({"hidden_size": null}), "hidden_size is missing"),
        (json!({"hidden_size": -1}), "hidden_size is -1"),
        (json!({"num_hidden_layers": 1e300}), "num_hidden_layers is 1e"),
        (json!({"num_attention_heads": 0}), "num_attention_heads is 0"),
        (json!({"num_key_value_heads": 3}), "4 attention heads cannot share 3"),
        (json!({"head_dim": 7}), "head_dim is 7"),
        (json!({"rms_norm_eps": "small"}), "rms_norm_eps is \"small\""),
        (json!({"tie_word_embeddings": 1}), "tie_word_embeddings is 1"),
        (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\""),
        (json!({"logit_scale": 0.5}), "not understood, so what they change would be missed: logit_scale"),
        (json!({"rope_interleaved": true}), "rope_interleaved"),
        (json!({"num_local_experts": 8, "q_lora_rank": 4}), "num_local_experts, q_lora_rank"),
        (json!({"quantization_config": {"bits": 4}}), "quantization_config is {\"bits\":4}"),
        (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "the rotary scaling 'yarn' is not known"),
        (json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}), "the rotary scaling 'dynamic' is not known"),
        (json!({"rope_scaling": llama3}), "'llama3' lacks one of its numbers"),
        (json!({"rope_scaling": "linear"}), "the rotary scaling is \"linear\""),
        (json!({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}}), "of the rotary scaling: mscale"),
        (json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}), "partial_rotary_factor"),
        (json!({"sliding_window": 8}), "sliding_window is 8, which llama does not have"),
        (json!({"model_type": "mistral", "sliding_window": "wide"}), "sliding_window is \"wide\""),
        (json!({"layer_types": ["full_attention", "linear_attention"]}), "layer_types has \"linear_attention\""),
    ];
    config(json!({"bos_token_id": 1, "sliding_window": null, "pretraining_tp": 1, "rope_interleaved": false})).unwrap();
    for (changes, part) in cases {
        refused(config(changes), &["config.json", part]);
    }
    // All at once.
    let all = json!({"hidden_size": 0, "hidden_act": "gelu", "logit_scale": 2.0, "rope_scaling": {"type": "yarn"}});
    refused(config(all), &["hidden_size is 0", "hidden_act", "logit_scale", "yarn"]);
}

#[test]
fn a_sliding_window_holds_for_the_layers_that_have_it() {
    let mistral = config(json!({"model_type": "mistral", "sliding_window": 8})).unwrap();
    assert_eq!((mistral.sliding_window, mistral.sliding_window_from_layer), (Some(8), 0));
    let qwen = |changes: Value| {
        let mut all = json!({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1});
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config(all)
    };
    assert_eq!(qwen(json!({})).unwrap().sliding_window, None);
    let used = qwen(json!({"use_sliding_window": true})).unwrap();
    assert_eq!((used.sliding_window, used.sliding_window_from_layer), (Some(8), 1));
    let types = json!({"use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention"]});
    refused(qwen(types), &["layer_types mixes"]);
}
