//! A model's own files, with some of their tensors changed: shards, dtypes and metadata stay.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, View};

use super::{Change, EMBEDDING, HEAD, INDEX, change, copy, merged, write_json};
use crate::models::config::read_json;
use crate::training::adapter::AdapterFile;
use crate::training::files::allow_reading;
use crate::{Error, Result};

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map is read-only and lives for one call; as with every reader of mapped weights, another program must not
    // shrink the file meanwhile.
    unsafe { Mmap::map(&file) }.map_err(Error::io(path))
}

fn header(path: &Path, map: &[u8]) -> Result<Option<HashMap<String, String>>> {
    let read = SafeTensors::read_metadata(map);
    Ok(read.map_err(|error| Error::file(path, format!("cannot be read: {error}")))?.1.metadata().clone())
}

fn tensors<'a>(path: &Path, map: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(map).map_err(|error| Error::file(path, format!("cannot be read: {error}")))
}

/// Refuses weights that are to change and are no floats that a sum can be rounded to.
pub fn check_dtypes(shards: &[PathBuf], adapter: &AdapterFile) -> Result<()> {
    let mut wrong = Vec::new();
    for shard in shards {
        let map = map(shard)?;
        for (name, view) in tensors(shard, &map)?.iter() {
            if change(adapter, name).is_some() && !matches!(view.dtype(), Dtype::F32 | Dtype::BF16 | Dtype::F16) {
                wrong.push(format!("{name} is {:?}", view.dtype()));
            }
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    let problem = format!("an adapter is added to weights in F32, BF16 or F16 only: {}", wrong.join(", "));
    Err(Error::setting("--model", problem))
}

/// Writes a file with the adapter in its tensors; `untied` puts an output projection beside the embedding.
pub fn write(shard: &Path, adapter: &AdapterFile, untied: bool, to: &Path) -> Result<()> {
    let map = map(shard)?;
    let tensors = tensors(shard, &map)?;
    let head = match tensors.tensor(EMBEDDING) {
        // Some files have the tied tensor twice.
        Ok(embedding) if untied && tensors.tensor(HEAD).is_err() => Some((head(&embedding, adapter)?, embedding)),
        _ => None,
    };
    if head.is_none() && !tensors.names().into_iter().any(|name| change(adapter, name).is_some()) {
        return copy(shard, to);
    }
    let failed = Mutex::new(None);
    let mut all: Vec<(&str, Weight)> = Vec::new();
    for (name, view) in tensors.iter() {
        all.push((name, Weight { name, view, change: change(adapter, name), failed: &failed }));
    }
    if let Some((bytes, embedding)) = &head {
        let view = TensorView::new(embedding.dtype(), embedding.shape().to_vec(), bytes);
        let view = view.map_err(|error| Error::file(to, format!("cannot be written: {error}")))?;
        all.push((HEAD, Weight { name: HEAD, view, change: None, failed: &failed }));
    }
    safetensors::serialize_to_file(all, header(shard, &map)?, to)
        .map_err(|error| Error::file(to, format!("cannot be written: {error}")))?;
    allow_reading(to)?;
    match failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

/// The bytes of an output projection that is no longer the embedding: what was trained, or the embedding as it was.
fn head(embedding: &TensorView, adapter: &AdapterFile) -> Result<Vec<u8>> {
    match adapter.saved.get(HEAD) {
        Some(tensor) => Ok(changed(HEAD, embedding, Change::Replace(tensor))?.data().into_owned()),
        None => Ok(embedding.data().to_vec()),
    }
}

/// Says in a folder's index, if there is one, that a tensor of the same size lies beside another.
pub fn add_to_index(folder: &Path, beside: &str, name: &str) -> Result<()> {
    let path = folder.join(INDEX);
    if !path.exists() {
        return Ok(());
    }
    let mut index = read_json(&path)?;
    let Some(file) = index["weight_map"].get(beside).cloned() else {
        return Err(Error::file(&path, format!("does not say which file has {beside}")));
    };
    let shard = folder.join(file.as_str().unwrap_or_default());
    let map = map(&shard)?;
    let size = tensors(&shard, &map)?.tensor(name).map_or(0, |view| view.data().len());
    if index["weight_map"].get(name).is_none() {
        index["weight_map"][name] = file;
        if let Some(total) = index["metadata"]["total_size"].as_u64() {
            index["metadata"]["total_size"] = (total + size as u64).into();
        }
    }
    write_json(&path, &index)
}

/// A tensor of the model that is made as it is written.
struct Weight<'a> {
    name: &'a str,
    view: TensorView<'a>,
    change: Option<Change<'a>>,
    /// [`View::data`] has no way to fail; what it writes then is thrown away.
    failed: &'a Mutex<Option<Error>>,
}

impl View for Weight<'_> {
    fn dtype(&self) -> Dtype {
        self.view.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.view.shape()
    }

    fn data_len(&self) -> usize {
        self.view.data().len()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let Some(change) = self.change else { return Cow::Borrowed(self.view.data()) };
        match changed(self.name, &self.view, change) {
            Ok(tensor) => Cow::Owned(tensor.data().into_owned()),
            Err(error) => {
                self.failed.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
                Cow::Borrowed(self.view.data())
            }
        }
    }
}

/// The merged weight, or what takes its place, in the weight's dtype.
fn changed(name: &str, view: &TensorView, change: Change) -> Result<Tensor> {
    let dtype = DType::try_from(view.dtype())?;
    let module = match change {
        Change::Replace(tensor) => return Ok(tensor.to_dtype(dtype)?.contiguous()?),
        Change::Add(module) => module,
    };
    let weight = Tensor::from_raw_buffer(view.data(), dtype, view.shape(), &Device::Cpu)?.to_dtype(DType::F32)?;
    Ok(merged(name, module, &weight)?.to_dtype(dtype)?)
}
