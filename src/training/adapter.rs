//! Adapters in the form of PEFT: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! PEFT stores `lora_A.weight` `[r, k]` and `lora_B.weight` `[n, r]`, the transposes of A and B, under
//! `base_model.model.{module}`. The scaling is `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};

use super::files::write_atomically;
use super::lora::LoRAConfig;
use crate::models::decoder::Decoder;
use crate::models::linear::{Adapter, Parameter};
use crate::{Error, Result};

/// The name of the configuration in an adapter's folder.
pub const CONFIG: &str = "adapter_config.json";
/// The name of the tensors' file in an adapter's folder.
pub const TENSORS: &str = "adapter_model.safetensors";

/// An adapter as files hold it.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    /// Rank, alpha, dropout and targets.
    pub config: LoRAConfig,
    /// Whether the scaling is alpha / √rank.
    pub rslora: bool,
    /// The model that it was trained on, as it was named then.
    pub base_model: String,
    /// A `[k, r]` and B `[r, n]`, f32, by module path (`model.layers.0.self_attn.q_proj`).
    pub tensors: BTreeMap<String, (Tensor, Tensor)>,
}

/// Keys of PEFT's configuration that mean another computation when they are set to anything but nothing, false or empty.
const UNSUPPORTED: &[&str] = &[
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "loftq_config",
    "megatron_config",
    "velora_config",
    "kasa_config",
    "ensure_weight_tying",
    "lora_ga_config",
    "use_bdlora",
    "exclude_modules",
];

/// Keys that have no bearing on a loaded adapter: where it came from, or how training began.
const HARMLESS: &[&str] = &[
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "peft_version",
    "runtime_config",
    "qalora_group_size",
    "monteclora_config",
];

impl AdapterFile {
    /// An adapter to be saved.
    pub fn new(config: LoRAConfig, base_model: &str, tensors: BTreeMap<String, (Tensor, Tensor)>) -> Result<Self> {
        config.validate()?;
        Ok(Self { config, rslora: false, base_model: base_model.to_string(), tensors })
    }

    /// s of the adapter at a module path.
    pub fn scaling(&self) -> f64 {
        if self.rslora { self.config.alpha / (self.config.rank as f64).sqrt() } else { self.config.scaling() }
    }

    /// Writes both files into a folder, each beside its place and then renamed.
    pub fn save(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let mut tensors = BTreeMap::new();
        for (module, (a, b)) in &self.tensors {
            for (name, tensor) in [("lora_A", a), ("lora_B", b)] {
                let flipped = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.t()?.contiguous()?;
                tensors.insert(format!("base_model.model.{module}.{name}.weight"), flipped);
            }
        }
        let path = folder.join(TENSORS);
        // transformers refuses files that do not say what framework's layout they have.
        let metadata = [("format".to_string(), "pt".to_string())].into();
        let bytes = safetensors::serialize(&tensors, Some(metadata))
            .map_err(|error| Error::file(&path, format!("cannot be written: {error}")))?;
        write_atomically(&path, |file| file.write_all(&bytes).map_err(Error::io(&path)))?;

        let path = folder.join(CONFIG);
        let text = format!("{:#}\n", self.config_json());
        write_atomically(&path, |file| file.write_all(text.as_bytes()).map_err(Error::io(&path)))
    }

