//! `convert` and `fuse` from the outside.
#![allow(missing_docs)]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use candle_core::{DType, Device, Tensor};
use common::{good, refused};
use metal_candle::training::adapter::AdapterFile;
use safetensors::SafeTensors;
use serde_json::{Value, json};

struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    /// A folder with `model` (f32, one file), `data` and `adapters`, which a short run left there.
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        common::tiny::write_model(&place.path("model"), 1);
        let row = |i: usize| format!("{{\"prompt\": \"row {i}\", \"completion\": \"value {}\"}}\n", i % 3);
        fs::create_dir(place.path("data")).unwrap();
        fs::write(place.path("data/train.jsonl"), (0..12).map(row).collect::<String>()).unwrap();
        place.train("adapters", "--rank 3 --alpha 5 --target-modules all-linear");
        place
    }

    fn train(&self, name: &str, flags: &str) {
        let common = "--model model --data data --iters 6 --batch-size 3 --learning-rate 0.02";
        good(&self.run(&format!("train {common} --adapter-path {name} {flags}")));
    }

    /// The model again as `shards`: bf16 in two files with an index and other files beside.
    fn shard(&self) {
        let (from, to) = (self.path("model"), self.path("shards"));
        fs::create_dir(&to).unwrap();
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            fs::copy(from.join(name), to.join(name)).unwrap();
        }
        let tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu).unwrap();
        let mut files = [HashMap::new(), HashMap::new()];
        let mut map = serde_json::Map::new();
        for (name, tensor) in tensors {
            let file = usize::from(name.contains("layers.1"));
            map.insert(name.clone(), format!("model-{file}.safetensors").into());
            files[file].insert(name, tensor.to_dtype(DType::BF16).unwrap());
        }
        for (number, tensors) in files.into_iter().enumerate() {
            let metadata = Some([("format".to_string(), "pt".to_string())].into());
            let path = to.join(format!("model-{number}.safetensors"));
            safetensors::serialize_to_file(tensors, metadata, &path).unwrap();
        }
        fs::write(to.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
        for name in ["generation_config.json", "chat_template.jinja", "pytorch_model.bin", ".hidden"] {
            fs::write(to.join(name), "{}\n").unwrap();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, args: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_metal-candle"));
        command.args(args.split(' ')).current_dir(self.folder.path()).output().unwrap()
    }

    fn tensors(&self, file: &str) -> BTreeMap<String, Tensor> {
        candle_core::safetensors::load(self.path(file), &Device::Cpu).unwrap().into_iter().collect()
    }

    fn config(&self, adapter: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(adapter).join("adapter_config.json")).unwrap()).unwrap()
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let names = fs::read_dir(self.path(folder)).unwrap().map(|file| file.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }
}

#[track_caller]
fn assert_same_tensors(one: &BTreeMap<String, Tensor>, other: &BTreeMap<String, Tensor>) {
    assert!(one.keys().eq(other.keys()));
    for (name, tensor) in one {
        assert_eq!(common::f64s(tensor), common::f64s(&other[name]), "{name}");
    }
}

#[test]
fn an_adapter_goes_to_mlx_and_back_to_the_same_bits() {
    let place = Place::new();
    let told = good(&place.run("convert adapters --to mlx --output mlx --model model"));
    assert!(told.contains("14 linears in mlx"), "{told}");
    assert_eq!(place.names("mlx"), ["adapter_config.json", "adapters.safetensors"]);
    let config = place.config("mlx");
    assert_eq!((&config["num_layers"], &config["model"]), (&json!(-1), &json!("model")));
    assert_eq!(config["lora_parameters"]["scale"], json!(5.0 / 3.0));
    good(&place.run("convert mlx --to peft --output peft"));
    assert_same_tensors(
        &place.tensors("adapters/adapter_model.safetensors"),
        &place.tensors("peft/adapter_model.safetensors"),
    );
    let back = place.config("peft");
    assert_eq!((&back["r"], &back["lora_alpha"], &back["layers_to_transform"]), (&json!(3), &json!(5), &Value::Null));
    let answer = |adapter: &str| good(&place.run(&format!("generate --adapter-path {adapter} -p row -m 12")));
    assert_eq!(answer("adapters"), answer("mlx"));
    assert_ne!(answer("mlx"), good(&place.run("generate --model model -p row -m 12")));
    assert!(good(&place.run("info --adapter-path mlx")).contains("form           MLX"));
}

