//! Embedding: `y[t] = table[ids[t]]`; backward `dtable[ids[t]] += g[t]`, in the order of the tokens, so that repeated ids
//! give the same bits always.
//!
//! `table` `[V, H]` and `g` `[T, H]` f32, f16 or bf16; `dtable` `[V, H]` f32.

use candle_core::{DType, Tensor};

use super::check::{dims2, expect_dtype, float, on_cpu, shape};
use crate::backend::cpu::floats::{Held, tensor_of};
use crate::backend::cpu::{self, by_dtype, tensor, update, view};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
use crate::backend::metal;
use crate::backend::quantized::QuantizedTensor;
use crate::{Error, Result};

const OP: &str = "embedding";

/// The rows of contiguous `table` for `ids`: `[ids.len(), H]` in the table's dtype.
pub fn forward(table: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let (vocab, hidden) = dims2(OP, "table", table, "[vocabulary, hidden]")?;
    check_ids(ids, vocab)?;
    float(OP, "table", table)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(table.device()) {
        return cuda::embedding::forward(table, ids);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if table.device().is_metal() {
        return metal::embedding::forward(table, ids);
    }
    on_cpu(OP, &[table])?;
    by_dtype!(OP, "table", table.dtype(), T => {
        let mut y = vec![T::default(); ids.len() * hidden];
        if hidden > 0 {
            cpu::embedding::forward::<T>(&view(OP, "table", table)?, ids, hidden, &mut y);
        }
        tensor(y, (ids.len(), hidden))
    })
}

/// The rows of a quantized table for `ids`: `[ids.len(), H]` in `dtype`. On the CPU.
///
/// # Errors
/// An id outside the table; a table elsewhere.
pub fn forward_quantized(table: &QuantizedTensor, ids: &[u32], dtype: DType) -> Result<Tensor> {
    let &[vocab, hidden] = table.dims();
    check_ids(ids, vocab)?;
    let held = Held::quantized(OP, "table", table)?;
    let mut y = vec![0.0; ids.len() * hidden];
    for (y, &id) in y.chunks_exact_mut(hidden).zip(ids) {
        held.floats().widen_into(id as usize * hidden, y);
    }
    tensor_of(y, (ids.len(), hidden), dtype)
}

/// `dtable` += the rows of `g` at `ids`.
pub fn backward(ids: &[u32], g: &Tensor, dtable: &Tensor) -> Result<()> {
    let (vocab, hidden) = dims2(OP, "dtable", dtable, "[vocabulary, hidden]")?;
    expect_dtype(OP, "dtable", dtable, DType::F32)?;
    shape(OP, "g", g, &[ids.len(), hidden])?;
    check_ids(ids, vocab)?;
    if hidden == 0 {
        return Ok(());
    }
    float(OP, "g", g)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(g.device()) {
        return cuda::embedding::backward(ids, g, dtable);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if g.device().is_metal() {
        return metal::embedding::backward(ids, g, dtable);
    }
    on_cpu(OP, &[g, dtable])?;
    by_dtype!(OP, "g", g.dtype(), T => {
        let g = view::<T>(OP, "g", g)?;
        update::<f32, _>(OP, "dtable", dtable, |dtable| {
            cpu::embedding::backward(ids, &g, hidden, dtable);
            Ok(())
        })
    })
}

fn check_ids(ids: &[u32], vocab: usize) -> Result<()> {
    let mut bad = ids.iter().enumerate().filter(|&(_, &id)| id as usize >= vocab);
    match bad.next() {
        None => Ok(()),
        Some((token, id)) => {
            let problem = format!("id {id} of token {token} is outside the vocabulary of {vocab}");
            Err(Error::op(OP, format!("{problem} ({} such tokens)", 1 + bad.count())))
        }
    }
}
