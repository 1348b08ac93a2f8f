//! What a training run promises: the same gradients however rows are put together, the same bits for one seed, and no run
//! that goes on while it learns nothing.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use metal_candle::models::ModelFiles;
use metal_candle::models::decoder::{Batch, Checkpointing, Decoder, TrainPass};
use metal_candle::models::linear::DropoutRound;
use metal_candle::training::adapter::{AdapterFile, Module};
use metal_candle::training::checkpoint;
use metal_candle::training::dataset::{Dataset, DatasetOptions};
use metal_candle::training::options::{FineTuneType, GradCheckpoint, TrainerOptions};
use metal_candle::training::params::Params;
use metal_candle::training::sampler::collate;
use metal_candle::training::trainer::{Event, From, Summary, Trainer, largest_pass};

struct Setup {
    folder: tempfile::TempDir,
    model: ModelFiles,
    data: Dataset,
}

impl Setup {
    fn new() -> Self {
        Self::with_weights(|_, tensor| tensor)
    }

    /// A tiny model whose weights went through `change`.
    fn with_weights(change: impl Fn(&str, Tensor) -> Tensor) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        common::tiny::write_model(&path, 5);
        let weights = path.join("model.safetensors");
        let changed = candle_core::safetensors::load(&weights, &Device::Cpu).unwrap().into_iter();
        let changed = changed.map(|(name, tensor)| (name.clone(), change(&name, tensor))).collect();
        candle_core::safetensors::save(&changed, &weights).unwrap();
        let model = ModelFiles::open(path.to_str().unwrap()).unwrap();

        let rows = folder.path().join("train.jsonl");
        let row = |i: usize| {
            format!("{{\"prompt\": \"row {i}{} of\", \"completion\": \"value {}\"}}\n", " and".repeat(i % 5), i * i)
        };
        fs::write(&rows, (0..12).map(row).collect::<String>()).unwrap();
        let options = DatasetOptions { max_seq_length: 64, mask_prompt: true };
        let data = Dataset::load(&[rows], &model.tokenizer, &options).unwrap();
        Self { folder, model, data }
    }

    fn adapter(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn train(&self, name: &str, options: TrainerOptions) -> metal_candle::Result<Summary> {
        let path = self.adapter(name);
        let mut trainer = Trainer::new(&self.model, &self.data, None, options, &path, From::Scratch, &Device::Cpu)?;
        trainer.run(&mut |_| ControlFlow::Continue(()))
    }

    /// The decoder with adapters whose A and B are not zero, and its gradients' buffers.
    fn trainable(&self) -> (Decoder, Params) {
        self.train("seeded", TrainerOptions { iters: 3, learning_rate: 0.05, ..options() }).unwrap();
        let weights = self.model.weights(DType::F32, &Device::Cpu).unwrap();
        let mut decoder = Decoder::new(&self.model.config, weights, &Device::Cpu).unwrap();
        let file = AdapterFile::load(&self.adapter("seeded")).unwrap();
        file.attach(&mut decoder, &Device::Cpu).unwrap();
        let initial: Vec<(String, Tensor)> = file
            .modules
            .iter()
            .flat_map(|(path, Module { a, b, .. })| {
                [(format!("{path}.a"), a.clone()), (format!("{path}.b"), b.clone())]
            })
            .collect();
        let params = Params::new(&initial, &Device::Cpu).unwrap();
        let adapters: Vec<_> =
            decoder.linears().filter_map(|(path, linear)| Some((path, linear.adapter.clone()?))).collect();
        let named = params.named().unwrap();
        for (path, mut adapter) in adapters {
            let find = |end: &str| named.iter().find(|(name, _)| *name == format!("{path}{end}")).unwrap().1.clone();
            (adapter.a, adapter.b) = (find(".a"), find(".b"));
            decoder.attach(&path, Some(adapter)).unwrap();
        }
        (decoder, params)
    }
}

fn options() -> TrainerOptions {
    TrainerOptions { rank: 3, alpha: 5.0, batch_size: 4, iters: 6, learning_rate: 1e-2, seed: 9, ..Default::default() }
}

