//! DoRA in f64: W `[n, k]`, A `[k, r]`, B `[r, n]`, m and bias `[n]`, x `[rows, k]`.

/// The sizes of a DoRA linear.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Columns of x and W.
    pub k: usize,
    /// Columns of A.
    pub r: usize,
    /// Rows of W.
    pub n: usize,
}

/// `W + s (A B)ᵀ`, `[n, k]`.
pub fn adapted(w: &[f64], a: &[f64], b: &[f64], s: f64, sizes: Sizes) -> Vec<f64> {
    let Sizes { k, r, n } = sizes;
    let delta = |j: usize, i: usize| (0..r).map(|q| a[i * r + q] * b[q * n + j]).sum::<f64>();
    (0..n * k).map(|at| w[at] + s * delta(at / k, at % k)).collect()
}

/// The lengths of rows of k values.
pub fn norms(rows: &[f64], k: usize) -> Vec<f64> {
    rows.chunks_exact(k).map(|row| row.iter().map(|value| value * value).sum::<f64>().sqrt()).collect()
}

/// `y = m / norm ∘ x (W + s (A B)ᵀ)ᵀ + bias` with the norms given, which backward takes for constants.
pub fn forward(x: &[f64], adapted: &[f64], m: &[f64], norms: &[f64], bias: &[f64], sizes: Sizes) -> Vec<f64> {
    let Sizes { k, n, .. } = sizes;
    let product = |row: &[f64], j: usize| row.iter().zip(&adapted[j * k..]).map(|(x, w)| x * w).sum::<f64>();
    let rows = x.chunks_exact(k);
    rows.flat_map(|row| (0..n).map(move |j| m[j] / norms[j] * product(row, j) + bias[j])).collect()
}

/// `(du, dm)` of `y = m / norm ∘ u`.
pub fn backward(u: &[f64], m: &[f64], norms: &[f64], g: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let n = m.len();
    let du = g.iter().enumerate().map(|(at, g)| g * m[at % n] / norms[at % n]).collect();
    let mut dm = vec![0.0; n];
    for (at, (g, u)) in g.iter().zip(u).enumerate() {
        dm[at % n] += g * u / norms[at % n];
    }
    (du, dm)
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::*;

    #[test]
    fn backward_is_the_derivative() {
        let (u, m, g) = (values(15, 1), values(5, 2), values(15, 3));
        let norms: Vec<f64> = values(5, 4).iter().map(|value| 1.5 + value).collect();
        let y = |u: &[f64], m: &[f64]| -> Vec<f64> {
            u.iter().enumerate().map(|(at, u)| m[at % 5] / norms[at % 5] * u).collect()
        };
        let (du, dm) = backward(&u, &m, &norms, &g);
        assert_gradient("du", &u, &du, |u| weighted_sum(&y(u, &m), &g));
        assert_gradient("dm", &m, &dm, |m| weighted_sum(&y(&u, m), &g));
    }
}
