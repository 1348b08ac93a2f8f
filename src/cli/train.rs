//! `metal-candle train`.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::{Args, ValueEnum};
use metal_candle::models::ModelFiles;
use metal_candle::training::dataset::{self, Dataset, DatasetOptions};
use metal_candle::training::options::FineTuneType;
use metal_candle::training::trainer::{From, Summary, Trainer, evaluate};
use metal_candle::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};

use super::device::{DeviceKind, DtypeKind, QuantizeKind};
use super::display::Display;
use super::settings::{ReportTo, Reporter, Settings};
use super::tensorboard::TensorBoard;
use super::{Outcome, demo, plan};

/// Fine-tune a model; without arguments, the one that ships with the program
///
/// Every option but --config and --dry-run can stand in the configuration file under its name with `_` for `-`; a flag
/// goes over the file, the file over the default. A step takes batch-size · grad-accumulation-steps rows.
#[derive(Args)]
pub struct Train {
    /// A YAML file with these options
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the options that the run would have, the memory that it takes and its largest batch, and stop
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    flags: Flags,
}

/// The options of a run; only those that were given are merged over the file.
#[derive(Args, Serialize)]
struct Flags {
    /// A folder, a GGUF file, or the name of a model on the hub
    #[arg(long, help_heading = "Model and data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<String>,
    /// A folder with train.jsonl (and valid.jsonl, test.jsonl), or a JSONL file
    #[arg(long, value_name = "PATH", help_heading = "Model and data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<PathBuf>,
    /// The folder of the adapter, its checkpoints and metrics [default: adapters]
    #[arg(long, value_name = "FOLDER", help_heading = "Model and data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter_path: Option<PathBuf>,
    /// Train on the assistant's turns or the completion alone
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", help_heading = "Model and data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    mask_prompt: Option<bool>,
    /// Cut rows at this many tokens [default: 2048]
    #[arg(long, value_name = "TOKENS", help_heading = "Model and data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_seq_length: Option<usize>,
    /// Where to compute [default: auto]
    #[arg(long, value_name = "DEVICE", help_heading = "Model and data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceKind>,
    /// What the frozen weights are held in; auto: f32 on the CPU; on a GPU f32 where the file has that, else bf16 [default: auto]
    #[arg(long, value_name = "DTYPE", help_heading = "Model and data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<DtypeKind>,
    /// Which of the frozen weights are quantized [default: auto]
    #[arg(long, value_name = "KIND", help_heading = "Model and data")]
    #[serde(skip_serializing_if = "Option::is_none")]
    quantize: Option<QuantizeKind>,

    /// Train adapters or all weights [default: lora]
    #[arg(long, value_name = "TYPE", help_heading = "Adapter")]
    #[serde(skip_serializing_if = "Option::is_none")]
    fine_tune_type: Option<FineTune>,
    /// Rank of the adapters [default: 8]
    #[arg(long, value_name = "R", help_heading = "Adapter")]
    #[serde(skip_serializing_if = "Option::is_none")]
    rank: Option<usize>,
    /// The adapters are scaled by alpha / rank, or with --use-rslora by alpha / √rank [default: 16]
    #[arg(long, help_heading = "Adapter")]
    #[serde(skip_serializing_if = "Option::is_none")]
    alpha: Option<f64>,
    /// Scale by alpha / √rank, which keeps the step's size at high ranks
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", help_heading = "Adapter")]
    #[serde(skip_serializing_if = "Option::is_none")]
    use_rslora: Option<bool>,
    /// How the adapters begin [default: default]
    #[arg(long, value_name = "KIND", help_heading = "Adapter")]
    #[serde(skip_serializing_if = "Option::is_none")]
    init_lora_weights: Option<Initial>,
    /// Dropout on the adapters' input [default: 0]
    #[arg(long, value_name = "P", help_heading = "Adapter")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dropout: Option<f32>,
    /// Linears that get adapters, by name, separated by commas [default: all-linear]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "Adapter")]
    #[serde(skip_serializing_if = "Option::is_none")]
    target_modules: Option<Vec<String>>,
    /// Blocks that get adapters, counted from the last; -1 for all [default: -1]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Adapter")]
    #[serde(skip_serializing_if = "Option::is_none")]
    num_layers: Option<i64>,

