//! Fusing: adapters are merged into the weights that they are on ([`Module::merge`]), tensors that were trained whole take their
//! place, and the model is written out: as a folder like its own ([`fuse`]), as one without quantization ([`dequantize`]), or as a GGUF
//! file ([`export_gguf`]).
//!
//! Sums are in f32 and rounded once. Files are written tensor by tensor, one weight in memory at a time, beside their place; before
//! they get their name, the model in them is loaded and held against the one that was to be written.

mod dense;
mod gguf;
mod rounding;
mod shards;

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::adapter::{AdapterFile, Module};
use super::files::replace_folder;
use crate::backend::quantized::Quantize;
use crate::models::config::read_json;
use crate::models::decoder::{Batch, Decoder};
use crate::models::linear::BaseWeight;
use crate::models::{Holding, ModelConfig, ModelFiles, weights};
use crate::{Error, Result};
pub use dense::dequantize;
pub use gguf::export_gguf;
pub use rounding::Rounding;

/// What was written.
#[derive(Debug)]
pub struct Fused {
    /// Files and folders of the model that were not carried over: weights in other formats, folders, hidden files.
    pub left_out: Vec<String>,
    /// The largest difference between the logits of the written model and those of the model with the adapter on it, in f32 on
    /// a fixed sequence of tokens, relative to the largest logit.
    pub difference: f64,
    /// What rounding to codes did to the adapter, where the written weights are quantized.
    pub rounding: Option<Rounding>,
    /// What a user should know of the output.
    pub notes: Vec<String>,
}

/// Over this, a model of floats is not written: rounding weights to bf16 or f16 gives a hundredth of it and less.
const MOST: f64 = 0.2;

/// Over this, a quantized model is not written: it has nothing of the other left.
const MOST_QUANTIZED: f64 = 1.0;

/// Tokens of the sequence that both models run.
const TOKENS: u32 = 32;

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Writes the model with the adapter in its weights. Shards, dtypes and everything else stay as they are. The folder is written
/// beside and renamed when the model in it has been tried; one that was there is replaced.
///
/// # Errors
/// A model that is quantized or not a folder; an adapter that does not fit it or that the decoder does not run; weights in a dtype
/// that cannot be added to; a fused model that does not answer as the adapted one.
pub fn fuse(model: &ModelFiles, adapter: &AdapterFile, output: &Path) -> Result<Fused> {
    check_base(model)?;
    let source = model.folder()?;
    adapter.check_fits(&model.config)?;
    let shards = weights::files(source)?;
    shards::check_dtypes(&shards, adapter)?;
    let wanted = wanted_logits(model, Some(adapter))?;
    let untied = !tied(model, adapter).is_empty();
    write_folder(output, |folder| {
        let left_out = copy_files(source, &shards, folder)?;
        for shard in &shards {
            shards::write(shard, adapter, untied, &beside(folder, shard))?;
        }
        let config =
            ModelConfig { tie_word_embeddings: model.config.tie_word_embeddings && !untied, ..model.config.clone() };
        if untied {
            shards::add_to_index(folder, EMBEDDING, HEAD)?;
        }
        let difference = difference(&wanted, &folder_logits(&config, folder)?, MOST, output)?;
        // Last, so that a folder that was left half written is no model.
        let mut notes = Vec::new();
        if untied {
            let mut json = read_json(&source.join(CONFIG))?;
            json["tie_word_embeddings"] = false.into();
            write_json(&folder.join(CONFIG), &json)?;
            notes.push("embedding and output projection, which were one tensor, are two now".to_string());
        } else {
            copy(&source.join(CONFIG), &folder.join(CONFIG))?;
        }
        Ok(Fused { left_out, difference, rounding: None, notes })
    })
}

/// The adapter's whole tensors that the model has as one: with them embedding and output projection are two.
fn tied<'a>(model: &ModelFiles, adapter: &'a AdapterFile) -> Vec<&'a str> {
    let names = adapter.saved.keys().map(String::as_str);
    names.filter(|name| model.config.tie_word_embeddings && [EMBEDDING, HEAD].contains(name)).collect()
}

