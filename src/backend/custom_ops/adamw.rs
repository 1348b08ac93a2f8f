//! AdamW (Loshchilov & Hutter, 2019) with torch.optim.AdamW's formula. For a value p with gradient g at step t:
//! `p ← p · (1 - lr · wd)`; `m ← m + (1 - β1)(g - m)`; `v ← β2 · v + (1 - β2) g²`;
//! `p ← p - lr / (1 - β1ᵗ) · m / (sqrt(v) / sqrt(1 - β2ᵗ) + ε)`.
//!
//! The block `[3, n]` f32 holds values, first moments and second moments; gradients `[n]` f32.

use candle_core::{DType, Tensor};

use super::check::{expect_dtype, on_cpu, shape};
use crate::backend::cpu::{self, update, view};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
use crate::backend::metal;
use crate::{Error, Result};

const OP: &str = "adamw";

/// The optimizer's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay of the first moment, in [0, 1).
    pub beta1: f64,
    /// Decay of the second moment, in [0, 1).
    pub beta2: f64,
    /// Added to the denominator.
    pub epsilon: f64,
    /// Decoupled weight decay: multiplied by the learning rate, applied to the values.
    pub weight_decay: f64,
}

/// One step in place. `grad_scale` multiplies the gradients first (clipping, or 1); `t` counts steps from 1.
pub fn step(block: &Tensor, grads: &Tensor, grad_scale: f32, t: usize, adamw: &AdamW) -> Result<()> {
    let n = grads.elem_count();
    shape(OP, "grads", grads, &[n])?;
    shape(OP, "block", block, &[3, n])?;
    expect_dtype(OP, "block", block, DType::F32)?;
    let &AdamW { learning_rate, beta1, beta2, epsilon, weight_decay } = adamw;
    if t == 0 {
        return Err(Error::op(OP, "step 0; steps count from 1"));
    }
    if !((0.0..1.0).contains(&beta1) && (0.0..1.0).contains(&beta2)) {
        return Err(Error::op(OP, format!("beta1 is {beta1}, beta2 is {beta2}; both must lie in [0, 1)")));
    }
    let power = |beta: f64| beta.powf(t as f64);
    let constants = cpu::adamw::Step {
        grad_scale,
        decay: (1.0 - learning_rate * weight_decay) as f32,
        beta2: beta2 as f32,
        one_minus_beta1: (1.0 - beta1) as f32,
        one_minus_beta2: (1.0 - beta2) as f32,
        step_size: (learning_rate / (1.0 - power(beta1))) as f32,
        root_correction2: (1.0 - power(beta2)).sqrt() as f32,
        epsilon: epsilon as f32,
    };
    expect_dtype(OP, "grads", grads, DType::F32)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(block.device()) {
        return cuda::adamw::step(block, grads, constants);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if block.device().is_metal() {
        return metal::adamw::step(block, grads, constants);
    }
    on_cpu(OP, &[block, grads])?;
    let grads = view::<f32>(OP, "grads", grads)?;
    update::<f32, _>(OP, "block", block, |block| {
        let (values, moments) = block.split_at_mut(n);
        let (first, second) = moments.split_at_mut(n);
        cpu::adamw::step(values, first, second, &grads, constants);
        Ok(())
    })
}

/// The sum of squares of contiguous f32 `grads`, in f64 and with the same bits whatever the number of threads. Where a
/// gradient is not finite, neither is the result. On Metal the sums are f32 to within a millionth, and a gradient above
/// 1.8e19 makes the result infinite.
pub fn squared_norm(grads: &Tensor) -> Result<f64> {
    expect_dtype(OP, "grads", grads, DType::F32)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(grads.device()) {
        return cuda::adamw::squared_norm(grads);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if grads.device().is_metal() {
        return metal::adamw::squared_norm(grads);
    }
    on_cpu(OP, &[grads])?;
    Ok(cpu::adamw::squared_norm(&view::<f32>(OP, "grads", grads)?))
}