fn gradients(decoder: &Decoder, params: &Params, batches: &[Batch]) -> Vec<f64> {
    let counted: usize = batches.iter().map(Batch::counted).sum();
    params.zero_gradients().unwrap();
    for batch in batches {
        let round = DropoutRound { seed: 0, round: 0 };
        let pass = TrainPass { checkpointing: Checkpointing::None, round, scale: 1.0 / counted as f32 };
        decoder.loss_and_gradients(batch, pass).unwrap();
    }
    let named = params.named().unwrap();
    named.iter().flat_map(|(_, parameter)| common::f64s(parameter.grad.as_ref().unwrap())).collect()
}

fn adapter_bytes(path: &Path) -> Vec<u8> {
    fs::read(path.join("adapter_model.safetensors")).unwrap()
}

/// Rows of different lengths and counts: a mean of the passes' means would differ, and so would a row that saw another.
#[test]
fn gradients_do_not_depend_on_how_rows_are_put_together() {
    let setup = Setup::new();
    let (decoder, params) = setup.trainable();
    let rows = &setup.data.rows;
    let whole = gradients(&decoder, &params, &[collate(rows)]);
    assert!(whole.iter().any(|gradient| gradient.abs() > 1e-4));
    for size in [1, 5] {
        let parts: Vec<Batch> = rows.chunks(size).map(collate).collect();
        let counts: Vec<usize> = parts.iter().map(Batch::counted).collect();
        assert!(counts.iter().any(|count| *count != counts[0]), "{counts:?}");
        let error = common::relative_error(&gradients(&decoder, &params, &parts), &whole);
        assert!(error < 1e-5, "passes of {size} rows: gradients differ by {error:.1e}");
    }
}

#[test]
fn one_seed_gives_the_same_bits_and_checkpointing_changes_none() {
    let setup = Setup::new();
    let dropout = TrainerOptions { dropout: 0.2, grad_accumulation_steps: 2, ..options() };
    setup.train("one", dropout.clone()).unwrap();
    setup.train("two", dropout.clone()).unwrap();
    for (name, grad_checkpoint) in [("none", GradCheckpoint::None), ("every", GradCheckpoint::Every)] {
        setup.train(name, TrainerOptions { grad_checkpoint, ..dropout.clone() }).unwrap();
    }
    setup.train("other", TrainerOptions { seed: 10, ..dropout }).unwrap();
    let one = adapter_bytes(&setup.adapter("one"));
    assert_eq!(one, adapter_bytes(&setup.adapter("two")));
    assert_eq!(one, adapter_bytes(&setup.adapter("none")));
    assert_eq!(one, adapter_bytes(&setup.adapter("every")));
    assert_ne!(one, adapter_bytes(&setup.adapter("other")));
}

/// With room for all rows in a pass, a packed epoch is one step over all of them, as one of so many rows is.
#[test]
fn packed_rows_train_as_rows_do() {
    let setup = Setup::new();
    let rows = setup.data.rows.len();
    let by_rows = TrainerOptions { batch_size: rows, iters: 3, ..options() };
    setup.train("rows", by_rows.clone()).unwrap();
    setup.train("packed", TrainerOptions { batch_size: 1, max_seq_length: 4096, pack: true, ..by_rows }).unwrap();
    assert_eq!(adapter_bytes(&setup.adapter("rows")), adapter_bytes(&setup.adapter("packed")));

    let lengths: Vec<usize> = setup.data.rows.iter().map(|row| row.tokens.len()).collect();
    let longest = *lengths.iter().max().unwrap();
    let small = TrainerOptions { batch_size: 1, max_seq_length: 2 * longest, pack: true, ..options() };
    let epochs = TrainerOptions { epochs: Some(2.0), ..small.clone() };
    let steps = epochs.steps(&lengths);
    let least = 2 * lengths.iter().sum::<usize>() / (2 * longest);
    assert!(steps >= least && steps < 2 * rows, "{steps} steps of two epochs, {least} at least");
    assert_eq!(setup.train("epochs", epochs).unwrap().step, steps);
    assert!(largest_pass(&small, &setup.data.rows).tokens <= 2 * longest);
}

#[test]
fn the_loss_falls() {
    let setup = Setup::new();
    let mut losses = Vec::new();
    let many = TrainerOptions { iters: 60, steps_per_report: 1, learning_rate: 2e-2, ..options() };
    let path = setup.adapter("falls");
    let mut trainer = Trainer::new(&setup.model, &setup.data, None, many, &path, From::Scratch, &Device::Cpu).unwrap();
    let summary = trainer.run(&mut |event| {
        if let Event::Report(report) = event {
            losses.push(report.loss);
        }
        ControlFlow::Continue(())
    });
    assert_eq!((summary.unwrap().step, losses.len()), (60, 60));
    assert!(losses[59] < 0.7 * losses[0], "from {} to {}", losses[0], losses[59]);
}

