//! `fuse --export-gguf`: what is written is what was there, of every family, tokenizer and type. `scripts/check-llama-cpp.sh` lets
//! llama.cpp read such files.
#![allow(missing_docs)]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value as Gguf};
use candle_core::{DType, Device, Tensor};
use common::{f64s, relative_error, tiny};
use metal_candle::models::decoder::{Batch, Decoder};
use metal_candle::models::gguf::export::FileType;
use metal_candle::models::{Message, ModelConfig, ModelFiles, RopeScaling};
use metal_candle::training::adapter::AdapterFile;
use metal_candle::training::fuse::{Fused, export_gguf};
use serde_json::{Value, json};

const TEMPLATE: &str =
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn open(path: &Path) -> ModelFiles {
    ModelFiles::open(path.to_str().unwrap()).unwrap()
}

fn logits(model: &ModelFiles, adapter: Option<&AdapterFile>) -> Vec<f64> {
    let weights = model.weights(DType::F32, &Device::Cpu).unwrap();
    let mut decoder = Decoder::new(&model.config, weights, &Device::Cpu).unwrap();
    if let Some(adapter) = adapter {
        adapter.attach(&mut decoder, &Device::Cpu).unwrap();
    }
    let tokens: Vec<u32> = (3..40).map(|i| i * 37 % model.config.vocab_size as u32).collect();
    let batch = Batch { targets: tokens.clone(), lengths: vec![tokens.len()], tokens };
    f64s(&decoder.logits(&batch).unwrap())
}

/// A tiny model of a folder with a chat template, its weights rounded to `dtype`.
fn write_model(folder: &Path, dtype: DType, change: impl FnOnce(&mut Value)) {
    tiny::write_model_with(folder, 7, change);
    let path = folder.join("model.safetensors");
    let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let rounded: HashMap<String, Tensor> =
        tensors.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(dtype).unwrap())).collect();
    candle_core::safetensors::save(&rounded, &path).unwrap();
    let config = json!({"eos_token": tiny::EOS, "chat_template": TEMPLATE, "pad_token": {"content": tiny::EOS}});
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
}

fn export(model: &ModelFiles, to: FileType, path: &Path) -> metal_candle::Result<Fused> {
    export_gguf(model, None, to, path)
}

/// The file as Candle reads it.
fn content(path: &Path) -> Content {
    Content::read(&mut File::open(path).unwrap()).unwrap()
}

fn dtypes(content: &Content) -> BTreeMap<String, GgmlDType> {
    content.tensor_infos.iter().map(|(name, info)| (name.clone(), info.ggml_dtype)).collect()
}

