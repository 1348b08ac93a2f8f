//! What every variant of an adapter promises: a run begins with the base model's answers, its adapter gives the base what the run has, and
//! a run that was stopped goes on to the same bytes.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use metal_candle::inference::AdapterRegistry;
use metal_candle::models::ModelFiles;
use metal_candle::models::decoder::{Batch, Decoder};
use metal_candle::training::adapter::{AdapterFile, Form};
use metal_candle::training::dataset::{Dataset, DatasetOptions};
use metal_candle::training::options::{FineTuneType, GradCheckpoint, InitLoraWeights, TrainerOptions};
use metal_candle::training::trainer::{From, Trainer};

struct Setup {
    folder: tempfile::TempDir,
    model: ModelFiles,
    data: Dataset,
}

impl Setup {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        common::tiny::write_model(&path, 5);
        let model = ModelFiles::open(path.to_str().unwrap()).unwrap();
        let rows = folder.path().join("train.jsonl");
        let row = |i: usize| format!("{{\"prompt\": \"row {i} of\", \"completion\": \"value {}\"}}\n", i * i);
        fs::write(&rows, (0..12).map(row).collect::<String>()).unwrap();
        let options = DatasetOptions { max_seq_length: 64, mask_prompt: true };
        let data = Dataset::load(&[rows], &model.tokenizer, &options).unwrap();
        Self { folder, model, data }
    }

    fn adapter(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn trainer(&self, name: &str, options: &TrainerOptions, from: From) -> metal_candle::Result<Trainer<'_>> {
        Trainer::new(&self.model, &self.data, None, options.clone(), &self.adapter(name), from, &Device::Cpu)
    }

    fn base(&self) -> Decoder {
        Decoder::new(&self.model.config, self.model.weights(DType::F32, &Device::Cpu).unwrap(), &Device::Cpu).unwrap()
    }

    fn logits(&self, decoder: &Decoder) -> Vec<f64> {
        let tokens: Vec<u32> = (0..24).map(|i| i * 17 % self.model.config.vocab_size as u32).collect();
        let batch = Batch { targets: tokens.clone(), lengths: vec![tokens.len()], tokens };
        common::f64s(&decoder.logits(&batch).unwrap())
    }
}

fn distance(got: &[f64], want: &[f64]) -> f64 {
    let largest = want.iter().fold(0.0f64, |most, value| most.max(value.abs()));
    got.iter().zip(want).fold(0.0f64, |most, (got, want)| most.max((got - want).abs())) / largest
}

fn bytes(folder: &Path) -> Vec<u8> {
    fs::read(folder.join("adapter_model.safetensors")).unwrap()
}

/// alpha is not the rank, and the last case has all at once.
fn variants() -> Vec<(&'static str, TrainerOptions)> {
    let base = TrainerOptions {
        rank: 3,
        alpha: 5.0,
        iters: 8,
        warmup: 0,
        save_every: 4,
        learning_rate: 0.01,
        batch_size: 3,
        ..Default::default()
    };
    let with = |change: &dyn Fn(&mut TrainerOptions)| {
        let mut options = base.clone();
        change(&mut options);
        options
    };
    vec![
        ("lora", base.clone()),
        ("rslora", with(&|options| options.use_rslora = true)),
        ("gaussian", with(&|options| options.init_lora_weights = InitLoraWeights::Gaussian)),
        ("loraplus", with(&|options| options.loraplus_ratio = 4.0)),
        ("dora", with(&|options| options.fine_tune_type = FineTuneType::Dora)),
        ("pissa", with(&|options| options.init_lora_weights = InitLoraWeights::Pissa)),
        ("olora", with(&|options| options.init_lora_weights = InitLoraWeights::Olora)),
        (
            "all",
            with(&|options| {
                options.fine_tune_type = FineTuneType::Dora;
                options.init_lora_weights = InitLoraWeights::Pissa;
                options.use_rslora = true;
                options.loraplus_ratio = 2.0;
                options.dropout = 0.1;
                options.target_modules = vec!["q_proj".into(), "down_proj".into()];
            }),
        ),
    ]
}

