//! Adapters in files: every spelling that is read, everything that is refused, and the ways between the forms.
#![allow(missing_docs)]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use metal_candle::models::decoder::{Batch, Decoder};
use metal_candle::models::{ModelConfig, ModelFiles};
use metal_candle::training::adapter::{AdapterFile, Form, Module};
use proptest::prelude::*;
use serde_json::{Value, json};

const Q: &str = "self_attn.q_proj";
const UP: &str = "mlp.up_proj";

/// The names in a block and `(k, n)` of the tiny model's linears that the tests adapt.
const SIZES: [(&str, (usize, usize)); 2] = [(Q, (32, 32)), (UP, (32, 48))];

fn path(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}")
}

/// A and B in PEFT's shapes.
fn pair(name: &str, rank: usize, seed: u64) -> (Tensor, Tensor) {
    let (k, n) = SIZES.iter().find(|(other, _)| *other == name).unwrap().1;
    (common::random(&[rank, k], DType::F32, seed), common::random(&[n, rank], DType::F32, seed + 1))
}

/// A PEFT folder, to be changed before it is written.
struct Peft {
    config: Value,
    tensors: HashMap<String, Tensor>,
}

impl Peft {
    /// Rank 3 and alpha 5 on q_proj and up_proj of both blocks.
    fn new() -> Self {
        let config = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]});
        let mut peft = Self { config, tensors: HashMap::new() };
        for layer in 0..2 {
            for (name, _) in SIZES {
                peft.put(layer, name, 3);
            }
        }
        peft
    }

    fn put(&mut self, layer: usize, name: &str, rank: usize) {
        let (a, b) = pair(name, rank, 10 * layer as u64 + name.len() as u64);
        for (part, tensor) in [("A", a), ("B", b)] {
            self.tensors.insert(format!("base_model.model.{}.lora_{part}.weight", path(layer, name)), tensor);
        }
    }

    fn with(mut self, config: Value) -> Self {
        self.config.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        self
    }

    /// All tensors by other names.
    fn renamed(mut self, rename: impl Fn(&str) -> String) -> Self {
        self.tensors = self.tensors.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
        self
    }

    fn dora(mut self) -> Self {
        self.config["use_dora"] = true.into();
        for layer in 0..2 {
            for (name, (_, n)) in SIZES {
                let magnitude = common::random(&[n], DType::F32, layer as u64 + 77);
                let name = format!("base_model.model.{}.lora_magnitude_vector", path(layer, name));
                self.tensors.insert(name, magnitude);
            }
        }
        self
    }

    fn load(&self) -> metal_candle::Result<AdapterFile> {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "adapter_model.safetensors", &self.config, &self.tensors);
        AdapterFile::load(folder.path())
    }

    #[track_caller]
    fn refused(&self, words: &[&str]) {
        refused(self.load(), words);
    }
}

fn write(folder: &Path, file: &str, config: &Value, tensors: &HashMap<String, Tensor>) {
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    candle_core::safetensors::save(tensors, folder.join(file)).unwrap();
}

#[track_caller]
fn refused<T>(outcome: metal_candle::Result<T>, words: &[&str]) {
    let Err(error) = outcome else { panic!("{words:?} was not refused") };
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "'{word}' is missing: {text}");
    }
}

/// s (A B)ᵀ of every module.
fn deltas(file: &AdapterFile) -> BTreeMap<String, Vec<f64>> {
    let delta = |module: &Module| {
        let [a, b] = [&module.a, &module.b].map(|tensor| tensor.to_dtype(DType::F64).unwrap());
        common::f64s(&(a.matmul(&b).unwrap() * module.scaling).unwrap())
    };
    file.modules.iter().map(|(path, module)| (path.clone(), delta(module))).collect()
}

#[track_caller]
fn assert_same(one: &AdapterFile, other: &AdapterFile, tolerance: f64) {
    let (one, other) = (deltas(one), deltas(other));
    assert!(one.keys().eq(other.keys()), "{:?} {:?}", one.keys(), other.keys());
    for (path, delta) in one {
        let far = delta.iter().zip(&other[&path]).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        let size = delta.iter().fold(0.0, |size: f64, x| size.max(x.abs()));
        assert!(size > 0.0 && far <= tolerance * size, "{path}: {far} of {size}");
    }
}

