//! Adapters: in memory, and in the two forms that files have, PEFT's ([`peft`]) and MLX's ([`mlx`]).
//!
//! In memory each module carries its own rank and scaling, so that whatever a file says of them is exact. A PEFT file with
//! patterns becomes this without loss; MLX has one rank and one scale for all modules, and what differs is folded into B there.

pub mod gguf;
mod merge;
pub mod mlx;
mod names;
pub mod peft;
mod peft_config;
mod sum;
mod targets;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};

use crate::models::ModelConfig;
use crate::models::block::LINEAR_NAMES;
use crate::models::decoder::{Decoder, Fitted};
use crate::models::linear::{Adapter, Magnitude, Parameter};
use crate::{Error, Result};
use names::in_block;
pub use sum::sum;
use targets::Targets;

/// The name of the configuration in an adapter's folder, in both forms.
pub const CONFIG: &str = "adapter_config.json";

/// The forms that an adapter's folder has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Of the PEFT library: `adapter_model.safetensors`.
    Peft,
    /// Of mlx-lm: `adapters.safetensors`.
    Mlx,
}

/// The adapter of one linear: the delta `s · (x A) B` and, with DoRA, the length of each row of the adapted weight.
#[derive(Debug, Clone)]
pub struct Module {
    /// A `[k, r]`, f32.
    pub a: Tensor,
    /// B `[r, n]`, f32.
    pub b: Tensor,
    /// s.
    pub scaling: f64,
    /// DoRA's magnitudes `[n]`, f32: rows of `W + s (A B)ᵀ` are scaled to these lengths.
    pub magnitude: Option<Tensor>,
}

impl Module {
    /// r.
    pub fn rank(&self) -> usize {
        self.a.dims()[1]
    }

    /// `(k, n)`: the sizes of the linear's input and output.
    pub fn sizes(&self) -> (usize, usize) {
        (self.a.dims()[0], self.b.dims()[1])
    }

    /// The alpha for which alpha / rank is the scaling.
    pub fn alpha(&self) -> f64 {
        let rank = self.rank() as f64;
        let product = self.scaling * rank;
        // The product of a quotient can be off by its last bit; alphas are whole numbers as a rule.
        if product.round() / rank == self.scaling { product.round() } else { product }
    }
}

/// An adapter as files hold it.
#[derive(Debug, Clone)]
pub struct AdapterFile {
    /// The model that it was trained on, as it was named then.
    pub base_model: Option<String>,
    /// The model's blocks, where they were known.
    pub blocks: Option<usize>,
    /// The dropout that it was trained with.
    pub dropout: f32,
    /// By module path (`model.layers.0.self_attn.q_proj`).
    pub modules: BTreeMap<String, Module>,
    /// Tensors of the model that were trained whole (PEFT's `modules_to_save`), by their names in the model.
    pub saved: BTreeMap<String, Tensor>,
    /// What the file's configuration chose, to be held against the model.
    targets: Option<Targets>,
}

impl AdapterFile {
    /// An adapter of a model with so many blocks.
    pub fn new(base_model: &str, blocks: usize, dropout: f32, modules: BTreeMap<String, Module>) -> Self {
        let base_model = Some(base_model.to_string());
        Self { base_model, blocks: Some(blocks), dropout, modules, saved: BTreeMap::new(), targets: None }
    }

    /// Reads an adapter's folder, in either form.
    ///
    /// # Errors
    /// One error lists every key of the configuration that is not supported; another every tensor without its partner, of a
    /// wrong shape, with a name that is not understood or outside of what the configuration chooses, and every target without
    /// a tensor.
    pub fn load(folder: &Path) -> Result<Self> {
        let (form, config) = read_config(folder)?;
        match form {
            Form::Peft => peft::load(folder, &config),
            Form::Mlx => mlx::load(folder, &config),
        }
    }

    /// The form of a folder.
    pub fn form(folder: &Path) -> Result<Form> {
        Ok(read_config(folder)?.0)
    }

    /// Writes both files in PEFT's form, each beside its place and then renamed.
    pub fn save(&self, folder: &Path) -> Result<()> {
        self.save_as(Form::Peft, folder)
    }