#[test]
fn every_variant_starts_at_the_base_and_ends_in_its_file() {
    let setup = Setup::new();
    let base = setup.logits(&setup.base());
    for (name, options) in variants() {
        let mut trainer = setup.trainer(name, &options, From::Scratch).unwrap();
        let start = distance(&setup.logits(trainer.decoder()), &base);
        assert!(start < 2e-5, "{name}: logits begin {start} away from the base's");
        trainer.run(&mut |_| ControlFlow::Continue(())).unwrap();
        let trained = setup.logits(trainer.decoder());
        assert!(distance(&trained, &base) > 1e-2, "{name} learnt nothing");
        let file = AdapterFile::load(&setup.adapter(name)).unwrap();
        let dora = options.fine_tune_type == FineTuneType::Dora;
        assert!(file.modules.values().all(|module| module.magnitude.is_some() == dora), "{name}");
        let mut decoder = setup.base();
        file.attach(&mut decoder, &Device::Cpu).unwrap();
        let end = distance(&setup.logits(&decoder), &trained);
        assert!(end < 2e-5, "{name}: from its file logits are {end} away from the run's");
        // MLX's form holds the same.
        let mlx = setup.adapter(&format!("{name}-mlx"));
        fs::create_dir(&mlx).unwrap();
        file.save_as(Form::Mlx, &mlx).unwrap();
        AdapterFile::load(&mlx).unwrap().attach(&mut decoder, &Device::Cpu).unwrap();
        let end = distance(&setup.logits(&decoder), &trained);
        assert!(end < 2e-5, "{name}: from MLX's form logits are {end} away from the run's");
    }
}

