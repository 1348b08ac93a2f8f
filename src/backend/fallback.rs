//! What happens where a device has no kernel for an op: the same formula runs as a composite of Candle's own ops, after one
//! warning an op that says so. With `METAL_CANDLE_STRICT=1` it is an error instead.

use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex};

use candle_core::{Device, Tensor};

use crate::{Error, Result};

/// The device's name in messages: `cpu`, `cuda` or `metal`.
pub fn device_name(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

/// Allows `op` to run as a composite of Candle's ops, and warns the first time.
///
/// # Errors
/// [`Error::Device`] when `METAL_CANDLE_STRICT` is set to anything but `0` or nothing.
pub fn allow(op: &'static str, device: &Device, reason: &str) -> Result<()> {
    allow_if(is_strict(), op, device_name(device), reason)
}

/// `dst += value` in place by Candle's ops; `dst` is contiguous and may be a view into a larger buffer.
pub fn accumulate(dst: &Tensor, value: &Tensor) -> Result<()> {
    let value = value.to_dtype(dst.dtype())?.reshape(dst.shape())?;
    if dst.elem_count() > 0 {
        dst.detach().slice_set(&(dst + value)?.contiguous()?, 0, 0)?;
    }
    Ok(())
}

fn is_strict() -> bool {
    static STRICT: LazyLock<bool> = LazyLock::new(|| {
        std::env::var_os("METAL_CANDLE_STRICT").is_some_and(|value| !value.is_empty() && value != "0")
    });
    *STRICT
}

fn allow_if(strict: bool, op: &'static str, device: &str, reason: &str) -> Result<()> {
    if strict {
        let problem = format!("{op}: {reason}, and METAL_CANDLE_STRICT forbids the composite of Candle's ops");
        return Err(Error::Device { device: device.to_string(), problem });
    }
    static WARNED: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    if WARNED.lock().is_ok_and(|mut warned| warned.insert(op)) {
        tracing::warn!("{op} runs as a composite of Candle's ops on {device}, slower than its kernel: {reason}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_is_an_error_that_names_op_device_and_reason() {
        assert!(allow_if(false, "an op", "cuda", "no kernel yet").is_ok());
        let error = allow_if(true, "an op", "cuda", "no kernel yet").unwrap_err().to_string();
        assert!(error.contains("an op") && error.contains("cuda") && error.contains("no kernel yet"), "{error}");
    }

    #[test]
    fn accumulates_into_a_view() {
        let buffer = Tensor::ones((4, 3), candle_core::DType::F32, &Device::Cpu).unwrap();
        let view = buffer.narrow(0, 1, 2).unwrap();
        accumulate(&view, &Tensor::full(2.0_f32, (2, 3), &Device::Cpu).unwrap()).unwrap();
        let rows = buffer.to_vec2::<f32>().unwrap();
        assert_eq!(rows, [[1.0; 3], [3.0; 3], [3.0; 3], [1.0; 3]]);
    }
}
