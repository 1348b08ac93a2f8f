//! Adapters in the form of PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! PEFT stores `lora_A.weight` `[r, k]` and `lora_B.weight` `[n, r]`, the transposes of A and B, and DoRA's
//! `lora_magnitude_vector` `[n]`, under `base_model.model.{module}`. The scaling is `lora_alpha / r`, or `lora_alpha / √r` with
//! `use_rslora`. Modules whose rank or alpha differ have them in `rank_pattern` and `alpha_pattern`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};

use super::names::{path_of, without_prefix};
use super::peft_config::Config;
use super::targets::{Targets, saved};
use super::{AdapterFile, CONFIG, Module, Part, Parts, read_tensors};
use crate::training::files::write_atomically;
use crate::{Error, Result};

/// The name of the tensors' file in an adapter's folder.
pub const TENSORS: &str = "adapter_model.safetensors";

const PREFIX: &str = "base_model.model.";

/// Reads an adapter's folder, whose configuration has been read.
pub(super) fn load(folder: &Path, config: &Map<String, Value>) -> Result<AdapterFile> {
    let config = Config::read(&folder.join(CONFIG), config)?;
    let path = folder.join(TENSORS);
    if !path.exists() {
        let pickle = if folder.join("adapter_model.bin").exists() {
            "; adapter_model.bin is a pickle, which is not read: save it with PEFT as safetensors"
        } else {
            ""
        };
        return Err(Error::file(folder, format!("has no {TENSORS}{pickle}")));
    }
    let mut parts = Parts::default();
    let mut whole = BTreeMap::new();
    for (name, tensor) in read_tensors(&path)? {
        let key = without_prefix(&name);
        if let Some((module, part)) = part_of(key) {
            let module_path = path_of(module);
            if !config.selection.include(module) && !config.selection.include(&module_path) {
                parts.problems.push(format!("{name} is of no module that {CONFIG} chooses"));
            }
            parts.add(&name, module_path, part, &tensor, true)?;
        } else if let Some(name_here) = saved_name(key, &config.selection.modules_to_save) {
            if whole.insert(name_here, tensor).is_some() {
                parts.problems.push(format!("{name} stands twice, in two spellings"));
            }
        } else if key.contains(".lora_embedding_") {
            parts.problems.push(format!("{name} adapts an embedding, which is not supported"));
        } else {
            parts.problems.push(format!("the name of {name} is not understood"));
        }
    }
    let found: Vec<String> = parts.found.keys().cloned().collect();
    let found: Vec<&str> = found.iter().map(String::as_str).collect();
    let whole_names: Vec<&str> = whole.keys().map(String::as_str).collect();
    let unmatched = config.unmatched(&found, &whole_names);
    let modules = parts.modules(config.dora, |path| config.rank_and_scaling(path));
    parts.problems.extend(unmatched);
    parts.finish(&path)?;
    let Config { base_model, dropout, selection, .. } = config;
    let targets = Some(Targets::Peft(selection));
    Ok(AdapterFile { base_model, blocks: None, dropout, modules, saved: whole, targets })
}

/// The module of a tensor and which part of its adapter it is. In memory, and in files saved by hand, the adapter's name
/// follows the part's (`lora_A.default.weight`).
fn part_of(key: &str) -> Option<(&str, Part)> {
    let (module, rest) = key.split_once(".lora_")?;
    let (part, rest) = match rest.split_once('.') {
        Some(("A", rest)) => (Part::A, rest),
        Some(("B", rest)) => (Part::B, rest),
        Some(("magnitude_vector", rest)) => (Part::Magnitude, rest),
        None if rest == "magnitude_vector" => return Some((module, Part::Magnitude)),
        _ => return None,
    };
    let name = rest.strip_suffix("weight").map(|name| name.strip_suffix('.').unwrap_or(name));
    match (part, name) {
        (_, Some(name)) if !name.contains('.') => Some((module, part)),
        (Part::Magnitude, None) if !rest.contains('.') => Some((module, part)),
        _ => None,
    }
}

/// The model's name of a tensor that was trained whole, if it is of a module that was to be.
fn saved_name(key: &str, modules_to_save: &[String]) -> Option<String> {
    let (module, parameter) = key.rsplit_once('.')?;
    // As in memory: `lm_head.modules_to_save.default.weight`.
    let module = match module.split_once(".modules_to_save.") {
        Some((module, adapter)) if !adapter.contains('.') => module,
        Some(_) => return None,
        None => module,
    };
    let tensor = format!("{}.{parameter}", path_of(module));
    modules_to_save.iter().any(|name| saved(&tensor, name)).then_some(tensor)
}

