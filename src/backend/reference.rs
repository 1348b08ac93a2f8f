//! Every op in plain f64 loops, forward and backward side by side: the judge of all kernels.

pub mod adamw;
pub mod attention;
pub mod cross_entropy;
#[cfg(test)]
mod differences;
pub mod dora;
pub mod embedding;
pub mod fused_lora;
pub mod linear;
pub mod lora_linear;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
