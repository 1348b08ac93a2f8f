//! Fine-tune language models with LoRA on Apple GPUs (Metal), NVIDIA GPUs (CUDA) and CPUs, on Candle.
//!
//! Letters used everywhere: `x` input `[.., k]`, `A` `[k, r]`, `B` `[r, n]`, `s` scaling = alpha / r, `W` `[n, k]` frozen
//! weight, `g` gradient of the output. The LoRA delta is `s · (x A) B`; the LoRA linear is `x Wᵀ + bias + s · (x A) B`.
//! With `h = x A` and `u = s · g Bᵀ`: `dA = xᵀ u`, `dB = s · hᵀ g`, `dx = g W + u Aᵀ`.

pub mod backend;
pub mod error;
pub mod inference;
pub mod models;
pub mod training;

pub use error::{Error, Result};
