//! The fused ops as a user sees them.
//!
//! An op is plain functions first, `forward` and `backward` on tensors without autograd, in its own file below; the
//! function of the op's name puts it on Candle's tape.

pub mod adamw;
pub mod attention;
mod check;
pub mod cross_entropy;
pub mod embedding;
pub mod linear;
pub mod rms_norm;
pub mod rope;
pub(crate) mod support;
pub mod swiglu;
