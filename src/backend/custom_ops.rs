//! The fused ops as a user sees them.
//!
//! An op is plain functions first, `forward` and `backward` on tensors without autograd, in its own file below; the
//! function of the op's name puts it on Candle's tape.

mod check;
pub mod fused_lora;
pub mod linear;
pub mod lora_linear;

pub use fused_lora::{FusedLoRAOp, Sink, fused_lora, fused_lora_with_dropout};
pub use lora_linear::lora_linear;
