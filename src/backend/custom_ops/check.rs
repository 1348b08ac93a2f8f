//! Checks that the ops share. Every message names the tensor and says what it is and what it should be.

use candle_core::{DType, Tensor};

use crate::backend::fallback::device_name;
use crate::{Error, Result};

/// f32, f16 or bf16.
pub(super) fn float(op: &'static str, name: &str, tensor: &Tensor) -> Result<()> {
    float_dtype(op, name, tensor.dtype())
}

/// f32, f16 or bf16.
pub(super) fn float_dtype(op: &'static str, name: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        other => Err(Error::op(op, format!("{name} has dtype {other:?}, but F32, F16 or BF16 is needed"))),
    }
}

/// All tensors must be on the CPU; else an error that names the op and the device.
pub(super) fn on_cpu(op: &str, tensors: &[&Tensor]) -> Result<()> {
    match tensors.iter().find(|tensor| !tensor.device().is_cpu()) {
        Some(tensor) => Err(Error::Device {
            device: device_name(tensor.device()).to_string(),
            problem: format!("{op} has no kernel for it; use the cpu"),
        }),
        None => Ok(()),
    }
}

/// `tensor` must have this dtype.
pub(super) fn expect_dtype(op: &'static str, name: &str, tensor: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dtype() == dtype {
        return Ok(());
    }
    Err(Error::op(op, format!("{name} has dtype {:?}, but {dtype:?} is needed", tensor.dtype())))
}

/// The three sizes of `tensor`, called `form` in the message.
pub(super) fn dims3(op: &'static str, name: &str, tensor: &Tensor, form: &str) -> Result<(usize, usize, usize)> {
    match *tensor.dims() {
        [a, b, c] => Ok((a, b, c)),
        ref dims => Err(Error::op(op, format!("{name} has shape {dims:?}, but {form} is needed"))),
    }
}

/// The two sizes of `tensor`, called `form` in the message.
pub(super) fn dims2(op: &'static str, name: &str, tensor: &Tensor, form: &str) -> Result<(usize, usize)> {
    match *tensor.dims() {
        [a, b] => Ok((a, b)),
        ref dims => Err(Error::op(op, format!("{name} has shape {dims:?}, but {form} is needed"))),
    }
}

/// Rows and row length of `tensor`, all leading dimensions taken as rows.
pub(super) fn rows(op: &'static str, name: &str, tensor: &Tensor) -> Result<(usize, usize)> {
    match tensor.dims().split_last() {
        Some((&row, leading)) => Ok((leading.iter().product(), row)),
        None => Err(Error::op(op, format!("{name} is a scalar; at least one dimension is needed"))),
    }
}

/// The size of the last dimension: there is one, and it is not empty.
pub(super) fn last(op: &'static str, name: &str, dims: &[usize]) -> Result<usize> {
    match dims.last() {
        Some(&last) if last > 0 => Ok(last),
        _ => Err(Error::op(op, format!("{name} {dims:?} must have at least one dimension, the last not empty"))),
    }
}

/// Exactly `dims`.
pub(super) fn shape(op: &'static str, name: &str, tensor: &Tensor, dims: &[usize]) -> Result<()> {
    if tensor.dims() == dims {
        return Ok(());
    }
    Err(Error::op(op, format!("{name} has shape {:?}, but {dims:?} is needed", tensor.dims())))
}

/// One device for both.
pub(super) fn same_device(op: &'static str, name: &str, tensor: &Tensor, like_name: &str, like: &Tensor) -> Result<()> {
    if tensor.device().same_device(like.device()) {
        return Ok(());
    }
    let (here, there) = (tensor.device().location(), like.device().location());
    Err(Error::op(
        op,
        format!("{name} {:?} is on {here:?}, but {like_name} {:?} is on {there:?}", tensor.dims(), like.dims()),
    ))
}

/// A gradient of an activation: of `dims`, f32 or of x's dtype, on x's device.
pub(super) fn gradient(op: &'static str, name: &str, tensor: &Tensor, dims: &[usize], x: &Tensor) -> Result<()> {
    shape(op, name, tensor, dims)?;
    if tensor.dtype() != DType::F32 && tensor.dtype() != x.dtype() {
        let (found, wanted) = (tensor.dtype(), x.dtype());
        return Err(Error::op(op, format!("{name} has dtype {found:?}, but F32 or x's {wanted:?} is needed")));
    }
    same_device(op, name, tensor, "x", x)
}

/// A gradient of a parameter, added to in place: of `dims`, f32, on x's device.
pub(super) fn sink(op: &'static str, name: &str, tensor: &Tensor, dims: &[usize], x: &Tensor) -> Result<()> {
    shape(op, name, tensor, dims)?;
    expect_dtype(op, name, tensor, DType::F32)?;
    same_device(op, name, tensor, "x", x)
}

/// `dims` with the last replaced by `n`.
pub(super) fn with_last(dims: &[usize], n: usize) -> Vec<usize> {
    let mut dims = dims.to_vec();
    if let Some(last) = dims.last_mut() {
        *last = n;
    }
    dims
}