/// Writes both files, each beside its place and then renamed.
pub(super) fn save(file: &AdapterFile, folder: &Path) -> Result<()> {
    check(file)?;
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let mut tensors = BTreeMap::new();
    for (module, Module { a, b, magnitude, .. }) in &file.modules {
        for (name, tensor) in [("lora_A", a), ("lora_B", b)] {
            let flipped = on_cpu(tensor)?.to_dtype(DType::F32)?.t()?.contiguous()?;
            tensors.insert(format!("{PREFIX}{module}.{name}.weight"), flipped);
        }
        if let Some(magnitude) = magnitude {
            tensors.insert(format!("{PREFIX}{module}.lora_magnitude_vector"), on_cpu(magnitude)?);
        }
    }
    for (name, tensor) in &file.saved {
        tensors.insert(format!("{PREFIX}{name}"), on_cpu(tensor)?);
    }
    let path = folder.join(TENSORS);
    // transformers refuses files that do not say what framework's layout they have.
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let bytes = safetensors::serialize(&tensors, Some(metadata))
        .map_err(|error| Error::file(&path, format!("cannot be written: {error}")))?;
    write_atomically(&path, |out| out.write_all(&bytes).map_err(Error::io(&path)))?;

    let path = folder.join(CONFIG);
    let text = format!("{:#}\n", config_json(file));
    write_atomically(&path, |out| out.write_all(text.as_bytes()).map_err(Error::io(&path)))
}

fn on_cpu(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_device(&Device::Cpu)?.contiguous()?)
}

/// DoRA is one key for all modules.
fn check(file: &AdapterFile) -> Result<()> {
    let plain: Vec<&str> =
        file.modules.iter().filter(|(_, module)| module.magnitude.is_none()).map(|(path, _)| path.as_str()).collect();
    if plain.is_empty() || plain.len() == file.modules.len() {
        return Ok(());
    }
    Err(Error::setting("adapter", format!("some modules have DoRA's magnitudes, but not {}", plain.join(", "))))
}

fn config_json(file: &AdapterFile) -> Value {
    let ranks = values(file, |module| module.rank() as f64);
    let alphas = values(file, Module::alpha);
    let (rank, alpha) = (most(&ranks), most(&alphas));
    let (targets, layers) = targets_of(file);
    let saved: BTreeSet<&str> = file.saved.keys().filter_map(|name| Some(name.rsplit_once('.')?.0)).collect();
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": file.base_model,
        "inference_mode": true,
        "r": number(rank),
        "lora_alpha": number(alpha),
        "lora_dropout": file.dropout,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "use_rslora": false,
        "use_dora": file.modules.values().any(|module| module.magnitude.is_some()),
        "rank_pattern": pattern(&ranks, rank),
        "alpha_pattern": pattern(&alphas, alpha),
        "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
        "layers_to_transform": layers,
    })
}

/// Targets by their last names where that, with the blocks, chooses exactly the adapter's modules; else their whole paths.
fn targets_of(file: &AdapterFile) -> (Value, Value) {
    let names = file.target_names();
    if file.common_names().is_none_or(|inner| inner.len() != names.len()) {
        return (json!(file.modules.keys().collect::<Vec<_>>()), Value::Null);
    }
    (json!(names), if file.in_all_blocks() { Value::Null } else { json!(file.layers()) })
}

fn values(file: &AdapterFile, value: impl Fn(&Module) -> f64) -> BTreeMap<&str, f64> {
    file.modules.iter().map(|(path, module)| (path.as_str(), value(module))).collect()
}

/// The value that most modules have; of equally frequent ones the largest.
pub(super) fn most(values: &BTreeMap<&str, f64>) -> f64 {
    let count = |value: f64| values.values().filter(|other| **other == value).count();
    let by_count = values.values().map(|value| (count(*value), *value));
    by_count.max_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))).map_or(1.0, |(_, value)| value)
}

/// The modules whose value is not the general one: by their last name where all modules of this name have it.
fn pattern(values: &BTreeMap<&str, f64>, general: f64) -> Map<String, Value> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let differing = values.iter().filter(|(_, value)| **value != general).map(|(path, value)| {
        let mut others = values.iter().filter(|(other, _)| last(other) == last(path));
        let key = if others.all(|(_, other)| other == value) { last(path) } else { path.to_string() };
        (key, number(*value))
    });
    differing.collect()
}

fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}
