//! The LoRA delta in f64: `Δ = s · (x∘M A) B`, M the factors of dropout (all 1 without). x `[m, k]`, A `[k, r]`, B `[r, n]`.

use super::linear::product;

/// One call's inputs, row-major.
#[derive(Debug, Clone)]
pub struct Problem {
    /// `[m, k, r, n]`
    pub size: [usize; 4],
    /// `[m, k]`
    pub x: Vec<f64>,
    /// `[k, r]`
    pub a: Vec<f64>,
    /// `[r, n]`
    pub b: Vec<f64>,
    /// alpha / r
    pub s: f64,
    /// What dropout multiplies each element of x with, `[m, k]`; `None`: nothing is dropped.
    pub mask: Option<Vec<f64>>,
}

/// `(Δ, h)`: the delta `[m, n]` and `h = x∘M A` `[m, r]`.
pub fn forward(problem: &Problem) -> (Vec<f64>, Vec<f64>) {
    let [m, k, r, n] = problem.size;
    let h = product([m, k, r], |i, p| problem.dropped(i, p), |p, j| problem.a[p * r + j]);
    let delta = product([m, r, n], |i, q| problem.s * h[i * r + q], |q, j| problem.b[q * n + j]);
    (delta, h)
}

/// `(dx, dA, dB)` for the gradient g `[m, n]` of the delta: with `u = s · g Bᵀ`, `dx = M∘(u Aᵀ)`, `dA = (x∘M)ᵀ u`,
/// `dB = s · hᵀ g`.
pub fn backward(problem: &Problem, g: &[f64]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let [m, k, r, n] = problem.size;
    let (_, h) = forward(problem);
    let u = product([m, n, r], |i, j| problem.s * g[i * n + j], |j, q| problem.b[q * n + j]);
    let mut dx = product([m, r, k], |i, q| u[i * r + q], |q, p| problem.a[p * r + q]);
    if let Some(mask) = &problem.mask {
        dx.iter_mut().zip(mask).for_each(|(dx, factor)| *dx *= factor);
    }
    let da = product([k, m, r], |p, i| problem.dropped(i, p), |i, q| u[i * r + q]);
    let db = product([r, m, n], |q, i| problem.s * h[i * r + q], |i, j| g[i * n + j]);
    (dx, da, db)
}

impl Problem {
    fn dropped(&self, i: usize, p: usize) -> f64 {
        let index = i * self.size[1] + p;
        self.x[index] * self.mask.as_ref().map_or(1.0, |mask| mask[index])
    }
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::*;

    #[test]
    fn backward_is_the_derivative() {
        let size = [3, 5, 2, 4];
        let mask = (0..15).map(|i| if i % 4 == 1 { 0.0 } else { 1.25 }).collect();
        let problem = Problem { size, x: values(15, 1), a: values(10, 2), b: values(8, 3), s: 2.5, mask: Some(mask) };
        let g = values(12, 4);
        let (dx, da, db) = backward(&problem, &g);
        let loss = |problem: Problem| weighted_sum(&forward(&problem).0, &g);
        assert_gradient("dx", &problem.x, &dx, |x| loss(Problem { x: x.to_vec(), ..problem.clone() }));
        assert_gradient("dA", &problem.a, &da, |a| loss(Problem { a: a.to_vec(), ..problem.clone() }));
        assert_gradient("dB", &problem.b, &db, |b| loss(Problem { b: b.to_vec(), ..problem.clone() }));
    }
}
