//! GGUF files say the same here as in llama.cpp, transformers and sentencepiece: values, logits, tokens, templates.
//!
//! `tests/fixtures/make_gguf.py` wrote what is compared with. Tests of the real SmolLM2-135M-Instruct need
//! `scripts/fetch-test-models.sh` to have been run and say so when they are skipped.
#![allow(missing_docs)]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use metal_candle::backend::custom_ops::dequantize;
use metal_candle::backend::quantized::Quantize;
use metal_candle::inference::KvCache;
use metal_candle::models::decoder::{Batch, Decoder};
use metal_candle::models::linear::BaseWeight;
use metal_candle::models::{Holding, Message, ModelConfig, ModelFiles, RopeScaling, weights};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn open(path: &Path) -> ModelFiles {
    ModelFiles::open(path.to_str().unwrap()).unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn logits<W: Into<BaseWeight>>(config: &ModelConfig, weights: HashMap<String, W>, tokens: &[u32]) -> Vec<f64> {
    let decoder = Decoder::new(config, weights, &Device::Cpu).unwrap();
    let batch = Batch { tokens: tokens.to_vec(), targets: vec![0; tokens.len()], lengths: vec![tokens.len()] };
    common::f64s(&decoder.logits(&batch).unwrap())
}

/// The same weights in both forms give the same logits: names, shapes, the permutation of q and k, rotary scaling and the
/// window all came through.
#[test]
fn a_model_in_gguf_computes_as_its_folder_does() {
    for family in ["llama", "llama_linear", "mistral", "qwen2", "qwen3"] {
        let folder = fixtures().join(family);
        let mut config = ModelConfig::from_json(&folder.join("config.json")).unwrap();
        if family == "qwen2" {
            // GGUF cannot say which layers of a Qwen have the window.
            config.sliding_window = None;
        }
        let model = open(&fixtures().join(format!("gguf/{family}.gguf")));
        assert_eq!(model.config.model_type, config.model_type);
        assert_eq!(model.config.sliding_window, config.sliding_window, "{family}");
        assert_eq!(model.config.rms_norm_eps, config.rms_norm_eps, "{family}");
        let tokens: Vec<u32> = (3..40).map(|i| i * 37 % 101).collect();
        let want = logits(
            &config,
            weights::load(&folder, &config, &Holding::dense(DType::F32), &Device::Cpu).unwrap(),
            &tokens,
        );
        let got = logits(&model.config, model.weights(DType::F32, &Device::Cpu).unwrap(), &tokens);
        let error = common::relative_error(&got, &want);
        // The divisors of rotary frequencies are stored in f32.
        assert!(error < 1e-5, "{family}: logits differ by {error:.1e}");
    }
    assert!(matches!(open(&fixtures().join("gguf/llama.gguf")).config.rope_scaling, RopeScaling::Divisors(_)));
}

#[test]
fn stored_values_are_dequantized_as_the_gguf_package_does_it() {
    let model = open(&fixtures().join("gguf/quants.gguf"));
    let want = candle_core::safetensors::load(fixtures().join("gguf/quants.safetensors"), &Device::Cpu).unwrap();
    for dtype in common::FLOATS {
        let got = model.weights(dtype, &Device::Cpu).unwrap();
        assert_eq!(got.len(), want.len());
        for (name, want) in &want {
            assert_eq!(got[name].dtype(), dtype);
            let want = common::f64s(&want.to_dtype(dtype).unwrap());
            common::assert_within(
                name,
                &got[name],
                &want,
                if dtype == DType::F32 { 1e-6 } else { common::tolerance(dtype) },
            );
        }
    }
}

/// Blocks as they lie in the file; the kinds that are not computed with come dense.
#[test]
fn blocks_that_stay_as_they_are_hold_the_same_values() {
    let model = open(&fixtures().join("gguf/quants.gguf"));
    let want = candle_core::safetensors::load(fixtures().join("gguf/quants.safetensors"), &Device::Cpu).unwrap();
    let holding = model.holding(Quantize::Auto, DType::F32, &Device::Cpu).unwrap();
    let mut kept = std::collections::BTreeSet::new();
    for (name, weight) in model.base(&holding, &Device::Cpu).unwrap() {
        let values = match weight {
            BaseWeight::Dense(parameter) => parameter.value,
            BaseWeight::Quantized(blocks) => {
                kept.insert(blocks.kind().name());
                dequantize(&blocks, DType::F32).unwrap()
            }
        };
        common::assert_within(&name, &values, &common::f64s(&want[&name]), 1e-6);
    }
    assert_eq!(kept.into_iter().collect::<Vec<_>>(), ["q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"]);
}

#[test]
fn tokenizers_agree_with_llama_cpp_and_the_models_own() {
    let expected = json(&fixtures().join("gguf/tokenizers.json"));
    let texts = expected["texts"].as_array().unwrap();
    let mut compared = 0;
    let mut wrong = Vec::new();
    for (kind, peers) in expected["tokens"].as_object().unwrap() {
        let model = open(&fixtures().join(format!("gguf/tokenizer-{kind}.gguf")));
        for (peer, lists) in peers.as_object().unwrap() {
            for (text, want) in texts.iter().zip(lists.as_array().unwrap()).filter(|(_, want)| !want.is_null()) {
                let (text, want) = (text.as_str().unwrap(), ids(want));
                let got = model.tokenizer.encode(text, peer.contains("special added")).unwrap();
                if got != want {
                    let show = |ids: &[u32]| {
                        ids.iter().map(|&id| model.tokenizer.decode(&[id], false).unwrap()).collect::<Vec<_>>()
                    };
                    wrong.push(format!("{kind}, {peer}: {text:?}\n  ours {:?}\n  peer {:?}", show(&got), show(&want)));
                }
                compared += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {compared} differ:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn text_survives_the_tokenizer() {
    let texts = json(&fixtures().join("gguf/tokenizers.json"));
    for kind in ["gpt-2", "smollm", "llama-bpe", "tekken", "default", "spm"] {
        let tokenizer = open(&fixtures().join(format!("gguf/tokenizer-{kind}.gguf"))).tokenizer;
        for text in texts["texts"].as_array().unwrap() {
            let text = text.as_str().unwrap();
            let back = tokenizer.decode(&tokenizer.encode(text, false).unwrap(), false).unwrap();
            // SentencePiece's dummy space stands before the text after each special token too.
            if kind != "spm" || !text.contains('<') {
                assert_eq!(back, text, "{kind}");
            }
        }
    }
}

/// A fixture's bytes with more pairs of keys and values (a kind's number, then its bytes) put before its own.
fn with_pairs(name: &str, pairs: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let text = |text: &[u8]| [&(text.len() as u64).to_le_bytes()[..], text].concat();
    let mut added: Vec<u8> = Vec::new();
    for (key, kind, value) in pairs {
        added.extend(text(key.as_bytes()));
        added.extend(kind.to_le_bytes());
        added.extend(if *kind == STRING { text(value) } else { value.to_vec() });
    }
    // The tensors' data is aligned to 32 bytes: a last pair fills up.
    let filler = "general.filler";
    let fill = (added.len() + 8 + filler.len() + 4 + 8).next_multiple_of(32) - (added.len() + 8 + filler.len() + 4 + 8);
    added.extend(text(filler.as_bytes()));
    added.extend(STRING.to_le_bytes());
    added.extend(text(&vec![b'x'; fill]));
    let mut file = std::fs::read(fixtures().join("gguf").join(name)).unwrap();
    let count = u64::from_le_bytes(file[16..24].try_into().unwrap()) + pairs.len() as u64 + 1;
    file[16..24].copy_from_slice(&count.to_le_bytes());
    file.splice(24..24, added);
    file
}

const U32: u32 = 4;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;

fn open_bytes(bytes: &[u8]) -> metal_candle::Result<ModelFiles> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let model = ModelFiles::open(file.path().to_str().unwrap())?;
    model.weights(DType::F32, &Device::Cpu)?;
    Ok(model)
}

#[track_caller]
fn refused(bytes: &[u8], parts: &[&str]) {
    let Err(error) = open_bytes(bytes) else { panic!("taken, though it should be refused for {parts:?}") };
    let error = error.to_string();
    for part in parts {
        assert!(error.contains(part), "'{part}' is not in: {error}");
    }
}

#[test]
fn what_a_file_says_and_is_not_understood_is_refused_by_name() {
    let one = 1u32.to_le_bytes();
    let two = 2.0f32.to_le_bytes();
    let with = |pairs: &[(&str, u32, &[u8])]| with_pairs("quants.gguf", pairs);
    let model = open_bytes(&with(&[("general.anything", U32, &one), ("qwen3.expert_count", U32, &[0; 4])])).unwrap();
    assert_eq!(model.config.rope_scaling, RopeScaling::None);
    let model = open_bytes(&with(&[("qwen3.rope.scaling.factor", F32, &two)])).unwrap();
    assert_eq!(model.config.rope_scaling, RopeScaling::Linear { factor: 2.0 });

    refused(&with(&[("qwen3.expert_count", U32, &one)]), &["would be missed: qwen3.expert_count"]);
    refused(&with(&[("qwen3.rope.scaling.type", STRING, b"yarn")]), &["qwen3.rope.scaling.type is 'yarn'"]);
    refused(&with(&[("qwen3.attention.sliding_window", U32, &one)]), &["qwen3.attention.sliding_window is 1"]);
    refused(&with(&[("qwen3.attention.causal", BOOL, &[0])]), &["qwen3.attention.causal is false"]);
    refused(&with(&[("general.type", STRING, b"adapter")]), &["general.type is 'adapter'"]);
    refused(&with(&[("split.count", U32, &3u32.to_le_bytes())]), &["one of 3 parts", "--merge"]);
    refused(&with(&[("tokenizer.ggml.magic", U32, &one)]), &["tokenizer.ggml.magic"]);
    refused(&with(&[("general.architecture", STRING, b"llama")]), &["general.architecture twice"]);
    let many: &[(&str, u32, &[u8])] = &[
        ("qwen3.logit_scale", F32, &two),
        ("qwen3.expert_count", U32, &one),
        ("qwen3.rope.scaling.type", STRING, b"longrope"),
    ];
    refused(&with(many), &["qwen3.logit_scale", "qwen3.expert_count", "longrope"]);

    // The same length: other bytes in place.
    let file = std::fs::read(fixtures().join("gguf/quants.gguf")).unwrap();
    let replaced = |old: &[u8], new: &[u8]| {
        let mut file = file.clone();
        let places: Vec<usize> = (0..file.len() - old.len()).filter(|&at| &file[at..at + old.len()] == old).collect();
        assert!(!places.is_empty() && old.len() == new.len());
        places.iter().for_each(|&at| file[at..at + old.len()].copy_from_slice(new));
        file
    };
    refused(&replaced(b"qwen3", b"gemma"), &["general.architecture 'gemma' is not known", "qwen2"]);
    refused(&replaced(b"gpt-2", b"gpt-9"), &["tokenizer.ggml.pre 'gpt-9' is not known", "smollm"]);
    refused(
        &replaced(b"attn_q.weight", b"attn_x.weight"),
        &["blk.0.attn_q.weight [8, 256] is missing", "blk.1.attn_x.weight is not"],
    );
    refused(&replaced(b"GGUF\x03", b"GGUF\x01"), &["GGUF version 1"]);
    refused(&replaced(b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03"), &["big-endian"]);
    // A kind of quantization that is not read: Q8_0 becomes IQ4_NL.
    let mut kind = b"token_embd.weight\x02\0\0\0".to_vec();
    kind.extend([256u64.to_le_bytes(), 8u64.to_le_bytes()].concat());
    let (old, new) = ([&kind[..], &[8, 0, 0, 0]].concat(), [&kind[..], &[20, 0, 0, 0]].concat());
    refused(&replaced(&old, &new), &["token_embd.weight (IQ4_NL)", "Q2_K to Q6_K are read"]);
}

#[test]
fn a_model_from_gguf_is_not_written_out_as_a_folder() {
    let model = open(&fixtures().join("gguf/llama.gguf"));
    let weights = model.weights(DType::F32, &Device::Cpu).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for result in [model.check_can_save(), model.save_with_weights(weights, folder.path())] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("llama.gguf") && error.contains("adapter"), "{error}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// The path of a model that `scripts/fetch-test-models.sh` brings.
fn smollm2() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    if path.exists() {
        return Some(path);
    }
    eprintln!("SKIPPED: {} is not there; scripts/fetch-test-models.sh brings it", path.display());
    None
}

#[test]
fn smollm2_tokenizes_renders_and_answers_as_llama_cpp_and_transformers_do() {
    let Some(path) = smollm2() else { return };
    let expected = json(&fixtures().join("smollm2.json"));
    let model = open(&path);
    assert_eq!((model.config.num_layers, model.config.vocab_size), (30, 49152));
    assert_eq!(model.tokenizer.eos_token(), Some((2, "<|im_end|>")));
    for (text, want) in expected["texts"].as_array().unwrap().iter().zip(expected["tokens"].as_array().unwrap()) {
        let text = text.as_str().unwrap();
        assert_eq!(model.tokenizer.encode(text, false).unwrap(), ids(want), "{text:?}");
    }
    let weights = model.weights(DType::F32, &Device::Cpu).unwrap();
    let decoder = Decoder::new(&model.config, weights, &Device::Cpu).unwrap();
    for chat in expected["chats"].as_array().unwrap() {
        let messages: Vec<Message> = serde_json::from_value(chat["messages"].clone()).unwrap();
        let text = model.tokenizer.render_chat(&messages, None, true).unwrap();
        assert_eq!(text, chat["text"].as_str().unwrap());
        let tokens = model.tokenizer.encode(&text, false).unwrap();
        assert_eq!(tokens, ids(&chat["tokens"]));

        let batch = Batch { targets: vec![0; tokens.len()], lengths: vec![tokens.len()], tokens: tokens.clone() };
        let rows: Vec<Vec<f32>> = decoder.logits(&batch).unwrap().to_vec2().unwrap();
        assert_eq!(rows.iter().map(|row| best(row)).collect::<Vec<_>>(), ids(&chat["best"]));
        let last = &rows[rows.len() - 1];
        let hundredths: Vec<f64> = last.iter().step_by(100).map(|&logit| logit as f64).collect();
        let want: Vec<f64> = serde_json::from_value(chat["hundredths"].clone()).unwrap();
        let error = common::relative_error(&hundredths, &want);
        let norm = last.iter().map(|&logit| (logit as f64).powi(2)).sum::<f64>().sqrt();
        println!("logits within {error:.1e} of transformers, norm {norm:.4} against {}", chat["norm"]);
        assert!(error < 1e-4, "logits differ by {error:.1e}");
        assert!((norm / chat["norm"].as_f64().unwrap() - 1.0).abs() < 1e-4);

        let mut cache = KvCache::new(&model.config, DType::F32, &Device::Cpu).unwrap();
        let (mut answer, mut next) = (Vec::new(), tokens);
        for _ in 0..ids(&chat["answer"]).len() {
            let logits: Vec<f32> = decoder.forward_cached(&next, &mut cache).unwrap().to_vec1().unwrap();
            next = vec![best(&logits)];
            answer.push(next[0]);
        }
        assert_eq!(answer, ids(&chat["answer"]), "{:?}", model.tokenizer.decode(&answer, false));
    }
}

fn best(logits: &[f32]) -> u32 {
    let best = logits
        .iter()
        .enumerate()
        .fold((0, f32::MIN), |best, (id, &logit)| if logit > best.1 { (id, logit) } else { best });
    best.0 as u32
}
