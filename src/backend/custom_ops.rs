//! The fused ops as a user sees them.
//!
//! An op is plain functions first, `forward` and `backward` on tensors without autograd, in its own file below; the
//! function of the op's name puts it on Candle's tape.

pub mod adamw;
pub mod attention;
mod check;
pub mod cross_entropy;
pub mod dequantize;
pub mod dora;
pub mod embedding;
pub mod fused_lora;
pub mod linear;
pub mod lora_linear;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
mod tape;
pub mod weight;

pub use attention::attention;
pub use cross_entropy::cross_entropy;
pub use dequantize::dequantize;
pub use dora::dora;
pub use fused_lora::{FusedLoRAOp, Sink, fused_lora, fused_lora_with_dropout};
pub use lora_linear::lora_linear;
pub use rms_norm::rms_norm;
pub use rope::rope;
pub use swiglu::{geglu, swiglu};
pub use weight::Weight;