#[test]
fn an_output_is_replaced_only_when_that_is_asked_for_and_safe() {
    let place = Place::new();
    good(&place.run("convert adapters --to mlx --output mlx"));
    refused(&place.run("convert adapters --to mlx --output mlx"), 1, &["mlx: is already there", "--force"]);
    good(&place.run("convert adapters --to peft --output mlx --force"));
    assert_eq!(place.names("mlx"), ["adapter_config.json", "adapter_model.safetensors"]);
    for output in ["adapters", "."] {
        let told = place.run(&format!("convert adapters --to mlx --output {output} --force"));
        refused(&told, 1, &["holds adapters, which is read"]);
    }
    fs::create_dir(place.path("mine")).unwrap();
    fs::write(place.path("mine/letter.txt"), "dear").unwrap();
    refused(
        &place.run("convert adapters --to mlx --output mine --force"),
        1,
        &["mine: is not the folder of an adapter"],
    );
    refused(&place.run("fuse --model model --adapter adapters --output model --force"), 1, &["holds model"]);
    assert_eq!(place.names("mine"), ["letter.txt"]);
    assert!(place.names(".").iter().all(|name| !name.starts_with(".writing")), "{:?}", place.names("."));
}

#[test]
fn what_mlx_cannot_hold_is_refused_by_name() {
    let place = Place::new();
    let mut tensors: HashMap<String, Tensor> =
        place.tensors("adapters/adapter_model.safetensors").into_iter().collect();
    let head = common::random(&[4, 32], DType::F32, 3);
    tensors.insert("base_model.model.lm_head.weight".into(), head.clone());
    tensors.insert("base_model.model.model.norm.weight".into(), head.clone());
    tensors.insert("base_model.model.model.embed_tokens.weight".into(), head);
    candle_core::safetensors::save(&tensors, place.path("adapters/adapter_model.safetensors")).unwrap();
    let mut config = place.config("adapters");
    config["modules_to_save"] = json!(["lm_head", "model.norm", "embed_tokens"]);
    fs::write(place.path("adapters/adapter_config.json"), config.to_string()).unwrap();
    refused(&place.run("convert adapters --to mlx --output mlx"), 1, &["lm_head.weight", "model.norm.weight"]);
    refused(
        &place.run("fuse --model model --adapter adapters --output f"),
        1,
        &["lm_head.weight is [300, 32]", "norm.weight is [32]", "embed_tokens.weight is [300, 32]"],
    );
    good(&place.run("convert adapters --to peft --output peft"));
    assert_eq!(place.tensors("peft/adapter_model.safetensors").len(), 31);
    assert!(!place.path("mlx").exists() && !place.path("f").exists());
}

