//! Apple GPUs: the kernels' texts (`kernels.metal` and the `.metal` files here), which kernels an op launches ([`plan`]), their
//! pipelines, and the encoding of launches, a file an op.
//!
//! Compiled on Apple targets with the feature `custom-metal`. Elsewhere only [`plan`] is real: the tests run it on the CPU.

pub mod plan;

macro_rules! on_apple {
    ($($visibility:vis mod $name:ident;)*) => {
        $(#[cfg(all(target_vendor = "apple", feature = "custom-metal"))] $visibility mod $name;)*
    };
}

on_apple! {
    pub(crate) mod adamw;
    pub(crate) mod attention;
    pub(crate) mod cross_entropy;
    pub(crate) mod dequantize;
    pub(crate) mod embedding;
    mod encode;
    pub mod fused_lora;
    mod pipelines;
    pub(crate) mod rms_norm;
    pub(crate) mod rope;
    pub(crate) mod swiglu;
}

#[cfg(not(all(target_vendor = "apple", feature = "custom-metal")))]
#[path = "absent.rs"]
pub mod fused_lora;