/// Through a form's files.
fn through(file: &AdapterFile, form: Form) -> (AdapterFile, Value) {
    let folder = tempfile::tempdir().unwrap();
    file.save_as(form, folder.path()).unwrap();
    assert_eq!(AdapterFile::form(folder.path()).unwrap(), form);
    let config = fs::read(folder.path().join("adapter_config.json")).unwrap();
    (AdapterFile::load(folder.path()).unwrap(), serde_json::from_slice(&config).unwrap())
}

#[test]
fn every_spelling_of_a_name_is_the_same_module() {
    let plain = Peft::new().load().unwrap();
    assert_eq!(plain.modules.len(), 4);
    let q = &plain.modules[&path(0, Q)];
    assert_eq!((q.rank(), q.scaling, q.alpha(), q.sizes()), (3, 5.0 / 3.0, 5.0, (32, 32)));
    assert_eq!(common::f64s(&q.a.t().unwrap().contiguous().unwrap()), common::f64s(&pair(Q, 3, 16).0));
    let strip = |name: &str, prefix: &str| name.strip_prefix(prefix).unwrap().to_string();
    let spellings: [&dyn Fn(&str) -> String; 6] = [
        &|name| name.replace(".weight", ".default.weight"),
        &|name| strip(name, "base_model.model."),
        &|name| strip(name, "base_model.model.model."),
        &|name| name.replace("base_model.model.model.", "base_model.model."),
        &|name| name.replace("model.model.layers", "model.model.language_model.layers"),
        &|name| name.replace("model.model.layers", "model.language_model.model.layers"),
    ];
    for rename in spellings {
        assert_same(&plain, &Peft::new().renamed(rename).load().unwrap(), 0.0);
    }
}

#[test]
fn targets_are_chosen_as_peft_chooses_them() {
    let plain = Peft::new().load().unwrap();
    for targets in [
        json!({"target_modules": "all-linear"}),
        json!({"target_modules": ".*\\.(q|up)_proj"}),
        json!({"target_modules": ["self_attn.q_proj", "mlp.up_proj"]}),
        json!({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 1]}),
        json!({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 0], "layers_pattern": "layers"}),
        json!({"target_modules": ".*_proj", "exclude_modules": ["k_proj"]}),
        json!({"target_modules": ["q_proj", "up_proj", "k_proj"], "exclude_modules": ["k_proj"]}),
    ] {
        assert_same(&plain, &Peft::new().with(targets).load().unwrap(), 0.0);
    }
    let cases = [
        (json!({"target_modules": ["q_proj"]}), "layers.0.mlp.up_proj.lora_A.weight is of no module"),
        (json!({"target_modules": "q_proj"}), "layers.1.self_attn.q_proj.lora_B.weight is of no module"),
        (json!({"target_modules": ["q_proj", "up_proj", "v_proj", "o_proj"]}), "target v_proj has no tensor"),
        (json!({"layers_to_transform": 0}), "layers.1.self_attn.q_proj.lora_A.weight is of no module"),
        (json!({"exclude_modules": ".*up_proj"}), "layers.0.mlp.up_proj.lora_B.weight is of no module"),
        (json!({"target_modules": "(?<=x)q_proj"}), "regular expression"),
        (json!({"target_modules": []}), "target_modules is missing or empty"),
        (json!({"target_modules": null}), "target_modules is missing or empty"),
    ];
    for (config, words) in cases {
        Peft::new().with(config).refused(&[words]);
    }
    let whole = Peft::new().with(json!({"target_modules": ["q_proj", "up_proj", "v_proj", "o_proj"]}));
    whole.refused(&["target v_proj", "target o_proj"]);
}

