//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! `checkpoints/step-0000100/` holds `trainer.safetensors` (values and optimizer moments, f32), `state.json` (step, data
//! position, dropout round, options, fingerprints of model and data) and the adapter in PEFT's form. The folder is written
//! beside, fsynced and renamed, so one that is there is whole.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::options::TrainerOptions;
use super::sampler::Position;
use crate::{Error, Result};

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Optimizer steps done.
    pub step: usize,
    /// Micro-batches done, which number the dropout masks.
    pub round: u32,
    /// Where the next batch starts.
    pub position: Position,
    /// Tokens counted in the loss so far.
    pub trained_tokens: u64,
    /// Steps of the whole run.
    pub total: usize,
    /// The run's options.
    pub options: TrainerOptions,
    /// Of the base model's weights.
    pub model: Fingerprint,
    /// Of the training rows.
    pub data: Fingerprint,
}

/// FNV-1a over what must be the same for a run to be continued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint(u64);

impl Default for Fingerprint {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fingerprint {
    /// Takes in more bytes.
    pub fn add(&mut self, bytes: impl IntoIterator<Item = u8>) {
        for byte in bytes {
            self.0 = (self.0 ^ byte as u64).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

impl State {
    /// Refuses to continue a run that was something else; one error lists every difference.
    pub fn check_continues(&self, now: &State, path: &Path) -> Result<()> {
        let mut differ = Vec::new();
        let (then, today) = (serde_json::to_value(&self.options), serde_json::to_value(&now.options));
        if let (Ok(serde_json::Value::Object(then)), Ok(serde_json::Value::Object(today))) = (then, today) {
            for (key, value) in &then {
                // These do not change what is learnt.
                let free = ["steps_per_report", "steps_per_eval", "val_batches", "save_every", "grad_checkpoint"];
                if today.get(key) != Some(value) && !free.contains(&key.as_str()) {
                    let today = today.get(key).map_or("nothing".to_string(), |today| today.to_string());
                    differ.push(format!("{key} was {value} and is now {today}"));
                }
            }
        }
        if self.total != now.total {
            differ.push(format!("the run had {} steps and now has {}", self.total, now.total));
        }
        if self.model != now.model {
            differ.push("the base model's weights differ".to_string());
        }
        if self.data != now.data {
            differ.push("the training rows differ".to_string());
        }
        if differ.is_empty() {
            return Ok(());
        }
        let advice = "give the options of the first run again, or start a new run in another adapter folder";
        Err(Error::file(path, format!("cannot be continued: {}; {advice}", differ.join("; "))))
    }
}

const STATE: &str = "state.json";
const TRAINER: &str = "trainer.safetensors";
const PREFIX: &str = "step-";

/// The folder of a step's checkpoint below the adapter's folder.
pub fn folder(adapter_path: &Path, step: usize) -> PathBuf {
    adapter_path.join("checkpoints").join(format!("{PREFIX}{step:07}"))
}

/// Writes the checkpoint's files into a folder; the caller replaces the real one with it.
pub fn write(folder: &Path, state: &State, blocks: &[Tensor]) -> Result<()> {
    let path = folder.join(STATE);
    let text = serde_json::to_string_pretty(state).map_err(|error| Error::file(&path, error.to_string()))?;
    fs::write(&path, text).map_err(Error::io(&path))?;
    let path = folder.join(TRAINER);
    let named = |(group, block): (usize, &Tensor)| Ok((name(group), block.to_device(&Device::Cpu)?));
    let blocks = blocks.iter().enumerate().map(named).collect::<Result<HashMap<_, _>>>()?;
    candle_core::safetensors::save(&blocks, &path)?;
    Ok(())
}

/// The name of a group's tensor.
fn name(group: usize) -> String {
    if group == 0 { "block".to_string() } else { format!("block.{group}") }
}

/// Reads a checkpoint.
pub fn read(folder: &Path, device: &Device) -> Result<(State, Vec<Tensor>)> {
    let path = folder.join(STATE);
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let state = serde_json::from_str(&text).map_err(|error| Error::file(&path, error.to_string()))?;
    let path = folder.join(TRAINER);
    let mut tensors = candle_core::safetensors::load(&path, device).map_err(|e| Error::file(&path, e.to_string()))?;
    let blocks: Vec<Tensor> = (0..).map_while(|group| tensors.remove(&name(group))).collect();
    match (blocks.is_empty(), tensors.keys().next()) {
        (true, _) => Err(Error::file(&path, "has no tensor 'block'")),
        (false, Some(unknown)) => Err(Error::file(&path, format!("has a tensor '{unknown}', which no run writes"))),
        (false, None) => Ok((state, blocks)),
    }
}

/// A checkpoint that was read.
pub struct Stored {
    /// Its folder.
    pub path: PathBuf,
    /// Where the run stood.
    pub state: State,
    /// Values and moments, as [`Params::blocks`](super::params::Params::blocks) gave them.
    pub blocks: Vec<Tensor>,
}

/// The newest checkpoint of a [`list`] that can be read, and what is to be said of those that can't.
///
/// # Errors
/// None of them can be read, or there is none.
pub fn newest(all: Vec<(usize, PathBuf)>, adapter_path: &Path, device: &Device) -> Result<(Stored, Vec<String>)> {
    let mut unreadable = Vec::new();
    for (_, path) in all {
        match read(&path, device) {
            Ok((state, blocks)) => return Ok((Stored { path, state, blocks }, unreadable)),
            Err(error) => unreadable.push(format!("a checkpoint cannot be read, an older one is taken: {error}")),
        }
    }
    let problem = if unreadable.is_empty() {
        "holds no checkpoint to resume from; leave --resume out to start a run".to_string()
    } else {
        format!("none of its checkpoints can be read: {}", unreadable.join("; "))
    };
    Err(Error::file(adapter_path, problem))
}

/// The checkpoints below an adapter's folder, newest first.
pub fn list(adapter_path: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let parent = adapter_path.join("checkpoints");
    let entries = match fs::read_dir(&parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(&parent)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io(&parent))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(step) = name.strip_prefix(PREFIX).and_then(|step| step.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

/// Removes all but the newest `keep` checkpoints.
pub fn prune(adapter_path: &Path, keep: usize) -> Result<()> {
    for (_, path) in list(adapter_path)?.into_iter().skip(keep) {
        fs::remove_dir_all(&path).map_err(Error::io(&path))?;
    }
    Ok(())
}
