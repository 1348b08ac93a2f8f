//! One flat set of keys for `train`: flag over configuration file over default.

use std::path::{Path, PathBuf};

use metal_candle::training::options::TrainerOptions;
use metal_candle::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::device::DeviceKind;

/// What `train` needs besides the trainer's own options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunSettings {
    /// A folder, a GGUF file or the name of a model on the hub.
    pub model: Option<String>,
    /// A folder with train.jsonl, or a JSONL file.
    pub data: Option<PathBuf>,
    /// Where the adapter and checkpoints go.
    pub adapter_path: PathBuf,
    /// Where to compute.
    pub device: DeviceKind,
    /// Train on answers alone.
    pub mask_prompt: bool,
    /// Continue the run in `adapter_path`.
    pub resume: bool,
    /// Start from the values of this adapter.
    pub resume_adapter_file: Option<PathBuf>,
    /// Evaluate on test.jsonl at the end.
    pub test: bool,
    /// Where reports go besides the terminal and metrics.jsonl.
    pub report_to: ReportTo,
}

/// A service that reports are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reporter {
    /// Event files in `runs`.
    #[serde(rename = "tensorboard")]
    TensorBoard,
}

/// A list of reporters. A configuration file may also give one name, or `none`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value")]
pub struct ReportTo(pub Vec<Reporter>);

impl TryFrom<Value> for ReportTo {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Self, String> {
        match value {
            Value::Null => Ok(Self::default()),
            Value::String(names) => names.parse(),
            list => serde_json::from_value(list).map(Self).map_err(|_| KNOWN_REPORTERS.to_string()),
        }
    }
}

/// As a flag gives it: names separated by commas, or `none`.
impl std::str::FromStr for ReportTo {
    type Err = String;

    fn from_str(names: &str) -> std::result::Result<Self, String> {
        if names == "none" {
            return Ok(Self::default());
        }
        let names: Vec<&str> = names.split(',').map(str::trim).collect();
        serde_json::from_value(json!(names)).map(Self).map_err(|_| KNOWN_REPORTERS.to_string())
    }
}

const KNOWN_REPORTERS: &str = "only tensorboard is known; none stands for no reporter";

impl Default for RunSettings {
    fn default() -> Self {
        Self {
            model: None,
            data: None,
            adapter_path: "adapters".into(),
            device: DeviceKind::Auto,
            mask_prompt: false,
            resume: false,
            resume_adapter_file: None,
            test: false,
            report_to: ReportTo::default(),
        }
    }
}

/// Everything `train` runs by.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What is read and written where.
    pub run: RunSettings,
    /// What the trainer is told.
    pub trainer: TrainerOptions,
}

impl Settings {
    /// Merges the flags that were given (a map with only those) over a configuration file over the defaults.
    ///
    /// # Errors
    /// One error lists every unknown key of the file with the nearest known one; another says which value cannot be read.
    pub fn merge(flags: Map<String, Value>, file: Option<&Path>) -> Result<Self> {
        let text = file.map(|path| std::fs::read_to_string(path).map_err(Error::io(path))).transpose()?;
        Self::merge_text(flags, file.zip(text.as_deref()))
    }

    /// [`Settings::merge`] with the file's text at hand; the path is for messages.
    pub fn merge_text(flags: Map<String, Value>, file: Option<(&Path, &str)>) -> Result<Self> {
        let mut merged = object(json!(RunSettings::default()));
        merged.extend(object(json!(TrainerOptions::default())));
        if let Some((path, text)) = file {
            let read: Map<String, Value> = serde_saphyr::from_str(text)
                .map_err(|error| Error::file(path, format!("is not a YAML mapping: {error}")))?;
            let read = from_mlx(path, read)?;
            let unknown: Vec<String> = read
                .keys()
                .filter(|key| !merged.contains_key(*key))
                .map(|key| match nearest(key, merged.keys()) {
                    Some(near) => format!("{key} (did you mean {near}?)"),
                    None => key.clone(),
                })
                .collect();
            if !unknown.is_empty() {
                return Err(Error::file(path, format!("unknown keys: {}", unknown.join(", "))));
            }
            merged.extend(read);
        }
        merged.extend(flags);
        let file = file.map(|(path, _)| path);
        let run = pick::<RunSettings>(&merged, &object(json!(RunSettings::default())), file)?;
        let trainer = pick::<TrainerOptions>(&merged, &object(json!(TrainerOptions::default())), file)?;
        Ok(Self { run, trainer })
    }

