//! The fused ops as a user sees them.
//!
//! An op is plain functions first, `forward` and `backward` on tensors without autograd, in its own file below; the
//! function of the op's name puts it on Candle's tape.

mod check;
pub mod linear;
