//! Weights from safetensors: one file, or shards with an index. Files are mapped, not read, and tensors converted one by one.

mod packed;

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device};
use serde_json::Value;

use super::Holding;
use super::config::{ModelConfig, read_json};
use super::linear::BaseWeight;
use crate::backend::custom_ops::dequantize;
use crate::backend::quantized::{Kind, QuantizedTensor};
use crate::{Error, Result};

/// The safetensors files of a model's folder.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("model.safetensors.index.json");
    if !index.exists() {
        let single = folder.join("model.safetensors");
        return if single.exists() { Ok(vec![single]) } else { Err(Error::file(folder, "has no model.safetensors")) };
    }
    let names = shards(&index)?;
    let missing: Vec<&str> = names.iter().map(String::as_str).filter(|name| !folder.join(name).exists()).collect();
    if !missing.is_empty() {
        return Err(Error::file(folder, format!("lacks files that its index names: {}", missing.join(", "))));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

/// The names of the files that an index lists; all lie beside it.
pub(super) fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let json = read_json(index)?;
    let names = json.get("weight_map").and_then(Value::as_object).and_then(|map| {
        let names = map.values().map(|name| name.as_str().map(str::to_string));
        names.collect::<Option<BTreeSet<String>>>()
    });
    let names = names.ok_or_else(|| Error::file(index, "has no weight_map from tensors to files"))?;
    // A name with a path in it could lead out of the folder.
    let outside = |name: &&String| Path::new(name).file_name() != Some(name.as_ref());
    let outside: Vec<&str> = names.iter().filter(outside).map(String::as_str).collect();
    if !outside.is_empty() {
        return Err(Error::file(index, format!("names files outside its folder: {}", outside.join(", "))));
    }
    Ok(names)
}

/// Exactly the tensors of [`ModelConfig::weight_shapes`] on `device`, held as `holding` says.
///
/// # Errors
/// One error lists every tensor that is missing, has another shape, or is not of this model.
pub fn load(
    folder: &Path,
    config: &ModelConfig,
    holding: &Holding,
    device: &Device,
) -> Result<HashMap<String, BaseWeight>> {
    let mut all = HashMap::new();
    visit(folder, config, holding, device, &mut |name, weight| {
        all.insert(name.to_string(), weight);
        Ok(())
    })?;
    Ok(all)
}

/// The tensors that [`load`] gives, one after the other.
///
/// # Errors
/// As [`load`]; what `visit` returns.
pub fn visit(
    folder: &Path,
    config: &ModelConfig,
    holding: &Holding,
    device: &Device,
    visit: &mut dyn FnMut(&str, BaseWeight) -> Result<()>,
) -> Result<()> {
    let reader = Reader::open(folder, config)?;
    reader.names.iter().try_for_each(|name| visit(name, reader.read(name, holding, device)?))
}

/// The weights of a folder's files, by name.
pub struct Reader {
    folder: PathBuf,
    mapped: MmapedSafetensors,
    shapes: HashMap<String, Vec<usize>>,
    packed: HashMap<String, Kind>,
    /// In the order of [`ModelConfig::weight_shapes`].
    pub names: Vec<String>,
}

impl Reader {
    /// Maps the files.
    ///
    /// # Errors
    /// As [`load`].
    pub fn open(folder: &Path, config: &ModelConfig) -> Result<Self> {
        let mapped = map(&files(folder)?)?;
        let mut found = shapes_of(&mapped);
        let shapes = wanted_shapes(folder, config, found.len())?;
        let packed = packed::find(folder, &mapped, &shapes, &mut found)?;
        let names = check(folder, config, found, str::to_string)?;
        Ok(Self { folder: folder.to_path_buf(), mapped, shapes, packed, names })
    }

    /// A weight on a device, held as `holding` says.
    pub fn read(&self, name: &str, holding: &Holding, device: &Device) -> Result<BaseWeight> {
        let kind = holding.kinds.get(name).copied();
        if let Some(&own) = self.packed.get(name) {
            let blocks = packed::read(&self.folder, &self.mapped, name, own, &self.shapes[name])?;
            return held(blocks, kind, holding.dtype, device);
        }
        match kind {
            Some(kind) => {
                let tensor = self.mapped.load(name, &Device::Cpu)?;
                Ok(QuantizedTensor::quantize(&tensor, kind)?.to_device(device)?.into())
            }
            // A tensor of the same dtype is already a copy in memory: `load` never hands out the map.
            None => Ok(self.mapped.load(name, device)?.to_dtype(holding.dtype)?.into()),
        }
    }

