//! The order of the rows of q and k.
//!
//! llama.cpp rotates the halves of a Llama's head as neighbouring pairs, and its converter permutes q and k for that. The other
//! families are left as they are.

use candle_core::{Device, Tensor};

use super::architecture_of;
use crate::Result;
use crate::backend::quantized::QuantizedTensor;
use crate::models::ModelConfig;

/// The heads of a weight whose rows lie in another order in a file, as [`unpermute`] takes them.
pub fn permuted_heads(config: &ModelConfig, name: &str) -> Option<usize> {
    match architecture_of(config) == "llama" {
        true if name.contains(".q_proj.") => Some(config.num_heads),
        true if name.contains(".k_proj.") => Some(config.num_kv_heads),
        _ => None,
    }
}

/// Rows `[n, ..]` of a weight of this name in the order that a file has.
pub fn in_file_order(config: &ModelConfig, name: &str, rows: &Tensor) -> Result<Tensor> {
    let Some(heads) = permuted_heads(config, name) else { return Ok(rows.clone()) };
    let split = rows.reshape((heads, 2, rows.dim(0)? / heads / 2, ()))?.transpose(1, 2)?;
    Ok(split.contiguous()?.reshape(rows.shape())?)
}

/// Rows of a head lie `0, D/2, 1, D/2 + 1, ...` in the file.
pub fn unpermute(tensor: &Tensor, heads: usize) -> Result<Tensor> {
    let rows = tensor.dim(0)?;
    let split = tensor.reshape((heads, rows / heads / 2, 2, ()))?.transpose(1, 2)?;
    Ok(split.contiguous()?.reshape(tensor.shape())?)
}

/// [`unpermute`] for the rows of blocks.
pub fn unpermute_blocks(blocks: QuantizedTensor, heads: Option<usize>) -> Result<QuantizedTensor> {
    let Some(heads) = heads else { return Ok(blocks) };
    let rows = Tensor::arange(0_u32, blocks.dims()[0] as u32, &Device::Cpu)?;
    blocks.permute_rows(&unpermute(&rows, heads)?.to_vec1()?)
}

/// [`in_file_order`] for the rows of blocks.
pub fn blocks_in_file_order(config: &ModelConfig, name: &str, blocks: &QuantizedTensor) -> Result<QuantizedTensor> {
    let rows = Tensor::arange(0_u32, blocks.dims()[0] as u32, &Device::Cpu)?;
    blocks.permute_rows(&in_file_order(config, name, &rows)?.to_vec1()?)
}
