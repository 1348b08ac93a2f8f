//! RMS norm in f64: rows of length `weight.len()`.

/// `(y, rstd)`: `rstd = 1 / sqrt(mean(x²) + eps)`, `y = x · rstd · weight`.
pub fn forward(x: &[f64], weight: &[f64], eps: f64) -> (Vec<f64>, Vec<f64>) {
    let n = weight.len();
    let (mut y, mut rstd) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(n) {
        let r = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / n as f64 + eps).sqrt();
        y.extend(row.iter().zip(weight).map(|(x, w)| x * r * w));
        rstd.push(r);
    }
    (y, rstd)
}

/// `(dx, dweight)`.
pub fn backward(x: &[f64], weight: &[f64], eps: f64, g: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let n = weight.len();
    let (_, rstd) = forward(x, weight, eps);
    let (mut dx, mut dweight) = (vec![0.0; x.len()], vec![0.0; n]);
    for (row, r) in rstd.iter().enumerate() {
        let at = |i: usize| row * n + i;
        let dot: f64 = (0..n).map(|i| g[at(i)] * weight[i] * x[at(i)]).sum();
        for i in 0..n {
            dx[at(i)] = r * g[at(i)] * weight[i] - r * r * r * x[at(i)] * dot / n as f64;
            dweight[i] += g[at(i)] * x[at(i)] * r;
        }
    }
    (dx, dweight)
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::*;

    #[test]
    fn backward_is_the_derivative() {
        let (x, weight, g, eps) = (values(15, 1), values(5, 2), values(15, 3), 1e-2);
        let (dx, dweight) = backward(&x, &weight, eps, &g);
        assert_gradient("dx", &x, &dx, |x| weighted_sum(&forward(x, &weight, eps).0, &g));
        assert_gradient("dweight", &weight, &dweight, |weight| weighted_sum(&forward(&x, weight, eps).0, &g));
    }
}
