//! Fusing: adapters are merged into the weights that they are on ([`Module::merge`]), tensors that were trained whole take their
//! place, and the model is written as a new folder.
//!
//! The sum is in f32 and rounded once, to the weight's own dtype. Files are written tensor by tensor: one weight is in memory at
//! a time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, View};

use super::adapter::{AdapterFile, Module};
use super::files::{allow_reading, replace_folder};
use crate::models::decoder::{Batch, Decoder};
use crate::models::{Holding, ModelFiles, weights};
use crate::{Error, Result};

/// What was written.
#[derive(Debug)]
pub struct Fused {
    /// Files and folders of the model that were not carried over: weights in other formats, folders, hidden files.
    pub left_out: Vec<String>,
    /// The largest difference between the logits of the fused model and those of the model with the adapter on it, in f32 on
    /// a fixed sequence of tokens, relative to the largest logit.
    pub difference: f64,
}

/// Over this, the fused model is not written: rounding weights to bf16 or f16 gives a hundredth of it and less.
const MOST: f64 = 0.2;

/// Tokens of the sequence that both models run.
const TOKENS: u32 = 32;

const CONFIG: &str = "config.json";

/// Writes the model with the adapter in its weights. Shards, dtypes and everything else stay as they are. The folder is written
/// beside and renamed when the model in it has been tried; one that was there is replaced.
///
/// # Errors
/// A model that is not a folder; an adapter that does not fit it or that the decoder does not run; weights in a dtype that cannot be added
/// to; a fused model that does not answer as the adapted one.
pub fn fuse(model: &ModelFiles, adapter: &AdapterFile, output: &Path) -> Result<Fused> {
    let source = model.folder()?;
    adapter.check_fits(&model.config)?;
    check_parts(model, adapter)?;
    let shards = weights::files(source)?;
    check_dtypes(&shards, adapter)?;
    let mut adapted = decoder(model, source, &adapter.saved)?;
    let mut deltas = adapter.clone();
    // Their tensors are in the decoder already.
    deltas.saved.clear();
    deltas.attach(&mut adapted, &Device::Cpu)?;
    let wanted = logits(&adapted)?;
    drop(adapted);
    let mut fused = None;
    replace_folder(output, |folder| {
        let left_out = copy_files(source, &shards, folder)?;
        for shard in &shards {
            write_shard(shard, adapter, &beside(folder, shard))?;
        }
        let difference = difference(&wanted, &logits(&decoder(model, folder, &BTreeMap::new())?)?);
        if !difference.is_finite() || difference > MOST {
            let problem = format!(
                "the fused model's logits differ by {difference:.3e} from the adapted one's; nothing is written"
            );
            return Err(Error::file(output, problem));
        }
        // Last, so that a folder that was left half written is no model.
        copy(&source.join(CONFIG), &folder.join(CONFIG))?;
        fused = Some(Fused { left_out, difference });
        Ok(())
    })?;
    let Some(fused) = fused else { unreachable!("the folder was filled") };
    Ok(fused)
}

fn beside(folder: &Path, file: &Path) -> PathBuf {
    folder.join(file.file_name().unwrap_or_default())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map_err(Error::io(from))?;
    Ok(())
}

