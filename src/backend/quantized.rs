//! Weights that stay quantized in memory: rows of blocks, each a few bytes of scales and the codes of 32, 64 or 256 values.
//!
//! Products never see them whole in a wider type: on the CPU rows are widened a tile at a time, on a GPU
//! [`dequantize`](fn@crate::backend::custom_ops::dequantize) fills a buffer that lives for one product.
//!
//! The Q kinds are llama.cpp's, byte for byte (github.com/ggml-org/ggml, `ggml-common.h`). NF4 is that of Dettmers et al., "QLoRA",
//! 2023, as bitsandbytes has it with blocks of 64; its scales are kept as f32 here, also where a file quantized them again.
//! The affine kinds are MLX's groups, cut into blocks of 32.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::cpu::blocks;
use super::cpu::view;
use crate::{Error, Result};

const OP: &str = "quantized";

/// How a block stores its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// f16 scale, 32 signed bytes.
    Q8_0,
    /// f16 scale, 32 codes of 4 bits, less 8.
    Q4_0,
    /// f16 scale and minimum, 32 codes of 4 bits.
    Q4_1,
    /// f16 scale, 32 codes of 5 bits, less 16.
    Q5_0,
    /// f16 scale and minimum, 32 codes of 5 bits.
    Q5_1,
    /// 256 codes of 4 bits; eight scales and minima of 6 bits, two f16 scales of those.
    Q4K,
    /// As [`Kind::Q4K`] with 5 bits.
    Q5K,
    /// 256 codes of 6 bits, less 32; sixteen scales of 8 bits, an f16 scale of those.
    Q6K,
    /// f32 scale, 64 codes of 4 bits into a table of sixteen quantiles of the normal distribution.
    Nf4,
    /// f32 scale and minimum, 32 codes of 4 bits.
    Affine4,
    /// f32 scale and minimum, 32 codes of 8 bits.
    Affine8,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Nf4,
        Self::Affine4,
        Self::Affine8,
    ];

    /// Values of a block.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
            Self::Nf4 => 64,
            _ => 32,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 | Self::Affine4 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Nf4 => 36,
            Self::Affine8 => 40,
        }
    }

    /// As people write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
            Self::Nf4 => "nf4",
            Self::Affine4 => "affine4",
            Self::Affine8 => "affine8",
        }
    }

    /// The kind of a GGUF file's tensor, where it is one of these.
    pub fn of_ggml(dtype: GgmlDType) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.ggml() == Some(dtype))
    }

    /// llama.cpp's type of the same bytes.
    pub fn ggml(self) -> Option<GgmlDType> {
        match self {
            Self::Q8_0 => Some(GgmlDType::Q8_0),
            Self::Q4_0 => Some(GgmlDType::Q4_0),
            Self::Q4_1 => Some(GgmlDType::Q4_1),
            Self::Q5_0 => Some(GgmlDType::Q5_0),
            Self::Q5_1 => Some(GgmlDType::Q5_1),
            Self::Q4K => Some(GgmlDType::Q4K),
            Self::Q5K => Some(GgmlDType::Q5K),
            Self::Q6K => Some(GgmlDType::Q6K),
            Self::Nf4 | Self::Affine4 | Self::Affine8 => None,
        }
    }
}

/// What the linears of a base are held in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantize {
    /// As the file has them: quantized where it is.
    #[default]
    Auto,
    /// In the weights' dtype, whatever the file has.
    None,
    /// NF4, blocks of 64.
    Nf4,
    /// llama.cpp's Q8_0.
    #[serde(rename = "q8_0")]
    Q8_0,
    /// llama.cpp's Q4_K; rows that are no multiple of 256 become Q8_0.
    #[serde(rename = "q4_k")]
    Q4K,
}

impl Quantize {
    /// The kind for rows of length `k`, where the linears are to be quantized.
    pub fn kind(self, k: usize) -> Option<Kind> {
        match self {
            Self::Auto | Self::None => None,
            Self::Nf4 => Some(Kind::Nf4),
            Self::Q8_0 => Some(Kind::Q8_0),
            Self::Q4K if !k.is_multiple_of(Kind::Q4K.block_len()) => Some(Kind::Q8_0),
            Self::Q4K => Some(Kind::Q4K),
        }
    }
}