#[test]
fn patterns_give_modules_their_own_rank_and_scaling() {
    let mut peft = Peft::new().with(json!({
        "rank_pattern": {"layers.1.mlp.up_proj": 2, "q_proj": 4},
        "alpha_pattern": {"up_proj": 7, "model.layers.0.self_attn.q_proj": 9},
        "use_rslora": true,
    }));
    for (layer, name, rank) in [(0, Q, 4), (1, Q, 4), (1, UP, 2)] {
        peft.put(layer, name, rank);
    }
    let file = peft.load().unwrap();
    let of = |layer, name| {
        let module = &file.modules[&path(layer, name)];
        (module.rank(), module.scaling)
    };
    assert_eq!((of(0, Q), of(1, Q)), ((4, 9.0 / 2.0), (4, 5.0 / 2.0)));
    assert_eq!((of(0, UP), of(1, UP)), ((3, 7.0 / 3f64.sqrt()), (2, 7.0 / 2f64.sqrt())));
    // As ends in whole parts: `proj` ends no part.
    Peft::new()
        .with(json!({"rank_pattern": {"proj": 4}, "alpha_pattern": {"x": 1}}))
        .refused(&["rank_pattern proj has no module", "alpha_pattern x has no module"]);
    Peft::new().with(json!({"rank_pattern": {"q_proj": 4}})).refused(&["rank 3 in A", "says 4"]);
    Peft::new().with(json!({"rank_pattern": {"q_proj": "4"}, "alpha_pattern": 3})).refused(&["rank_pattern", "alpha"]);

    let (again, config) = through(&file, Form::Peft);
    assert_same(&file, &again, 1e-15);
    assert_eq!(config["rank_pattern"], json!({"model.layers.0.mlp.up_proj": 3, "model.layers.1.mlp.up_proj": 2}));
    let (mlx, config) = through(&file, Form::Mlx);
    assert_same(&file, &mlx, 1e-6);
    assert!(
        mlx.modules.values().all(|module| module.rank() == 4 && module.scaling == mlx.modules[&path(0, Q)].scaling)
    );
    assert_eq!(config["lora_parameters"]["rank"], 4);
}

#[test]
fn every_fault_is_named_at_once() {
    Peft::new().with(json!({"use_dora": "yes", "novelty": 1, "bias": "all", "lora_bias": true, "r": 2.5})).refused(&[
        "use_dora is \"yes\"",
        "novelty",
        "bias is \"all\"",
        "lora_bias is true",
        "r has 2.5",
    ]);
    Peft::new().with(json!({"init_lora_weights": "pissa", "peft_type": "LOHA"})).refused(&["pissa", "LOHA"]);
    Peft::new().with(json!({"r": "3", "lora_dropout": 1.0})).refused(&["r is \"3\"", "lora_dropout is 1"]);
    let mut peft = Peft::new();
    peft.tensors.remove("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight");
    let (a, _) = pair(Q, 3, 1);
    for name in ["model.layers.1.self_attn.q_proj.lora_A.other.weight", "model.embed_tokens.lora_embedding_A", "odd"] {
        peft.tensors.insert(name.to_string(), a.clone());
    }
    peft.tensors
        .insert("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight".to_string(), a.flatten_all().unwrap());
    peft.refused(&[
        "model.layers.0.self_attn.q_proj lacks its B",
        "stands twice",
        "lora_embedding_A adapts an embedding",
        "the name of odd",
        "lora_A.weight is [96] in f32, not a matrix",
    ]);
    let folder = tempfile::tempdir().unwrap();
    refused(AdapterFile::load(folder.path()), &["has no adapter_config.json"]);
    fs::create_dir(folder.path().join("other")).unwrap();
    write(&folder.path().join("other"), "adapter_model.safetensors", &peft.config, &peft.tensors);
    refused(AdapterFile::load(folder.path()), &["adapters lie in", "other"]);
    fs::write(folder.path().join("adapter_config.json"), Peft::new().config.to_string()).unwrap();
    fs::write(folder.path().join("adapter_model.bin"), "").unwrap();
    refused(AdapterFile::load(folder.path()), &["adapter_model.bin is a pickle"]);
    for (text, words) in [("[]", "not a JSON object"), ("{", "not JSON"), ("{}", "neither peft_type")] {
        fs::write(folder.path().join("adapter_config.json"), text).unwrap();
        refused(AdapterFile::load(folder.path()), &[words]);
    }
    let both = Peft::new().with(json!({"lora_parameters": {}}));
    both.refused(&["both peft_type and"]);
}