    /// Rows in a pass [default: 4]
    #[arg(long, value_name = "ROWS", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    batch_size: Option<usize>,
    /// Passes in a step, weighted by their tokens [default: 1]
    #[arg(long, value_name = "N", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    grad_accumulation_steps: Option<usize>,
    /// Steps [default: 1000]
    #[arg(long, value_name = "STEPS", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    iters: Option<usize>,
    /// Passes over the data, in place of --iters
    #[arg(long, value_name = "N", conflicts_with = "iters", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    epochs: Option<f64>,
    /// The full learning rate [default: 2e-4]
    #[arg(long, value_name = "RATE", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    learning_rate: Option<f64>,
    /// LoRA+: B is trained at so many times the learning rate of A; 16 is usual [default: 1]
    #[arg(long, value_name = "RATIO", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    loraplus_ratio: Option<f64>,
    /// What follows the warm-up [default: cosine]
    #[arg(long, value_name = "KIND", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    lr_schedule: Option<Schedule>,
    /// Steps of linear warm-up [default: 10]
    #[arg(long, value_name = "STEPS", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    warmup: Option<usize>,
    /// The last learning rate as a share of the full one [default: 0.1]
    #[arg(long, value_name = "SHARE", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    min_lr_ratio: Option<f64>,
    /// AdamW's weight decay [default: 0.01]
    #[arg(long, value_name = "DECAY", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_decay: Option<f64>,
    /// Clip the gradient's norm to this; 0 for no clipping [default: 1]
    #[arg(long, value_name = "NORM", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    max_grad_norm: Option<f64>,
    /// Keep only the input of blocks for backward, which computes them again: less memory for up to a third more work [default: auto]
    #[arg(long, value_name = "BLOCKS", num_args = 0..=1, default_missing_value = "every", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    grad_checkpoint: Option<Recompute>,
    /// Fill a pass with as many whole rows as batch-size · max-seq-length tokens hold; rows do not see each other
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pack: Option<bool>,
    /// Seeds the initial adapters, the order of rows and dropout [default: 0]
    #[arg(long, help_heading = "Training")]
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,

