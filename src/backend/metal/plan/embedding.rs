//! Rows by index: `embedding_*` of `decoder.metal`.

use std::collections::BTreeMap;

use candle_core::DType;

use super::{Binding, LANES, Launch, Plan, Slot, Source, narrow, params, threads, type_suffix};
use crate::Result;

const OP: &str = "embedding";

params! {
    /// `EmbeddingParams` of decoder.metal.
    pub struct Params {
        /// H
        pub width: u32,
    }
}

/// `y[t] = table[ids[t]]`, rows of `width`.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn gather(ids: &[u32], width: usize, dtype: DType) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    let bindings = vec![Read(Slot::Table), Read(Slot::Ids), Write(Slot::Y), Params];
    rows("embedding_gather", bindings, ids, width, dtype)
}

/// `y[ids[t]] = x[t]`, for ids that differ.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn scatter(ids: &[u32], width: usize, dtype: DType) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    let bindings = vec![Read(Slot::X), Read(Slot::Ids), Write(Slot::Y), Params];
    rows("embedding_scatter", bindings, ids, width, dtype)
}

/// `dtable[ids[t]] += g[t]`, in the order of the tokens.
///
/// # Errors
/// Sizes that the kernels cannot take.
pub fn backward(ids: &[u32], width: usize, dtype: DType) -> Result<Plan> {
    use Binding::{Params, Read, Write};
    let mut tokens_of: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (token, &id) in ids.iter().enumerate() {
        tokens_of.entry(id).or_default().push(token as u32);
    }
    let distinct: Vec<u32> = tokens_of.keys().copied().collect();
    let mut starts = vec![0];
    let mut tokens = Vec::with_capacity(ids.len());
    for of_id in tokens_of.values() {
        tokens.extend(of_id);
        starts.push(tokens.len() as u32);
    }
    let bindings =
        vec![Read(Slot::G), Read(Slot::Ids), Read(Slot::Starts), Read(Slot::Tokens), Write(Slot::Dtable), Params];
    let mut plan = rows("embedding_backward", bindings, &distinct, width, dtype)?;
    plan.tables.extend([(Slot::Starts, starts), (Slot::Tokens, tokens)]);
    Ok(plan)
}

/// A threadgroup for each id.
fn rows(kernel: &str, bindings: Vec<Binding>, ids: &[u32], width: usize, dtype: DType) -> Result<Plan> {
    if ids.is_empty() || width == 0 {
        return Ok(Plan::default());
    }
    narrow(OP, "the number of tokens", ids.len())?;
    let launch = Launch {
        source: Source::Decoder,
        kernel: format!("{kernel}{}", type_suffix(&[dtype])),
        bindings,
        params: self::Params { width: narrow(OP, "the width", width)? }.bytes(),
        grid: [ids.len(), 1, 1],
        threads: threads(width, 8 * LANES),
        threadgroup_bytes: 0,
    };
    Ok(Plan { launches: vec![launch], tables: vec![(Slot::Ids, ids.to_vec())], ..Plan::default() })
}