    /// All settings as a configuration file would have them.
    pub fn to_yaml(&self) -> String {
        let mut all = object(json!(self.run));
        all.extend(object(json!(self.trainer)));
        serde_saphyr::to_string(&all).unwrap_or_else(|error| format!("# cannot be written: {error}\n"))
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// The part of the keys that a type has.
fn pick<T: serde::de::DeserializeOwned>(
    merged: &Map<String, Value>,
    keys: &Map<String, Value>,
    file: Option<&Path>,
) -> Result<T> {
    // Key by key first, so that the message names the key.
    for key in keys.keys() {
        let mut one = keys.clone();
        one.insert(key.clone(), merged[key].clone());
        if let Err(error) = serde_json::from_value::<T>(Value::Object(one)) {
            let place = file.map_or(String::new(), |path| format!(" (flag or {})", path.display()));
            return Err(Error::setting(format!("{key}{place}"), format!("{} cannot be used: {error}", merged[key])));
        }
    }
    let part: Map<String, Value> = keys.keys().map(|key| (key.clone(), merged[key].clone())).collect();
    serde_json::from_value(Value::Object(part)).map_err(|error| Error::setting("settings", error.to_string()))
}

/// mlx_lm's nested `lora_parameters`: `scale` is the scaling itself, so alpha = scale · rank.
fn from_mlx(path: &Path, mut read: Map<String, Value>) -> Result<Map<String, Value>> {
    if read.get("lr_schedule").is_some_and(Value::is_object) {
        let flat = "lr_schedule: cosine (or constant, linear), warmup: steps, min_lr_ratio: share";
        return Err(Error::file(path, format!("lr_schedule is a mapping; write it as {flat}")));
    }
    let Some(lora) = read.remove("lora_parameters") else { return Ok(read) };
    let Value::Object(mut lora) = lora else {
        return Err(Error::file(path, "lora_parameters is not a mapping"));
    };
    let rank = lora.remove("rank").and_then(|rank| rank.as_u64()).unwrap_or(8);
    let scale = lora.remove("scale").and_then(|scale| scale.as_f64()).unwrap_or(20.0);
    let mut flat = Map::new();
    flat.insert("rank".into(), json!(rank));
    flat.insert("alpha".into(), json!(scale * rank as f64));
    if read.get("use_rslora").is_some_and(|value| *value != json!(false)) {
        return Err(Error::file(path, "lora_parameters.scale is the scaling itself, and use_rslora would change it"));
    }
    if let Some(dropout) = lora.remove("dropout") {
        flat.insert("dropout".into(), dropout);
    }
    if let Some(keys) = lora.remove("keys") {
        flat.insert("target_modules".into(), keys);
    }
    if !lora.is_empty() {
        let keys: Vec<String> = lora.into_iter().map(|(key, _)| format!("lora_parameters.{key}")).collect();
        return Err(Error::file(path, format!("unknown keys: {}", keys.join(", "))));
    }
    let twice: Vec<&str> = flat.keys().map(String::as_str).filter(|key| read.contains_key(*key)).collect();
    if !twice.is_empty() {
        return Err(Error::file(path, format!("set here and in lora_parameters: {}", twice.join(", "))));
    }
    read.extend(flat);
    Ok(read)
}

/// The known key with the fewest edits to this one, if they are few.
fn nearest<'a>(key: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a String> {
    let best = known.map(|name| (edits(&key.replace('-', "_"), name), name)).min()?;
    (best.0 <= (key.len() / 3).max(2)).then_some(best.1)
}

/// Levenshtein's distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merge(flags: Value, yaml: &str) -> Result<Settings> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.yaml");
        std::fs::write(&path, yaml).unwrap();
        Settings::merge(object(flags), Some(&path))
    }

    #[test]
    fn flag_over_file_over_default() {
        let settings = merge(json!({"rank": 3}), "rank: 5\nalpha: 7\nmask_prompt: true\n").unwrap();
        let TrainerOptions { rank, alpha, batch_size, .. } = settings.trainer;
        assert_eq!((rank, alpha, batch_size), (3, 7.0, TrainerOptions::default().batch_size));
        assert!(settings.run.mask_prompt);
    }

    #[test]
    fn every_unknown_key_is_named() {
        let error = merge(json!({}), "learning_rat: 1\nbatchsize: 2\nzzz: 3\n").unwrap_err().to_string();
        assert!(error.contains("learning_rat (did you mean learning_rate?)"), "{error}");
        assert!(error.contains("batchsize (did you mean batch_size?)") && error.contains("zzz"), "{error}");
    }

    #[test]
    fn a_wrong_value_is_named() {
        let error = merge(json!({}), "rank: many\n").unwrap_err().to_string();
        assert!(error.contains("rank") && error.contains("many"), "{error}");
    }

    #[test]
    fn reporters_are_a_list_a_name_or_none() {
        for yaml in ["report_to: [tensorboard]\n", "report_to: tensorboard\n"] {
            assert_eq!(merge(json!({}), yaml).unwrap().run.report_to.0, [Reporter::TensorBoard]);
            assert!(merge(json!({"report_to": []}), yaml).unwrap().run.report_to.0.is_empty());
        }
        assert!(merge(json!({}), "report_to: none\n").unwrap().run.report_to.0.is_empty());
        for wrong in ["wandb", "[tensorboard, wandb]", "3"] {
            let error = merge(json!({}), &format!("report_to: {wrong}\n")).unwrap_err().to_string();
            assert!(error.contains("report_to") && error.contains("only tensorboard"), "{error}");
        }
    }

    #[test]
    fn mlx_parameters() {
        let settings = merge(json!({}), "lora_parameters: {rank: 4, scale: 10.0, keys: [self_attn.q_proj]}\n").unwrap();
        assert_eq!((settings.trainer.rank, settings.trainer.alpha), (4, 40.0));
        assert_eq!(settings.trainer.target_modules, ["self_attn.q_proj"]);
        assert!(merge(json!({}), "rank: 4\nlora_parameters: {rank: 4}\n").is_err());
        assert!(merge(json!({}), "lora_parameters: {rnk: 4}\n").is_err());
    }
}
