//! AdamW's step and the norm of a gradient on the CPU.

use rayon::prelude::*;

use super::simd;

/// Elements that one task works on; [`squared_norm`] sums within these blocks, then over them in order.
const BLOCK: usize = 16_384;

/// The constants of one step, in f32 as the elements are.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Multiplies the gradient.
    pub grad_scale: f32,
    /// `1 - lr · weight_decay`.
    pub decay: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// `1 - beta1`, rounded once.
    pub one_minus_beta1: f32,
    /// `1 - beta2`, rounded once.
    pub one_minus_beta2: f32,
    /// `lr / (1 - beta1ᵗ)`.
    pub step_size: f32,
    /// `sqrt(1 - beta2ᵗ)`.
    pub root_correction2: f32,
    /// Added to the denominator.
    pub epsilon: f32,
}

/// One pass over values, first and second moments and gradients.
pub fn step(values: &mut [f32], first: &mut [f32], second: &mut [f32], grads: &[f32], step: Step) {
    let state = first.par_chunks_mut(BLOCK).zip(second.par_chunks_mut(BLOCK));
    values.par_chunks_mut(BLOCK).zip(state).zip(grads.par_chunks(BLOCK)).for_each(
        |((values, (first, second)), grads)| {
            simd(
                #[inline(always)]
                || {
                    for (((value, m), v), &g) in values.iter_mut().zip(first).zip(second).zip(grads) {
                        let g = g * step.grad_scale;
                        *m = *m + step.one_minus_beta1 * (g - *m);
                        *v = step.beta2 * *v + step.one_minus_beta2 * g * g;
                        let denominator = v.sqrt() / step.root_correction2 + step.epsilon;
                        *value = step.decay * *value - step.step_size * *m / denominator;
                    }
                },
            )
        },
    );
}

/// The sum of squares, in f64.
pub fn squared_norm(grads: &[f32]) -> f64 {
    let blocks = grads.par_chunks(BLOCK).map(|block| {
        simd(
            #[inline(always)]
            || {
                let mut sums = [0.0_f64; 8];
                let (whole, rest) = block.as_chunks::<8>();
                for eight in whole {
                    for (sum, &g) in sums.iter_mut().zip(eight) {
                        *sum += g as f64 * g as f64;
                    }
                }
                for (sum, &g) in sums.iter_mut().zip(rest) {
                    *sum += g as f64 * g as f64;
                }
                sums.iter().sum::<f64>()
            },
        )
    });
    blocks.collect::<Vec<f64>>().iter().sum()
}