    /// Reads an adapter's folder.
    ///
    /// # Errors
    /// One error lists every key that is not supported; another every tensor without its partner, of a wrong shape or with a
    /// name that is not understood, and every target without a tensor.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG);
        if !path.exists() {
            return Err(Error::file(folder, format!("is not an adapter's folder: it has no {CONFIG}")));
        }
        let (config, rslora, base_model) = read_config(&path)?;
        let path = folder.join(TENSORS);
        let raw = candle_core::safetensors::load(&path, &Device::Cpu)
            .map_err(|error| Error::file(&path, format!("cannot be read: {error}")))?;
        let tensors = pair_up(&path, raw, &config)?;
        Ok(Self { config, rslora, base_model, tensors })
    }

    /// Puts the adapter on a model, in place of any that it has.
    ///
    /// # Errors
    /// As [`AdapterFile::fitted`]; nothing is attached then.
    pub fn attach(&self, decoder: &mut Decoder, device: &Device) -> Result<()> {
        let adapters = self.fitted(decoder, device)?;
        decoder.set_adapters(&adapters)
    }

    /// The adapters of a model's linears, in the order of [`Decoder::linears`].
    ///
    /// # Errors
    /// One error lists every module that the model lacks or has with other sizes.
    pub fn fitted(&self, decoder: &Decoder, device: &Device) -> Result<Vec<Option<Adapter>>> {
        let sizes: BTreeMap<String, (usize, usize)> =
            decoder.linears().map(|(path, linear)| (path, linear.sizes())).collect();
        let mut problems = Vec::new();
        for (module, (a, b)) in &self.tensors {
            let found = (a.dims()[0], b.dims()[1]);
            match sizes.get(module) {
                None => problems.push(format!("the model has no linear {module}")),
                Some(&size) if size != found => {
                    problems.push(format!(
                        "{module} goes from {} to {}, the adapter's from {} to {}",
                        size.0, size.1, found.0, found.1
                    ));
                }
                Some(_) => {}
            }
        }
        if !problems.is_empty() {
            let base = &self.base_model;
            return Err(Error::setting(
                "adapter",
                format!("it does not fit (it was made for {base}): {}", problems.join("; ")),
            ));
        }
        let adapters = decoder.linears().enumerate().map(|(number, (path, _))| {
            let Some((a, b)) = self.tensors.get(&path) else { return Ok(None) };
            Ok(Some(Adapter {
                a: Parameter::frozen(a.to_device(device)?),
                b: Parameter::frozen(b.to_device(device)?),
                scaling: self.scaling(),
                dropout: 0.0,
                number: number as u32,
            }))
        });
        adapters.collect()
    }

    fn config_json(&self) -> Value {
        // PEFT matches a name by its end; a name that also ends others' paths must be given whole.
        let names: BTreeSet<&str> = self.tensors.keys().filter_map(|module| module.rsplit('.').next()).collect();
        let layers: BTreeSet<usize> = self.tensors.keys().filter_map(|module| layer_of(module)).collect();
        let everywhere = self.tensors.len() == names.len() * layers.len() && layers.iter().copied().eq(0..layers.len());
        let mut config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "inference_mode": true,
            "r": self.config.rank,
            "lora_alpha": self.config.alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": names,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "use_rslora": self.rslora,
            "use_dora": false,
            "rank_pattern": {},
            "alpha_pattern": {},
            "modules_to_save": null,
            "layers_to_transform": null,
        });
        if !everywhere {
            config["target_modules"] = json!(self.tensors.keys().collect::<Vec<_>>());
        }
        if self.config.alpha.fract() == 0.0 {
            config["lora_alpha"] = json!(self.config.alpha as i64);
        }
        config
    }
}

fn read_config(path: &Path) -> Result<(LoRAConfig, bool, String)> {
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let value: Value =
        serde_json::from_str(&text).map_err(|error| Error::file(path, format!("is not JSON: {error}")))?;
    let Value::Object(map) = value else { return Err(Error::file(path, "is not a JSON object")) };
    if map.contains_key("lora_parameters") {
        return Err(Error::file(path, "is an adapter in MLX's form; only PEFT's is read for now"));
    }
    let mut problems = Vec::new();
    match map.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => problems.push(format!("peft_type is {}; only LORA is known", other.unwrap_or("missing"))),
    }
    if map.get("bias").is_some_and(|bias| bias != "none" && !bias.is_null()) {
        problems.push(format!("bias is {}; only none is known", map["bias"]));
    }
    problems.extend(strange_initialisation(&map));
    for (key, value) in &map {
        if is_empty(value) || HARMLESS.contains(&key.as_str()) {
            continue;
        }
        let what = if UNSUPPORTED.contains(&key.as_str()) { "is not supported" } else { "is not known" };
        problems.push(format!("{key} is {value}, which {what}"));
    }
    let number = |key: &str| map.get(key).and_then(Value::as_f64);
    // PEFT's defaults for both are 8.
    let rank = number("r").unwrap_or(8.0);
    let mut config = LoRAConfig::new(if (1.0..=65_536.0).contains(&rank) { rank as usize } else { 0 });
    config.alpha = number("lora_alpha").unwrap_or(8.0);
    config.dropout = number("lora_dropout").unwrap_or(0.0) as f32;
    config.target_modules = match map.get("target_modules") {
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).map(str::to_string).collect(),
        Some(Value::String(name)) => vec![name.clone()],
        _ => Vec::new(),
    };
    if config.target_modules.is_empty() {
        problems.push("target_modules is missing".to_string());
    } else if let Err(error) = config.validate() {
        problems.push(error.to_string());
    }
    if !problems.is_empty() {
        return Err(Error::file(path, problems.join("; ")));
    }
    let base = map.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or("an unnamed model").to_string();
    Ok((config, map.get("use_rslora").and_then(Value::as_bool).unwrap_or(false), base))
}

