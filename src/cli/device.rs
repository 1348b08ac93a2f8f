//! `--device`: which device, and what this build lacks for another.

use candle_core::Device;
use clap::ValueEnum;
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
            // The decoder's ops have CPU kernels only, so that is the best there is.
            Self::Auto | Self::Cpu => Ok(Device::Cpu),
            Self::Cuda if !cfg!(feature = "cuda") => {
                Err(missing("cuda", "this program was built without CUDA; build it with --features cuda".to_string()))
            }
            Self::Metal if !cfg!(target_vendor = "apple") => {
                Err(missing("metal", "this program was not built for an Apple machine".to_string()))
            }
            Self::Cuda | Self::Metal => {
                let device = if self == Self::Cuda { "cuda" } else { "metal" };
                let lacking = "attention, norms and the loss have no kernels for it yet, so models run on the CPU only";
                Err(missing(device, format!("{lacking}; the LoRA ops of the library do run there. Use --device cpu")))
            }
        }
    }
}
