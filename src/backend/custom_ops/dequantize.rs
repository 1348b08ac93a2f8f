//! Blocks to a tensor: `w[i, j] = d · code + m`, by the scales of each block (`backend::quantized`).
//!
//! W `[n, k]` of f32, f16 or bf16, rounded once from the f32 value. Moves the blocks and `2 n k` or `4 n k` bytes.

use candle_core::{DType, Device, Tensor};

use super::check::float_dtype;
use crate::backend::cpu::floats::{Held, tensor_of};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
use crate::backend::metal;
use crate::backend::quantized::QuantizedTensor;
use crate::{Error, Result};

const OP: &str = "dequantize";

/// `[n, k]` in `dtype`, where the blocks are.
///
/// # Errors
/// A dtype that is not f32, f16 or bf16; a device without the kernel.
pub fn dequantize(w: &QuantizedTensor, dtype: DType) -> Result<Tensor> {
    float_dtype(OP, "the result", dtype)?;
    match w.device() {
        Device::Cpu => {
            let held = Held::quantized(OP, "w", w)?;
            tensor_of(held.floats().to_f32().into_owned(), w.dims().as_slice(), dtype)
        }
        #[cfg(feature = "cuda")]
        device if cuda::takes(device) => cuda::dequantize::dequantize(w, dtype),
        #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
        device if device.is_metal() => metal::dequantize::dequantize(w, dtype),
        other => {
            Err(Error::op(OP, format!("this build has no kernel for quantized weights on {:?}", other.location())))
        }
    }
}
