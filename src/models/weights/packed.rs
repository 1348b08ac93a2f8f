//! Weights that bitsandbytes (NF4) or MLX (groups of 4 or 8 bits) quantized, as they stand in safetensors.
//!
//! bitsandbytes (`functional.py`, `QuantState.as_dict`): `{name}` holds two codes a byte, the first in the high half;
//! `{name}.quant_state.bitsandbytes__nf4` JSON with shape and block size; `{name}.absmax` a scale for each block of 64, as f32, or with
//! `{name}.nested_absmax`, `{name}.nested_quant_map` and an offset as codes of 8 bits in blocks of their own.
//! MLX (`mlx.core.quantize`): `{path}.weight` u32, codes from the lowest bits up; `{path}.scales` and `{path}.biases` `[n, k / group]`.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::Device;
use candle_core::safetensors::MmapedSafetensors;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::Deserialize;

use crate::backend::cpu::blocks::{GROUP, pack_nibbles};
use crate::backend::quantized::{Kind, QuantizedTensor};
use crate::{Error, Result};

/// Marks NF4; other types of bitsandbytes have another ending.
const STATE: &str = ".quant_state.bitsandbytes__";
const NF4: &str = ".quant_state.bitsandbytes__nf4";

/// What bitsandbytes writes beside a weight.
const BESIDE: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];

#[derive(Deserialize)]
struct State {
    shape: Vec<usize>,
    blocksize: usize,
    #[serde(default)]
    nested_blocksize: usize,
    #[serde(default)]
    nested_offset: f32,
}

/// The kinds of packed weights by name, of a model with `wanted` shapes, which MLX's form leaves open. In `found`, names with shapes, they get the shape that they stand for and what lies beside them goes.
///
/// # Errors
/// One error lists every packed weight of a form that is not read.
pub fn find(
    path: &Path,
    mapped: &MmapedSafetensors,
    wanted: &HashMap<String, Vec<usize>>,
    found: &mut HashMap<String, Vec<usize>>,
) -> Result<HashMap<String, Kind>> {
    let mut kinds = HashMap::new();
    let mut problems = Vec::new();
    let names: BTreeMap<String, Vec<usize>> = found.iter().map(|(name, shape)| (name.clone(), shape.clone())).collect();
    for (name, shape) in &names {
        let packed = if let Some((weight, _)) = name.split_once(STATE) {
            nf4(mapped, weight, name).map(|(kind, shape)| {
                BESIDE.iter().for_each(|end| drop(found.remove(&format!("{weight}{end}"))));
                (weight.to_string(), kind, shape)
            })
        } else if let Some(stem) = name.strip_suffix(".scales") {
            let wanted = wanted.get(&format!("{stem}.weight")).and_then(|shape| shape.last().copied());
            groups(mapped, stem, shape, wanted).map(|(kind, shape)| {
                found.remove(&format!("{stem}.biases"));
                (format!("{stem}.weight"), kind, shape)
            })
        } else {
            continue;
        };
        found.remove(name);
        match packed {
            Ok((weight, kind, shape)) => {
                found.insert(weight.clone(), shape);
                kinds.insert(weight, kind);
            }
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok(kinds) } else { Err(Error::file(path, problems.join("; "))) }
}

/// A packed weight, on the CPU.
///
/// # Errors
/// Parts that are missing or do not fit each other.
pub fn read(
    path: &Path,
    mapped: &MmapedSafetensors,
    name: &str,
    kind: Kind,
    shape: &[usize],
) -> Result<QuantizedTensor> {
    let bytes = match kind {
        Kind::Nf4 => nf4_blocks(mapped, name),
        _ => group_blocks(mapped, name.trim_end_matches(".weight"), kind, shape[1]),
    };
    let bytes = bytes.map_err(|problem| Error::file(path, problem))?;
    QuantizedTensor::new(kind, bytes, (shape[0], shape[1]), &Device::Cpu)
}

fn view<'a>(mapped: &'a MmapedSafetensors, name: &str) -> std::result::Result<TensorView<'a>, String> {
    mapped.get(name).map_err(|_| format!("{name} is missing"))
}

fn state(mapped: &MmapedSafetensors, name: &str) -> std::result::Result<State, String> {
    serde_json::from_slice(view(mapped, name)?.data()).map_err(|error| format!("{name} is not understood: {error}"))
}

fn nf4(mapped: &MmapedSafetensors, weight: &str, name: &str) -> std::result::Result<(Kind, Vec<usize>), String> {
    if !name.ends_with(NF4) {
        let (_, kind) = name.split_once(STATE).unwrap_or_default();
        return Err(format!("{weight} is bitsandbytes' {kind}; of its types nf4 is read"));
    }
    let State { shape, blocksize, .. } = state(mapped, name)?;
    match *shape.as_slice() {
        [_, k] if blocksize == Kind::Nf4.block_len() && k.is_multiple_of(blocksize) => Ok((Kind::Nf4, shape)),
        _ => Err(format!("{weight} is {shape:?} in blocks of {blocksize}; rows of whole blocks of 64 are read")),
    }
}