/// Refuses whole tensors that have no place of their own in the model.
fn check_parts(model: &ModelFiles, adapter: &AdapterFile) -> Result<()> {
    let mut problems = Vec::new();
    let shapes: BTreeMap<String, Vec<usize>> = model.config.weight_shapes().into_iter().collect();
    for (name, tensor) in &adapter.saved {
        match shapes.get(name) {
            // PEFT trains one side of a tied embedding; a fused model has one tensor for both.
            Some(_) if model.config.tie_word_embeddings && name == "model.embed_tokens.weight" => {
                problems.push(format!("{name}, whose tie to the output projection it breaks"));
            }
            Some(shape) if shape != tensor.dims() => {
                problems.push(format!("{name} as {:?}, which is {shape:?} in the model", tensor.dims()));
            }
            Some(_) => {}
            None => problems.push(format!("{name}, which the model does not have")),
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::setting("adapter", format!("cannot be fused: it has {}", problems.join("; "))))
}

/// The model in f32 with the weights of a folder, some of them replaced.
fn decoder(model: &ModelFiles, folder: &Path, replaced: &BTreeMap<String, Tensor>) -> Result<Decoder> {
    let mut weights = weights::load(folder, &model.config, &Holding::dense(DType::F32), &Device::Cpu)?;
    for (name, tensor) in replaced {
        weights.insert(name.clone(), tensor.to_dtype(DType::F32)?.into());
    }
    Decoder::new(&model.config, weights, &Device::Cpu)
}

fn logits(decoder: &Decoder) -> Result<Vec<f32>> {
    let vocab = decoder.config.vocab_size as u32;
    // Tokens from the whole vocabulary, far apart.
    let tokens: Vec<u32> = (1..=TOKENS).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    let batch = Batch { targets: tokens.clone(), lengths: vec![tokens.len()], tokens };
    Ok(decoder.logits(&batch)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}

/// The largest difference, relative to the largest of `wanted`. NaN anywhere gives infinity.
fn difference(wanted: &[f32], found: &[f32]) -> f64 {
    let far = |x: f32, y: f32| if (x - y).is_nan() { f32::INFINITY } else { (x - y).abs() };
    let largest = wanted.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
    let far = wanted.iter().zip(found).fold(0.0, |most: f32, (x, y)| most.max(far(*x, *y)));
    far as f64 / (largest as f64).max(f64::MIN_POSITIVE)
}

/// Copies everything but the shards, [`CONFIG`] and what [`Fused::left_out`] says, and returns that.
fn copy_files(source: &Path, shards: &[PathBuf], folder: &Path) -> Result<Vec<String>> {
    const WEIGHTS: [&str; 8] = ["safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx"];
    let mut left_out = Vec::new();
    for entry in fs::read_dir(source).map_err(Error::io(source))? {
        let path = entry.map_err(Error::io(source))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if shards.contains(&path) || name == CONFIG {
            continue;
        }
        let weights = path.extension().is_some_and(|end| WEIGHTS.iter().any(|known| end.eq_ignore_ascii_case(known)));
        if weights || name.starts_with('.') || !path.is_file() {
            left_out.push(name);
        } else {
            copy(&path, &folder.join(name))?;
        }
    }
    left_out.sort_unstable();
    Ok(left_out)
}

fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: the map is read-only and lives for one call; as with every reader of mapped weights, another program must not
    // shrink the file meanwhile.
    unsafe { Mmap::map(&file) }.map_err(Error::io(path))
}

fn header(path: &Path, map: &[u8]) -> Result<Option<std::collections::HashMap<String, String>>> {
    let read = SafeTensors::read_metadata(map);
    Ok(read.map_err(|error| Error::file(path, format!("cannot be read: {error}")))?.1.metadata().clone())
}

fn tensors<'a>(path: &Path, map: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(map).map_err(|error| Error::file(path, format!("cannot be read: {error}")))
}

/// What happens to a tensor.
#[derive(Clone, Copy)]
enum Change<'a> {
    Add(&'a Module),
    Replace(&'a Tensor),
}

fn change<'a>(adapter: &'a AdapterFile, name: &str) -> Option<Change<'a>> {
    let module = || adapter.modules.get(name.strip_suffix(".weight")?);
    adapter.saved.get(name).map(Change::Replace).or_else(|| module().map(Change::Add))
}

/// Refuses weights that are to change and are no floats that a sum can be rounded to.
fn check_dtypes(shards: &[PathBuf], adapter: &AdapterFile) -> Result<()> {
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

fn write_shard(shard: &Path, adapter: &AdapterFile, to: &Path) -> Result<()> {
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
    let merged = module.merge(&weight).map_err(|error| Error::setting(name, error.to_string()))?;
    Ok(merged.to_dtype(dtype)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_relative_and_sees_no_number() {
        assert_eq!(difference(&[1.0, -4.0], &[1.0, -3.0]), 0.25);
        assert_eq!(difference(&[1.0, 2.0], &[1.0, f32::NAN]), f64::INFINITY);
        assert_eq!(difference(&[f32::NAN, 2.0], &[1.0, 2.0]), f64::INFINITY);
    }
}
