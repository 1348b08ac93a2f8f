//! Merging into quantized bases, and into files that are quantized.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use common::{f64s, good, random, refused, relative_error};
use metal_candle::models::decoder::{Batch, Decoder};
use metal_candle::models::{ModelFiles, weights};
use metal_candle::training::adapter::{AdapterFile, Module};
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized").join(name)
}

/// A copy of a fixture, with a tokenizer of single characters.
fn copy_model(name: &str, folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    for file in fs::read_dir(fixture(name)).unwrap() {
        let path = file.unwrap().path();
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let letters = ('!'..='Z').map(String::from).enumerate().map(|(id, letter)| (letter, (id + 3).into()));
    let special = ["<unk>", "<s>", "</s>"];
    let ids = special.iter().enumerate().map(|(id, text)| (text.to_string(), id.into()));
    let vocab: serde_json::Map<String, Value> = ids.chain(letters).collect();
    let added = special.iter().enumerate().map(|(id, text)| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    });
    let tokenizer = json!({"version": "1.0", "added_tokens": added.collect::<Vec<_>>(), "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.join("tokenizer_config.json"), json!({"eos_token": "</s>"}).to_string()).unwrap();
}

/// An adapter of rank 3 on two linears of each block; `size` of its B.
fn adapter(model: &ModelFiles, size: f64) -> AdapterFile {
    let shapes: BTreeMap<String, Vec<usize>> = model.config.weight_shapes().into_iter().collect();
    let mut modules = BTreeMap::new();
    for layer in 0..model.config.num_layers {
        for name in ["self_attn.q_proj", "mlp.down_proj"] {
            let path = format!("model.layers.{layer}.{name}");
            let [n, k] = shapes[&format!("{path}.weight")][..] else { panic!("{path} is no matrix") };
            let (a, b) = (random(&[k, 3], DType::F32, 5), (random(&[3, n], DType::F32, 6) * size).unwrap());
            modules.insert(path, Module { a, b, scaling: 0.5, magnitude: None });
        }
    }
    AdapterFile::new("model", model.config.num_layers, 0.0, modules)
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
    let tokens: Vec<u32> = (3..30).map(|i| i * 37 % 64).collect();
    let batch = Batch { targets: tokens.clone(), lengths: vec![tokens.len()], tokens };
    f64s(&decoder.logits(&batch).unwrap())
}

fn run(place: &Path, args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_metal-candle")).args(args.split(' ')).current_dir(place).output().unwrap()
}

fn dtypes(path: &Path) -> BTreeMap<String, DType> {
    let tensors = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    tensors.into_iter().map(|(name, tensor): (String, Tensor)| (name, tensor.dtype())).collect()
}

#[test]
fn a_quantized_base_is_fused_only_by_choice() {
    let place = tempfile::tempdir().unwrap();
    let gguf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf/llama.gguf");
    for name in ["nf4", "mlx4"] {
        copy_model(name, &place.path().join(name));
        adapter(&open(&place.path().join(name)), 0.1).save(&place.path().join("adapters")).unwrap();
        let told = run(place.path(), &format!("fuse --model {name} --adapter adapters --output out"));
        let ways =
            ["quantized weights", "--dequantize", "--export-gguf f16", "q4_k", "--adapter-path", "convert --to gguf"];
        refused(&told, 1, &ways);
    }
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama/adapter");
    let (gguf, adapter) = (gguf.display(), adapter.display());
    let told = run(place.path(), &format!("fuse --model {gguf} --adapter {adapter} --output out"));
    refused(&told, 1, &["llama.gguf", "GGUF file", "--export-gguf", "--adapter-path"]);
    let told = run(place.path(), &format!("fuse --model {gguf} --adapter {adapter} --dequantize --output out"));
    refused(&told, 1, &["llama.gguf", "--dequantize cannot write", "--export-gguf f16"]);
    refused(&run(place.path(), "fuse --model nf4 --output out"), 2, &["--adapter"]);
    refused(&run(place.path(), "fuse --model nf4 --dequantize --export-gguf f16 --output out"), 2, &["cannot be used"]);
    assert!(!place.path().join("out").exists());
}

#[test]
fn dequantize_writes_floats_with_the_adapter_in_them() {
    let place = tempfile::tempdir().unwrap();
    for name in ["nf4", "nf4_single", "mlx4", "mlx8"] {
        let (folder, out) = (place.path().join(name), place.path().join("out"));
        copy_model(name, &folder);
        let model = open(&folder);
        let adapter = adapter(&model, 0.1);
        adapter.save(&place.path().join("adapters")).unwrap();
        let told = good(&run(
            place.path(),
            &format!("fuse --model {name} --adapter adapters --dequantize --output out --force"),
        ));
        assert!(told.contains("4 linears fused into out"), "{told}");
        let fused = open(&out);
        assert!(weights::kinds(&out, &fused.config).unwrap().is_empty());
        assert_eq!(fused.config, model.config);
        let error = relative_error(&logits(&fused, None), &logits(&model, Some(&adapter)));
        assert!(error < 1e-5, "{name}: {error:e}");
        assert!(relative_error(&logits(&model, None), &logits(&fused, None)) > 0.01, "{name}");
        let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        assert!(config.get("quantization").is_none() && config.get("quantization_config").is_none());
        // The fixtures' config.json says float32.
        let (before, after) = (dtypes(&folder.join("model.safetensors")), dtypes(&out.join("model.safetensors")));
        assert_eq!(after["model.layers.1.mlp.up_proj.weight"], DType::F32);
        assert_eq!(after["model.norm.weight"], before["model.norm.weight"]);
        assert_eq!(out.join("model.safetensors.index.json").exists(), name.starts_with("mlx"));
        let told = run(place.path(), "fuse --model out --adapter adapters --dequantize --output again --force");
        refused(&told, 1, &["out: is not quantized"]);
        good(&run(place.path(), "fuse --model out --adapter adapters --output again --force"));
    }
    // Without a word of the dtype, and without an adapter.
    let path = place.path().join("mlx4/config.json");
    let text = fs::read_to_string(&path).unwrap().replace("\"dtype\": \"float32\",", "");
    fs::write(&path, text).unwrap();
    good(&run(place.path(), "fuse --model mlx4 --dequantize --output out --force"));
    let found = dtypes(&place.path().join("out/model.safetensors"));
    assert_eq!(found["model.layers.0.mlp.up_proj.weight"], DType::BF16);
}

/// The figure after `by` in a warning of rounding, and the worst linear's.
fn rounding(output: &Output) -> (f64, f64) {
    good(output);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("kept apart loses nothing: --adapter-path") && text.contains("most in model.layers."),
        "{text}"
    );
    let number = |before: &str| -> f64 {
        text.split(before)
            .nth(1)
            .unwrap()
            .split(" %")
            .next()
            .unwrap()
            .rsplit(['(', ' '])
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    (number("delta by "), number("most in "))
}

#[test]
fn it_is_said_how_much_of_the_delta_rounding_changes() {
    let place = tempfile::tempdir().unwrap();
    copy_model("nf4", &place.path().join("model"));
    let model = open(&place.path().join("model"));
    let export = |size: f64, to: &str| {
        adapter(&model, size).save(&place.path().join("adapters")).unwrap();
        let out = format!("{to}.gguf");
        run(place.path(), &format!("fuse --model model --adapter adapters --export-gguf {to} --output {out} --force"))
    };
    let (large, small) = (rounding(&export(0.1, "q8_0")), rounding(&export(0.001, "q8_0")));
    // The same steps against a hundredth of the delta.
    assert!(large.0 < 10.0 && small.0 > 20.0 * large.0, "{large:?} {small:?}");
    assert!(large.1 >= large.0 && small.1 >= small.0);

    // The figure is that of the files: what the weights are away from those of the base in the same kind with the delta on them.
    let adapter = adapter(&model, 0.001);
    good(&run(place.path(), "fuse --model model --export-gguf q8_0 --output base.gguf"));
    let [base, written] = ["base.gguf", "q8_0.gguf"].map(|name| open(&place.path().join(name)));
    let [base, written] = [base, written].map(|model| model.weights(DType::F32, &Device::Cpu).unwrap());
    let (mut error, mut delta) = (0.0, 0.0);
    for (path, module) in &adapter.modules {
        let name = format!("{path}.weight");
        let want = f64s(&module.a.matmul(&module.b).unwrap().t().unwrap());
        for ((base, written), want) in f64s(&base[&name]).iter().zip(f64s(&written[&name])).zip(want) {
            error += (written - base - module.scaling * want).powi(2);
            delta += (module.scaling * want).powi(2);
        }
    }
    let percent = 100.0 * f64::sqrt(error / delta);
    assert!((percent - small.0).abs() < 0.1, "{percent} {small:?}");

    let told = export(0.1, "f16");
    good(&told);
    assert!(!String::from_utf8_lossy(&told.stderr).contains("warning"));
}
