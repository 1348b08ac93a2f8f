//! The ops on NVIDIA GPUs of compute capability 8.0 and up, with the feature `cuda`.
//!
//! Our kernels (`*.cuh`, instances in `*.cu`) make everything but those of the base's products that cuBLASLt does better. An op costs
//! its outputs' and its scratch's allocation and its launches: no event, no synchronisation, but where a number goes back to the host (the
//! loss, the gradient's norm). [`paths`] lists what runs fast.

#[cfg(feature = "cuda")]
pub(crate) mod adamw;
#[cfg(feature = "cuda")]
pub(crate) mod attention;
#[cfg(feature = "cuda")]
pub(crate) mod cross_entropy;
#[cfg(feature = "cuda")]
pub(crate) mod dequantize;
#[cfg(feature = "cuda")]
mod device;
#[cfg(feature = "cuda")]
pub(crate) mod dora;
#[cfg(feature = "cuda")]
pub(crate) mod embedding;
#[cfg(feature = "cuda")]
pub(crate) mod few_rows;
#[cfg(feature = "cuda")]
pub mod fused_lora;
#[cfg(feature = "cuda")]
mod fused_lora_launch;
#[cfg(feature = "cuda")]
mod hopper;
#[cfg(feature = "cuda")]
pub mod linear;
#[cfg(feature = "cuda")]
pub mod lora_linear;
mod paths;
#[cfg(feature = "cuda")]
pub(crate) mod rms_norm;
#[cfg(feature = "cuda")]
pub(crate) mod rope;
#[cfg(feature = "cuda")]
pub mod shared_linear;
#[cfg(feature = "cuda")]
pub(crate) mod swiglu;

pub use paths::{Path, paths};

/// Whether this build has kernels for `device`.
pub fn takes(device: &candle_core::Device) -> bool {
    cfg!(feature = "cuda") && device.is_cuda()
}

/// The most bytes that tensors on this GPU have had at a time, since the start or the last call with `reset`.
///
/// # Errors
/// Where `device` is no GPU of this build.
#[cfg(feature = "cuda")]
pub fn peak_memory(device: &candle_core::Device, reset: bool) -> crate::Result<u64> {
    Ok(pool(device, reset)?.most)
}

/// Bytes of tensors on this GPU now.
///
/// # Errors
/// Where `device` is no GPU of this build.
#[cfg(feature = "cuda")]
pub fn used_memory(device: &candle_core::Device) -> crate::Result<u64> {
    Ok(pool(device, false)?.used)
}

/// Bytes that new tensors on this GPU can have.
///
/// # Errors
/// Where `device` is no GPU of this build.
#[cfg(feature = "cuda")]
pub fn available_memory(device: &candle_core::Device) -> crate::Result<u64> {
    let device::Pool { used, reserved, free, .. } = pool(device, false)?;
    Ok(free + reserved.saturating_sub(used))
}

#[cfg(feature = "cuda")]
fn pool(device: &candle_core::Device, reset: bool) -> crate::Result<device::Pool> {
    match device {
        candle_core::Device::Cuda(device) => device::pool(device, reset),
        _ => Err(device::failed("the device is no GPU".to_string())),
    }
}

/// Fails where `ordinal` has no GPU that the kernels run on; the error says what is missing.
///
/// # Errors
/// Without the feature `cuda`, a driver, a GPU of that number, or compute capability 8.0.
#[cfg(feature = "cuda")]
pub fn check(ordinal: usize) -> crate::Result<()> {
    device::check(ordinal)
}

/// Fails where `ordinal` has no GPU that the kernels run on; the error says what is missing.
///
/// # Errors
/// Always: this build has no CUDA.
#[cfg(not(feature = "cuda"))]
pub fn check(_ordinal: usize) -> crate::Result<()> {
    Err(crate::Error::Device {
        device: "cuda".to_string(),
        problem: "this program was built without CUDA; build it with --features cuda".to_string(),
    })
}
