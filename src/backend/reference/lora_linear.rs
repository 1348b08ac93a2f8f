//! A frozen linear layer with its adapter in f64: `y = x Wᵀ + bias + s · (x∘M A) B`, W `[n, k]`, bias `[n]`.

use super::{fused_lora, linear};

/// `(y, h)`: y `[m, n]` and the adapter's `h = x∘M A` `[m, r]`.
pub fn forward(lora: &fused_lora::Problem, w: &[f64], bias: Option<&[f64]>) -> (Vec<f64>, Vec<f64>) {
    let [m, k, _, n] = lora.size;
    let (delta, h) = fused_lora::forward(lora);
    let mut y = linear::forward(&lora.x, w, bias, [m, k, n]);
    y.iter_mut().zip(delta).for_each(|(y, delta)| *y += delta);
    (y, h)
}

/// `(dx, dA, dB)` for the gradient g `[m, n]` of y; W and bias are frozen.
pub fn backward(lora: &fused_lora::Problem, w: &[f64], g: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let [m, k, _, n] = lora.size;
    let (mut dx, da, db) = fused_lora::backward(lora, g);
    let (through_base, _, _) = linear::backward(&lora.x, w, g, [m, k, n]);
    dx.iter_mut().zip(through_base).for_each(|(dx, base)| *dx += base);
    (dx, da, db)
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::fused_lora::Problem;
    use super::*;

    #[test]
    fn backward_is_the_derivative() {
        let size = [2, 5, 3, 4];
        let lora = Problem { size, x: values(10, 1), a: values(15, 2), b: values(12, 3), s: 0.75, mask: None };
        let (w, bias, g) = (values(20, 4), values(4, 5), values(8, 6));
        let (dx, da, db) = backward(&lora, &w, &g);
        let loss = |lora: Problem| weighted_sum(&forward(&lora, &w, Some(&bias)).0, &g);
        assert_gradient("dx", &lora.x, &dx, |x| loss(Problem { x: x.to_vec(), ..lora.clone() }));
        assert_gradient("dA", &lora.a, &da, |a| loss(Problem { a: a.to_vec(), ..lora.clone() }));
        assert_gradient("dB", &lora.b, &db, |b| loss(Problem { b: b.to_vec(), ..lora.clone() }));
    }
}