/// Initialisations that change the base model's weights leave an adapter that fits the changed weights only.
fn strange_initialisation(map: &Map<String, Value>) -> Option<String> {
    let init = map.get("init_lora_weights")?;
    let plain = init.is_boolean() || init == "gaussian" || init == "eva" || init == "orthogonal" || init.is_null();
    (!plain).then(|| format!("init_lora_weights is {init}, which changed the base model's weights"))
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// Names to modules and the two matrices to each other, whatever spelling the file has.
fn pair_up(
    path: &Path,
    raw: std::collections::HashMap<String, Tensor>,
    config: &LoRAConfig,
) -> Result<BTreeMap<String, (Tensor, Tensor)>> {
    let mut problems = Vec::new();
    let mut halves: BTreeMap<String, [Option<Tensor>; 2]> = BTreeMap::new();
    for (name, tensor) in raw {
        let Some((module, index)) = module_of(&name) else {
            problems.push(format!("the name of {name} is not understood"));
            continue;
        };
        let rank_at = index;
        if tensor.rank() != 2 || tensor.dims()[rank_at] != config.rank {
            problems.push(format!("{name} is {:?}, which does not fit rank {}", tensor.dims(), config.rank));
            continue;
        }
        if halves.entry(module).or_default()[index].replace(tensor.to_dtype(DType::F32)?.t()?.contiguous()?).is_some() {
            problems.push(format!("{name} stands twice, in two spellings"));
        }
    }
    let mut tensors = BTreeMap::new();
    for (module, pair) in halves {
        match pair {
            [Some(a), Some(b)] => {
                tensors.insert(module, (a, b));
            }
            [Some(_), None] => problems.push(format!("{module} has lora_A and no lora_B")),
            _ => problems.push(format!("{module} has lora_B and no lora_A")),
        }
    }
    // A target written as a regular expression cannot be looked for as a name.
    let names =
        config.target_modules.iter().filter(|name| name.chars().all(|c| c.is_alphanumeric() || "._-".contains(c)));
    for name in names.filter(|name| *name != "all-linear") {
        if !tensors.keys().any(|module| module == name || module.ends_with(&format!(".{name}"))) {
            problems.push(format!("target {name} has no tensor"));
        }
    }
    problems.sort_unstable();
    if problems.is_empty() { Ok(tensors) } else { Err(Error::file(path, problems.join("; "))) }
}

/// The module and 0 for A, 1 for B. PEFT's own name is `base_model.model.{module}.lora_A.weight`; in memory, and in files
/// saved by hand, an adapter's name follows (`lora_A.default.weight`), and some tools leave prefixes out.
fn module_of(name: &str) -> Option<(String, usize)> {
    let (module, rest) = name.split_once(".lora_")?;
    let index = match rest.strip_suffix(".weight")?.split_once('.').unwrap_or((rest.strip_suffix(".weight")?, "")) {
        ("A", adapter) if !adapter.contains('.') => 0,
        ("B", adapter) if !adapter.contains('.') => 1,
        _ => return None,
    };
    let mut module = module;
    for prefix in ["base_model.model.", "base_model."] {
        module = module.strip_prefix(prefix).unwrap_or(module);
    }
    let module = if module.starts_with("layers.") { format!("model.{module}") } else { module.to_string() };
    Some((module, index))
}

fn layer_of(module: &str) -> Option<usize> {
    module.split_once("layers.")?.1.split('.').next()?.parse().ok()
}
