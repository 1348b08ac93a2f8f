//! Writes a model as a GGUF file, which llama.cpp reads and [`super::load`] too, one weight in memory at a time.
//!
//! Keys, names and the order of rows are those of llama.cpp's `convert_hf_to_gguf.py`; from a GGUF file all keys are carried but those
//! of how its values are stored. Norms and biases are f32.

use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use safetensors::View;

use super::compare::same_tokens;
use super::order::blocks_in_file_order;
use super::writer::{Pairs, TensorInfo, Writer};
use super::{file_name, in_file_order, metadata, vocabulary, with_container};
use crate::backend::custom_ops::dequantize;
use crate::backend::quantized::{Kind, Quantize, QuantizedTensor};
use crate::models::linear::BaseWeight;
use crate::models::{ModelConfig, ModelFiles, TextTokenizer};
use crate::{Error, Result};

/// How the matrices of a file are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// 16 bits.
    F16,
    /// 16 bits with the range of f32.
    Bf16,
    /// Blocks of 32 signed bytes.
    Q8_0,
    /// Blocks of 256 codes of 4 bits; the output projection is Q6_K, as in llama.cpp's Q4_K_S.
    Q4K,
}

impl FileType {
    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
        }
    }

    /// Whether values are rounded to codes.
    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4K)
    }

    /// llama.cpp's number, for `general.file_type`.
    fn number(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Bf16 => 32,
            Self::Q8_0 => 7,
            Self::Q4K => 14,
        }
    }

    /// What a weight is stored in.
    fn dtype(self, shape: &[usize], is_output: bool) -> GgmlDType {
        let &[_, k] = shape else { return GgmlDType::F32 };
        let fits = |kind: Kind| k.is_multiple_of(kind.block_len());
        match self {
            Self::Bf16 => GgmlDType::BF16,
            Self::Q4K if fits(Kind::Q6K) && is_output => GgmlDType::Q6K,
            Self::Q4K if fits(Kind::Q4K) => GgmlDType::Q4K,
            Self::Q8_0 | Self::Q4K if fits(Kind::Q8_0) => GgmlDType::Q8_0,
            _ => GgmlDType::F16,
        }
    }
}

/// What a file will hold.
pub struct Plan<'a> {
    model: &'a ModelFiles,
    pairs: Pairs,
    /// By Hugging Face's names, in the order of [`ModelConfig::weight_shapes`].
    tensors: Vec<(String, TensorInfo)>,
    divisors: Option<(TensorInfo, Vec<f32>)>,
    other_prefix: bool,
    /// What a user should know of the file.
    pub notes: Vec<String>,
}

/// What happens to a weight that will be stored in a dtype, before it is written.
pub type Change<'a> = dyn FnMut(&str, BaseWeight, GgmlDType) -> Result<BaseWeight> + 'a;

impl<'a> Plan<'a> {
    /// The keys and tensors of a model's file.
    ///
    /// # Errors
    /// A tokenizer or a configuration that GGUF has no keys for.
    pub fn of(model: &'a ModelFiles, to: FileType) -> Result<Self> {
        let (config, mut pairs, mut notes) = (&model.config, Pairs::default(), Vec::new());
        let mut other_prefix = false;
        if model.is_gguf() {
            carry(model.path(), &mut pairs)?;
        } else {
            let named = metadata::write(config, &base_name(&model.name), &mut pairs);
            notes.extend(named.map_err(|problem| Error::file(model.path(), problem))?);
            let said = vocabulary::write(model.path(), config, &model.tokenizer, &mut pairs)?;
            notes.extend(said.notes);
            other_prefix = said.other_prefix;
        }
        pairs.u32("general.file_type", to.number());
        if to.is_quantized() {
            pairs.u32("general.quantization_version", 2);
        }
        let output = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let tensors = config.weight_shapes().into_iter().map(|(name, shape)| {
            let dtype = to.dtype(&shape, name == output);
            let info = TensorInfo { name: file_name(&name), shape, dtype };
            (name, info)
        });
        let tensors: Vec<(String, TensorInfo)> = tensors.collect();
        notes.extend(other_kinds(to, &tensors));
        Ok(Self { model, pairs, tensors, divisors: metadata::rope_divisors(config), other_prefix, notes })
    }