    /// Steps between reports [default: 10]
    #[arg(long, value_name = "STEPS", help_heading = "Reports and checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    steps_per_report: Option<usize>,
    /// Write event files for TensorBoard into `runs` of the adapter's folder: tensorboard, or none [default: none]
    #[arg(long, value_name = "NAMES", help_heading = "Reports and checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    report_to: Option<ReportTo>,
    /// Steps between validations [default: 200]
    #[arg(long, value_name = "STEPS", help_heading = "Reports and checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    steps_per_eval: Option<usize>,
    /// Batches of a validation; -1 for all [default: 25]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Reports and checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    val_batches: Option<i64>,
    /// Evaluate on test.jsonl at the end
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", help_heading = "Reports and checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    test: Option<bool>,
    /// Steps between checkpoints [default: 100]
    #[arg(long, value_name = "STEPS", help_heading = "Reports and checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    save_every: Option<usize>,
    /// Continue the run in the adapter's folder from its newest checkpoint
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true", help_heading = "Reports and checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    resume: Option<bool>,
    /// Start a new run from the values of this adapter
    #[arg(long, value_name = "FOLDER", conflicts_with = "resume", help_heading = "Reports and checkpoints")]
    #[serde(skip_serializing_if = "Option::is_none")]
    resume_adapter_file: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum FineTune {
    /// Low-rank adapters on frozen weights
    Lora,
    /// Low-rank adapters and a length for each row of the adapted weight
    Dora,
    /// Every weight
    Full,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Initial {
    /// A uniform within ±1/√k, B zero
    Default,
    /// A normal with deviation 1/r, B zero
    Gaussian,
    /// The largest singular values of each weight, which keeps the rest
    Pissa,
    /// The first columns and rows of each weight's QR, which keeps the rest
    Olora,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Recompute {
    /// Of no block
    #[value(alias = "false")]
    None,
    /// Of all blocks
    #[value(alias = "true")]
    Every,
    /// Of as few as the free memory asks for
    Auto,
}

#[derive(Clone, Copy, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Schedule {
    /// Stays at the full rate
    Constant,
    /// Falls in a line
    Linear,
    /// Falls along half a cosine
    Cosine,
}

impl Train {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        let flags = match serde_json::to_value(&self.flags)? {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        let bare = self.config.is_none() && !flags.contains_key("model") && !flags.contains_key("data");
        let settings = if bare { demo::settings(flags)? } else { Settings::merge(flags, self.config.as_deref())? };
        settings.trainer.check()?;
        if self.dry_run {
            // Of the demo's files none is there before its first run.
            let place = if bare { Some(demo::unpacked()?) } else { None };
            let memory = match &place {
                Some(place) => plan::describe(&demo::settings_in(&settings, place.path()))?,
                None => plan::describe(&settings)?,
            };
            print!("{}{memory}", settings.to_yaml());
            return Ok(());
        }
        if bare {
            return demo::run(&settings);
        }
        run(&settings, &interrupt_flag(Some(FINISHING))).map(drop)
    }
}

/// What the first Ctrl-C of a training run says.
pub const FINISHING: &str = "finishing this step and writing a checkpoint; Ctrl-C again to stop at once";

/// One training run with its reports; returns what it came to.
pub fn run(settings: &Settings, interrupted: &AtomicBool) -> Result<Summary, Box<dyn std::error::Error>> {
    let run = &settings.run;
    let missing = |key: &str| Error::setting(format!("--{key}"), "is needed, as a flag or in the configuration file");
    let device = run.device.open()?;
    let model = ModelFiles::open(run.model.as_deref().ok_or_else(|| missing("model"))?)?;
    if settings.trainer.fine_tune_type == FineTuneType::Full {
        model.check_can_save()?;
    }
    let data = run.data.as_deref().ok_or_else(|| missing("data"))?;
    let options = DatasetOptions {
        max_seq_length: row_length(&model, settings.trainer.max_seq_length),
        mask_prompt: run.mask_prompt,
    };
    let mut display = Display::new(&run.adapter_path)?;
    let splits = load_splits(data, &model, &options, &mut display, run.test)?;
    let train = splits.get("train").ok_or_else(|| Error::file(data, "has no train.jsonl"))?;
    let from = match (&run.resume, &run.resume_adapter_file) {
        (true, _) => From::Checkpoint,
        (false, Some(path)) => From::Adapter(path.clone()),
        (false, None) => From::Scratch,
    };
    let valid = splits.get("valid");
    let mut trainer = Trainer::new(&model, train, valid, settings.trainer.clone(), &run.adapter_path, from, &device)?;
    if run.report_to.0.contains(&Reporter::TensorBoard) {
        display.report_to(TensorBoard::create(&run.adapter_path)?);
    }
    let summary = trainer.run(&mut |event| {
        display.show(&event);
        if interrupted.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    display.finish(&summary)?;
    if let Some(test) = splits.get("test").filter(|_| summary.step == summary.total) {
        let loss = evaluate(trainer.decoder(), &test.rows, settings.trainer.batch_size, usize::MAX)?;
        println!("test loss {:.4}, perplexity {:.3}, over {} tokens", loss.mean(), loss.mean().exp(), loss.count);
    }
    Ok(summary)
}

/// Set by Ctrl-C. With a message the first Ctrl-C prints it and the second ends the program at once.
pub fn interrupt_flag(message: Option<&'static str>) -> Arc<AtomicBool> {
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    let installed = ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        if let Some(message) = message {
            eprintln!("\n{message}");
        }
    });
    if let Err(error) = installed {
        tracing::warn!("Ctrl-C will end the program at once: {error}");
    }
    flag
}

/// Rows are cut at the model's context where `max_seq_length` is over it.
pub fn row_length(model: &ModelFiles, length: usize) -> usize {
    let limit = model.config.max_position_embeddings;
    if length > limit {
        tracing::warn!("max_seq_length {length} is over the model's context: rows are cut at {limit} tokens");
    }
    length.min(limit)
}

fn load_splits(
    data: &Path,
    model: &ModelFiles,
    options: &DatasetOptions,
    display: &mut Display,
    test: bool,
) -> Result<BTreeMap<&'static str, Dataset>> {
    if !data.exists() {
        return Err(Error::file(data, "does not exist; --data takes a folder with train.jsonl, or a JSONL file"));
    }
    let mut splits = BTreeMap::new();
    for name in ["train", "valid", "test"].into_iter().filter(|name| test || *name != "test") {
        let Some(path) = dataset::split(data, name) else { continue };
        let loaded = Dataset::load(std::slice::from_ref(&path), &model.tokenizer, options)?;
        display.dataset(&path, &loaded.report);
        splits.insert(name, loaded);
    }
    if test && !splits.contains_key("test") {
        return Err(Error::file(data, "has no test.jsonl, which --test evaluates on"));
    }
    Ok(splits)
}
