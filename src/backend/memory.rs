//! How much memory there is: of this process, and free on a device.

use candle_core::Device;

use crate::Result;

/// Bytes that this process has in memory now, where the system tells (Linux).
pub fn resident() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let pages = std::fs::read_to_string("/proc/self/statm").ok()?;
        let pages: u64 = pages.split_whitespace().nth(1)?.parse().ok()?;
        // SAFETY: sysconf reads a constant of the system.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        Some(pages * u64::try_from(size).ok()?)
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// The most bytes that this process has had in memory, where the system tells (Unix).
pub fn peak_resident() -> Option<u64> {
    // On Linux getrusage counts what the parent had before it became this program, too.
    #[cfg(target_os = "linux")]
    {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        kilobytes(&status, "VmHWM:")
    }
    #[cfg(all(unix, not(target_os = "linux")))]
    {
        use nix::sys::resource::{UsageWho, getrusage};
        let peak = u64::try_from(getrusage(UsageWho::RUSAGE_SELF).ok()?.max_rss()).ok()?;
        // Bytes on Apple systems, kilobytes elsewhere.
        Some(if cfg!(target_vendor = "apple") { peak } else { peak * 1024 })
    }
    #[cfg(not(unix))]
    None
}

/// The bytes that a line of /proc tells in kilobytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(1024 * line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?)
}

/// Bytes that new tensors on `device` can have: what is free on a GPU and what its pool holds unused; on the CPU what the system
/// can give without swapping (Linux), else `None`.
///
/// # Errors
/// What the GPU's driver says.
pub fn available(device: &Device) -> Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return super::cuda::available_memory(device).map(Some);
    }
    if !device.is_cpu() {
        return Ok(None);
    }
    Ok(kilobytes(&std::fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:"))
}

/// The most bytes of tensors on a GPU since the last call with `reset`; on the CPU [`peak_resident`].
///
/// # Errors
/// What the GPU's driver says.
pub fn peak(device: &Device, reset: bool) -> Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return super::cuda::peak_memory(device, reset).map(Some);
    }
    let _ = (device, reset);
    Ok(peak_resident())
}

/// Bytes of tensors on a GPU now; on the CPU [`resident`].
///
/// # Errors
/// What the GPU's driver says.
pub fn used(device: &Device) -> Result<Option<u64>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return super::cuda::used_memory(device).map(Some);
    }
    let _ = device;
    Ok(resident())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_shows() {
        let before = resident().unwrap();
        let taken = std::hint::black_box(vec![1_u8; 64 << 20]);
        let after = resident().unwrap();
        assert!(after >= before + (60 << 20), "{before} then {after}");
        assert!(peak_resident().unwrap() >= after - (1 << 20));
        assert!(available(&Device::Cpu).unwrap().unwrap() > 1 << 20);
        drop(taken);
    }
}