    /// The shape of a weight.
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.shapes[name]
    }

    /// What a weight is stored in, if it is not quantized.
    pub fn dtype(&self, name: &str) -> Result<Option<DType>> {
        if self.packed.contains_key(name) {
            return Ok(None);
        }
        Ok(Some(self.mapped.get(name)?.dtype().try_into()?))
    }
}

/// A quantized weight of a file as it is to be held: as it is, quantized otherwise, or dense.
pub(super) fn held(weight: QuantizedTensor, kind: Option<Kind>, dtype: DType, device: &Device) -> Result<BaseWeight> {
    if kind == Some(weight.kind()) {
        return Ok(weight.to_device(device)?.into());
    }
    let dense = dequantize(&weight, DType::F32)?;
    match kind {
        Some(kind) => Ok(QuantizedTensor::quantize(&dense, kind)?.to_device(device)?.into()),
        None => Ok(dense.to_dtype(dtype)?.to_device(device)?.into()),
    }
}

/// The kinds of the weights that bitsandbytes or MLX quantized in a folder's files.
///
/// # Errors
/// One error lists every weight of a form that is not read.
pub fn kinds(folder: &Path, config: &ModelConfig) -> Result<HashMap<String, Kind>> {
    let mapped = map(&files(folder)?)?;
    let mut found = shapes_of(&mapped);
    packed::find(folder, &mapped, &wanted_shapes(folder, config, found.len())?, &mut found)
}

/// [`ModelConfig::weight_shapes`] of a file with so many tensors.
fn wanted_shapes(path: &Path, config: &ModelConfig, tensors: usize) -> Result<HashMap<String, Vec<usize>>> {
    check_count(path, config, tensors)?;
    Ok(config.weight_shapes().into_iter().collect())
}

/// A block has more tensors than one: a configuration from a broken file is not followed into memory.
pub(super) fn check_count(path: &Path, config: &ModelConfig, tensors: usize) -> Result<()> {
    if config.num_layers <= tensors {
        return Ok(());
    }
    let problem = format!("has {tensors} tensors, too few for the {} layers of its configuration", config.num_layers);
    Err(Error::file(path, problem))
}

fn shapes_of(mapped: &MmapedSafetensors) -> HashMap<String, Vec<usize>> {
    mapped.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec())).collect()
}

/// The names of [`ModelConfig::weight_shapes`], if exactly these tensors are found. `file_name` says how a file calls one.
pub(super) fn check(
    path: &Path,
    config: &ModelConfig,
    mut found: HashMap<String, Vec<usize>>,
    file_name: impl Fn(&str) -> String,
) -> Result<Vec<String>> {
    check_count(path, config, found.len())?;
    let mut problems = Vec::new();
    let wanted = config.weight_shapes();
    for (name, shape) in &wanted {
        let name = file_name(name);
        match found.remove(&name) {
            None => problems.push(format!("{name} {shape:?} is missing")),
            Some(other) if other != *shape => {
                problems.push(format!("{name} is {other:?}, the configuration says {shape:?}"))
            }
            Some(_) => {}
        }
    }
    // Buffers of old checkpoints, and the copy of a tied embedding that some tools write.
    let passed =
        |name: &str| name.ends_with("rotary_emb.inv_freq") || (config.tie_word_embeddings && name == "lm_head.weight");
    found.retain(|name, _| !passed(name));
    let mut unknown: Vec<String> = found.into_keys().map(|name| format!("{name} is not of this model")).collect();
    unknown.sort_unstable();
    problems.extend(unknown);
    if !problems.is_empty() {
        const SHOWN: usize = 20;
        let more = problems.len().saturating_sub(SHOWN);
        problems.truncate(SHOWN);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        return Err(Error::file(
            path,
            format!("its weights do not fit its configuration: {}{more}", problems.join("; ")),
        ));
    }
    Ok(wanted.into_iter().map(|(name, _)| name).collect())
}

/// The dtype of a folder's last norm, which nobody quantizes, or of its first weight.
pub fn dtype(folder: &Path) -> Result<DType> {
    let mapped = map(&files(folder)?)?;
    let mut tensors = mapped.tensors();
    tensors.sort_by_key(|(name, _)| name != "model.norm.weight");
    let first = tensors.into_iter().next();
    let (_, view) = first.ok_or_else(|| Error::file(folder, "its weights hold no tensor"))?;
    Ok(view.dtype().try_into()?)
}

fn map(files: &[PathBuf]) -> Result<MmapedSafetensors> {
    // SAFETY: the map is read-only and lives for one call; as with every reader of mapped weights, another program must not
    // shrink the files meanwhile.
    let mapped = unsafe { MmapedSafetensors::multi(files) };
    mapped.map_err(|error| {
        let folder = files.first().and_then(|file| file.parent()).unwrap_or(Path::new(""));
        Error::file(folder, format!("its safetensors cannot be read: {error}"))
    })
}
