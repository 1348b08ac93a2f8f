//! Puts what is trained in place, adapters or all weights, and writes it out again.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::adapter::{AdapterFile, Module};
use super::lora::{kaiming_uniform, normal};
use super::options::{InitialA, TrainerOptions};
use super::params::Params;
use crate::models::block::LINEAR_NAMES;
use crate::models::decoder::Decoder;
use crate::models::linear::{Adapter, Parameter};
use crate::models::{ModelConfig, ModelFiles};
use crate::{Error, Result};

/// Ends the name of a trained A.
pub(super) const A: &str = ".lora_a";
/// Ends the name of a trained B.
pub(super) const B: &str = ".lora_b";

/// Stands for all linears of a block.
pub const ALL_LINEAR: &str = "all-linear";

/// The module paths that `target_modules` and `num_layers` choose, block by block. A name that matches no linear is an error.
pub fn targets(config: &ModelConfig, options: &TrainerOptions) -> Result<Vec<String>> {
    let layers = config.num_layers;
    let first = usize::try_from(options.num_layers).map_or(0, |count| layers.saturating_sub(count));
    let path = |layer: usize, name: &str| format!("model.layers.{layer}.{name}");
    let paths: Vec<(usize, String)> =
        (0..layers).flat_map(|layer| LINEAR_NAMES.map(|name| (layer, path(layer, name)))).collect();
    let matches = |path: &str, target: &str| {
        target == ALL_LINEAR || path == target || path.strip_suffix(target).is_some_and(|head| head.ends_with('.'))
    };
    let unknown: Vec<&str> = options
        .target_modules
        .iter()
        .map(String::as_str)
        .filter(|target| !paths.iter().any(|(_, path)| matches(path, target)))
        .collect();
    if !unknown.is_empty() {
        let known = LINEAR_NAMES.map(|name| name.rsplit('.').next().unwrap_or(name)).join(", ");
        let problem = format!("the model has no linear named {}; it has {known}", unknown.join(", "));
        return Err(Error::setting("target_modules", problem));
    }
    let chosen = paths.into_iter().filter(|(layer, _)| *layer >= first).map(|(_, path)| path);
    Ok(chosen.filter(|path| options.target_modules.iter().any(|target| matches(path, target))).collect())
}

/// Attaches new adapters (A drawn from the seed, B zero) and returns the buffers that train them.
pub(super) fn lora(decoder: &mut Decoder, options: &TrainerOptions, device: &Device) -> Result<Params> {
    let targets = targets(&decoder.config, options)?;
    let mut initial = Vec::with_capacity(2 * targets.len());
    for (path, linear) in decoder.linears() {
        let Some(number) = targets.iter().position(|target| *target == path) else { continue };
        let (k, n) = linear.sizes();
        initial.push((format!("{path}{A}"), initial_a(k, options, number as u64)?));
        initial.push((format!("{path}{B}"), Tensor::zeros((options.rank, n), DType::F32, &Device::Cpu)?));
    }
    let params = Params::new(&initial, device)?;
    let named = params.named()?;
    for (number, (path, pair)) in targets.iter().zip(named.chunks_exact(2)).enumerate() {
        let [(_, a), (_, b)] = pair else { unreachable!("chunks of two") };
        let adapter = Adapter {
            a: a.clone(),
            b: b.clone(),
            scaling: options.scaling(),
            dropout: options.dropout,
            number: number as u32,
        };
        decoder.attach(path, Some(adapter))?;
    }
    Ok(params)
}

/// Makes every weight trainable and returns the buffers.
///
/// # Errors
/// A base with quantized weights, which have no gradients.
pub(super) fn full(decoder: &mut Decoder, device: &Device) -> Result<Params> {
    let quantized = decoder.quantized();
    if let Some(first) = quantized.first() {
        let problem = format!(
            "full trains every weight, and {} are quantized ({first} first); give quantize none, or train adapters",
            quantized.len()
        );
        return Err(Error::setting("fine_tune_type", problem));
    }
    let initial: Vec<(String, Tensor)> =
        decoder.parameters_mut().into_iter().map(|(name, parameter)| (name, parameter.value.clone())).collect();
    let params = Params::new(&initial, device)?;
    for ((_, slot), (_, trained)) in decoder.parameters_mut().into_iter().zip(params.named()?) {
        *slot = trained;
    }
    Ok(params)
}

/// Copies the values of an adapter from a file into the trained ones. Both must have the same modules, rank and scaling.
pub(super) fn start_from(params: &Params, options: &TrainerOptions, file: &AdapterFile) -> Result<()> {
    let mut wrong = Vec::new();
    let scaling = options.scaling();
    file.check_plain("a run starts from")?;
    let mut left: BTreeMap<&String, &Module> = file.modules.iter().collect();
    for (name, Parameter { value, .. }) in params.named()? {
        let Some((path, is_a)) = name.strip_suffix(A).map(|p| (p, true)).or(name.strip_suffix(B).map(|p| (p, false)))
        else {
            return Err(Error::setting("resume_adapter_file", "starting from an adapter needs fine_tune_type lora"));
        };
        let Some(module) = file.modules.get(path) else {
            wrong.push(format!("{path} is not in the file"));
            continue;
        };
        left.remove(&path.to_string());
        if is_a && (module.scaling - scaling).abs() > 1e-6 * scaling {
            wrong.push(format!("the scaling of {path} is {} in the file and {scaling} in this run", module.scaling));
        }
        let source = if is_a { &module.a } else { &module.b };
        if source.shape() != value.shape() {
            wrong.push(format!("{name} is {:?} in the file and {:?} in this run", source.dims(), value.dims()));
            continue;
        }
        value.slice_set(&source.to_device(value.device())?.to_dtype(DType::F32)?.contiguous()?, 0, 0)?;
    }
    wrong.extend(left.keys().map(|path| format!("{path} is in the file and not trained in this run")));
    if wrong.is_empty() { Ok(()) } else { Err(Error::setting("resume_adapter_file", wrong.join("; "))) }
}

/// The adapters as they are now, to be saved.
pub(super) fn adapter_file(params: &Params, options: &TrainerOptions, model: &ModelFiles) -> Result<AdapterFile> {
    let scaling = options.scaling();
    let mut modules = BTreeMap::new();
    for pair in params.named()?.chunks_exact(2) {
        let [(name, a), (_, b)] = pair else { unreachable!("chunks of two") };
        let path = name.strip_suffix(A).unwrap_or(name).to_string();
        let (a, b) = (a.value.force_contiguous()?, b.value.force_contiguous()?);
        modules.insert(path, Module { a, b, scaling, magnitude: None });
    }
    Ok(AdapterFile::new(&model.name, model.config.num_layers, options.dropout, modules))
}

/// Writes a fully fine-tuned model: weights in the base's own dtype, with its configuration and tokenizer.
pub(super) fn save_model(params: &Params, model: &ModelFiles, folder: &Path) -> Result<()> {
    let weights = params.named()?.into_iter().map(|(name, parameter)| (name.to_string(), parameter.value));
    model.save_with_weights(weights.collect(), folder)
}

/// Each adapter draws from a seed of its own, spread by the golden ratio's bits.
fn initial_a(k: usize, options: &TrainerOptions, number: u64) -> Result<Tensor> {
    let (rank, seed) = (options.rank, options.seed.wrapping_add((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    let values = match options.init_lora_weights {
        InitialA::Default => kaiming_uniform(k, rank, seed),
        InitialA::Gaussian => normal(k * rank, 1.0 / rank as f64, seed),
    };
    Ok(Tensor::from_vec(values, (k, rank), &Device::Cpu)?)
}