#[test]
fn dora_and_whole_tensors_go_through_files() {
    let plain = Peft::new().dora().load().unwrap();
    let spelt = Peft::new().dora().renamed(|name| name.replace("_vector", "_vector.default.weight")).load().unwrap();
    let magnitude = |file: &AdapterFile| common::f64s(file.modules[&path(1, UP)].magnitude.as_ref().unwrap());
    assert_eq!(magnitude(&plain), magnitude(&spelt));
    for form in [Form::Peft, Form::Mlx] {
        let (again, config) = through(&plain, form);
        assert_same(&plain, &again, 0.0);
        assert_eq!(magnitude(&plain), magnitude(&again));
        assert!(config["use_dora"] == true || config["fine_tune_type"] == "dora", "{config}");
    }
    Peft::new().dora().with(json!({"use_dora": false})).refused(&["layers.0.mlp.up_proj has magnitudes"]);
    Peft::new().with(json!({"use_dora": true})).refused(&["layers.1.self_attn.q_proj has no magnitudes"]);

    let mut peft = Peft::new().with(json!({"modules_to_save": ["embed_tokens", "lm_head"]}));
    peft.refused(&["modules_to_save embed_tokens has no tensor", "modules_to_save lm_head"]);
    for name in ["model.embed_tokens.weight", "lm_head.modules_to_save.default.weight"] {
        let tensor = common::random(&[4, 32], DType::BF16, 5);
        peft.tensors.insert(format!("base_model.model.{name}"), tensor);
    }
    let file = peft.load().unwrap();
    assert!(file.saved.keys().eq(["lm_head.weight", "model.embed_tokens.weight"]), "{:?}", file.saved.keys());
    let (again, config) = through(&file, Form::Peft);
    assert_eq!(config["modules_to_save"], json!(["lm_head", "model.embed_tokens"]));
    assert_eq!(again.saved["lm_head.weight"].dtype(), DType::BF16);
    assert_eq!(common::f64s(&again.saved["lm_head.weight"]), common::f64s(&file.saved["lm_head.weight"]));
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    refused(file.save_as(Form::Mlx, &output), &["lm_head.weight was trained whole", "model.embed_tokens.weight"]);
    assert!(!output.exists());

    // PEFT compares letters: `norm` ends `input_layernorm`.
    let mut norms = Peft::new().with(json!({"modules_to_save": ["norm"]}));
    norms.tensors.insert(
        "base_model.model.model.layers.0.input_layernorm.weight".to_string(),
        Tensor::new(&[1f32], &Device::Cpu).unwrap(),
    );
    assert!(norms.load().unwrap().saved.contains_key("model.layers.0.input_layernorm.weight"));

    let (model, mut decoder) = tiny();
    let base = logits(&decoder);
    refused(file.attach(&mut decoder, &Device::Cpu), &["lm_head.weight is [", "model.embed_tokens.weight is ["]);
    assert!(model.config.num_layers == 2 && decoder.linears().all(|(_, linear)| linear.adapter.is_none()));
    assert_eq!(logits(&decoder), base);

    // Tied tensors that were trained apart stand apart: a head that is the base's changes nothing.
    assert!(model.config.tie_word_embeddings);
    common::tiny::write_model(&output, 1);
    let weights = candle_core::safetensors::load(output.join("model.safetensors"), &Device::Cpu).unwrap();
    let embedding = &weights["model.embed_tokens.weight"];
    let none = AdapterFile::new("model", 2, 0.0, BTreeMap::new());
    for (name, scale, changes) in [
        ("lm_head.weight", 1.0, false),
        ("lm_head.weight", 2.0, true),
        ("model.embed_tokens.weight", 1.0, false),
        ("model.embed_tokens.weight", 2.0, true),
    ] {
        let mut one = none.clone();
        one.saved.insert(name.to_string(), (embedding * scale).unwrap());
        one.attach(&mut decoder, &Device::Cpu).unwrap();
        assert_eq!(logits(&decoder) != base, changes, "{name} times {scale}");
    }
    none.attach(&mut decoder, &Device::Cpu).unwrap();
    assert_eq!(logits(&decoder), base);
}

/// The tiny model.
fn tiny() -> (ModelFiles, Decoder) {
    let folder = tempfile::tempdir().unwrap();
    common::tiny::write_model(folder.path(), 1);
    let model = ModelFiles::open(folder.path().to_str().unwrap()).unwrap();
    let weights = model.weights(DType::F32, &Device::Cpu).unwrap();
    let decoder = Decoder::new(&model.config, weights, &Device::Cpu).unwrap();
    (model, decoder)
}

