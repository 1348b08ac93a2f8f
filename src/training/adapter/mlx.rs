//! Adapters in the form of mlx-lm: `adapter_config.json` and `adapters.safetensors`.
//!
//! mlx-lm stores `{module}.lora_a` `[k, r]`, `{module}.lora_b` `[r, n]` and DoRA's `{module}.m` `[n]`. `scale` is s itself, not
//! divided by the rank. One rank and one scale hold for all modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};

use super::names::in_block;
use super::peft::most;
use super::targets::Targets;
use super::{AdapterFile, CONFIG, Module, Part, Parts, read_tensors};
use crate::training::files::write_atomically;
use crate::{Error, Result};

/// The name of the tensors' file in an adapter's folder.
pub const TENSORS: &str = "adapters.safetensors";

/// Names of modules that are embeddings, whose A is a table and not a product's factor.
const EMBEDDINGS: &[&str] = &["embed_tokens", "wte", "tok_embeddings"];

/// Reads an adapter's folder, whose configuration has been read.
pub(super) fn load(folder: &Path, config: &Map<String, Value>) -> Result<AdapterFile> {
    let config = Config::read(&folder.join(CONFIG), config)?;
    let path = folder.join(TENSORS);
    if !path.exists() {
        return Err(Error::file(folder, format!("has no {TENSORS}")));
    }
    let mut parts = Parts::default();
    for (name, tensor) in read_tensors(&path)? {
        let Some((module, part)) = part_of(&name) else {
            parts.problems.push(format!("the name of {name} is not understood"));
            continue;
        };
        if EMBEDDINGS.iter().any(|end| module.rsplit('.').next() == Some(end)) {
            parts.problems.push(format!("{name} adapts an embedding, which is not supported"));
        } else {
            parts.add(&name, module.to_string(), part, &tensor, false)?;
        }
    }
    // Whether a block is among the last ones is known with the model only: here it is taken for the last.
    let unchosen = parts.found.keys().filter(|path| !config.targets.include(path, 0)).cloned().collect::<Vec<_>>();
    let unmatched = config.unmatched(&parts.found);
    parts.problems.extend(unchosen.iter().map(|path| format!("{path} is none of the modules that {CONFIG} chooses")));
    parts.problems.extend(unmatched);
    let modules = parts.modules(config.dora, |_| (config.rank, config.scale));
    parts.finish(&path)?;
    let Config { base_model, dropout, targets, .. } = config;
    let mut file =
        AdapterFile { base_model, blocks: None, dropout, modules, saved: BTreeMap::new(), targets: Some(targets) };
    if file.targets.as_ref().is_some_and(Targets::reach_the_last_block) {
        file.blocks = file.layers().last().map(|last| last + 1);
    }
    Ok(file)
}

fn part_of(name: &str) -> Option<(&str, Part)> {
    let (module, part) = name.rsplit_once('.')?;
    let part = match part {
        "lora_a" => Part::A,
        "lora_b" => Part::B,
        "m" => Part::Magnitude,
        _ => return None,
    };
    Some((module, part))
}

/// What a configuration says of an adapter. The file holds all arguments of the run that trained it, of which four are about
/// the adapter and read by mlx-lm too; the others cannot change it.
struct Config {
    base_model: Option<String>,
    rank: usize,
    scale: f64,
    dropout: f32,
    dora: bool,
    targets: Targets,
}

impl Config {
    fn read(path: &Path, map: &Map<String, Value>) -> Result<Self> {
        let mut problems = Vec::new();
        let dora = match map.get("fine_tune_type").map(|kind| kind.as_str().unwrap_or_default()) {
            None | Some("lora") => false,
            Some("dora") => true,
            Some(_) => {
                let kind = &map["fine_tune_type"];
                problems.push(format!("fine_tune_type is {kind}; only lora and dora are adapters"));
                false
            }
        };
        let num_layers = map.get("num_layers").and_then(Value::as_i64);
        if num_layers.is_none() {
            problems.push("num_layers is missing or not a whole number".to_string());
        }
        let empty = Map::new();
        let parameters = map.get("lora_parameters").and_then(Value::as_object).unwrap_or(&empty);
        for key in parameters.keys().filter(|key| !["rank", "scale", "dropout", "keys"].contains(&key.as_str())) {
            problems.push(format!("lora_parameters has {key}, which is not known"));
        }
        let mut number = |key: &str, wanted: &str, good: fn(f64) -> bool| {
            let number = parameters.get(key).and_then(Value::as_f64).filter(|number| good(*number));
            if number.is_none() {
                let value = parameters.get(key).map_or("missing".to_string(), Value::to_string);
                problems.push(format!("lora_parameters: {key} is {value}, but must be {wanted}"));
            }
            number.unwrap_or(1.0)
        };
        let whole = |rank: f64| (1.0..=65_536.0).contains(&rank) && rank.fract() == 0.0;
        let rank = number("rank", "a whole number from 1 to 65536", whole) as usize;
        let scale = number("scale", "a number", f64::is_finite);
        let dropout = number("dropout", "at least 0 and under 1", |p| (0.0..1.0).contains(&p)) as f32;
        let keys = match parameters.get("keys") {
            None | Some(Value::Null) => None,
            Some(value) => {
                let names =
                    value.as_array().and_then(|keys| keys.iter().map(|key| key.as_str().map(str::to_string)).collect());
                if names.is_none() {
                    problems.push(format!("lora_parameters: keys is {value}, but must be a list of names"));
                }
                names
            }
        };
        if !problems.is_empty() {
            return Err(Error::file(path, problems.join("; ")));
        }
        let base_model = map.get("model").and_then(Value::as_str).map(str::to_string);
        let targets = Targets::Mlx { keys, num_layers: num_layers.unwrap_or(0) };
        Ok(Self { base_model, rank, scale, dropout, dora, targets })
    }

