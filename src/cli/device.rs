//! `--device` and `--dtype`: which device, what this build lacks for another, and what weights are held in there.

use candle_core::Device;
use clap::ValueEnum;
use metal_candle::backend::cuda;
use metal_candle::backend::quantized::Quantize;
use metal_candle::models::WeightDtype;
use metal_candle::{Error, Result};
use serde::{Deserialize, Serialize};

/// Where to compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The best that the program can train on here
    #[default]
    Auto,
    /// The processor
    Cpu,
    /// An NVIDIA GPU
    Cuda,
    /// An Apple GPU
    Metal,
}

impl DeviceKind {
    /// The device, or what stands in the way.
    pub fn open(self) -> Result<Device> {
        let missing = |device: &str, problem: String| Error::Device { device: device.to_string(), problem };
        match self {
            Self::Auto if cuda::check(0).is_ok() => Ok(Device::new_cuda(0)?),
            Self::Auto | Self::Cpu => Ok(Device::Cpu),
            Self::Cuda => {
                cuda::check(0)?;
                Ok(Device::new_cuda(0)?)
            }
            Self::Metal if !cfg!(target_vendor = "apple") => {
                Err(missing("metal", "this program was not built for an Apple machine".to_string()))
            }
            Self::Metal => {
                let lacking = "no model has been tried on an Apple GPU yet, so models run on the CPU only";
                Err(missing(
                    "metal",
                    format!("{lacking}; the ops of the library have kernels for it. Use --device cpu"),
                ))
            }
        }
    }
}

/// Which weights are quantized.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizeKind {
    /// Those that are quantized in the file
    #[default]
    Auto,
    /// None: a quantized file is dequantized at load
    None,
    /// All linears, in NF4 with blocks of 64 (QLoRA)
    Nf4,
    /// All linears, in llama.cpp's Q8_0
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// All linears, in llama.cpp's Q4_K; those whose rows are no multiple of 256 in Q8_0
    #[value(name = "q4_k")]
    #[serde(rename = "q4_k")]
    Q4K,
}

impl QuantizeKind {
    /// The library's form of it.
    pub fn library(self) -> Quantize {
        match self {
            Self::Auto => Quantize::Auto,
            Self::None => Quantize::None,
            Self::Nf4 => Quantize::Nf4,
            Self::Q8_0 => Quantize::Q8_0,
            Self::Q4K => Quantize::Q4K,
        }
    }
}

/// What weights are held in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DtypeKind {
    /// f32 on the CPU; on a GPU f32 where the file has that, else bf16
    #[default]
    Auto,
    /// 32 bits
    F32,
    /// 16 bits with the range of f32
    Bf16,
    /// 16 bits with more digits and less range
    F16,
}

impl DtypeKind {
    /// The library's form of it.
    pub fn weights(self) -> WeightDtype {
        match self {
            Self::Auto => WeightDtype::Auto,
            Self::F32 => WeightDtype::F32,
            Self::Bf16 => WeightDtype::Bf16,
            Self::F16 => WeightDtype::F16,
        }
    }
}
