//! SwiGLU in f64.

/// `silu(gate) · up`.
pub fn forward(gate: &[f64], up: &[f64]) -> Vec<f64> {
    gate.iter().zip(up).map(|(z, up)| z / (1.0 + (-z).exp()) * up).collect()
}

/// `(dgate, dup)`.
pub fn backward(gate: &[f64], up: &[f64], g: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut dgate, mut dup) = (Vec::new(), Vec::new());
    for i in 0..gate.len() {
        let sigmoid = 1.0 / (1.0 + (-gate[i]).exp());
        dgate.push(g[i] * up[i] * (sigmoid + gate[i] * sigmoid * (1.0 - sigmoid)));
        dup.push(g[i] * gate[i] * sigmoid);
    }
    (dgate, dup)
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::*;

    #[test]
    fn backward_is_the_derivative() {
        let gate: Vec<f64> = values(12, 1).iter().map(|gate| 4.0 * gate).collect();
        let (up, g) = (values(12, 2), values(12, 3));
        let (dgate, dup) = backward(&gate, &up, &g);
        assert_gradient("dgate", &gate, &dgate, |gate| weighted_sum(&forward(gate, &up), &g));
        assert_gradient("dup", &up, &dup, |up| weighted_sum(&forward(&gate, up), &g));
    }
}
