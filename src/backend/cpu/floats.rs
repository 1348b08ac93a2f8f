//! Reads f32, f16 and bf16 tensors as f32: in place where they are f32, a range at a time where they are not. One kernel
//! then serves every mix of dtypes.

use std::borrow::Cow;

use candle_core::{DType, Device, Shape, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::{Element, View, simd, update, view};
use crate::{Error, Result};

/// Elements per parallel task of the conversions.
const TASK: usize = 1 << 14;

/// The elements of a contiguous CPU tensor of any of the three dtypes.
pub enum Floats<'a> {
    /// f32
    F32(View<'a, f32>),
    /// f16
    F16(View<'a, f16>),
    /// bf16
    BF16(View<'a, bf16>),
}

impl<'a> Floats<'a> {
    /// Reads `tensor`; an error names the op and the tensor when it is elsewhere, not contiguous or of another dtype.
    pub fn of(op: &'static str, name: &str, tensor: &'a Tensor) -> Result<Self> {
        match tensor.dtype() {
            DType::F32 => Ok(Self::F32(view(op, name, tensor)?)),
            DType::F16 => Ok(Self::F16(view(op, name, tensor)?)),
            DType::BF16 => Ok(Self::BF16(view(op, name, tensor)?)),
            other => Err(Error::op(op, format!("{name} has dtype {other:?}, but f32, f16 or bf16 is needed"))),
        }
    }

    /// The elements themselves when they are f32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match self {
            Self::F32(elements) => Some(elements),
            _ => None,
        }
    }

    /// Widens `dst.len()` elements from `start` on, on this thread.
    pub fn widen_into(&self, start: usize, dst: &mut [f32]) {
        let range = start..start + dst.len();
        match self {
            Self::F32(elements) => dst.copy_from_slice(&elements[range]),
            Self::F16(elements) => widen(&elements[range], dst),
            Self::BF16(elements) => widen(&elements[range], dst),
        }
    }

    /// All elements: borrowed when they are f32, else widened on all cores.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        let len = match self {
            Self::F32(elements) => return Cow::Borrowed(elements),
            Self::F16(elements) => elements.len(),
            Self::BF16(elements) => elements.len(),
        };
        let mut all = vec![0.0; len];
        all.par_chunks_mut(TASK).enumerate().for_each(|(task, dst)| self.widen_into(task * TASK, dst));
        Cow::Owned(all)
    }
}

/// A CPU tensor of `dtype` from f32 values, rounded on all cores.
pub fn tensor_of(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    Ok(match dtype {
        DType::F16 => Tensor::from_vec(narrowed::<f16>(&values), shape, &Device::Cpu)?,
        DType::BF16 => Tensor::from_vec(narrowed::<bf16>(&values), shape, &Device::Cpu)?,
        _ => Tensor::from_vec(values, shape, &Device::Cpu)?,
    })
}

/// Gives `f` the elements of `dst` as f32 to change in place; half-precision elements are widened before and rounded
/// after. `f` must not read a tensor that shares `dst`'s storage.
pub fn update_f32<R>(op: &'static str, name: &str, dst: &Tensor, f: impl FnOnce(&mut [f32]) -> Result<R>) -> Result<R> {
    fn through<T: Element, R>(elements: &mut [T], f: impl FnOnce(&mut [f32]) -> Result<R>) -> Result<R> {
        let mut wide = vec![0.0; elements.len()];
        let pairs = wide.par_chunks_mut(TASK).zip(elements.par_chunks(TASK));
        pairs.for_each(|(wide, elements)| widen(elements, wide));
        let result = f(&mut wide)?;
        let pairs = elements.par_chunks_mut(TASK).zip(wide.par_chunks(TASK));
        pairs.for_each(|(elements, wide)| narrow(wide, elements));
        Ok(result)
    }
    match dst.dtype() {
        DType::F16 => update::<f16, R>(op, name, dst, |elements| through(elements, f)),
        DType::BF16 => update::<bf16, R>(op, name, dst, |elements| through(elements, f)),
        _ => update::<f32, R>(op, name, dst, f),
    }
}

/// Widens on this thread.
pub fn widen<T: Element>(src: &[T], dst: &mut [f32]) {
    simd(
        #[inline(always)]
        || dst.iter_mut().zip(src).for_each(|(dst, src)| *dst = src.widen()),
    )
}

/// Rounds to nearest on this thread.
pub fn narrow<T: Element>(src: &[f32], dst: &mut [T]) {
    simd(
        #[inline(always)]
        || dst.iter_mut().zip(src).for_each(|(dst, src)| *dst = T::narrow(*src)),
    )
}

fn narrowed<T: Element>(values: &[f32]) -> Vec<T> {
    let mut all = vec![T::narrow(0.0); values.len()];
    all.par_chunks_mut(TASK).zip(values.par_chunks(TASK)).for_each(|(dst, src)| narrow(src, dst));
    all
}