/// With o_proj zero nothing behind it reaches the loss.
#[test]
fn adapters_without_a_gradient_stop_the_run_by_name() {
    let setup = Setup::with_weights(|name, tensor| {
        if name == "model.layers.1.self_attn.o_proj.weight" { tensor.zeros_like().unwrap() } else { tensor }
    });
    let only_qv = TrainerOptions { target_modules: vec!["q_proj".into(), "v_proj".into()], ..options() };
    let message = setup.train("dead", only_qv).unwrap_err().to_string();
    for name in ["step 1", "model.layers.1.self_attn.q_proj.lora_b", "model.layers.1.self_attn.v_proj.lora_b"] {
        assert!(message.contains(name), "{message}");
    }
    assert!(!message.contains("layers.0"), "{message}");
}

#[test]
fn a_loss_that_is_no_number_stops_with_the_rows_and_keeps_the_checkpoint() {
    let setup = Setup::new();
    let wild = TrainerOptions { learning_rate: 1e30, warmup: 0, save_every: 1, max_grad_norm: 0.0, ..options() };
    let message = setup.train("wild", wild).unwrap_err().to_string();
    assert!(message.contains("train.jsonl:") && message.contains("checkpoint of step 1 is kept"), "{message}");
    let kept = checkpoint::list(&setup.adapter("wild")).unwrap();
    let (state, _) = checkpoint::read(&kept[0].1, &Device::Cpu).unwrap();
    assert_eq!(state.step, 1);
}

#[test]
fn a_run_that_was_something_else_is_not_continued() {
    let setup = Setup::new();
    setup.train("first", options()).unwrap();
    let path = setup.adapter("first");
    let message = setup.train("first", options()).unwrap_err().to_string();
    assert!(message.contains("--resume"), "{message}");
    let other = TrainerOptions { rank: 4, learning_rate: 0.5, steps_per_report: 3, ..options() };
    let resumed = Trainer::new(&setup.model, &setup.data, None, other, &path, From::Checkpoint, &Device::Cpu);
    let message = resumed.err().unwrap().to_string();
    assert!(message.contains("rank was 3 and is now 4") && message.contains("learning_rate"), "{message}");
    assert!(!message.contains("steps_per_report"), "{message}");
}

#[test]
fn a_run_can_be_stopped_and_started_from_an_adapter() {
    let setup = Setup::new();
    let path = setup.adapter("stopped");
    let start =
        |from, path: &Path| Trainer::new(&setup.model, &setup.data, None, options(), path, from, &Device::Cpu).unwrap();
    let summary = start(From::Scratch, &path).run(&mut |event| match event {
        Event::Step { step: 2, .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(summary.unwrap().step, 2);
    assert_eq!(checkpoint::list(&path).unwrap().len(), 1);
    let finished = start(From::Checkpoint, &path).run(&mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(finished.step, options().iters);

    let second = setup.adapter("second");
    let trainer = start(From::Adapter(path.clone()), &second);
    let b = AdapterFile::load(&path).unwrap().modules["model.layers.0.self_attn.q_proj"].b.clone();
    let linear = trainer.decoder().linears().find(|(path, _)| path == "model.layers.0.self_attn.q_proj").unwrap().1;
    assert_eq!(common::f64s(&linear.adapter.as_ref().unwrap().b.value), common::f64s(&b));
}

#[test]
fn full_fine_tuning_writes_a_model_that_opens() {
    let setup = Setup::new();
    let full = TrainerOptions { fine_tune_type: FineTuneType::Full, learning_rate: 1e-3, ..options() };
    setup.train("full", full).unwrap();
    let trained = ModelFiles::open(setup.adapter("full").to_str().unwrap()).unwrap();
    let (before, after) =
        (setup.model.weights(DType::F32, &Device::Cpu).unwrap(), trained.weights(DType::F32, &Device::Cpu).unwrap());
    let same: Vec<&String> =
        before.keys().filter(|name| common::f64s(&before[*name]) == common::f64s(&after[*name])).collect();
    assert!(same.is_empty(), "{same:?} did not change");
}
