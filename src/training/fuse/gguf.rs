//! A model, with an adapter in it or without, as a GGUF file.

use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};

use super::rounding::Sums;
use super::{
    Change, Fused, MOST, MOST_QUANTIZED, change, check_adapter, difference, logits, merged, values, wanted_logits,
};
use crate::backend::custom_ops::dequantize;
use crate::backend::quantized::{Kind, QuantizedTensor};
use crate::models::decoder::Decoder;
use crate::models::gguf::export::{FileType, Plan};
use crate::models::linear::BaseWeight;
use crate::models::{Holding, ModelFiles, gguf};
use crate::training::adapter::AdapterFile;
use crate::training::files::write_beside;
use crate::{Error, Result};

/// Writes the model, from a folder or a GGUF file, as a GGUF file with tokenizer and chat template. It is written beside and renamed
/// when it has been read again: its tokens must be the model's, its logits near those of the model with the adapter on it.
///
/// # Errors
/// A configuration or a tokenizer that GGUF has no keys for; an adapter that does not fit; a written file that differs.
pub fn export_gguf(model: &ModelFiles, adapter: Option<&AdapterFile>, to: FileType, output: &Path) -> Result<Fused> {
    if let Some(adapter) = adapter {
        check_adapter(model, adapter)?;
    }
    let plan = Plan::of(model, to)?;
    let wanted = wanted_logits(model, adapter)?;
    let mut sums = Sums::default();
    let most = if to.is_quantized() { MOST_QUANTIZED } else { MOST };
    let difference = write_beside(output, |file, at| {
        plan.write(output, file, &mut |name, weight, dtype| match adapter.and_then(|adapter| change(adapter, name)) {
            Some(change) => changed(name, weight, change, dtype, &mut sums),
            None => Ok(weight),
        })?;
        let (config, tokenizer) = gguf::open(at)?;
        plan.check_tokens(&tokenizer).map_err(|problem| Error::file(output, problem))?;
        let holding = Holding { dtype: DType::F32, kinds: gguf::kinds(at, &config)? };
        let weights = gguf::load(at, &config, &holding, &Device::Cpu)?;
        let found = logits(&Decoder::new(&config, weights, &Device::Cpu)?)?;
        difference(&wanted, &found, most, output)
    })?;
    Ok(Fused { left_out: Vec::new(), difference, rounding: sums.result(), notes: plan.notes })
}

/// What is written in a weight's place.
fn changed(name: &str, weight: BaseWeight, change: Change, dtype: GgmlDType, sums: &mut Sums) -> Result<BaseWeight> {
    let module = match change {
        Change::Replace(tensor) => return Ok(tensor.to_dtype(DType::F32)?.into()),
        Change::Add(module) => module,
    };
    let base = values(&weight)?;
    let merged = merged(name, module, &base)?;
    let Some(kind) = Kind::of_ggml(dtype) else { return Ok(merged.into()) };
    let kept = match &weight {
        BaseWeight::Quantized(blocks) if blocks.kind() == kind => base.clone(),
        _ => dequantize(&QuantizedTensor::quantize(&base, kind)?, DType::F32)?,
    };
    let written = QuantizedTensor::quantize(&merged, kind)?;
    sums.add(name, &base, &merged, &kept, &dequantize(&written, DType::F32)?)?;
    Ok(written.into())
}
