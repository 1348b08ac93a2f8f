//! A model from a folder of quantized safetensors, as one in floats.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{DType, Device};
use safetensors::{Dtype, View};
use serde_json::{Map, Value, json};

use super::{
    CONFIG, Change, Fused, INDEX, MOST, beside, change, check_adapter, copy_files, difference, folder_logits, merged,
    values, wanted_logits, write_folder, write_json,
};
use crate::models::config::read_json;
use crate::models::weights::{self, Reader};
use crate::models::{Holding, ModelFiles};
use crate::training::adapter::AdapterFile;
use crate::training::files::allow_reading;
use crate::{Error, Result};

/// What `config.json` says of quantized weights.
const QUANTIZATION: [&str; 2] = ["quantization", "quantization_config"];

/// Writes the model with its weights in floats and the adapter, if there is one, in them. What was quantized gets the dtype that
/// `config.json` names, else bf16; the rest keeps its own. Files keep their names.
///
/// # Errors
/// A model that is not a folder or not quantized; an adapter that does not fit it; a written model that does not answer as the
/// adapted one.
pub fn dequantize(model: &ModelFiles, adapter: Option<&AdapterFile>, output: &Path) -> Result<Fused> {
    if model.is_gguf() {
        let problem = "is a GGUF file: its configuration and tokenizer have no form as a folder's here, so --dequantize cannot write \
                       one; take --export-gguf f16 or bf16 for its values in floats";
        return Err(Error::file(model.path(), problem));
    }
    let source = model.folder()?;
    let packed = weights::kinds(source, &model.config)?;
    if packed.is_empty() {
        return Err(Error::file(source, "is not quantized; leave --dequantize out"));
    }
    if let Some(adapter) = adapter {
        check_adapter(model, adapter)?;
    }
    let reader = Reader::open(source, &model.config)?;
    let mut config = read_json(&source.join(CONFIG))?;
    let dtype = float_dtype(&config);
    if let Some(config) = config.as_object_mut() {
        config.retain(|key, _| !QUANTIZATION.contains(&key.as_str()));
    }
    let shards = weights::files(source)?;
    let wanted = wanted_logits(model, adapter)?;
    write_folder(output, |folder| {
        let left_out = copy_files(source, &shards, folder)?;
        let files = weights_by_file(source, &shards, &reader.names)?;
        let (mut map, mut total) = (Map::new(), 0);
        for (file, names) in &files {
            let path = beside(folder, file);
            let failed = Mutex::new(None);
            let weights = names.iter().map(|name| {
                let dtype = reader.dtype(name)?.unwrap_or(dtype);
                let change = adapter.and_then(|adapter| change(adapter, name));
                Ok((name.as_str(), Weight { name, reader: &reader, dtype, change, failed: &failed }))
            });
            let weights = weights.collect::<Result<Vec<_>>>()?;
            total += weights.iter().map(|(_, weight)| weight.data_len()).sum::<usize>();
            let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            map.extend(names.iter().map(|name| (name.clone(), file_name.clone().into())));
            let metadata = Some([("format".to_string(), "pt".to_string())].into());
            safetensors::serialize_to_file(weights, metadata, &path)
                .map_err(|error| Error::file(&path, format!("cannot be written: {error}")))?;
            allow_reading(&path)?;
            if let Some(error) = failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
                return Err(error);
            }
        }
        if source.join(INDEX).exists() {
            write_json(&folder.join(INDEX), &json!({"metadata": {"total_size": total}, "weight_map": map}))?;
        }
        let difference = difference(&wanted, &folder_logits(&model.config, folder)?, MOST, output)?;
        // Last, so that a folder that was left half written is no model.
        write_json(&folder.join(CONFIG), &config)?;
        let note = format!("{} quantized weights became {}", packed.len(), dtype.as_str());
        Ok(Fused { left_out, difference, rounding: None, notes: vec![note] })
    })
}

/// The dtype that a configuration names.
fn float_dtype(config: &Value) -> DType {
    match config.get("dtype").or(config.get("torch_dtype")).and_then(Value::as_str) {
        Some("float32") => DType::F32,
        Some("float16") => DType::F16,
        _ => DType::BF16,
    }
}

/// Which weights each file has.
fn weights_by_file(source: &Path, shards: &[PathBuf], names: &[String]) -> Result<BTreeMap<PathBuf, Vec<String>>> {
    let index = source.join(INDEX);
    if !index.exists() {
        return Ok(shards.iter().map(|shard| (shard.clone(), names.to_vec())).collect());
    }
    let json = read_json(&index)?;
    let mut files: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    for name in names {
        let Some(file) = json["weight_map"][name].as_str() else {
            return Err(Error::file(&index, format!("does not say which file has {name}")));
        };
        files.entry(source.join(file)).or_default().push(name.clone());
    }
    Ok(files)
}

/// A weight that is read, changed and rounded as it is written.
struct Weight<'a> {
    name: &'a str,
    reader: &'a Reader,
    dtype: DType,
    change: Option<Change<'a>>,
    /// [`View::data`] has no way to fail; what it writes then is thrown away.
    failed: &'a Mutex<Option<Error>>,
}

impl Weight<'_> {
    fn bytes(&self) -> Result<Vec<u8>> {
        let base = || values(&self.reader.read(self.name, &Holding::dense(DType::F32), &Device::Cpu)?);
        let tensor = match self.change {
            None => base()?,
            Some(Change::Replace(tensor)) => tensor.clone(),
            Some(Change::Add(module)) => merged(self.name, module, &base()?)?,
        };
        Ok(tensor.to_dtype(self.dtype)?.contiguous()?.data().into_owned())
    }
}

impl View for Weight<'_> {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            _ => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        self.reader.shape(self.name)
    }

    fn data_len(&self) -> usize {
        self.shape().iter().product::<usize>() * self.dtype.size_in_bytes()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.bytes().unwrap_or_else(|error| {
            self.failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
            vec![0; self.data_len()]
        }))
    }
}