    /// Writes both files in a form, each beside its place and then renamed.
    ///
    /// # Errors
    /// One error lists everything that the form cannot hold; nothing is written then.
    pub fn save_as(&self, form: Form, folder: &Path) -> Result<()> {
        match form {
            Form::Peft => peft::save(self, folder),
            Form::Mlx => mlx::save(self, folder),
        }
    }

    /// Whether the model has every linear of the adapter, of its sizes, and the adapter every linear that its configuration
    /// chooses in this model.
    ///
    /// # Errors
    /// One error lists every module that does not fit.
    pub fn check_fits(&self, config: &ModelConfig) -> Result<()> {
        let sizes = linear_sizes(config);
        let mut problems = Vec::new();
        for (path, module) in &self.modules {
            match (sizes.get(path), module.sizes()) {
                (None, _) => problems.push(format!("the model has no linear {path}")),
                (Some(&(k, n)), found) if (k, n) != found => {
                    problems
                        .push(format!("{path} goes from {k} to {n}, the adapter's from {} to {}", found.0, found.1));
                }
                _ => {}
            }
        }
        problems.extend(self.misplaced(config));
        if let Some(targets) = &self.targets {
            let chosen = sizes.keys().filter(|path| targets.include(path, config.num_layers));
            let without = chosen.filter(|path| !self.modules.contains_key(*path));
            problems.extend(without.map(|path| format!("{path} is a target of it and has no tensor")));
            let beyond = self.modules.keys().filter(|path| targets.leave_out(path, config.num_layers));
            problems.extend(beyond.map(|path| format!("{path} is not in the blocks that it is for")));
        }
        if problems.is_empty() {
            return Ok(());
        }
        let made_for = self.base_model.as_ref().map(|base| format!(" (it was made for {base})")).unwrap_or_default();
        Err(Error::setting("adapter", format!("it does not fit the model{made_for}: {}", problems.join("; "))))
    }

    /// The whole tensors that the model has no place for. A tied output projection gets one of its own.
    fn misplaced(&self, config: &ModelConfig) -> Vec<String> {
        let mut shapes: BTreeMap<String, Vec<usize>> = config.weight_shapes().into_iter().collect();
        shapes.entry("lm_head.weight".into()).or_insert_with(|| vec![config.vocab_size, config.hidden_size]);
        let saved = self.saved.iter().filter_map(|(name, tensor)| match shapes.get(name) {
            Some(shape) if shape == tensor.dims() => None,
            Some(shape) => Some(format!("{name} is {shape:?} in the model, {:?} in the adapter", tensor.dims())),
            None => Some(format!("the model has no tensor {name}")),
        });
        saved.collect()
    }

    /// Puts the adapter on a model, in place of any that it has.
    ///
    /// # Errors
    /// As [`AdapterFile::fitted`]; the model is without adapters then.
    pub fn attach(&self, decoder: &mut Decoder, device: &Device) -> Result<()> {
        decoder.set_adapters(&decoder.bare())?;
        let adapters = self.fitted(decoder, device)?;
        decoder.set_adapters(&adapters)
    }

    /// As a model takes it. The model must be without adapters: DoRA's scales are those of its own weights.
    ///
    /// # Errors
    /// As [`AdapterFile::check_fits`].
    pub fn fitted(&self, decoder: &Decoder, device: &Device) -> Result<Fitted> {
        self.check_fits(&decoder.config)?;
        let adapters = decoder.linears().enumerate().map(|(number, (path, linear))| {
            let Some(Module { a, b, scaling, magnitude }) = self.modules.get(&path) else { return Ok(None) };
            let (a, b, scaling) = (a.to_device(device)?, b.to_device(device)?, *scaling);
            let fixed = |m: &Tensor| Magnitude::fixed(&m.to_device(device)?, &linear.weight, &a, &b, scaling);
            let magnitude = magnitude.as_ref().map(fixed).transpose()?;
            let (a, b) = (Parameter::frozen(a), Parameter::frozen(b));
            Ok(Some(Adapter { a, b, scaling, dropout: 0.0, number: number as u32, magnitude }))
        });
        let linears = adapters.collect::<Result<_>>()?;
        let whole = self.saved.iter().map(|(name, tensor)| {
            let tensor = tensor.to_dtype(decoder.dtype())?.to_device(device)?;
            Ok((name.clone(), tensor.contiguous()?.into()))
        });
        Ok(Fitted { linears, whole: whole.collect::<Result<_>>()? })
    }