#[test]
fn a_fused_model_answers_as_the_adapted_one() {
    let place = Place::new();
    let told = good(&place.run("fuse --model model --adapter adapters --output fused"));
    assert!(told.contains("14 linears fused into fused"), "{told}");
    let difference: f64 = told.split("logit: ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(difference > 0.0 && difference < 1e-5, "{told}");
    let answer = |flags: &str| good(&place.run(&format!("generate {flags} -p row -m 12")));
    assert_eq!(answer("--model fused"), answer("--adapter-path adapters"));
    assert_ne!(answer("--model fused"), answer("--model model"));
    // From MLX's form, to the same bits.
    good(&place.run("convert adapters --to mlx --output mlx"));
    good(&place.run("fuse --model model --adapter mlx --output again"));
    assert_same_tensors(&place.tensors("fused/model.safetensors"), &place.tensors("again/model.safetensors"));
}

/// An embedding that was trained whole leaves the tied output projection behind, in one file and in shards.
#[test]
fn tied_tensors_that_were_trained_whole_become_two() {
    let place = Place::new();
    place.shard();
    let mut tensors: HashMap<String, Tensor> =
        place.tensors("adapters/adapter_model.safetensors").into_iter().collect();
    let trained = common::random(&[300, 32], DType::F32, 3);
    tensors.insert("base_model.model.model.embed_tokens.weight".into(), trained.clone());
    candle_core::safetensors::save(&tensors, place.path("adapters/adapter_model.safetensors")).unwrap();
    let mut config = place.config("adapters");
    config["modules_to_save"] = json!(["embed_tokens"]);
    fs::write(place.path("adapters/adapter_config.json"), config.to_string()).unwrap();
    for (model, limit) in [("model", 1e-5), ("shards", 0.05)] {
        let told = good(&place.run(&format!("fuse --model {model} --adapter adapters --output fused-{model}")));
        let difference: f64 = told.split("logit: ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(difference < limit, "{told}");
        let config: Value =
            serde_json::from_slice(&fs::read(place.path(&format!("fused-{model}/config.json"))).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], false);
    }
    let (before, after) = (place.tensors("model/model.safetensors"), place.tensors("fused-model/model.safetensors"));
    assert_eq!(common::f64s(&after["model.embed_tokens.weight"]), common::f64s(&trained));
    assert_eq!(common::f64s(&after["lm_head.weight"]), common::f64s(&before["model.embed_tokens.weight"]));
    let index: Value =
        serde_json::from_slice(&fs::read(place.path("fused-shards/model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["weight_map"]["lm_head.weight"], index["weight_map"]["model.embed_tokens.weight"]);
    // Out of that folder a GGUF file can be made, in one step it cannot.
    refused(
        &place.run("fuse --model model --adapter adapters --export-gguf f16 --output f.gguf"),
        1,
        &["model.embed_tokens.weight", "fuse into a folder first"],
    );
    good(&place.run("fuse --model fused-model --export-gguf f16 --output fused.gguf"));
}

/// DoRA's magnitudes go into the weights, in a folder and in a GGUF file.
#[test]
fn a_fused_dora_answers_as_the_adapted_one() {
    let place = Place::new();
    place.train("dora", "--rank 3 --alpha 5 --fine-tune-type dora --init-lora-weights pissa");
    for output in ["--output fused", "--export-gguf f16 --output fused.gguf"] {
        let told = good(&place.run(&format!("fuse --model model --adapter dora {output}")));
        let difference: f64 = told.split("logit: ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(difference < if output.contains("gguf") { 5e-3 } else { 1e-5 }, "{told}");
    }
    let answer = |model: &str| good(&place.run(&format!("generate {model} --prompt x --max-tokens 6 --temp 0")));
    assert_eq!(answer("--model fused"), answer("--model model --adapter-path dora"));
    refused(&place.run("fuse --model model --adapter dora=0.5 --output f"), 1, &["a weighted sum", "magnitudes"]);
}

/// Dtype, shape and bytes by name.
type Raw = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

/// The tensors of a safetensors file and its metadata.
fn raw(path: &Path) -> (Raw, Option<HashMap<String, String>>) {
    let bytes = fs::read(path).unwrap();
    let metadata = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let all = tensors.iter().map(|(name, view)| {
        (name.to_string(), (format!("{:?}", view.dtype()), view.shape().to_vec(), view.data().to_vec()))
    });
    (all.collect(), metadata)
}

#[test]
fn shards_dtypes_and_other_files_stay() {
    let place = Place::new();
    place.shard();
    place.train("last", "--rank 2 --alpha 3 --target-modules q_proj,down_proj --num-layers 1");
    let output = place.run("fuse --model shards --adapter last --output fused");
    let told = good(&output);
    let notes = String::from_utf8_lossy(&output.stderr);
    assert!(notes.contains("not carried over: .hidden, pytorch_model.bin"), "{notes}");
    assert!(told.contains("2 linears"), "{told}");
    let mut kept = place.names("shards");
    kept.retain(|name| name != ".hidden" && name != "pytorch_model.bin");
    assert_eq!(place.names("fused"), kept);
    for name in kept.iter().filter(|name| *name != "model-1.safetensors") {
        let [one, other] = ["shards", "fused"].map(|folder| fs::read(place.path(folder).join(name)).unwrap());
        assert!(one == other, "{name} differs");
    }
    let [(before, metadata), (after, kept)] =
        ["shards", "fused"].map(|folder| raw(&place.path(folder).join("model-1.safetensors")));
    assert_eq!((metadata.clone(), metadata.unwrap()["format"].as_str()), (kept, "pt"));
    let changed: Vec<&String> = before.keys().filter(|name| before[*name] != after[*name]).collect();
    assert_eq!(changed, ["model.layers.1.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"]);
    for name in changed {
        assert_eq!((&before[name].0, &before[name].1), (&after[name].0, &after[name].1));
    }
}

#[test]
fn several_adapters_are_summed_with_their_weights() {
    let place = Place::new();
    place.train("other", "--rank 2 --alpha 7 --target-modules q_proj,v_proj --seed 5");
    good(&place.run("fuse --model model --adapter adapters=0.25 --adapter-path other=-1.5 --output fused"));
    let (before, after) = (place.tensors("model/model.safetensors"), place.tensors("fused/model.safetensors"));
    let adapters = [("adapters", 0.25), ("other", -1.5)];
    let adapters = adapters.map(|(name, weight)| (AdapterFile::load(&place.path(name)).unwrap(), weight));
    for (name, tensor) in &before {
        let module = name.strip_suffix(".weight").unwrap();
        let mut wanted = tensor.to_dtype(DType::F64).unwrap();
        for (adapter, weight) in &adapters {
            let Some(module) = adapter.modules.get(module) else { continue };
            let [a, b] = [&module.a, &module.b].map(|tensor| tensor.to_dtype(DType::F64).unwrap());
            let delta = a.matmul(&b).unwrap().t().unwrap();
            wanted = (wanted + (delta * (module.scaling * weight)).unwrap()).unwrap();
        }
        for (wanted, found) in common::f64s(&wanted).iter().zip(common::f64s(&after[name])) {
            assert!((wanted - found).abs() < 1e-6, "{name}: {wanted} {found}");
        }
    }
    refused(&place.run("fuse --model model --adapter adapters=much --output f"), 2, &["much"]);
    refused(&place.run("fuse --model model --adapter adapters=0 --output f"), 2, &["other than 0"]);
}

#[test]
fn whole_tensors_take_their_place() {
    let place = Place::new();
    let mut tensors: HashMap<String, Tensor> =
        place.tensors("adapters/adapter_model.safetensors").into_iter().collect();
    let norm = common::random(&[32], DType::F32, 3);
    tensors.insert("base_model.model.model.norm.weight".into(), norm.clone());
    candle_core::safetensors::save(&tensors, place.path("adapters/adapter_model.safetensors")).unwrap();
    let mut config = place.config("adapters");
    config["modules_to_save"] = json!(["model.norm"]);
    fs::write(place.path("adapters/adapter_config.json"), config.to_string()).unwrap();
    let told = good(&place.run("fuse --model model --adapter adapters --output fused"));
    let difference: f64 = told.split("logit: ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(difference < 1e-5, "{told}");
    let (before, after) = (place.tensors("model/model.safetensors"), place.tensors("fused/model.safetensors"));
    assert_eq!(common::f64s(&after["model.norm.weight"]), common::f64s(&norm));
    let changed = before.keys().filter(|name| common::f64s(&before[*name]) != common::f64s(&after[*name]));
    assert_eq!(changed.count(), 15);
    let told = place.run("fuse --model model --adapter adapters=2 --output f");
    refused(&told, 1, &["a weighted sum", "model.norm.weight"]);
    assert!(!place.path("f").exists());
}

#[test]
fn what_cannot_be_fused_is_refused() {
    let place = Place::new();
    let gguf = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/gguf/llama.gguf");
    let told = place.run(&format!("fuse --model {gguf} --adapter adapters --output fused"));
    refused(&told, 1, &["llama.gguf", "safetensors"]);
    common::tiny::write_model_with(&place.path("wide"), 2, |config| config["intermediate_size"] = 64.into());
    let told = place.run("fuse --model wide --adapter adapters --output fused");
    refused(&told, 1, &["model.layers.0.mlp.down_proj goes from 64 to 32", "model.layers.1.mlp.up_proj"]);
    assert!(!place.path("fused").exists());
}

#[test]
fn a_gguf_file_answers_as_the_adapted_model() {
    let place = Place::new();
    let told = good(&place.run("fuse --model model --adapter adapters --export-gguf bf16 --output fused.gguf"));
    assert!(told.contains("14 linears fused into fused.gguf"), "{told}");
    let difference: f64 = told.split("logit: ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(difference > 1e-5 && difference < 0.05, "{told}");
    // All of a small model's f32 values are f16's after rounding once more: the answer is the same.
    good(&place.run("fuse --model model --adapter adapters --export-gguf f16 --output f16.gguf"));
    let answer = |flags: &str| good(&place.run(&format!("generate {flags} -p row -m 12")));
    assert_eq!(answer("--model f16.gguf"), answer("--adapter-path adapters"));
    assert_ne!(answer("--model f16.gguf"), answer("--model model"));
    // Without an adapter, and from GGUF to GGUF.
    good(&place.run("fuse --model model --export-gguf f16 --output plain.gguf"));
    assert_eq!(answer("--model plain.gguf"), answer("--model model"));
    good(&place.run("fuse --model plain.gguf --adapter adapters --export-gguf f16 --output again.gguf"));
    assert_eq!(answer("--model again.gguf"), answer("--adapter-path adapters"));

    let again = "fuse --model f16.gguf --export-gguf f16 --output";
    refused(&place.run(&format!("{again} plain.gguf")), 1, &["plain.gguf: is already there", "--force"]);
    refused(&place.run(&format!("{again} f16.gguf --force")), 1, &["f16.gguf: is read"]);
    refused(&place.run(&format!("{again} data --force")), 1, &["data: is a folder"]);
    refused(&place.run("fuse --model model --adapter adapters --output f16.gguf --force"), 1, &["f16.gguf: is a file"]);
    good(&place.run(&format!("{again} plain.gguf --force")));
}

/// The system kills a process that writes a file over its limit, in the middle of a shard.
#[cfg(unix)]
#[test]
fn a_killed_export_leaves_nothing_that_looks_whole() {
    let place = Place::new();
    let program = env!("CARGO_BIN_EXE_metal-candle");
    let script =
        format!("ulimit -c 0; ulimit -f 40; exec {program} fuse --model model --adapter adapters --output fused");
    let output = Command::new("bash").args(["-c", &script]).current_dir(place.folder.path()).output().unwrap();
    assert_eq!(output.status.code(), None, "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!place.path("fused").exists());
    let left = place.names(".").into_iter().find(|name| name.starts_with(".writing-")).unwrap();
    assert!(!place.names(&left).contains(&"config.json".to_string()), "{:?}", place.names(&left));
    refused(&place.run(&format!("info --model {left}")), 1, &["has no config.json"]);

    let script = script.replace("--output fused", "--export-gguf f16 --output fused.gguf").replace("-f 40", "-f 20");
    let output = Command::new("bash").args(["-c", &script]).current_dir(place.folder.path()).output().unwrap();
    assert_eq!(output.status.code(), None, "{}", String::from_utf8_lossy(&output.stderr));
    assert!(place.names(".").iter().all(|name| !name.ends_with(".gguf")));
    let left = place.names(".").into_iter().find(|name| name.starts_with(".writing-") && place.path(name).is_file());
    refused(&place.run(&format!("info --model {}", left.unwrap())), 1, &["is cut short or broken"]);
}
