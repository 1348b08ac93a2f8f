//! `metal-candle train` without a model and data: the ones that ship in the program. A model of 1.8 million values that confirms
//! appointments in prose learns to write them down as JSON.

use std::fs;
use std::path::Path;

use metal_candle::inference::score::{Answer, answers};
use metal_candle::models::ModelFiles;
use metal_candle::models::decoder::Decoder;
use metal_candle::training::adapter::AdapterFile;
use metal_candle::training::dataset::{Dataset, DatasetOptions};
use metal_candle::training::options::FineTuneType;
use metal_candle::{Error, Result};
use serde_json::{Map, Value};

use super::Outcome;
use super::settings::Settings;
use super::train::{self, FINISHING, interrupt_flag};

/// Where everything goes, below the current folder.
const FOLDER: &str = "metal-candle-demo";

/// Path below [`FOLDER`] and content. `scripts/make-demo.sh` made them.
const FILES: &[(&str, &[u8])] = &[
    ("base/config.json", include_bytes!("../../assets/demo/base/config.json")),
    ("base/model.safetensors", include_bytes!("../../assets/demo/base/model.safetensors")),
    ("base/tokenizer.json", include_bytes!("../../assets/demo/base/tokenizer.json")),
    ("base/tokenizer_config.json", include_bytes!("../../assets/demo/base/tokenizer_config.json")),
    ("data/train.jsonl", include_bytes!("../../assets/demo/data/train.jsonl")),
    ("data/valid.jsonl", include_bytes!("../../assets/demo/data/valid.jsonl")),
    ("data/test.jsonl", include_bytes!("../../assets/demo/data/test.jsonl")),
];
const CONFIG: &str = include_str!("../../assets/demo/train.yaml");

/// Answers that are shown before and after.
const SHOWN: usize = 3;
const TRY: &str = "Lunch with Thea at the Maple Castle on 12 May at 12:30 pm, six of us.";

/// The demo's own settings, with `flags` over them.
pub fn settings(flags: Map<String, Value>) -> Result<Settings> {
    Settings::merge_text(flags, Some((&Path::new(FOLDER).join("train.yaml"), &config())))
}

/// The demo's files in a folder that goes with what is returned.
pub fn unpacked() -> Result<tempfile::TempDir> {
    let place = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    unpack(place.path())?;
    Ok(place)
}

/// The settings with the demo's own model and data looked for in another folder.
pub fn settings_in(settings: &Settings, folder: &Path) -> Settings {
    let mut settings = settings.clone();
    settings.run.model = Some(folder.join("base").display().to_string());
    settings.run.data = Some(folder.join("data"));
    settings
}

/// Unpacks, scores, trains, scores again.
pub fn run(settings: &Settings) -> Outcome {
    let folder = Path::new(FOLDER);
    unpack(folder)?;
    let adapter_path = &settings.run.adapter_path;
    if !settings.run.resume && *adapter_path == folder.join("adapter") && adapter_path.exists() {
        println!("replacing the adapter of an earlier demo in {}", adapter_path.display());
        fs::remove_dir_all(adapter_path).map_err(Error::io(adapter_path))?;
    }
    println!("A model that ships with the program learns to turn a sentence into JSON. All of it is in {FOLDER}/.\n");

    let before = score(settings, false)?;
    println!("exact match on held-out rows before training: {}\n", share(&before));
    let summary = train::run(settings, &interrupt_flag(Some(FINISHING)))?;
    if summary.step < summary.total {
        return Ok(());
    }
    let after = score(settings, true)?;
    println!();
    for (before, after) in before.iter().zip(&after).take(SHOWN) {
        println!("sentence  {}", plain(&before.prompt));
        println!("  before  {}", before.written.trim());
        println!("  after   {}\n", after.written.trim());
    }
    println!("exact match on held-out rows: {} before, {} after\n", share(&before), share(&after));
    println!("Try it:");
    let model = match settings.trainer.fine_tune_type {
        FineTuneType::Full => format!("--model {}", adapter_path.display()),
        _ => format!("--model {FOLDER}/base --adapter-path {}", adapter_path.display()),
    };
    println!("  metal-candle generate {model} \\\n    --prompt \"{TRY}\"");
    Ok(())
}

/// The demo's configuration, as it is written beside the files.
fn config() -> String {
    format!("{CONFIG}model: {FOLDER}/base\ndata: {FOLDER}/data\nadapter_path: {FOLDER}/adapter\n")
}

fn unpack(folder: &Path) -> Result<()> {
    let config = config();
    for (name, content) in FILES.iter().copied().chain([("train.yaml", config.as_bytes())]) {
        let path = folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent))?;
        }
        fs::write(&path, content).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// The answers to the test rows of the base model, or of what was trained, as it stands on the disk.
fn score(settings: &Settings, trained: bool) -> Result<Vec<Answer>> {
    let device = settings.run.device.open()?;
    let base = Path::new(FOLDER).join("base");
    let full = settings.trainer.fine_tune_type == FineTuneType::Full;
    let folder = if trained && full { settings.run.adapter_path.clone() } else { base };
    let model = ModelFiles::open(&folder.display().to_string())?;
    let mut decoder =
        Decoder::new(&model.config, model.base(&settings.trainer.holding(&model, &device)?, &device)?, &device)?;
    if trained && !full {
        AdapterFile::load(&settings.run.adapter_path)?.attach(&mut decoder, &device)?;
    }
    let options = DatasetOptions { max_seq_length: settings.trainer.max_seq_length, mask_prompt: true };
    let test = Dataset::load(&[Path::new(FOLDER).join("data/test.jsonl")], &model.tokenizer, &options)?;
    answers(&decoder, &model.tokenizer, &test.rows, &|_| {})
}

fn share(answers: &[Answer]) -> String {
    let right = answers.iter().filter(|answer| answer.matches()).count();
    format!("{right} of {} ({:.0} %)", answers.len(), 100.0 * right as f64 / answers.len() as f64)
}

/// A prompt without the template's tokens.
fn plain(prompt: &str) -> String {
    prompt.replace("<|user|>", "").replace("<|assistant|>", "").replace("<|end|>", "").trim().to_string()
}