    /// Refuses DoRA and tensors that were trained whole, by name. `who` begins the sentence.
    pub(crate) fn check_plain(&self, who: &str) -> Result<()> {
        let whole = self.saved.keys().map(|name| format!("the whole tensor {name}"));
        let problems: Vec<String> = self.magnitudes().into_iter().chain(whole).collect();
        if problems.is_empty() {
            return Ok(());
        }
        let what = format!("{who} plain LoRA adapters only; this one also has {}", problems.join(", "));
        Err(Error::setting("adapter", what))
    }

    /// What the adapter has of DoRA, in words.
    pub(crate) fn magnitudes(&self) -> Vec<String> {
        let dora = self.modules.iter().filter(|(_, module)| module.magnitude.is_some());
        dora.map(|(path, _)| format!("DoRA's magnitudes of {path}")).collect()
    }

    /// Whether the adapter is on the same linears of every block of its model, as far as that is known.
    fn in_all_blocks(&self) -> bool {
        let layers = self.layers();
        let count = layers.len();
        let next = |path: &String| {
            let (_, name) = in_block(path)?;
            let path = format!("model.layers.{count}.{name}");
            Some(self.targets.as_ref()?.include(&path, count + 1))
        };
        let all = match self.blocks {
            Some(blocks) => count == blocks,
            // A configuration that would choose a further block names no blocks.
            None => self.modules.keys().all(|path| next(path).unwrap_or(false)),
        };
        all && layers.into_iter().eq(0..count)
    }

    /// The blocks with an adapter.
    fn layers(&self) -> BTreeSet<usize> {
        self.modules.keys().filter_map(|path| Some(in_block(path)?.0)).collect()
    }

    /// The names in a block of the linears with an adapter, if each of the adapter's blocks has all of them and nothing else
    /// has an adapter.
    fn common_names(&self) -> Option<BTreeSet<&str>> {
        let names: BTreeSet<&str> = self.modules.keys().filter_map(|path| Some(in_block(path)?.1)).collect();
        (self.modules.len() == names.len() * self.layers().len()).then_some(names)
    }

    /// The linears of a block that have an adapter in any block, by their last names.
    pub fn target_names(&self) -> BTreeSet<&str> {
        self.modules.keys().filter_map(|path| path.rsplit('.').next()).collect()
    }
}

/// `(k, n)` of every linear that can carry an adapter.
fn linear_sizes(config: &ModelConfig) -> BTreeMap<String, (usize, usize)> {
    let linear = |(name, shape): (String, Vec<usize>)| {
        let path = name.strip_suffix(".weight")?;
        let &[n, k] = shape.as_slice() else { return None };
        LINEAR_NAMES.iter().any(|end| path.ends_with(end)).then(|| (path.to_string(), (k, n)))
    };
    config.weight_shapes().into_iter().filter_map(linear).collect()
}

/// The form that a folder's configuration has, and its keys.
fn read_config(folder: &Path) -> Result<(Form, Map<String, Value>)> {
    let path = folder.join(CONFIG);
    if !path.exists() {
        return Err(Error::file(folder, format!("is not an adapter's folder: it has no {CONFIG}{}", inner(folder))));
    }
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let value: Value =
        serde_json::from_str(&text).map_err(|error| Error::file(&path, format!("is not JSON: {error}")))?;
    let Value::Object(map) = value else { return Err(Error::file(&path, "is not a JSON object")) };
    let has = |key: &str| map.contains_key(key);
    match (has("peft_type"), has("lora_parameters") || has("fine_tune_type")) {
        (true, false) => Ok((Form::Peft, map)),
        (false, true) => Ok((Form::Mlx, map)),
        (false, false) => {
            Err(Error::file(&path, "has neither peft_type (as PEFT writes it) nor lora_parameters (as mlx-lm does)"))
        }
        (true, true) => Err(Error::file(
            &path,
            "has both peft_type and lora_parameters or fine_tune_type; take one form's keys out",
        )),
    }
}