/// A quantized matrix `[n, k]`.
#[derive(Debug, Clone)]
pub struct QuantizedTensor {
    kind: Kind,
    /// u8, `[n, bytes of a row]`, contiguous.
    bytes: Tensor,
    dims: [usize; 2],
}

impl QuantizedTensor {
    /// From the bytes of its rows.
    ///
    /// # Errors
    /// A k that is not a whole number of blocks; a length that does not fit.
    pub fn new(kind: Kind, bytes: Vec<u8>, (n, k): (usize, usize), device: &Device) -> Result<Self> {
        let row = row_bytes(kind, k)?;
        if bytes.len() != n * row {
            return Err(Error::op(OP, format!("[{n}, {k}] of {kind:?} takes {} bytes, not {}", n * row, bytes.len())));
        }
        Ok(Self { kind, bytes: Tensor::from_vec(bytes, (n, row), device)?, dims: [n, k] })
    }

    /// Quantizes the rows of `w` `[n, k]`, f32, f16 or bf16, on the CPU, and puts them where `w` is.
    ///
    /// # Errors
    /// A k that is not a whole number of blocks; a kind that only files bring (the affine ones).
    pub fn quantize(w: &Tensor, kind: Kind) -> Result<Self> {
        let (n, k) = w.dims2()?;
        row_bytes(kind, k)?;
        let on_cpu = w.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?;
        let bytes = match kind.ggml() {
            Some(dtype) => quantize_rows(&on_cpu, dtype)?,
            None if kind == Kind::Nf4 => blocks::quantize_nf4(&view::<f32>(OP, "w", &on_cpu)?),
            None => return Err(Error::op(OP, format!("{kind:?} is read from files and not made here"))),
        };
        Self::new(kind, bytes, (n, k), w.device())
    }

    /// How its blocks store values.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// `[n, k]`
    pub fn dims(&self) -> &[usize; 2] {
        &self.dims
    }

    /// Bytes that it takes.
    pub fn size_in_bytes(&self) -> usize {
        self.bytes.elem_count()
    }

    /// The blocks, u8 `[n, bytes of a row]`.
    pub fn bytes(&self) -> &Tensor {
        &self.bytes
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.bytes.device()
    }

    /// The same on a device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self { bytes: self.bytes.to_device(device)?, ..*self })
    }

    /// A copy on a device that shares no memory with this one.
    pub fn copy_to(&self, device: &Device) -> Result<Self> {
        Ok(Self { bytes: self.bytes.copy()?.to_device(device)?, ..*self })
    }

    /// The rows in another order: row i of the result is row `order[i]`.
    pub fn permute_rows(&self, order: &[u32]) -> Result<Self> {
        let order = Tensor::new(order, self.device())?;
        let bytes = self.bytes.index_select(&order, 0)?;
        let dims = [bytes.dims()[0], self.dims[1]];
        Ok(Self { bytes, dims, ..*self })
    }
}

/// Candle quantizes on one thread; rows know nothing of each other.
fn quantize_rows(w: &Tensor, dtype: GgmlDType) -> Result<Vec<u8>> {
    const ROWS: usize = 64;
    let n = w.dims()[0];
    let parts = (0..n.div_ceil(ROWS)).into_par_iter().map(|part| {
        // Candle quantizes a tensor's whole memory, whatever part of it a view has.
        let rows = w.narrow(0, part * ROWS, ROWS.min(n - part * ROWS))?.force_contiguous()?;
        Ok(QTensor::quantize(&rows, dtype)?.data()?.into_owned())
    });
    Ok(parts.collect::<Result<Vec<Vec<u8>>>>()?.concat())
}

fn row_bytes(kind: Kind, k: usize) -> Result<usize> {
    if k == 0 || !k.is_multiple_of(kind.block_len()) {
        let block = kind.block_len();
        return Err(Error::op(OP, format!("rows of {k} values are not made of {kind:?}'s blocks of {block}")));
    }
    Ok(k / kind.block_len() * kind.block_bytes())
}
