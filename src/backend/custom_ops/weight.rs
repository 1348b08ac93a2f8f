//! A frozen weight of a product, as it is held.

use candle_core::{DType, Device, Tensor, Var};

use super::check;
use super::dequantize::dequantize;
use crate::Result;
use crate::backend::quantized::QuantizedTensor;

/// W `[n, k]` of a product: a tensor, or blocks that stay quantized.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// f32, f16 or bf16.
    Dense(&'a Tensor),
    /// Frozen: no gradient of it is ever computed.
    Quantized(&'a QuantizedTensor),
}

impl<'a> From<&'a Tensor> for Weight<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self::Dense(tensor)
    }
}

impl<'a> From<&'a Var> for Weight<'a> {
    fn from(variable: &'a Var) -> Self {
        Self::Dense(variable)
    }
}

impl<'a> From<&'a QuantizedTensor> for Weight<'a> {
    fn from(tensor: &'a QuantizedTensor) -> Self {
        Self::Quantized(tensor)
    }
}

impl<'a> Weight<'a> {
    /// Its shape.
    pub fn dims(self) -> &'a [usize] {
        match self {
            Self::Dense(tensor) => tensor.dims(),
            Self::Quantized(tensor) => tensor.dims(),
        }
    }

    /// Where it is.
    pub fn device(self) -> &'a Device {
        match self {
            Self::Dense(tensor) => tensor.device(),
            Self::Quantized(tensor) => tensor.device(),
        }
    }

    /// The same, contiguous.
    pub(crate) fn contiguous(self) -> Result<Frozen> {
        Ok(match self {
            Self::Dense(tensor) => Frozen::Dense(tensor.detach().contiguous()?),
            Self::Quantized(tensor) => Frozen::Quantized(tensor.clone()),
        })
    }

    /// The same, a tensor in `dtype`.
    pub(crate) fn to_dtype(self, dtype: DType) -> Result<Frozen> {
        Ok(match self {
            Self::Dense(tensor) => Frozen::Dense(tensor.detach().to_dtype(dtype)?),
            Self::Quantized(tensor) => Frozen::Quantized(tensor.clone()),
        })
    }

    /// Whether it is a tensor of another dtype than `dtype`; what is quantized takes any.
    pub(super) fn differs_from(self, dtype: DType) -> bool {
        matches!(self, Self::Dense(tensor) if tensor.dtype() != dtype)
    }

    /// A tensor: itself, or a copy in `dtype` where it is quantized.
    pub(crate) fn to_dense(self, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.clone()),
            Self::Quantized(tensor) => dequantize(tensor, dtype),
        }
    }

    /// Refuses a dtype that is no float and a device that is not x's.
    pub(super) fn check(self, op: &'static str, name: &str, x: &Tensor) -> Result<()> {
        match self {
            Self::Dense(tensor) => {
                check::float(op, name, tensor)?;
                check::same_device(op, name, tensor, "x", x)
            }
            Self::Quantized(tensor) => check::same_device(op, name, tensor.bytes(), "x", x),
        }
    }
}

/// A [`Weight`] of its own.
#[derive(Debug, Clone)]
pub enum Frozen {
    /// f32, f16 or bf16.
    Dense(Tensor),
    /// Blocks.
    Quantized(QuantizedTensor),
}

impl From<Tensor> for Frozen {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(tensor)
    }
}

impl From<QuantizedTensor> for Frozen {
    fn from(tensor: QuantizedTensor) -> Self {
        Self::Quantized(tensor)
    }
}

impl Frozen {
    /// As the ops take it.
    pub fn borrow(&self) -> Weight<'_> {
        match self {
            Self::Dense(tensor) => Weight::Dense(tensor),
            Self::Quantized(tensor) => Weight::Quantized(tensor),
        }
    }
}
