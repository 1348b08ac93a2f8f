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

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: at step 1 the bias corrections cancel the decays, so that the step is `lr · g / (|g| + ε)`.
    #[test]
    fn the_first_step_by_hand() {
        let adamw = AdamW { learning_rate: 0.1, beta1: 0.9, beta2: 0.99, epsilon: 0.5, weight_decay: 0.2 };
        let (mut values, mut first, mut second) = ([2.0, -1.0], [0.0; 2], [0.0; 2]);
        step(&mut values, &mut first, &mut second, &[1.5, -3.0], 1, &adamw);
        let want = [2.0 * 0.98 - 0.1 * 1.5 / 2.0, -0.98 + 0.1 * 3.0 / 3.5];
        assert!(values.iter().zip(want).all(|(value, want)| (value - want).abs() < 1e-15), "{values:?}, not {want:?}");
        assert!((first[0] - 0.15).abs() < 1e-15 && (second[1] - 0.09).abs() < 1e-15);
    }
}
