//! Apple GPUs: `kernels.metal`, which kernels an op launches ([`plan`]), their pipelines, and the encoding of launches.
//!
//! Compiled on Apple targets with the feature `custom-metal`. Elsewhere only [`plan`] is real: the tests run it on the CPU.

#[cfg(not(all(target_vendor = "apple", feature = "custom-metal")))]
#[path = "absent.rs"]
pub mod fused_lora;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
pub mod fused_lora;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
mod pipelines;
pub mod plan;
