//! Puts what is trained in place, adapters or all weights, and writes it out again.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::adapter::{AdapterFile, Module};
use super::initial;
use super::options::{FineTuneType, TrainerOptions};
use super::params::Params;
use crate::models::block::LINEAR_NAMES;
use crate::models::decoder::Decoder;
use crate::models::linear::{Adapter, Linear, Magnitude, Parameter};
use crate::models::{ModelConfig, ModelFiles};
use crate::{Error, Result};

/// Ends the name of a trained A.
pub(super) const A: &str = ".lora_a";
/// Ends the name of a trained B.
pub(super) const B: &str = ".lora_b";
/// Ends the name of DoRA's trained magnitudes.
pub(super) const M: &str = ".magnitude";

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

/// What was taken from the base's weights when the adapters were made, A and B of each module; nothing where they stayed as they are.
pub(super) type Taken = BTreeMap<String, (Tensor, Tensor)>;

/// Attaches new adapters and returns the buffers that train them. Where they take a part of the base's weights, that part is the one in
/// `earlier`, the adapter of a run that goes on.
///
/// # Errors
/// A target that the model does not have; quantized weights that a part is to be taken from; a rank that is too large for that.
pub(super) fn adapters(
    decoder: &mut Decoder,
    options: &TrainerOptions,
    earlier: Option<&AdapterFile>,
    device: &Device,
) -> Result<(Params, Taken)> {
    let targets = targets(&decoder.config, options)?;
    let changes = options.init_lora_weights.changes_base();
    if changes {
        check_taken(decoder, options, &targets)?;
    }
    let (mut of_a, mut of_b, mut taken) = (Vec::new(), Vec::new(), Taken::new());
    let dora = options.fine_tune_type == FineTuneType::Dora;
    // LoRA+ trains B and the magnitudes at a rate of their own, as PEFT's optimizer does.
    let apart = options.loraplus_ratio != 1.0;
    for (number, path) in targets.iter().enumerate() {
        let linear = decoder.linear_mut(path)?;
        let (a, b) = match earlier.filter(|_| changes) {
            Some(earlier) => taken_before(earlier, path, options.rank)?,
            None => initial::adapter(linear.weight.value(), options, number as u64)?,
        };
        let (on_device_a, on_device_b) = (a.to_device(device)?, b.to_device(device)?);
        if changes {
            take(linear, &on_device_a, &on_device_b, options.scaling())?;
            taken.insert(path.clone(), (a.clone(), b.clone()));
        }
        let magnitude = if dora {
            Some(Magnitude::of(&linear.weight, &on_device_a, &on_device_b, options.scaling())?)
        } else {
            None
        };
        // The order is that of checkpoints.
        of_a.push((format!("{path}{A}"), a));
        let rest = if apart { &mut of_b } else { &mut of_a };
        rest.push((format!("{path}{B}"), b));
        rest.extend(magnitude.as_ref().map(|magnitude| (format!("{path}{M}"), magnitude.m.value.clone())));
        let (a, b) = (Parameter::frozen(on_device_a), Parameter::frozen(on_device_b));
        let (scaling, dropout) = (options.scaling(), options.dropout);
        linear.adapter = Some(Adapter { a, b, scaling, dropout, number: number as u32, magnitude });
    }
    let params = Params::grouped(vec![(1.0, of_a), (options.loraplus_ratio, of_b)], device)?;
    let mut trained: BTreeMap<&str, Parameter> = params.named()?.into_iter().collect();
    let mut of = |path: &str, part: &str| trained.remove(format!("{path}{part}").as_str());
    for path in &targets {
        let Some(adapter) = &mut decoder.linear_mut(path)?.adapter else { continue };
        let (Some(a), Some(b)) = (of(path, A), of(path, B)) else { unreachable!("both were put there") };
        let magnitude = adapter.magnitude.take().zip(of(path, M));
        (adapter.a, adapter.b, adapter.magnitude) = (a, b, magnitude.map(|(magnitude, m)| magnitude.trained(m)));
    }
    Ok((params, taken))
}

/// Whether a part can be taken from every target's weight.
fn check_taken(decoder: &Decoder, options: &TrainerOptions, targets: &[String]) -> Result<()> {
    let rank = options.rank;
    let problem = |(path, linear): (String, &Linear)| {
        let (k, n) = linear.sizes();
        let quantized = linear.weight.dense().is_none();
        if quantized {
            return Some(format!("{path} is quantized"));
        }
        (rank > k.min(n)).then(|| format!("{path} has {k} inputs and {n} outputs, which is less than the rank, {rank}"))
    };
    let problems: Vec<String> =
        decoder.linears().filter(|(path, _)| targets.contains(path)).filter_map(problem).collect();
    if problems.is_empty() {
        return Ok(());
    }
    let advice = "pissa and olora take a part of the base's own weights";
    Err(Error::setting("init_lora_weights", format!("{advice}: {}", problems.join("; "))))
}

/// `W -= s (A B)ᵀ`, in f32 and rounded to W's dtype.
fn take(linear: &mut Linear, a: &Tensor, b: &Tensor, scaling: f64) -> Result<()> {
    let Some(weight) = linear.weight.dense_mut() else { unreachable!("quantized weights were refused") };
    let part = (b.t()?.matmul(&a.t()?)? * scaling)?;
    let dtype = weight.value.dtype();
    weight.value = (weight.value.to_dtype(DType::F32)? - part)?.to_dtype(dtype)?;
    Ok(())
}