#[test]
fn a_stopped_run_of_every_variant_goes_on_to_the_same_bytes() {
    let setup = Setup::new();
    for (name, options) in variants() {
        let whole = format!("{name}-whole");
        setup.trainer(&whole, &options, From::Scratch).unwrap().run(&mut |_| ControlFlow::Continue(())).unwrap();
        let mut steps = 0;
        let mut trainer = setup.trainer(name, &options, From::Scratch).unwrap();
        let mut stop_after_five = |event| {
            steps += usize::from(matches!(event, metal_candle::training::trainer::Event::Step { .. }));
            if steps == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        trainer.run(&mut stop_after_five).unwrap();
        drop(trainer);
        assert_ne!(bytes(&setup.adapter(name)), bytes(&setup.adapter(&whole)), "{name}");
        let mut trainer = setup.trainer(name, &options, From::Checkpoint).unwrap();
        trainer.run(&mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(bytes(&setup.adapter(name)), bytes(&setup.adapter(&whole)), "{name}");
    }
}

#[test]
fn checkpointing_changes_no_bit_of_dora() {
    let setup = Setup::new();
    let mut options = variants().into_iter().find(|(name, _)| *name == "all").unwrap().1;
    for (name, grad_checkpoint) in [("kept", GradCheckpoint::None), ("again", GradCheckpoint::Every)] {
        options.grad_checkpoint = grad_checkpoint;
        setup.trainer(name, &options, From::Scratch).unwrap().run(&mut |_| ControlFlow::Continue(())).unwrap();
    }
    assert_eq!(bytes(&setup.adapter("kept")), bytes(&setup.adapter("again")));
}

#[test]
fn a_run_starts_from_an_adapter_of_its_kind_only() {
    let setup = Setup::new();
    let of = |name: &str| variants().into_iter().find(|(known, _)| *known == name).unwrap().1;
    for name in ["lora", "dora"] {
        setup.trainer(name, &of(name), From::Scratch).unwrap().run(&mut |_| ControlFlow::Continue(())).unwrap();
    }
    let from = |name: &str| From::Adapter(setup.adapter(name));
    let trained = {
        let mut decoder = setup.base();
        AdapterFile::load(&setup.adapter("dora")).unwrap().attach(&mut decoder, &Device::Cpu).unwrap();
        setup.logits(&decoder)
    };
    let trainer = setup.trainer("next", &of("dora"), from("dora")).unwrap();
    assert!(distance(&setup.logits(trainer.decoder()), &trained) < 2e-5);
    for (options, file, word) in [
        ("lora", "dora", "fine_tune_type dora"),
        ("dora", "lora", "magnitudes"),
        ("pissa", "lora", "init_lora_weights"),
    ] {
        let text = setup.trainer("none", &of(options), from(file)).err().unwrap().to_string();
        assert!(text.contains(word) && text.contains("resume_adapter_file"), "{text}");
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let setup = Setup::new();
    let refused = |change: &dyn Fn(&mut TrainerOptions), words: &[&str]| {
        let mut options = TrainerOptions { iters: 1, ..Default::default() };
        change(&mut options);
        let text = setup.trainer("none", &options, From::Scratch).err().unwrap().to_string();
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    refused(
        &|options| {
            options.fine_tune_type = FineTuneType::Full;
            options.loraplus_ratio = 16.0;
            options.init_lora_weights = InitLoraWeights::Olora;
        },
        &["loraplus_ratio", "init_lora_weights", "full"],
    );
    refused(&|options| options.loraplus_ratio = 0.0, &["loraplus_ratio"]);
    refused(
        &|options| {
            options.init_lora_weights = InitLoraWeights::Pissa;
            options.quantize = metal_candle::backend::quantized::Quantize::Q8_0;
        },
        &["pissa", "quantize"],
    );
    refused(
        &|options| {
            options.init_lora_weights = InitLoraWeights::Olora;
            options.rank = 1000;
        },
        &["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "rank"],
    );
}

/// Whole tensors and DoRA's scales come and go with their adapter.
#[test]
fn a_registry_switches_variants_and_whole_tensors() {
    let setup = Setup::new();
    let base = setup.logits(&setup.base());
    let options = variants().into_iter().find(|(name, _)| *name == "dora").unwrap().1;
    setup.trainer("dora", &options, From::Scratch).unwrap().run(&mut |_| ControlFlow::Continue(())).unwrap();
    let dora = AdapterFile::load(&setup.adapter("dora")).unwrap();
    let mut whole = dora.clone();
    let weights = setup.model.weights(DType::F32, &Device::Cpu).unwrap();
    let changed = |name: &str| (name.to_string(), (&weights[name] * 1.25).unwrap());
    whole.saved.extend(
        ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.k_proj.weight"].map(changed),
    );
    let alone = |file: &AdapterFile| {
        let mut decoder = setup.base();
        file.attach(&mut decoder, &Device::Cpu).unwrap();
        setup.logits(&decoder)
    };
    let (of_dora, of_whole) = (alone(&dora), alone(&whole));
    assert!(distance(&of_whole, &of_dora) > 1e-2 && distance(&of_dora, &base) > 1e-2);
    let mut registry = AdapterRegistry::new(setup.base()).unwrap();
    registry.add("whole", &whole).unwrap();
    registry.activate(Some("whole")).unwrap();
    // The base's own weights decide DoRA's scales, whatever is active.
    registry.add("dora", &dora).unwrap();
    assert_eq!(registry.active(), Some("whole"));
    for (name, want) in
        [(Some("whole"), &of_whole), (Some("dora"), &of_dora), (None, &base), (Some("whole"), &of_whole), (None, &base)]
    {
        registry.activate(name).unwrap();
        assert_eq!(&setup.logits(registry.decoder()), want, "{name:?}");
    }
    let mut unknown = dora.clone();
    unknown
        .saved
        .insert("model.layers.9.mlp.up_proj.weight".into(), Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap());
    unknown.saved.insert("lm_head.weight".into(), Tensor::zeros((2, 2), DType::F32, &Device::Cpu).unwrap());
    let text = registry.add("unknown", &unknown).unwrap_err().to_string();
    assert!(text.contains("model.layers.9.mlp.up_proj.weight") && text.contains("lm_head.weight"), "{text}");
    assert_eq!(setup.logits(registry.decoder()), base);
}