    /// The keys that no module of the file has.
    fn unmatched<T>(&self, found: &BTreeMap<String, T>) -> Vec<String> {
        if found.is_empty() {
            return vec!["it has no adapter's tensors".to_string()];
        }
        let Targets::Mlx { keys: Some(keys), .. } = &self.targets else { return Vec::new() };
        let has =
            |key: &String| found.keys().any(|path| path == key || in_block(path).is_some_and(|(_, name)| name == key));
        keys.iter().filter(|key| !has(key)).map(|key| format!("key {key} has no tensor")).collect()
    }
}

/// Writes both files, each beside its place and then renamed.
pub(super) fn save(file: &AdapterFile, folder: &Path) -> Result<()> {
    check(file)?;
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let rank = file.modules.values().map(Module::rank).max().unwrap_or(1);
    let scalings = file.modules.iter().map(|(path, module)| (path.as_str(), module.scaling)).collect();
    let scale = Some(most(&scalings)).filter(|scale| *scale != 0.0).unwrap_or(1.0);
    let mut tensors = BTreeMap::new();
    for (path, module) in &file.modules {
        let (a, b) = uniform(module, rank, scale)?;
        tensors.insert(format!("{path}.lora_a"), a);
        tensors.insert(format!("{path}.lora_b"), b);
        if let Some(magnitude) = &module.magnitude {
            tensors.insert(format!("{path}.m"), magnitude.to_device(&Device::Cpu)?.contiguous()?);
        }
    }
    let path = folder.join(TENSORS);
    let metadata = [("format".to_string(), "mlx".to_string())].into();
    let bytes = safetensors::serialize(&tensors, Some(metadata))
        .map_err(|error| Error::file(&path, format!("cannot be written: {error}")))?;
    write_atomically(&path, |out| out.write_all(&bytes).map_err(Error::io(&path)))?;

    let (keys, num_layers) = targets_of(file);
    let config = json!({
        "model": file.base_model,
        "fine_tune_type": if file.modules.values().any(|module| module.magnitude.is_some()) { "dora" } else { "lora" },
        "num_layers": num_layers,
        "lora_parameters": { "rank": rank, "scale": scale, "dropout": file.dropout, "keys": keys },
    });
    let path = folder.join(CONFIG);
    write_atomically(&path, |out| out.write_all(format!("{config:#}\n").as_bytes()).map_err(Error::io(&path)))
}

/// What MLX has no place for: tensors that were trained whole, and DoRA on some modules only.
fn check(file: &AdapterFile) -> Result<()> {
    let mut problems: Vec<String> =
        file.saved.keys().map(|name| format!("{name} was trained whole (modules_to_save)")).collect();
    let dora = file.modules.values().any(|module| module.magnitude.is_some());
    let plain = file.modules.iter().filter(|(_, module)| dora && module.magnitude.is_none());
    problems.extend(plain.map(|(path, _)| format!("{path} has no DoRA magnitudes and others have")));
    if problems.is_empty() {
        return Ok(());
    }
    let problem = format!("MLX's form cannot hold it: {}", problems.join("; "));
    Err(Error::setting("adapter", problem))
}

/// A and B with `rank` columns and rows, zeros behind their own, and the ratio of the scalings folded into B.
fn uniform(module: &Module, rank: usize, scale: f64) -> Result<(Tensor, Tensor)> {
    let own = module.rank();
    let [a, b] = [&module.a, &module.b].map(|tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32));
    let (mut a, mut b) = (a?, b?);
    if module.scaling != scale {
        b = (b.to_dtype(DType::F64)? * (module.scaling / scale))?.to_dtype(DType::F32)?;
    }
    if own < rank {
        a = a.pad_with_zeros(1, 0, rank - own)?;
        b = b.pad_with_zeros(0, 0, rank - own)?;
    }
    Ok((a.contiguous()?, b.contiguous()?))
}

/// `keys` and `num_layers` that choose exactly the adapter's modules: names in a block where they are in all of the last
/// blocks, else whole paths, which mlx-lm takes too.
fn targets_of(file: &AdapterFile) -> (BTreeSet<&str>, i64) {
    let layers = file.layers();
    let (first, last) = (layers.first().copied().unwrap_or(0), layers.last().copied().unwrap_or(0));
    // -1 stands for all blocks.
    let num_layers = match file.blocks {
        _ if file.in_all_blocks() => Some(-1),
        Some(blocks) if last + 1 == blocks && layers.len() == blocks - first => Some((blocks - first) as i64),
        _ => None,
    };
    match (file.common_names(), num_layers) {
        (Some(names), Some(num_layers)) => (names, num_layers),
        _ => (file.modules.keys().map(String::as_str).collect(), -1),
    }
}