    /// Whether the tokenizer that is read from the file cuts texts as the model's own does.
    ///
    /// # Errors
    /// The first text that differs.
    pub fn check_tokens(&self, written: &TextTokenizer) -> Result<(), String> {
        same_tokens(&self.model.tokenizer, written, self.other_prefix)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// Values that the file's type does not hold; what `change` returns.
    pub fn write(&self, path: &Path, out: impl Write, change: &mut Change) -> Result<()> {
        let infos = self.divisors.iter().map(|(info, _)| info).chain(self.tensors.iter().map(|(_, info)| info));
        let out = BufWriter::new(out);
        let mut writer = Writer::begin(out, &self.pairs, infos.cloned().collect()).map_err(Error::io(path))?;
        if let Some((info, divisors)) = &self.divisors {
            let bytes: Vec<u8> = divisors.iter().flat_map(|divisor| divisor.to_le_bytes()).collect();
            writer.tensor(&info.name, &bytes).map_err(Error::io(path))?;
        }
        let holding = self.model.holding(Quantize::Auto, DType::F32, &Device::Cpu)?;
        let mut infos = self.tensors.iter();
        self.model.visit(&holding, &mut |name, weight| {
            let next = infos.next().filter(|(next, _)| next == name);
            let (_, info) = next.ok_or_else(|| Error::op("export", format!("{name} comes out of its turn")))?;
            let weight = change(name, weight, info.dtype)?;
            let bytes = stored(&self.model.config, name, weight, info.dtype)?;
            writer.tensor(&info.name, &bytes).map_err(Error::io(path))
        })?;
        writer.finish().map_err(Error::io(path))
    }
}

/// Says which tensors are in another kind than was asked for.
fn other_kinds(to: FileType, tensors: &[(String, TensorInfo)]) -> Option<String> {
    let wanted = match to {
        FileType::F16 | FileType::Bf16 => return None,
        FileType::Q8_0 => [GgmlDType::Q8_0; 2],
        FileType::Q4K => [GgmlDType::Q4K, GgmlDType::Q6K],
    };
    let matrices: Vec<&TensorInfo> =
        tensors.iter().map(|(_, info)| info).filter(|info| info.shape.len() == 2).collect();
    let count =
        |dtype: GgmlDType| matrices.iter().filter(|info| info.dtype == dtype && !wanted.contains(&dtype)).count();
    let others = [(GgmlDType::Q8_0, "q8_0"), (GgmlDType::F16, "f16")].map(|(dtype, name)| (count(dtype), name));
    let others: Vec<String> =
        others.iter().filter(|(count, _)| *count > 0).map(|(count, name)| format!("{count} are {name}")).collect();
    let (all, name) = (matrices.len(), to.name());
    (!others.is_empty()).then(|| {
        format!("of {all} matrices {}, since their rows are not made of {name}'s blocks", others.join(" and "))
    })
}

fn base_name(name: &str) -> String {
    let last = Path::new(name).canonicalize().ok();
    let last = last.as_deref().unwrap_or(Path::new(name)).file_name();
    last.map_or_else(|| name.to_string(), |last| last.to_string_lossy().into_owned())
}

/// All keys of a file but those of how its values are stored and of its parts.
fn carry(path: &Path, pairs: &mut Pairs) -> Result<()> {
    const OWN: [&str; 3] = ["general.file_type", "general.quantization_version", "general.alignment"];
    with_container(path, |container| {
        for (key, value) in container.raw_pairs() {
            if !OWN.contains(&key) && !key.starts_with("quantize.") && !key.starts_with("split.") {
                pairs.raw(key, value);
            }
        }
        Ok(())
    })
}

/// A weight's bytes in a file. Blocks that are of its kind already are taken as they are.
fn stored(config: &ModelConfig, name: &str, weight: BaseWeight, dtype: GgmlDType) -> Result<Vec<u8>> {
    let tensor = match weight {
        BaseWeight::Quantized(blocks) if blocks.kind().ggml() == Some(dtype) => {
            return block_bytes(&blocks_in_file_order(config, name, &blocks)?);
        }
        BaseWeight::Quantized(blocks) => dequantize(&blocks, DType::F32)?,
        BaseWeight::Dense(parameter) => parameter.value,
    };
    let tensor = in_file_order(config, name, &tensor)?;
    match Kind::of_ggml(dtype) {
        Some(kind) => block_bytes(&QuantizedTensor::quantize(&tensor, kind)?),
        None => float_bytes(name, &tensor, dtype),
    }
}

fn block_bytes(blocks: &QuantizedTensor) -> Result<Vec<u8>> {
    Ok(blocks.bytes().flatten_all()?.to_vec1()?)
}

fn float_bytes(name: &str, tensor: &Tensor, dtype: GgmlDType) -> Result<Vec<u8>> {
    let dtype = match dtype {
        GgmlDType::F16 => DType::F16,
        GgmlDType::BF16 => DType::BF16,
        _ => DType::F32,
    };
    let most = tensor.abs()?.max_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
    if dtype == DType::F16 && most > half::f16::MAX.to_f32() {
        return Err(Error::setting(name, format!("has a value of {most:e}, beyond f16; bf16 holds it")));
    }
    Ok(tensor.to_dtype(dtype)?.contiguous()?.data().into_owned())
}
