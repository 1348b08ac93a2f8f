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

use super::{Change, change, copy, merged};
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

/// Writes a file with the adapter in its tensors.
pub fn write(shard: &Path, adapter: &AdapterFile, to: &Path) -> Result<()> {
    let map = map(shard)?;
    let tensors = tensors(shard, &map)?;
    if !tensors.names().into_iter().any(|name| change(adapter, name).is_some()) {
        return copy(shard, to);
    }
    let failed = Mutex::new(None);
    let all = tensors.iter().map(|(name, view)| {
        let change = change(adapter, name);
        (name, Weight { name, view, change, failed: &failed })
    });
    safetensors::serialize_to_file(all, header(shard, &map)?, to)
        .map_err(|error| Error::file(to, format!("cannot be written: {error}")))?;
    allow_reading(to)?;
    match failed.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        None => Ok(()),
        Some(error) => Err(error),
    }
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