/// What a run took from a weight when it began: the second half of the ranks in its adapter, where B has the other sign.
fn taken_before(earlier: &AdapterFile, path: &str, rank: usize) -> Result<(Tensor, Tensor)> {
    match earlier.modules.get(path) {
        Some(module) if module.rank() == 2 * rank => {
            Ok((module.a.narrow(1, rank, rank)?.contiguous()?, module.b.narrow(0, rank, rank)?.neg()?))
        }
        _ => Err(Error::setting("resume", format!("the checkpoint's adapter has no {path} of rank {}", 2 * rank))),
    }
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

/// Copies the values of an adapter from a file into the trained ones. Both must have the same modules, parts, rank and scaling.
pub(super) fn start_from(params: &Params, options: &TrainerOptions, file: &AdapterFile) -> Result<()> {
    let key = "resume_adapter_file";
    if !options.fine_tune_type.adapters() {
        return Err(Error::setting(key, "starting from an adapter needs fine_tune_type lora or dora"));
    }
    if options.init_lora_weights.changes_base() {
        let problem =
            "starts from an adapter's values; init_lora_weights must be default, since pissa and olora have their own";
        return Err(Error::setting(key, problem));
    }
    let mut wrong: Vec<String> =
        file.saved.keys().map(|name| format!("{name} is in the file, trained whole")).collect();
    let scaling = options.scaling();
    let mut left: BTreeMap<&str, &Module> = file.modules.iter().map(|(path, module)| (path.as_str(), module)).collect();
    for (name, Parameter { value, .. }) in params.named()? {
        let Some((path, part)) = [A, B, M].iter().find_map(|end| Some((name.strip_suffix(end)?, *end))) else {
            unreachable!("an adapter's tensors have these names")
        };
        let Some(module) = file.modules.get(path) else {
            wrong.push(format!("{name} is not in the file"));
            continue;
        };
        left.remove(path);
        if part == A {
            if (module.scaling - scaling).abs() > 1e-6 * scaling {
                wrong
                    .push(format!("the scaling of {path} is {} in the file and {scaling} in this run", module.scaling));
            }
            if module.magnitude.is_some() && options.fine_tune_type != FineTuneType::Dora {
                wrong.push(format!("{path} has DoRA's magnitudes in the file; give fine_tune_type dora"));
            }
        }
        let source = match part {
            A => Some(&module.a),
            B => Some(&module.b),
            _ => module.magnitude.as_ref(),
        };
        let Some(source) = source else {
            wrong.push(format!("{path} has no magnitudes in the file, which DoRA trains"));
            continue;
        };
        if source.shape() != value.shape() {
            wrong.push(format!("{name} is {:?} in the file and {:?} in this run", source.dims(), value.dims()));
            continue;
        }
        value.slice_set(&source.to_device(value.device())?.to_dtype(DType::F32)?.contiguous()?, 0, 0)?;
    }
    wrong.extend(left.keys().map(|path| format!("{path} is in the file and not trained in this run")));
    if wrong.is_empty() { Ok(()) } else { Err(Error::setting(key, wrong.join("; "))) }
}

/// The adapters as they are now, to be saved: for the base's weights as they are in its files. What was taken from those when the run
/// began stands in further ranks, with the other sign: `(W - s A₀ B₀) + s A B = W + s [A A₀] [B; -B₀]`, PEFT's form too.
pub(super) fn adapter_file(
    params: &Params,
    options: &TrainerOptions,
    taken: &Taken,
    model: &ModelFiles,
) -> Result<AdapterFile> {
    let scaling = options.scaling();
    let mut parts: BTreeMap<&str, Tensor> = BTreeMap::new();
    for (name, parameter) in params.named()? {
        parts.insert(name, parameter.value.force_contiguous()?);
    }
    let mut modules = BTreeMap::new();
    for (name, a) in &parts {
        let Some(path) = name.strip_suffix(A) else { continue };
        let part = |end: &str| parts.get(format!("{path}{end}").as_str()).cloned();
        let (Some(b), magnitude) = (part(B), part(M)) else { unreachable!("each A has its B") };
        let (a, b) = match taken.get(path) {
            None => (a.clone(), b),
            Some((a0, b0)) => {
                let (a0, b0) = (a0.to_device(a.device())?, b0.to_device(a.device())?);
                (Tensor::cat(&[a, &a0], 1)?, Tensor::cat(&[&b, &b0.neg()?], 0)?)
            }
        };
        modules.insert(path.to_string(), Module { a, b, scaling, magnitude });
    }
    Ok(AdapterFile::new(&model.name, model.config.num_layers, options.dropout, modules))
}

/// Writes a fully fine-tuned model: weights in the base's own dtype, with its configuration and tokenizer.
pub(super) fn save_model(params: &Params, model: &ModelFiles, folder: &Path) -> Result<()> {
    let weights = params.named()?.into_iter().map(|(name, parameter)| (name.to_string(), parameter.value));
    model.save_with_weights(weights.collect(), folder)
}
