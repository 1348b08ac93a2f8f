//! Several adapters as one: `Σ w s (A B)`.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::Tensor;

use super::{AdapterFile, Module};
use crate::{Error, Result};

/// The weighted sum of adapters. Where several are on one module, their A stand beside each other and their B, scaled, below
/// each other.
///
/// # Errors
/// No adapter; DoRA and whole tensors among several or with a weight, which are no sums.
pub fn sum(adapters: &[(AdapterFile, f64)]) -> Result<AdapterFile> {
    let (first, weight) = adapters.first().ok_or_else(|| Error::setting("adapter", "there is none"))?;
    if adapters.len() == 1 && *weight == 1.0 {
        return Ok(first.clone());
    }
    for (adapter, _) in adapters {
        adapter.check_plain("a weighted sum takes")?;
    }
    let paths: BTreeSet<&String> = adapters.iter().flat_map(|(adapter, _)| adapter.modules.keys()).collect();
    let mut modules = BTreeMap::new();
    for path in paths {
        let parts = adapters.iter().filter_map(|(adapter, weight)| Some((adapter.modules.get(path)?, *weight)));
        let parts: Vec<(&Module, f64)> = parts.collect();
        modules.insert(path.clone(), add(path, &parts)?);
    }
    // What each of them chose has no meaning for the sum.
    Ok(AdapterFile { modules, targets: None, ..first.clone() })
}

fn add(path: &str, parts: &[(&Module, f64)]) -> Result<Module> {
    if let [(module, weight)] = parts {
        return Ok(Module { scaling: module.scaling * weight, ..(*module).clone() });
    }
    let sizes: BTreeSet<(usize, usize)> = parts.iter().map(|(module, _)| module.sizes()).collect();
    if sizes.len() > 1 {
        return Err(Error::setting("adapter", format!("{path} has other sizes in one than in another: {sizes:?}")));
    }
    let a: Vec<&Tensor> = parts.iter().map(|(module, _)| &module.a).collect();
    let b: Vec<Tensor> =
        parts.iter().map(|(module, weight)| &module.b * (module.scaling * weight)).collect::<Result<_, _>>()?;
    Ok(Module { a: Tensor::cat(&a, 1)?, b: Tensor::cat(&b, 0)?, scaling: 1.0, magnitude: None })
}
