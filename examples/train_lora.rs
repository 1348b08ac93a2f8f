//! Fine-tunes a model with LoRA through the library, in a page.
//!
//! `cargo run --release --example train_lora -- MODEL DATA` takes a model folder, GGUF file or hub name and a folder with
//! `train.jsonl` and, if it likes, `valid.jsonl`. Without arguments it takes the model and data that ship with the crate.

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::Device;
use metal_candle::models::ModelFiles;
use metal_candle::training::dataset::{Dataset, DatasetOptions};
use metal_candle::training::options::TrainerOptions;
use metal_candle::training::trainer::{Event, From, Trainer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/demo");
    let model = ModelFiles::open(&args.next().unwrap_or(format!("{demo}/base")))?;
    let data = args.next().unwrap_or(format!("{demo}/data"));

    let rows = DatasetOptions { max_seq_length: 512, mask_prompt: true };
    let load = |split: &str| Dataset::load(&[Path::new(&data).join(split)], &model.tokenizer, &rows);
    let (train, valid) = (load("train.jsonl")?, load("valid.jsonl")?);

    let options = TrainerOptions {
        rank: 8,
        alpha: 16.0,
        batch_size: 8,
        iters: 60,
        learning_rate: 2e-3,
        steps_per_eval: 30,
        ..TrainerOptions::default()
    };
    let folder = tempfile::tempdir()?;
    let mut trainer = Trainer::new(&model, &train, Some(&valid), options, folder.path(), From::Scratch, &Device::Cpu)?;
    let summary = trainer.run(&mut |event| {
        match event {
            Event::Report(report) => println!("step {:4}  loss {:.4}", report.step, report.loss),
            Event::Validation(now) => println!("step {:4}  validation loss {:.4}", now.step, now.loss),
            Event::Checkpoint { path, .. } => println!("checkpoint {}", path.display()),
            _ => {}
        }
        ControlFlow::Continue(())
    })?;
    println!("{} steps in {:.1} s; the adapter was in {}", summary.step, summary.seconds, folder.path().display());
    Ok(())
}
