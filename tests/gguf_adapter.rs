//! Adapters in llama.cpp's form: names, order of rows, one alpha for all. `scripts/check-llama-cpp.sh` lets llama.cpp itself apply them.
#![allow(missing_docs)]

mod common;

use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use common::f64s;
use metal_candle::models::ModelConfig;
use metal_candle::training::adapter::{AdapterFile, gguf};

fn fixture(name: &str) -> (ModelConfig, AdapterFile) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    let config = ModelConfig::from_json(&folder.join("config.json")).unwrap();
    (config, AdapterFile::load(&folder.join("adapter")).unwrap())
}

/// The tensors of a file by name, and alpha.
struct Written {
    file: File,
    content: Content,
}

impl Written {
    fn of(config: &ModelConfig, adapter: &AdapterFile, folder: &Path) -> Self {
        let path = folder.join("adapter.gguf");
        gguf::save(adapter, config, &path).unwrap();
        let mut file = File::open(path).unwrap();
        let content = Content::read(&mut file).unwrap();
        Self { file, content }
    }

    fn tensor(&mut self, name: &str) -> Tensor {
        let tensor = self.content.tensor(&mut self.file, name, &Device::Cpu).unwrap();
        tensor.dequantize(&Device::Cpu).unwrap()
    }

    fn alpha(&self) -> f32 {
        self.content.metadata["adapter.lora.alpha"].to_f32().unwrap()
    }
}

#[test]
fn names_order_and_scaling_are_llama_cpps() {
    let place = tempfile::tempdir().unwrap();
    let (config, mut adapter) = fixture("llama");
    // One linear of another scaling: B takes it up.
    let odd = "model.layers.1.mlp.up_proj";
    adapter.modules.get_mut(odd).unwrap().scaling *= 3.0;
    let mut written = Written::of(&config, &adapter, place.path());
    assert_eq!(written.content.metadata["general.architecture"].to_string().unwrap(), "llama");
    assert_eq!(written.content.metadata["general.type"].to_string().unwrap(), "adapter");
    assert_eq!(written.content.metadata["adapter.type"].to_string().unwrap(), "lora");
    assert_eq!((written.alpha(), written.content.tensor_infos.len()), (10.0, 2 * adapter.modules.len()));

    let names = [("self_attn.q_proj", "attn_q", 4), ("self_attn.k_proj", "attn_k", 2), ("mlp.up_proj", "ffn_up", 0)];
    for layer in 0..2 {
        for (ours, theirs, heads) in names {
            let path = format!("model.layers.{layer}.{ours}");
            let module = &adapter.modules[&path];
            let a = written.tensor(&format!("blk.{layer}.{theirs}.weight.lora_a"));
            assert_eq!(f64s(&a), f64s(&module.a.t().unwrap()), "{path}");
            let b = written.tensor(&format!("blk.{layer}.{theirs}.weight.lora_b")).to_vec2::<f32>().unwrap();
            let want = module.b.t().unwrap().to_vec2::<f32>().unwrap();
            // llama.cpp turns neighbours of a head: row 2 j + i of one is row i D/2 + j here.
            let half = want.len().checked_div(2 * heads);
            for (row, got) in b.iter().enumerate() {
                let from = half.map_or(row, |half| row / (2 * half) * 2 * half + row % 2 * half + row % (2 * half) / 2);
                let factor = if path == odd { 3.0 } else { 1.0 };
                let want: Vec<f32> = want[from].iter().map(|value| factor * value).collect();
                let close = got.iter().zip(&want).all(|(got, want)| (got - want).abs() <= 1e-6 * want.abs());
                assert!(close, "{path}, row {row}: {got:?} for {want:?}");
            }
        }
    }
}

#[test]
fn other_families_keep_their_rows_and_what_does_not_fit_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let (config, adapter) = fixture("qwen2");
    let mut written = Written::of(&config, &adapter, place.path());
    let b = written.tensor("blk.0.attn_q.weight.lora_b");
    assert_eq!(f64s(&b), f64s(&adapter.modules["model.layers.0.self_attn.q_proj"].b.t().unwrap()));

    let other = fixture("qwen3").0;
    let path = place.path().join("other.gguf");
    let error = gguf::save(&adapter, &other, &path).unwrap_err().to_string();
    assert!(error.contains("q_proj") && !path.exists(), "{error}");
    let mut dora = adapter.clone();
    let module = dora.modules.values_mut().next().unwrap();
    module.magnitude = Some(Tensor::ones(module.b.dims()[1], candle_core::DType::F32, &Device::Cpu).unwrap());
    let error = gguf::save(&dora, &config, &path).unwrap_err().to_string();
    assert!(error.contains("DoRA") && error.contains("llama.cpp"), "{error}");
}
