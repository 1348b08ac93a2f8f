//! `metrics.jsonl`: a JSON object for each report and validation.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use metal_candle::training::trainer::{Report, Validation};
use metal_candle::{Error, Result};
use serde_json::{Value, json};

/// Appends to a run's metrics.
pub struct Metrics {
    path: PathBuf,
    file: Option<File>,
}

impl Metrics {
    /// Nothing is written before [`Metrics::start`].
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf(), file: None }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file for a run that goes on after `step`; lines of later steps, which will be done again, are dropped.
    pub fn start(&mut self, step: usize) -> Result<()> {
        let kept: String = match fs::read_to_string(&self.path) {
            Ok(text) if step > 0 => {
                text.lines().filter(|line| step_of(line) <= step).map(|line| format!("{line}\n")).collect()
            }
            _ => String::new(),
        };
        fs::write(&self.path, kept).map_err(Error::io(&self.path))?;
        let file = OpenOptions::new().append(true).open(&self.path).map_err(Error::io(&self.path))?;
        self.file = Some(file);
        Ok(())
    }

    /// A report's line.
    pub fn report(&mut self, report: &Report) -> Result<()> {
        self.append(&json!({
            "step": report.step,
            "train_loss": report.loss,
            "learning_rate": report.learning_rate,
            "grad_norm": report.grad_norm,
            "tokens_per_second": report.tokens_per_second,
            "steps_per_second": report.steps_per_second,
            "trained_tokens": report.trained_tokens,
            "epoch": report.epoch,
            "peak_memory_bytes": report.peak_memory,
            "memory_bytes": report.memory,
        }))
    }

    /// A validation's line.
    pub fn validation(&mut self, now: &Validation) -> Result<()> {
        let Validation { step, loss, perplexity, tokens } = now;
        self.append(&json!({"step": step, "val_loss": loss, "val_perplexity": perplexity, "val_tokens": tokens}))
    }

    fn append(&mut self, value: &Value) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        writeln!(file, "{value}").map_err(Error::io(&self.path))
    }
}

/// A line that is cut off counts as late, and goes.
fn step_of(line: &str) -> usize {
    let value: Option<Value> = serde_json::from_str(line).ok();
    value.and_then(|value| value.get("step")?.as_u64()).map_or(usize::MAX, |step| step as usize)
}
