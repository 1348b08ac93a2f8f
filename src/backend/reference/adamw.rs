//! AdamW in f64, as torch.optim.AdamW computes it.

use crate::backend::custom_ops::adamw::AdamW;

/// Step `t` (from 1) of values, first and second moments, in place.
pub fn step(values: &mut [f64], first: &mut [f64], second: &mut [f64], grads: &[f64], t: usize, adamw: &AdamW) {
    let correction1 = 1.0 - adamw.beta1.powi(t as i32);
    let correction2 = 1.0 - adamw.beta2.powi(t as i32);
    for i in 0..values.len() {
        values[i] *= 1.0 - adamw.learning_rate * adamw.weight_decay;
        first[i] = adamw.beta1 * first[i] + (1.0 - adamw.beta1) * grads[i];
        second[i] = adamw.beta2 * second[i] + (1.0 - adamw.beta2) * grads[i] * grads[i];
        let denominator = second[i].sqrt() / correction2.sqrt() + adamw.epsilon;
        values[i] -= adamw.learning_rate / correction1 * first[i] / denominator;
    }
}
