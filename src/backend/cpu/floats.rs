//! Reads f32, f16, bf16 and quantized tensors as f32: in place where they are f32, a range at a time where they are not. One
//! kernel then serves every mix of dtypes.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, Layout, Shape, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::blocks::Blocks;
use super::{Element, View, contiguous_range, simd, update, view};
use crate::backend::custom_ops::Weight;
use crate::backend::quantized::{Kind, QuantizedTensor};
use crate::{Error, Result};

/// Elements per parallel task of the conversions.
const TASK: usize = 1 << 14;

/// Elements of any of the three dtypes, or quantized; row-major.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// f32
    F32(&'a [f32]),
    /// f16
    F16(&'a [f16]),
    /// bf16
    BF16(&'a [bf16]),
    /// Rows of whole blocks.
    Quantized(Blocks<'a>),
}

impl<'a> Floats<'a> {
    /// Reads a contiguous part of a storage; an error names the op and the tensor when it is not contiguous or of another
    /// dtype.
    pub fn of(op: &'static str, name: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<Self> {
        let range = contiguous_range(op, name, layout)?;
        match storage {
            CpuStorage::F32(elements) => Ok(Self::F32(&elements[range])),
            CpuStorage::F16(elements) => Ok(Self::F16(&elements[range])),
            CpuStorage::BF16(elements) => Ok(Self::BF16(&elements[range])),
            other => Err(wrong_dtype(op, name, other.dtype())),
        }
    }

    /// The elements themselves when they are f32.
    pub fn as_f32(&self) -> Option<&'a [f32]> {
        match self {
            Self::F32(elements) => Some(elements),
            _ => None,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(elements) => elements.len(),
            Self::F16(elements) => elements.len(),
            Self::BF16(elements) => elements.len(),
            Self::Quantized(blocks) => blocks.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `len` elements from `start` on: borrowed when they are f32, else widened on this thread.
    pub fn range(&self, start: usize, len: usize) -> Cow<'a, [f32]> {
        if let Some(elements) = self.as_f32() {
            return Cow::Borrowed(&elements[start..start + len]);
        }
        let mut wide = vec![0.0; len];
        self.widen_into(start, &mut wide);
        Cow::Owned(wide)
    }

    /// Widens `dst.len()` elements from `start` on, on this thread.
    pub fn widen_into(&self, start: usize, dst: &mut [f32]) {
        let range = start..start + dst.len();
        match self {
            Self::F32(elements) => dst.copy_from_slice(&elements[range]),
            Self::F16(elements) => widen(&elements[range], dst),
            Self::BF16(elements) => widen(&elements[range], dst),
            Self::Quantized(blocks) => blocks.widen_into(start, dst),
        }
    }

    /// All elements: borrowed when they are f32, else widened on all cores.
    pub fn to_f32(&self) -> Cow<'a, [f32]> {
        if let Some(elements) = self.as_f32() {
            return Cow::Borrowed(elements);
        }
        let mut all = vec![0.0; self.len()];
        all.par_chunks_mut(TASK).enumerate().for_each(|(task, dst)| self.widen_into(task * TASK, dst));
        Cow::Owned(all)
    }
}

/// A contiguous CPU tensor of any of the three dtypes, or a quantized one, read-locked.
pub enum Held<'a> {
    /// f32
    F32(View<'a, f32>),
    /// f16
    F16(View<'a, f16>),
    /// bf16
    BF16(View<'a, bf16>),
    /// Blocks of a kind.
    Quantized(View<'a, u8>, Kind),
}

impl<'a> Held<'a> {
    /// Locks `tensor`; an error names the op and the tensor when it is elsewhere, not contiguous or of another dtype.
    pub fn of(op: &'static str, name: &str, tensor: &'a Tensor) -> Result<Self> {
        match tensor.dtype() {
            DType::F32 => Ok(Self::F32(view(op, name, tensor)?)),
            DType::F16 => Ok(Self::F16(view(op, name, tensor)?)),
            DType::BF16 => Ok(Self::BF16(view(op, name, tensor)?)),
            other => Err(wrong_dtype(op, name, other)),
        }
    }

    /// Locks a quantized tensor; an error names the op and the tensor when it is elsewhere.
    pub fn quantized(op: &'static str, name: &str, tensor: &'a QuantizedTensor) -> Result<Self> {
        Ok(Self::Quantized(view(op, name, tensor.bytes())?, tensor.kind()))
    }

    /// Locks a weight of a product.
    pub fn weight(op: &'static str, name: &str, weight: Weight<'a>) -> Result<Self> {
        match weight {
            Weight::Dense(tensor) => Self::of(op, name, tensor),
            Weight::Quantized(tensor) => Self::quantized(op, name, tensor),
        }
    }

    /// The elements.
    pub fn floats(&self) -> Floats<'_> {
        match self {
            Self::F32(elements) => Floats::F32(elements),
            Self::F16(elements) => Floats::F16(elements),
            Self::BF16(elements) => Floats::BF16(elements),
            Self::Quantized(bytes, kind) => Floats::Quantized(Blocks::new(*kind, bytes)),
        }
    }
}

/// The elements that `layout` selects from `storage`, row-major, in a storage of their own.
pub fn gather(op: &'static str, name: &str, storage: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
    fn pick<T: Copy>(elements: &[T], layout: &Layout) -> Vec<T> {
        let mut places = vec![layout.start_offset()];
        for (&dim, &stride) in layout.dims().iter().zip(layout.stride()) {
            places = places.iter().flat_map(|place| (0..dim).map(move |index| place + index * stride)).collect();
        }
        places.iter().map(|&place| elements[place]).collect()
    }
    match storage {
        CpuStorage::F32(elements) => Ok(CpuStorage::F32(pick(elements, layout))),
        CpuStorage::F16(elements) => Ok(CpuStorage::F16(pick(elements, layout))),
        CpuStorage::BF16(elements) => Ok(CpuStorage::BF16(pick(elements, layout))),
        other => Err(wrong_dtype(op, name, other.dtype())),
    }
}

/// A CPU storage of `dtype` from f32 values, rounded on all cores.
pub fn storage_of(values: Vec<f32>, dtype: DType) -> CpuStorage {
    match dtype {
        DType::F16 => CpuStorage::F16(narrowed(&values)),
        DType::BF16 => CpuStorage::BF16(narrowed(&values)),
        _ => CpuStorage::F32(values),
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

/// An f32 CPU tensor in another dtype, rounded on all cores; one that has the dtype stays as it is.
pub fn cast(tensor: Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() == dtype {
        return Ok(tensor);
    }
    let values = view::<f32>("cast", "the sum", &tensor)?;
    Ok(match dtype {
        DType::F16 => Tensor::from_vec(narrowed::<f16>(&values), tensor.shape(), &Device::Cpu)?,
        DType::BF16 => Tensor::from_vec(narrowed::<bf16>(&values), tensor.shape(), &Device::Cpu)?,
        other => return Err(wrong_dtype("cast", "the sum", other)),
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

fn wrong_dtype(op: &'static str, name: &str, found: DType) -> Error {
    Error::op(op, format!("{name} has dtype {found:?}, but F32, F16 or BF16 is needed"))
}
