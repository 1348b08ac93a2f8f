//! How long it takes to change the active adapter: SmolLM2-135M's shape, rank 8 on all 210 linears.
#![allow(missing_docs)]

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use metal_candle::inference::AdapterRegistry;
use metal_candle::models::ModelConfig;
use metal_candle::models::decoder::Decoder;
use metal_candle::training::adapter::{AdapterFile, Module};

/// SmolLM2-135M but for the vocabulary, which no adapter touches.
fn decoder() -> Decoder {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true, "hidden_act": "silu",
    });
    let config = ModelConfig::from_value("config.json".as_ref(), &json).unwrap();
    let weights: HashMap<_, _> =
        config.weight_shapes().into_iter().map(|(name, shape)| (name, zeros(&shape))).collect();
    Decoder::new(&config, weights, &Device::Cpu).unwrap()
}

/// The values have no bearing on a change of adapters.
fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

fn adapter(decoder: &Decoder) -> AdapterFile {
    const RANK: usize = 8;
    let modules: BTreeMap<_, _> = decoder
        .linears()
        .map(|(path, linear)| {
            let (k, n) = linear.sizes();
            (path, Module { a: zeros(&[k, RANK]), b: zeros(&[RANK, n]), scaling: 2.0, magnitude: None })
        })
        .collect();
    AdapterFile::new("SmolLM2", decoder.config.num_layers, 0.0, modules)
}

fn activation(criterion: &mut Criterion) {
    let mut registry = AdapterRegistry::new(decoder()).unwrap();
    for name in ["one", "two"] {
        let file = adapter(registry.decoder());
        registry.add(name, &file).unwrap();
    }
    criterion.bench_function("adapters/activate the other of two", |bencher| {
        let mut names = ["one", "two"].into_iter().cycle();
        bencher.iter(|| black_box(&mut registry).activate(names.next()).unwrap());
    });
    criterion.bench_function("adapters/activate one and none in turn", |bencher| {
        let mut names = [Some("one"), None].into_iter().cycle();
        bencher.iter(|| black_box(&mut registry).activate(names.next().flatten()).unwrap());
    });
}

criterion_group!(benches, activation);
criterion_main!(benches);
