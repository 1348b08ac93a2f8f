//! Devices and the fused ops that run on them.

pub mod cpu;
pub mod cuda;
pub mod custom_ops;
pub mod dropout;
pub mod fallback;
pub mod memory;
pub mod metal;
pub mod quantized;
pub mod reference;
