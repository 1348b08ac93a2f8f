//! Models that bitsandbytes and MLX quantized: their own logits, stay quantized, train. Fixtures: tests/fixtures/make_quantized.py.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::path::PathBuf;

use candle_core::{DType, Device};
use common::{f64s, relative_error};
use metal_candle::backend::quantized::{Kind, Quantize};
use metal_candle::models::decoder::{Batch, Decoder};
use metal_candle::models::{Holding, ModelConfig, weights};
use serde_json::Value;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized").join(name)
}

fn config(name: &str) -> ModelConfig {
    ModelConfig::from_json(&folder(name).join("config.json")).unwrap()
}

fn decoder(name: &str, holding: &Holding) -> Decoder {
    let weights = weights::load(&folder(name), &config(name), holding, &Device::Cpu).unwrap();
    Decoder::new(&config(name), weights, &Device::Cpu).unwrap()
}

/// The largest difference of our logits from the library's, relative to the largest of them.
fn error(name: &str, decoder: &Decoder) -> f64 {
    let text = fs::read_to_string(folder(name).join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let row: Vec<u32> = serde_json::from_value(expected["row"].clone()).unwrap();
    let logits: Vec<Vec<f64>> = serde_json::from_value(expected["logits"].clone()).unwrap();
    let batch = Batch { lengths: vec![row.len()], targets: vec![0; row.len()], tokens: row };
    relative_error(&f64s(&decoder.logits(&batch).unwrap()), &logits.concat())
}

#[test]
fn logits_are_those_of_the_libraries() {
    for (name, kind, count) in [
        ("nf4", Kind::Nf4, 14),
        ("nf4_single", Kind::Nf4, 14),
        // Embedding and output projection too; scales of f16 make llama.cpp's Q4_1, those of bf16 do not fit it.
        ("mlx4", Kind::Affine4, 16),
        ("mlx8", Kind::Affine8, 16),
    ] {
        let kinds = weights::kinds(&folder(name), &config(name)).unwrap();
        assert!(kinds.len() == count && kinds.values().all(|held| *held == kind), "{name}: {kinds:?}");
        let as_it_is = decoder(name, &Holding { dtype: DType::F32, kinds });
        assert_eq!(as_it_is.quantized().len(), count);
        let dense = decoder(name, &Holding::dense(DType::F32));
        assert!(dense.quantized().is_empty());
        for (how, decoder) in [("as it is", &as_it_is), ("dequantized", &dense)] {
            let error = error(name, decoder);
            println!("{name} {how}: {error:.1e}");
            assert!(error < 1e-5, "{name} {how}: {error:e}");
        }
        let other = Holding::linears(&config(name), Quantize::Q8_0, DType::F32);
        let requantized = decoder(name, &other);
        assert_eq!(requantized.quantized().len(), 14);
        let error = error(name, &requantized);
        assert!(error < 6e-2, "{name} as q8_0: {error:e}");
    }
}

#[test]
fn other_forms_are_refused_by_name() {
    let place = tempfile::tempdir().unwrap();
    let bytes = fs::read(folder("nf4/model.safetensors")).unwrap();
    // The same length, so that the header stays whole.
    let text = |from: &[u8], to: &[u8]| {
        let mut bytes = bytes.clone();
        let mut at = 0;
        while let Some(found) = bytes[at..].windows(from.len()).position(|window| window == from) {
            bytes[at + found..][..to.len()].copy_from_slice(to);
            at += found + to.len();
        }
        fs::write(place.path().join("model.safetensors"), bytes).unwrap();
        weights::load(place.path(), &config("nf4"), &Holding::dense(DType::F32), &Device::Cpu)
            .err()
            .unwrap()
            .to_string()
    };
    let error = text(b"bitsandbytes__nf4", b"bitsandbytes__fp4");
    assert!(
        error.contains("fp4") && error.contains("layers.0.self_attn.q_proj") && error.contains("layers.1"),
        "{error}"
    );
    let error = text(b"\"blocksize\": 64", b"\"blocksize\": 32");
    assert!(error.contains("blocks of 32"), "{error}");
    let error = text(b".nested_absmax", b".nested_abmaxs");
    assert!(error.contains("nested_ab"), "{error}");

    let mut config: Value = serde_json::from_str(&fs::read_to_string(folder("nf4/config.json")).unwrap()).unwrap();
    config["quantization_config"]["quant_method"] = "gptq".into();
    let error = ModelConfig::from_value("config.json".as_ref(), &config).unwrap_err().to_string();
    assert!(error.contains("gptq"), "{error}");
}