fn logits(decoder: &Decoder) -> Vec<f64> {
    let tokens: Vec<u32> = (3..14).collect();
    let batch = Batch { targets: vec![0; tokens.len()], lengths: vec![tokens.len()], tokens };
    common::f64s(&decoder.logits(&batch).unwrap())
}

#[test]
fn a_model_answers_the_same_whatever_the_form() {
    let (_, mut decoder) = tiny();
    let base = logits(&decoder);
    let mut peft = Peft::new().with(json!({"rank_pattern": {"up_proj": 5}, "alpha_pattern": {"q_proj": 2}}));
    peft.put(0, UP, 5);
    peft.put(1, UP, 5);
    let file = peft.load().unwrap();
    file.attach(&mut decoder, &Device::Cpu).unwrap();
    let adapted = logits(&decoder);
    assert_ne!(base, adapted);
    for form in [Form::Mlx, Form::Peft] {
        through(&file, form).0.attach(&mut decoder, &Device::Cpu).unwrap();
        for (one, other) in adapted.iter().zip(logits(&decoder)) {
            assert!((one - other).abs() < 1e-4, "{form:?}: {one} {other}");
        }
    }
}

#[test]
fn what_does_not_fit_the_model_is_named_at_once() {
    let (_, mut decoder) = tiny();
    let mut peft = Peft::new().with(json!({"target_modules": ["q_proj", "up_proj", "fc"]}));
    peft.tensors.retain(|name, _| !name.contains("layers.1.mlp"));
    let (a, b) = pair(UP, 3, 1);
    for (part, tensor) in [("A", a), ("B", b)] {
        peft.tensors.insert(format!("model.layers.1.mlp.fc.lora_{part}.weight"), tensor.clone());
        peft.tensors.insert(format!("model.layers.1.self_attn.q_proj.lora_{part}.weight"), tensor);
    }
    peft.tensors.retain(|name, _| !name.starts_with("base_model.model.model.layers.1.self_attn"));
    refused(
        peft.load().unwrap().attach(&mut decoder, &Device::Cpu),
        &[
            "the model has no linear model.layers.1.mlp.fc",
            "model.layers.1.self_attn.q_proj goes from 32 to 32, the adapter's from 32 to 48",
            "model.layers.1.mlp.up_proj is a target of it and has no tensor",
        ],
    );
}

/// An MLX folder with q_proj and up_proj of the last `layers`.
fn mlx(layers: &[usize], config: Value) -> metal_candle::Result<AdapterFile> {
    let mut tensors = HashMap::new();
    for &layer in layers {
        for (name, _) in SIZES {
            let (a, b) = pair(name, 3, layer as u64);
            for (part, tensor) in [("a", a), ("b", b)] {
                let name = format!("{}.lora_{part}", path(layer, name));
                tensors.insert(name, tensor.t().unwrap().contiguous().unwrap());
            }
        }
    }
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), "adapters.safetensors", &config, &tensors);
    AdapterFile::load(folder.path())
}

fn mlx_config(num_layers: i64, keys: Value) -> Value {
    json!({"model": "base", "num_layers": num_layers, "fine_tune_type": "lora", "iters": 100, "data": "data",
           "lora_parameters": {"rank": 3, "scale": 20.0, "dropout": 0.0, "keys": keys}})
}

#[test]
fn mlx_scale_multiplies_and_blocks_count_from_the_last() {
    let file = mlx(&[1], mlx_config(1, json!([Q, UP]))).unwrap();
    assert_eq!((file.modules.len(), file.base_model.as_deref()), (2, Some("base")));
    let q = &file.modules[&path(1, Q)];
    assert_eq!((q.scaling, q.alpha(), q.sizes()), (20.0, 60.0, (32, 32)));
    let (_, mut decoder) = tiny();
    file.attach(&mut decoder, &Device::Cpu).unwrap();
    let (peft, config) = through(&file, Form::Peft);
    assert_same(&file, &peft, 0.0);
    assert_eq!(
        (&config["layers_to_transform"], &config["r"], &config["lora_alpha"]),
        (&json!([1]), &3.into(), &60.into())
    );
    // Through PEFT, which does not count from the last, whole paths are what is certain.
    let (again, config) = through(&peft, Form::Mlx);
    assert_same(&file, &again, 0.0);
    assert_eq!(config["lora_parameters"]["keys"], json!([path(1, UP), path(1, Q)]));
    let (same, config) = through(&file, Form::Mlx);
    assert_same(&file, &same, 0.0);
    assert_eq!((&config["num_layers"], &config["lora_parameters"]["keys"]), (&json!(1), &json!([UP, Q])));
}