/// Changes of the tiny model's configuration that make a family or a variant of one.
fn families() -> Vec<(&'static str, Value)> {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32});
    vec![
        ("llama, tied", json!({})),
        ("llama of 3.1", json!({"rope_scaling": llama3, "tie_word_embeddings": false, "rope_theta": 500000.0})),
        (
            "llama with biases",
            json!({"attention_bias": true, "mlp_bias": true, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ),
        ("mistral", json!({"model_type": "mistral", "sliding_window": 5, "tie_word_embeddings": false})),
        ("qwen2", json!({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": false})),
        ("qwen3", json!({"model_type": "qwen3", "head_dim": 12, "rms_norm_eps": 1e-6})),
        // Rows of the embedding that have no token.
        ("padded", json!({"vocab_size": 320})),
    ]
}

#[test]
fn every_family_comes_back_the_same() {
    let place = tempfile::tempdir().unwrap();
    for (name, changes) in families() {
        for (to, dtype) in [(FileType::F16, DType::F16), (FileType::Bf16, DType::BF16)] {
            let folder = place.path().join("model");
            write_model(&folder, dtype, |config| {
                config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            });
            let (model, path) = (open(&folder), place.path().join("model.gguf"));
            let fused = export(&model, to, &path).unwrap();
            let found = open(&path);
            let plain = |config: &ModelConfig| ModelConfig { rope_scaling: RopeScaling::None, ..config.clone() };
            assert_eq!(plain(&found.config), plain(&model.config), "{name}");
            let freqs = |config: &ModelConfig| config.inv_freq().iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            assert!(relative_error(&freqs(&found.config), &freqs(&model.config)) < 1e-6, "{name}");
            // Every value was of the file's type before: only divisors of rotary frequencies are rounded.
            let error = relative_error(&logits(&found, None), &logits(&model, None));
            assert!(error < 1e-6 && fused.difference < 1e-6, "{name}: {error:.1e}, {:.1e}", fused.difference);
            for (tensor, stored) in dtypes(&content(&path)) {
                let vector = tensor.contains("norm") || tensor.ends_with("bias") || tensor.contains("rope_freqs");
                let want = if dtype == DType::F16 { GgmlDType::F16 } else { GgmlDType::BF16 };
                assert_eq!(stored, if vector { GgmlDType::F32 } else { want }, "{name}: {tensor}");
            }
            let text = "row 12 of the data\n has \t the value <|end|> é";
            let tokens = |model: &ModelFiles| model.tokenizer.encode(text, true).unwrap();
            assert_eq!(tokens(&found), tokens(&model));
            assert_eq!(found.tokenizer.stop_tokens(), model.tokenizer.stop_tokens());
            let message = Message::new("user", "hi");
            let chat =
                |model: &ModelFiles| model.tokenizer.render_chat(std::slice::from_ref(&message), None, true).unwrap();
            assert_eq!(chat(&found), chat(&model));
            assert_eq!(fused.notes.iter().any(|note| note.contains("sliding window of 5")), name == "mistral");
        }
    }
}

#[test]
fn keys_are_llama_cpps() {
    let place = tempfile::tempdir().unwrap();
    let (folder, path) = (place.path().join("Some-Model"), place.path().join("x.gguf"));
    write_model(&folder, DType::F32, |config| config["vocab_size"] = 310.into());
    export(&open(&folder), FileType::Q8_0, &path).unwrap();
    let keys = content(&path).metadata;
    let number = |key: &str| match &keys[key] {
        Gguf::U32(value) => *value,
        other => panic!("{key} is {other:?}"),
    };
    let numbers = [
        ("llama.block_count", 2),
        ("llama.context_length", 256),
        ("llama.embedding_length", 32),
        ("llama.feed_forward_length", 48),
        ("llama.attention.head_count", 4),
        ("llama.attention.head_count_kv", 2),
        ("llama.attention.key_length", 8),
        ("llama.attention.value_length", 8),
        ("llama.rope.dimension_count", 8),
        ("llama.vocab_size", 310),
        ("general.file_type", 7),
        ("general.quantization_version", 2),
        ("tokenizer.ggml.padding_token_id", number("tokenizer.ggml.eos_token_id")),
    ];
    for (key, want) in numbers {
        assert_eq!(number(key), want, "{key}");
    }
    let text = |key: &str| keys[key].to_string().unwrap().clone();
    assert_eq!(text("general.architecture"), "llama");
    assert_eq!(text("general.name"), "Some-Model");
    assert_eq!((text("tokenizer.ggml.model"), text("tokenizer.ggml.pre")), ("gpt2".into(), "gpt-2".into()));
    assert_eq!(text("tokenizer.chat_template"), TEMPLATE);
    assert!(matches!(keys["tokenizer.ggml.add_bos_token"], Gguf::Bool(false)));
    assert!(matches!(keys["llama.rope.freq_base"], Gguf::F32(10000.0)));
    let named = json!([{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "x"}]);
    edited(&folder, "tokenizer_config.json", |json| json["chat_template"] = named);
    let fused = export(&open(&folder), FileType::Q8_0, &path).unwrap();
    assert!(fused.notes.iter().any(|note| note.contains("not tools")), "{:?}", fused.notes);
    assert_eq!(content(&path).metadata["tokenizer.chat_template"].to_string().unwrap(), TEMPLATE);
    let list = |key: &str| keys[key].to_vec().unwrap().clone();
    let (tokens, kinds) = (list("tokenizer.ggml.tokens"), list("tokenizer.ggml.token_type"));
    assert_eq!((tokens.len(), kinds.len()), (310, 310));
    let eos = number("tokenizer.ggml.eos_token_id") as usize;
    let at = |id: usize| (tokens[id].to_string().unwrap().as_str(), kinds[id].to_i32().unwrap());
    assert_eq!((at(eos), at(309)), ((tiny::EOS, 3), ("[PAD309]", 5)));
    assert_eq!(at(eos + 1).1, 1);
}

#[test]
fn rows_that_fit_no_block_are_in_another_kind_and_that_is_said() {
    let place = tempfile::tempdir().unwrap();
    let (folder, path) = (place.path().join("model"), place.path().join("x.gguf"));
    let quantized = |to: FileType, changes: Value| {
        write_model(&folder, DType::F32, |config| {
            config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        });
        let fused = export(&open(&folder), to, &path).unwrap();
        (dtypes(&content(&path)), fused)
    };
    // Rows of 32, but those of down are 48.
    let (found, fused) = quantized(FileType::Q8_0, json!({}));
    assert_eq!((found["blk.0.attn_q.weight"], found["token_embd.weight"]), (GgmlDType::Q8_0, GgmlDType::Q8_0));
    assert_eq!((found["blk.1.ffn_down.weight"], found["blk.1.ffn_norm.weight"]), (GgmlDType::F16, GgmlDType::F32));
    assert!(fused.notes[0].contains("of 15 matrices 2 are f16"), "{:?}", fused.notes);
    assert!(fused.difference > 1e-5 && fused.difference < 0.1, "{}", fused.difference);

    let wide = json!({"hidden_size": 256, "intermediate_size": 96, "tie_word_embeddings": false});
    let (found, fused) = quantized(FileType::Q4K, wide);
    assert_eq!((found["output.weight"], found["token_embd.weight"]), (GgmlDType::Q6K, GgmlDType::Q4K));
    assert_eq!((found["blk.0.attn_q.weight"], found["blk.0.ffn_down.weight"]), (GgmlDType::Q4K, GgmlDType::Q8_0));
    assert!(fused.notes[0].contains("of 16 matrices 2 are q8_0"), "{:?}", fused.notes);
    let (found, fused) = quantized(FileType::Q4K, json!({"hidden_size": 256, "intermediate_size": 256}));
    assert_eq!(found["token_embd.weight"], GgmlDType::Q6K);
    assert!(fused.notes.is_empty(), "{:?}", fused.notes);
    let written = open(&path).weights(DType::F32, &Device::Cpu).unwrap();
    for (name, tensor) in open(&folder).weights(DType::F32, &Device::Cpu).unwrap() {
        // Half a step of 4 bits over a block's range, and the rounding of scales and minima.
        let error = relative_error(&f64s(&written[&name]), &f64s(&tensor));
        assert!(error < 0.1, "{name}: {error:.3}");
        assert_eq!(error > 0.04, !name.contains("norm") && !name.contains("embed"), "{name}: {error:.3}");
    }
}

/// A folder with a model of a GGUF file, the tokenizer as `tokenizer.json`.
fn as_folder(file: &Path, folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let model = open(file);
    let c = &model.config;
    let config = json!({"model_type": c.model_type, "vocab_size": c.vocab_size, "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim, "rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_position_embeddings, "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_ids});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("tokenizer.json"), model.tokenizer.to_json().unwrap()).unwrap();
    let weights = model.weights(DType::F32, &Device::Cpu).unwrap();
    candle_core::safetensors::save(&weights, folder.join("model.safetensors")).unwrap();
}

/// From a file of llama.cpp's own writer to `tokenizer.json` and back: the same keys, and llama.cpp's tokens.
#[test]
fn tokenizers_come_back_the_same() {
    let expected: Value = serde_json::from_slice(&fs::read(fixtures().join("gguf/tokenizers.json")).unwrap()).unwrap();
    let place = tempfile::tempdir().unwrap();
    for kind in ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "spm"] {
        let (file, folder) = (fixtures().join(format!("gguf/tokenizer-{kind}.gguf")), place.path().join(kind));
        as_folder(&file, &folder);
        let path = place.path().join(format!("{kind}.gguf"));
        let notes = export(&open(&folder), FileType::F16, &path).unwrap().notes;
        assert!(notes.is_empty(), "{notes:?}");
        let (before, after) = (content(&file).metadata, content(&path).metadata);
        for key in ["model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"] {
            let key = format!("tokenizer.ggml.{key}");
            assert_eq!(format!("{:?}", before.get(&key)), format!("{:?}", after.get(&key)), "{kind}: {key}");
        }
        let written = open(&path);
        for (text, want) in expected["texts"]
            .as_array()
            .unwrap()
            .iter()
            .zip(expected["tokens"][kind]["llama.cpp, special added"].as_array().unwrap())
        {
            let want: Option<Vec<u32>> = serde_json::from_value(want.clone()).unwrap();
            let got = written.tokenizer.encode(text.as_str().unwrap(), true).unwrap();
            assert!(want.is_none_or(|want| got == want), "{kind}: {text}");
        }
    }
}

/// The other form that tokenizers of SentencePiece's kind have.
#[test]
fn a_metaspace_is_carried() {
    let place = tempfile::tempdir().unwrap();
    let (folder, path) = (place.path().join("model"), place.path().join("x.gguf"));
    for (scheme, prefix, said) in [("always", true, true), ("first", true, true), ("never", false, false)] {
        as_folder(&fixtures().join("gguf/tokenizer-spm.gguf"), &folder);
        edited(&folder, "tokenizer.json", |json| {
            json["normalizer"] = Value::Null;
            json["pre_tokenizer"] =
                json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
        });
        let model = open(&folder);
        let fused = export(&model, FileType::F16, &path).unwrap();
        assert_eq!(fused.notes.iter().any(|note| note.contains("after special tokens")), said, "{:?}", fused.notes);
        let keys = content(&path).metadata;
        assert!(matches!(keys["tokenizer.ggml.add_space_prefix"], Gguf::Bool(value) if value == prefix));
        let tokens = |model: &ModelFiles| model.tokenizer.encode("Hello  world 1234 é", true).unwrap();
        assert_eq!(tokens(&open(&path)), tokens(&model), "{scheme}");
    }
}

fn edited(folder: &Path, file: &str, edit: impl FnOnce(&mut Value)) {
    let path = folder.join(file);
    let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut json);
    fs::write(&path, json.to_string()).unwrap();
}

#[test]
fn what_gguf_cannot_say_is_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let (folder, path) = (place.path().join("model"), place.path().join("x.gguf"));
    let refused = |edit: fn(&mut Value), words: &[&str]| {
        write_model(&folder, DType::F32, |_| ());
        edited(&folder, "tokenizer.json", edit);
        let error = export(&open(&folder), FileType::F16, &path).unwrap_err().to_string();
        for word in words.iter().chain(&["tokenizer.json", "cannot be said in GGUF"]) {
            assert!(error.contains(word), "'{word}' is not in: {error}");
        }
        assert!(!path.exists() && fs::read_dir(place.path()).unwrap().count() == 1);
    };
    refused(|json| json["model"]["end_of_word_suffix"] = "</w>".into(), &["end_of_word_suffix", "</w>"]);
    refused(
        |json| {
            json["added_tokens"][0]["lstrip"] = true.into();
            json["normalizer"] = json!({"type": "Lowercase"});
        },
        &["<|end|>", "lstrip", "Lowercase"],
    );
    refused(|json| json["pre_tokenizer"]["add_prefix_space"] = true.into(), &["pre_tokenizer", "add_prefix_space"]);
    refused(
        |json| {
            let split = json!({"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": false});
            let bytes =
                json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": false, "trim_offsets": true});
            json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [split, bytes]});
        },
        &["x+", "llama-bpe, qwen2"],
    );
    refused(
        |json| json["model"] = json!({"type": "WordLevel", "vocab": {"<|end|>": 0, "a": 1}, "unk_token": "a"}),
        &["WordLevel"],
    );

    write_model(&folder, DType::F32, |config| {
        config["model_type"] = "qwen2".into();
        config["sliding_window"] = 5.into();
        config["use_sliding_window"] = true.into();
        config["max_window_layers"] = 1.into();
    });
    let error = export(&open(&folder), FileType::F16, &path).unwrap_err().to_string();
    assert!(error.contains("window of 5 from layer 1") && error.contains("use_sliding_window"), "{error}");

    write_model(&folder, DType::F32, |_| ());
    let weights = folder.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&weights, &Device::Cpu).unwrap();
    let name = "model.layers.1.self_attn.v_proj.weight";
    tensors.insert(name.into(), (&tensors[name] * 1e6).unwrap());
    candle_core::safetensors::save(&tensors, &weights).unwrap();
    let error = export(&open(&folder), FileType::F16, &path).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("bf16 holds it"), "{error}");
    assert!(!path.exists());
    export(&open(&folder), FileType::Bf16, &path).unwrap();
}