/// PEFT puts an adapter with a name of its own into a folder of that name.
fn inner(folder: &Path) -> String {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<String> =
        entries.filter(|path| path.join(CONFIG).exists()).map(|path| path.display().to_string()).collect();
    found.sort_unstable();
    if found.is_empty() { String::new() } else { format!("; adapters lie in {}", found.join(", ")) }
}

/// The tensors of a file, brought to their modules.
#[derive(Default)]
struct Parts {
    found: BTreeMap<String, [Option<Tensor>; 3]>,
    problems: Vec<String>,
}

/// The parts of a module's adapter, in the order of [`Parts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    A,
    B,
    Magnitude,
}

impl Parts {
    /// Takes a tensor that stands in the file as `[r, k]`, `[n, r]` (`transposed`), or as A and B are here.
    fn add(&mut self, name: &str, path: String, part: Part, tensor: &Tensor, transposed: bool) -> Result<()> {
        let wanted = if part == Part::Magnitude { 1 } else { 2 };
        if tensor.rank() != wanted || !tensor.dtype().is_float() {
            let (dims, dtype) = (tensor.dims(), tensor.dtype().as_str());
            let what = if wanted == 1 { "a vector" } else { "a matrix" };
            self.problems.push(format!("{name} is {dims:?} in {dtype}, not {what} of floats"));
            return Ok(());
        }
        let tensor = tensor.to_dtype(DType::F32)?;
        let tensor = if transposed && wanted == 2 { tensor.t()? } else { tensor }.contiguous()?;
        if self.found.entry(path).or_default()[part as usize].replace(tensor).is_some() {
            self.problems.push(format!("{name} stands twice, in two spellings"));
        }
        Ok(())
    }

    /// The modules that are whole; `wanted` gives rank and scaling of one, and `dora` says whether they have magnitudes.
    fn modules(&mut self, dora: bool, wanted: impl Fn(&str) -> (usize, f64)) -> BTreeMap<String, Module> {
        let mut modules = BTreeMap::new();
        for (path, [a, b, magnitude]) in std::mem::take(&mut self.found) {
            let (Some(a), Some(b)) = (&a, &b) else {
                let half = |part: &Option<Tensor>, name| if part.is_some() { "" } else { name };
                self.problems.push(format!("{path} lacks its{}{}", half(&a, " A"), half(&b, " B")));
                continue;
            };
            let (rank, scaling) = wanted(&path);
            let mut wrong = Vec::new();
            if a.dims()[1] != rank || b.dims()[0] != rank {
                let (of_a, of_b) = (a.dims()[1], b.dims()[0]);
                wrong.push(format!("{path} has rank {of_a} in A and {of_b} in B; the configuration says {rank}"));
            }
            match &magnitude {
                None if dora => wrong.push(format!("{path} has no magnitudes, which DoRA needs")),
                Some(_) if !dora => {
                    wrong.push(format!("{path} has magnitudes; the configuration says nothing of DoRA"))
                }
                Some(m) if m.dims()[0] != b.dims()[1] => {
                    wrong.push(format!("{path} has {} magnitudes for {} outputs", m.dims()[0], b.dims()[1]));
                }
                _ => {}
            }
            if wrong.is_empty() {
                modules.insert(path, Module { a: a.clone(), b: b.clone(), scaling, magnitude });
            }
            self.problems.extend(wrong);
        }
        modules
    }

    /// One error with all that was found.
    fn finish(mut self, path: &Path) -> Result<()> {
        self.problems.sort_unstable();
        if self.problems.is_empty() { Ok(()) } else { Err(Error::file(path, self.problems.join("; "))) }
    }
}

/// All tensors of a file, sorted by name.
fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let raw = candle_core::safetensors::load(path, &Device::Cpu);
    Ok(raw.map_err(|error| Error::file(path, format!("cannot be read: {error}")))?.into_iter().collect())
}
