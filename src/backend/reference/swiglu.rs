//! SwiGLU and GeGLU in f64.

use crate::backend::custom_ops::swiglu::Activation;

/// `act(gate) · up`.
pub fn forward(gate: &[f64], up: &[f64], activation: Activation) -> Vec<f64> {
    gate.iter().zip(up).map(|(&z, up)| activated(z, activation).0 * up).collect()
}

/// `(dgate, dup)`.
pub fn backward(gate: &[f64], up: &[f64], g: &[f64], activation: Activation) -> (Vec<f64>, Vec<f64>) {
    let (mut dgate, mut dup) = (Vec::new(), Vec::new());
    for i in 0..gate.len() {
        let (value, derivative) = activated(gate[i], activation);
        dgate.push(g[i] * up[i] * derivative);
        dup.push(g[i] * value);
    }
    (dgate, dup)
}

/// `act(z)` and its derivative.
fn activated(z: f64, activation: Activation) -> (f64, f64) {
    match activation {
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-z).exp());
            (z * sigmoid, sigmoid + z * sigmoid * (1.0 - sigmoid))
        }
        Activation::GeluTanh => {
            let c = (2.0 / std::f64::consts::PI).sqrt();
            let t = (c * (z + 0.044715 * z.powi(3))).tanh();
            (0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * z * z))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::*;

    #[test]
    fn backward_is_the_derivative() {
        let gate: Vec<f64> = values(12, 1).iter().map(|gate| 4.0 * gate).collect();
        let (up, g) = (values(12, 2), values(12, 3));
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let (dgate, dup) = backward(&gate, &up, &g, activation);
            assert_gradient("dgate", &gate, &dgate, |gate| weighted_sum(&forward(gate, &up, activation), &g));
            assert_gradient("dup", &up, &dup, |up| weighted_sum(&forward(&gate, up, activation), &g));
        }
    }
}