#[test]
fn from_a_gguf_file_keys_are_carried_and_blocks_stay() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("x.gguf");
    // An adapter on some linears, the base's q and k in llama.cpp's order.
    let (file, adapter) = (fixtures().join("gguf/llama.gguf"), fixtures().join("llama/adapter"));
    let (model, adapter) = (open(&file), AdapterFile::load(&adapter).unwrap());
    let fused = export_gguf(&model, Some(&adapter), FileType::Bf16, &path).unwrap();
    let want = logits(&model, Some(&adapter));
    assert!(relative_error(&logits(&open(&path), None), &want) < 0.02, "{}", fused.difference);
    assert!(relative_error(&logits(&model, None), &want) > 0.05);
    let (before, after) = (content(&file), content(&path));
    for (key, value) in &before.metadata {
        assert_eq!(format!("{value:?}"), format!("{:?}", after.metadata[key]), "{key}");
    }
    assert!(matches!(after.metadata["general.file_type"], Gguf::U32(32)));
    assert!(!after.metadata.contains_key("general.quantization_version") && fused.rounding.is_none());
    assert!(after.tensor_infos.contains_key("rope_freqs.weight"));

    let file = fixtures().join("gguf/quants.gguf");
    export(&open(&file), FileType::Q8_0, &path).unwrap();
    let (before, after) = (content(&file), content(&path));
    for name in ["token_embd.weight", "blk.1.ffn_up.weight"] {
        let data = |content: &Content, file: &Path| {
            let tensor = content.tensor(&mut File::open(file).unwrap(), name, &Device::Cpu).unwrap();
            (tensor.dtype(), tensor.data().unwrap().into_owned())
        };
        assert_eq!(data(&before, &file), data(&after, &path), "{name}");
        assert_eq!(data(&after, &path).0, GgmlDType::Q8_0);
    }
}