fn groups(
    mapped: &MmapedSafetensors,
    stem: &str,
    scales: &[usize],
    k: Option<usize>,
) -> std::result::Result<(Kind, Vec<usize>), String> {
    let weight = view(mapped, &format!("{stem}.weight"))?;
    let dtype = view(mapped, &format!("{stem}.scales"))?.dtype();
    let ([n, words], [rows, count]) = (weight.shape(), scales) else {
        return Err(format!("{stem}.weight and its scales are no matrices"));
    };
    if weight.dtype() != Dtype::U32 || n != rows || *count == 0 {
        return Err(format!(
            "{stem}.weight is {:?} {:?} and its scales are {scales:?}",
            weight.dtype(),
            weight.shape()
        ));
    }
    let Some(k) = k else { return Err(format!("{stem}.weight is not of this model")) };
    let bits = words * 32 / k.max(1);
    let kind = match bits {
        4 if dtype == Dtype::F16 => Kind::Q4_1,
        4 => Kind::Affine4,
        8 => Kind::Affine8,
        _ => return Err(format!("{stem}.weight is of {bits} bits; 4 and 8 are read")),
    };
    if words * 32 != k * bits || !k.is_multiple_of(*count) || !(k / count).is_multiple_of(GROUP) {
        return Err(format!("{stem}.weight has groups of {}; multiples of 32 are read", k / count));
    }
    Ok((kind, vec![*n, k]))
}

/// bitsandbytes' blocks in this crate's layout.
fn nf4_blocks(mapped: &MmapedSafetensors, name: &str) -> std::result::Result<Vec<u8>, String> {
    const LEN: usize = Kind::Nf4.block_len();
    let State { shape, nested_blocksize, nested_offset, .. } = state(mapped, &format!("{name}{NF4}"))?;
    let blocks = shape.iter().product::<usize>() / LEN;
    let codes = view(mapped, name)?;
    let scales = view(mapped, &format!("{name}.absmax"))?;
    let scales: Vec<f32> = match scales.dtype() {
        Dtype::U8 => {
            let outer = floats(&view(mapped, &format!("{name}.nested_absmax"))?)?;
            let map = floats(&view(mapped, &format!("{name}.nested_quant_map"))?)?;
            if map.len() != 256 || nested_blocksize == 0 || outer.len() < blocks.div_ceil(nested_blocksize) {
                return Err(format!("{name}: its nested scales do not fit"));
            }
            let scale = |(i, code): (usize, &u8)| map[usize::from(*code)] * outer[i / nested_blocksize] + nested_offset;
            scales.data().iter().take(blocks).enumerate().map(scale).collect()
        }
        _ => floats(&scales)?,
    };
    if scales.len() != blocks || codes.data().len() * 2 != blocks * LEN {
        let (bytes, scales) = (codes.data().len(), scales.len());
        return Err(format!("{name} is {shape:?} and has {bytes} bytes and {scales} scales"));
    }
    let mut all = Vec::with_capacity(blocks * Kind::Nf4.block_bytes());
    for (scale, bytes) in scales.iter().zip(codes.data().chunks_exact(LEN / 2)) {
        all.extend(scale.to_le_bytes());
        all.extend(pack_nibbles(bytes.iter().flat_map(|byte| [byte >> 4, byte & 15])));
    }
    Ok(all)
}

/// MLX's groups, in blocks of 32.
fn group_blocks(mapped: &MmapedSafetensors, stem: &str, kind: Kind, k: usize) -> std::result::Result<Vec<u8>, String> {
    let weight = view(mapped, &format!("{stem}.weight"))?;
    let (scales, biases) = (view(mapped, &format!("{stem}.scales"))?, view(mapped, &format!("{stem}.biases"))?);
    if scales.shape() != biases.shape() || scales.dtype() != biases.dtype() {
        return Err(format!("{stem}.scales and {stem}.biases do not fit each other"));
    }
    let in_f16 = kind == Kind::Q4_1;
    let (scales, biases) = (floats(&scales)?, floats(&biases)?);
    let bytes_of_a_block = if kind == Kind::Affine8 { GROUP } else { GROUP / 2 };
    let blocks = weight.data().len() / bytes_of_a_block;
    let a_group = blocks / scales.len().max(1);
    if a_group == 0 || a_group * scales.len() != blocks || !k.is_multiple_of(a_group * GROUP) {
        return Err(format!("{stem}.weight and its scales do not fit each other"));
    }
    let mut all = Vec::with_capacity(blocks * kind.block_bytes());
    for (block, bytes) in weight.data().chunks_exact(bytes_of_a_block).enumerate() {
        for value in [scales[block / a_group], biases[block / a_group]] {
            match in_f16 {
                true => all.extend(f16::from_f32(value).to_le_bytes()),
                false => all.extend(value.to_le_bytes()),
            }
        }
        match kind {
            Kind::Affine8 => all.extend(bytes),
            _ => all.extend(pack_nibbles(bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]))),
        }
    }
    Ok(all)
}

fn floats(view: &TensorView) -> std::result::Result<Vec<f32>, String> {
    let data = view.data();
    match view.dtype() {
        Dtype::F32 => Ok(data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
        Dtype::F16 => Ok(data.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()),
        Dtype::BF16 => Ok(data.as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()),
        other => Err(format!("scales of {other:?} are not read")),
    }
}
