//! Stands in for `fused_lora.rs` where there is no Metal: every function says so.
#![allow(clippy::too_many_arguments)]

use candle_core::{Layout, MetalStorage, Shape, Tensor};

use crate::backend::custom_ops::Sink;
use crate::backend::dropout::Dropout;
use crate::{Error, Result};

fn absent<T>() -> Result<T> {
    Err(Error::op("fused_lora", "this build has no kernel for it on this device"))
}

/// No Metal in this build.
pub fn ready(_: &Tensor, _: &Tensor, _: &Tensor) -> Result<()> {
    absent()
}

/// No Metal in this build.
pub fn delta(_: &Tensor, _: &Tensor, _: &Tensor, _: f64, _: Option<Dropout>) -> Result<Tensor> {
    absent()
}

/// No Metal in this build.
pub fn delta_op(_: [(&MetalStorage, &Layout); 3], _: f64, _: Option<Dropout>) -> Result<(MetalStorage, Shape)> {
    absent()
}

/// No Metal in this build.
pub fn delta_op1(_: &MetalStorage, _: &Layout, _: &Tensor, _: &Tensor, _: f64) -> Result<(MetalStorage, Shape)> {
    absent()
}

/// No Metal in this build.
pub fn add_into(_: &Tensor, _: &Tensor, _: &Tensor, _: &Tensor, _: f64, _: Option<Dropout>) -> Result<Tensor> {
    absent()
}

/// No Metal in this build.
pub fn backward(
    _: &Tensor,
    _: &Tensor,
    _: &Tensor,
    _: Option<&Tensor>,
    _: &Tensor,
    _: f64,
    _: Option<Dropout>,
    _: &Sink,
) -> Result<()> {
    absent()
}