#[test]
fn mlx_faults_are_named_at_once() {
    let error = mlx(&[1], mlx_config(1, json!([Q, "self_attn.v_proj", "self_attn.o_proj"])));
    refused(
        error,
        &["model.layers.1.mlp.up_proj is none of the modules", "self_attn.v_proj has", "self_attn.o_proj has"],
    );
    let mut config = mlx_config(1, json!("q_proj"));
    config["lora_parameters"]["alpha"] = 3.into();
    config["lora_parameters"]["rank"] = 0.into();
    config["fine_tune_type"] = "full".into();
    config.as_object_mut().unwrap().remove("num_layers");
    refused(
        mlx(&[1], config),
        &["alpha, which is not known", "rank is 0", "\"full\"", "num_layers is missing", "keys is"],
    );
    let (_, mut decoder) = tiny();
    let file = mlx(&[0, 1], mlx_config(1, json!([Q, UP]))).unwrap();
    refused(
        file.attach(&mut decoder, &Device::Cpu),
        &["model.layers.0.mlp.up_proj is not in the blocks", "layers.0.self_attn"],
    );
    let file = mlx(&[1], mlx_config(2, json!([Q, UP]))).unwrap();
    refused(file.attach(&mut decoder, &Device::Cpu), &["model.layers.0.mlp.up_proj is a target", "layers.0.self_attn"]);
    refused(mlx(&[], mlx_config(1, Value::Null)), &["no adapter's tensors"]);
    let file = mlx(&[1], mlx_config(1, Value::Null)).unwrap();
    refused(file.attach(&mut decoder, &Device::Cpu), &["model.layers.1.self_attn.v_proj is a target"]);
}

/// Both files of both forms, with all that they can hold.
fn both_forms() -> [(&'static str, tempfile::TempDir); 2] {
    let peft = Peft::new().dora().with(json!({"rank_pattern": {"q_proj": 3}, "layers_to_transform": [0, 1]}));
    let file = peft.load().unwrap();
    [("adapter_model.safetensors", Form::Peft), ("adapters.safetensors", Form::Mlx)].map(|(name, form)| {
        let folder = tempfile::tempdir().unwrap();
        file.save_as(form, folder.path()).unwrap();
        (name, folder)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Damaged files are refused or read, and what is read can be held against a model; nothing panics.
    #[test]
    fn damaged_files_do_not_panic(
        form in 0..2usize,
        config in any::<bool>(),
        damage in proptest::collection::vec((0..2_000usize, prop_oneof![
            proptest::collection::vec(any::<u8>(), 1..6),
            Just(b"null".to_vec()), Just(b"[]".to_vec()), Just(b"-1".to_vec()), Just(b"1e999".to_vec()), Just(b"99999999".to_vec()),
        ]), 1..4),
    ) {
        let (tensors, folder) = &both_forms()[form];
        let path = folder.path().join(if config { "adapter_config.json" } else { tensors });
        let mut bytes = fs::read(&path).unwrap();
        for (at, new) in damage {
            let at = at % bytes.len();
            let end = (at + new.len()).min(bytes.len());
            bytes.splice(at..end, new);
        }
        fs::write(&path, bytes).unwrap();
        if let Ok(file) = AdapterFile::load(folder.path()) {
            static MODEL: OnceLock<ModelConfig> = OnceLock::new();
            let _ = file.check_fits(MODEL.get_or_init(|| tiny().0.config));
            for form in [Form::Peft, Form::Mlx] {
                let out = tempfile::tempdir().unwrap();
                let _ = file.save_as(form, out.path());
            }
        }
    }
}