/// Refuses a base that [`fuse`] does not take, with the ways that there are.
pub fn check_base(model: &ModelFiles) -> Result<()> {
    let kinds = model.holding(Quantize::Auto, DType::F32, &Device::Cpu)?.kinds;
    if !model.is_gguf() && kinds.is_empty() {
        return Ok(());
    }
    let (what, folder) = match model.is_gguf() {
        true => ("is a GGUF file, which has no form as a folder of safetensors", String::new()),
        false => ("has quantized weights", "--dequantize for a folder in floats, ".to_string()),
    };
    let problem = format!(
        "{what}; choose {folder}--export-gguf f16 or bf16 for a GGUF file in floats, --export-gguf q8_0 or q4_k for one that is rounded \
         again, or keep the adapter apart: --adapter-path with generate and chat, `convert --to gguf` for llama.cpp"
    );
    Err(Error::file(model.path(), problem))
}

fn write_json(path: &Path, value: &serde_json::Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Error::file(path, error.to_string()))?;
    fs::write(path, text + "\n").map_err(Error::io(path))
}

/// As [`replace_folder`], with what `write` returns.
fn write_folder<T>(output: &Path, write: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let mut written = None;
    replace_folder(output, |folder| {
        written = Some(write(folder)?);
        Ok(())
    })?;
    let Some(written) = written else { unreachable!("the folder was filled") };
    Ok(written)
}

fn beside(folder: &Path, file: &Path) -> PathBuf {
    folder.join(file.file_name().unwrap_or_default())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map_err(Error::io(from))?;
    Ok(())
}

/// Refuses an adapter that does not fit, and one after which embedding and output projection are no longer one tensor.
fn check_adapter(model: &ModelFiles, adapter: &AdapterFile) -> Result<()> {
    adapter.check_fits(&model.config)?;
    let tied = tied(model, adapter);
    if tied.is_empty() {
        return Ok(());
    }
    let advice = "whose tie to the other end it breaks; fuse into a folder first, and take that as --model";
    Err(Error::setting("adapter", format!("it has {}, {advice}", tied.join(" and "))))
}

/// The logits of the model with the adapter on it. What is quantized stays so in memory: products with it are as exact.
fn wanted_logits(model: &ModelFiles, adapter: Option<&AdapterFile>) -> Result<Vec<f32>> {
    let holding = model.holding(Quantize::Auto, DType::F32, &Device::Cpu)?;
    let mut decoder = Decoder::new(&model.config, model.base(&holding, &Device::Cpu)?, &Device::Cpu)?;
    if let Some(adapter) = adapter {
        adapter.attach(&mut decoder, &Device::Cpu)?;
    }
    logits(&decoder)
}

/// The logits of the weights in a folder.
fn folder_logits(config: &ModelConfig, folder: &Path) -> Result<Vec<f32>> {
    let weights = weights::load(folder, config, &Holding::dense(DType::F32), &Device::Cpu)?;
    logits(&Decoder::new(config, weights, &Device::Cpu)?)
}

fn logits(decoder: &Decoder) -> Result<Vec<f32>> {
    let vocab = decoder.config.vocab_size as u32;
    // Tokens from the whole vocabulary, far apart.
    let tokens: Vec<u32> = (1..=TOKENS).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    let batch = Batch { targets: tokens.clone(), lengths: vec![tokens.len()], tokens };
    Ok(decoder.logits(&batch)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
}

/// The largest difference, relative to the largest of `wanted`; `output` is not written where it is over `most`.
fn difference(wanted: &[f32], found: &[f32], most: f64, output: &Path) -> Result<f64> {
    let difference = relative(wanted, found);
    if difference <= most {
        return Ok(difference);
    }
    let problem =
        format!("the written model's logits differ by {difference:.3e} from the adapted one's; nothing is written");
    Err(Error::file(output, problem))
}

/// The largest difference, relative to the largest. NaN anywhere gives infinity.
fn relative(wanted: &[f32], found: &[f32]) -> f64 {
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

/// A weight with the adapter in it, f32, from one that is f32.
fn merged(name: &str, module: &Module, weight: &Tensor) -> Result<Tensor> {
    module.merge(weight).map_err(|error| Error::setting(name, error.to_string()))
}

/// The values of a weight, f32.
fn values(weight: &BaseWeight) -> Result<Tensor> {
    match weight {
        BaseWeight::Dense(parameter) => Ok(parameter.value.to_dtype(DType::F32)?),
        BaseWeight::Quantized(blocks) => crate::backend::custom_ops::dequantize(blocks, DType::F32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_relative_and_sees_no_number() {
        assert_eq!(relative(&[1.0, -4.0], &[1.0, -3.0]), 0.25);
        assert_eq!(relative(&[1.0, 2.0], &[1.0, f32::NAN]), f64::INFINITY);
        assert_eq!(relative(&[f32::NAN, 2.0], &[1.0, 2.0]), f64::INFINITY);
    }
}
