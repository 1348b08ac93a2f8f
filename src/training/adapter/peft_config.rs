//! PEFT's `adapter_config.json`: what its keys mean, and which mean something that cannot be done here.

use std::collections::BTreeSet;
use std::path::Path;

use regex::Regex;
use serde_json::{Map, Value};

use super::targets::{self, Layers, Names, Selection};
use crate::{Error, Result};

/// Keys that mean another computation when they are set to anything but nothing, false or empty.
const UNSUPPORTED: &[&str] = &[
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
];

/// Keys that [`Config`] is made of, and keys that have no bearing on a loaded adapter: where it came from, how training began.
const KNOWN: &[&str] = &[
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
    "exclude_modules",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "peft_version",
    "runtime_config",
    "qalora_group_size",
    "monteclora_config",
];

/// Initialisations that leave the base model's weights as they are; an adapter made with another fits changed weights only.
const PLAIN_INITIALISATIONS: &[&str] = &["gaussian", "eva", "orthogonal"];

/// What a configuration says of an adapter.
pub struct Config {
    pub base_model: Option<String>,
    pub dropout: f32,
    pub dora: bool,
    pub selection: Selection,
    rank: usize,
    alpha: f64,
    rslora: bool,
    ranks: Vec<(String, Regex, usize)>,
    alphas: Vec<(String, Regex, f64)>,
}

impl Config {
    /// # Errors
    /// One error lists every key that is not known, not supported, or has a value that cannot be used.
    pub fn read(path: &Path, map: &Map<String, Value>) -> Result<Self> {
        let mut keys = Keys { map, problems: Vec::new() };
        keys.check_known();
        // PEFT's defaults for both are 8.
        let rank = keys.number("r").map_or(8, |value| keys.rank("r", value));
        let alpha = keys.number("lora_alpha").unwrap_or(8.0);
        let dropout = keys.number("lora_dropout").unwrap_or(0.0) as f32;
        if !(0.0..1.0).contains(&dropout) {
            keys.problems.push(format!("lora_dropout is {dropout}, but must be at least 0 and under 1"));
        }
        let ranks = keys.pattern("rank_pattern");
        let ranks =
            ranks.into_iter().map(|(name, regex, value)| (name, regex, keys.rank("rank_pattern", value))).collect();
        let config = Self {
            base_model: keys.text("base_model_name_or_path"),
            dropout,
            dora: keys.flag("use_dora"),
            selection: keys.selection(),
            rank,
            alpha,
            rslora: keys.flag("use_rslora"),
            ranks,
            alphas: keys.pattern("alpha_pattern"),
        };
        if keys.problems.is_empty() { Ok(config) } else { Err(Error::file(path, keys.problems.join("; "))) }
    }

    /// Rank and scaling of a module: of the first pattern that its path ends in, else the general ones.
    pub fn rank_and_scaling(&self, path: &str) -> (usize, f64) {
        let rank = self.ranks.iter().find(|(_, regex, _)| regex.is_match(path)).map_or(self.rank, |(.., rank)| *rank);
        let alpha =
            self.alphas.iter().find(|(_, regex, _)| regex.is_match(path)).map_or(self.alpha, |(.., alpha)| *alpha);
        let divisor = if self.rslora { (rank as f64).sqrt() } else { rank as f64 };
        (rank, alpha / divisor)
    }

    /// The names of targets, whole tensors and patterns that none of the modules and tensors has.
    pub fn unmatched(&self, modules: &[&str], saved: &[&str]) -> Vec<String> {
        let none = |regex: &Regex| !modules.iter().any(|path| regex.is_match(path));
        let ranks = self.ranks.iter().filter(|(_, regex, _)| none(regex)).map(|(name, ..)| ("rank_pattern", name));
        let alphas = self.alphas.iter().filter(|(_, regex, _)| none(regex)).map(|(name, ..)| ("alpha_pattern", name));
        let patterns = ranks.chain(alphas).map(|(key, name)| format!("{key} {name} has no module"));
        let without = |name: &&String| !saved.iter().any(|tensor| targets::saved(tensor, name));
        let whole = self.selection.modules_to_save.iter().filter(without);
        let whole = whole.map(|name| format!("modules_to_save {name} has no tensor"));
        let targets: Vec<String> = match &self.selection.targets {
            Names::List(names) => {
                let found = |name: &str| modules.iter().any(|path| targets::ends_with(path, name));
                let excluded =
                    |name: &str| self.selection.exclude.as_ref().is_some_and(|names| names.may_exclude(name));
                let without = names.iter().filter(|name| !found(name) && !excluded(name));
                without.map(|name| format!("target {name} has no tensor")).collect()
            }
            _ if modules.is_empty() => vec!["no tensor is of a target module".to_string()],
            _ => Vec::new(),
        };
        patterns.chain(whole).chain(targets).collect()
    }
}

/// The keys of a file, with what is wrong with them.
struct Keys<'a> {
    map: &'a Map<String, Value>,
    problems: Vec<String>,
}

