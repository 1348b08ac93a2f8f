//! Adapters as llama.cpp takes them at load (`--lora`): one GGUF file of `adapter.type` `lora`.
//!
//! As llama.cpp's `convert_lora_to_gguf.py` writes it: `{tensor}.weight.lora_a` `[r, k]` and `.lora_b` `[n, r]` in f32 under llama.cpp's names
//! of the base's tensors, and one `adapter.lora.alpha`, by which llama.cpp's scaling of a linear is alpha / r. Where that is not the
//! linear's own scaling, B takes the difference up. Where the base's rows of q and k are in another order, so are B's.

use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::AdapterFile;
use crate::models::{ModelConfig, gguf};
use crate::training::files::write_atomically;
use crate::{Error, Result};

/// Writes the file, beside its place and then renamed.
///
/// # Errors
/// An adapter that does not fit the model, or that is more than LoRA; nothing is written then.
pub fn save(adapter: &AdapterFile, config: &ModelConfig, path: &Path) -> Result<()> {
    adapter.check_fits(config)?;
    adapter.check_plain("llama.cpp takes")?;
    let Some(alpha) = adapter.modules.values().next().map(|module| module.alpha()) else {
        return Err(Error::setting("adapter", "it has no linears"));
    };
    let architecture = gguf::architecture_of(config);
    let mut tensors = Vec::with_capacity(2 * adapter.modules.len());
    for (name, module) in &adapter.modules {
        let ratio = module.scaling * module.rank() as f64 / alpha;
        let b = if ratio == 1.0 { module.b.clone() } else { (&module.b * ratio)? };
        let name = format!("{name}.weight");
        let b = gguf::in_file_order(config, &name, &b.t()?.contiguous()?)?;
        let name = gguf::file_name(&name);
        tensors.push((format!("{name}.lora_a"), f32_tensor(&module.a.t()?.contiguous()?)?));
        tensors.push((format!("{name}.lora_b"), f32_tensor(&b)?));
    }
    let text = |text: &str| Value::String(text.to_string());
    let metadata = [
        ("general.architecture", text(architecture)),
        ("general.type", text("adapter")),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", Value::F32(alpha as f32)),
    ];
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    write_atomically(path, |file| {
        let mut file = BufWriter::new(file);
        gguf_file::write(&mut file, &metadata, &tensors)?;
        file.flush().map_err(Error::io(path))
    })
}

fn f32_tensor(tensor: &Tensor) -> Result<QTensor> {
    Ok(QTensor::quantize(&tensor.to_device(&Device::Cpu)?, GgmlDType::F32)?)
}