impl<'a> Keys<'a> {
    fn check_known(&mut self) {
        let is = |key: &str| self.map.get(key).filter(|value| !value.is_null());
        if is("peft_type").is_none_or(|value| value != "LORA") {
            let value = is("peft_type").map_or("missing".to_string(), Value::to_string);
            self.problems.push(format!("peft_type is {value}; only LORA is known"));
        }
        if let Some(bias) = is("bias").filter(|bias| *bias != "none") {
            self.problems.push(format!("bias is {bias}; only none is known"));
        }
        if let Some(init) = is("init_lora_weights") {
            let plain = init.is_boolean() || init.as_str().is_some_and(|init| PLAIN_INITIALISATIONS.contains(&init));
            if !plain {
                self.problems.push(format!("init_lora_weights is {init}, which changed the base model's weights"));
            }
        }
        for (key, value) in self.map {
            if is_empty(value) || KNOWN.contains(&key.as_str()) {
                continue;
            }
            let what = if UNSUPPORTED.contains(&key.as_str()) { "is not supported" } else { "is not known" };
            self.problems.push(format!("{key} is {value}, which {what}"));
        }
    }

    fn wrong<T>(&mut self, key: &str, wanted: &str) -> Option<T> {
        self.problems.push(format!("{key} is {}, but must be {wanted}", self.map[key]));
        None
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn number(&mut self, key: &str) -> Option<f64> {
        let number = self.get(key)?.as_f64().filter(|number| number.is_finite());
        number.or_else(|| self.wrong(key, "a number"))
    }

    fn rank(&mut self, key: &str, value: f64) -> usize {
        if !(1.0..=65_536.0).contains(&value) || value.fract() != 0.0 {
            self.problems.push(format!("{key} has {value}, but a rank is a whole number from 1 to 65536"));
            return 1;
        }
        value as usize
    }

    fn flag(&mut self, key: &str) -> bool {
        let Some(value) = self.get(key) else { return false };
        value.as_bool().or_else(|| self.wrong(key, "true or false")).unwrap_or(false)
    }

    fn text(&mut self, key: &str) -> Option<String> {
        let text = self.get(key)?.as_str().map(str::to_string);
        text.or_else(|| self.wrong(key, "a text")).filter(|text| !text.is_empty())
    }

    fn list(&mut self, key: &str) -> Vec<String> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let names =
            value.as_array().and_then(|names| names.iter().map(|name| name.as_str().map(str::to_string)).collect());
        names.or_else(|| self.wrong(key, "a list of names")).unwrap_or_default()
    }

    fn names(&mut self, key: &str) -> Option<Names> {
        match self.get(key)? {
            Value::String(text) if text.eq_ignore_ascii_case("all-linear") => Some(Names::AllLinear),
            Value::String(pattern) => {
                let regex = targets::whole(pattern);
                self.compiled(key, pattern, regex).map(Names::Pattern)
            }
            _ => Some(Names::List(self.list(key))),
        }
    }

    fn compiled(&mut self, key: &str, pattern: &str, regex: Result<Regex, regex::Error>) -> Option<Regex> {
        if regex.is_err() {
            let advice = "is not a regular expression that can be read here (without lookaround and backreferences); \
                          write the names as a list";
            self.problems.push(format!("{key} '{pattern}' {advice}"));
        }
        regex.ok()
    }

    fn pattern(&mut self, key: &str) -> Vec<(String, Regex, f64)> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let Some(map) = value.as_object() else { return self.wrong(key, "an object").unwrap_or_default() };
        let mut found = Vec::new();
        for (name, value) in map {
            match value.as_f64() {
                None => self.problems.push(format!("{key} of {name} is {value}, but must be a number")),
                Some(value) => {
                    let regex = self.compiled(key, name, targets::ending(name));
                    found.extend(regex.map(|regex| (name.clone(), regex, value)));
                }
            }
        }
        found
    }

    fn selection(&mut self) -> Selection {
        let targets = self.names("target_modules").unwrap_or(Names::List(Vec::new()));
        if matches!(&targets, Names::List(names) if names.is_empty()) {
            self.problems.push("target_modules is missing or empty".to_string());
        }
        let exclude =
            self.names("exclude_modules").filter(|names| !matches!(names, Names::List(names) if names.is_empty()));
        Selection { targets, exclude, modules_to_save: self.list("modules_to_save"), layers: self.layers() }
    }

    fn layers(&mut self) -> Option<Layers> {
        let indices = match self.get("layers_to_transform") {
            None => None,
            Some(Value::Array(indices)) if indices.is_empty() => None,
            Some(Value::Array(indices)) => {
                let all: Option<BTreeSet<u64>> = indices.iter().map(Value::as_u64).collect();
                all.or_else(|| self.wrong("layers_to_transform", "a list of numbers"))
            }
            Some(index) => {
                let one = index.as_u64().map(|index| BTreeSet::from([index]));
                one.or_else(|| self.wrong("layers_to_transform", "a number or a list of them"))
            }
        };
        let names = match self.get("layers_pattern") {
            Some(Value::String(name)) if name.is_empty() => Vec::new(),
            Some(Value::String(name)) => vec![name.clone()],
            _ => self.list("layers_pattern"),
        };
        let patterns = if names.is_empty() {
            targets::numbered(None).into_iter().collect()
        } else {
            let compiled = names.iter().filter_map(|name| {
                let regex = targets::numbered(Some(name));
                self.compiled("layers_pattern", name, regex)
            });
            compiled.collect()
        };
        Some(Layers { indices: indices?, patterns })
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}
