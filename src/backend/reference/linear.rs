//! The base linear layer in f64: `y = x Wᵀ + bias`; x `[m, k]`, W `[n, k]`, bias `[n]`; `size` is `[m, k, n]`.

/// y `[m, n]`.
pub fn forward(x: &[f64], w: &[f64], bias: Option<&[f64]>, size: [usize; 3]) -> Vec<f64> {
    let [_, k, n] = size;
    let mut y = product(size, |i, p| x[i * k + p], |p, j| w[j * k + p]);
    if let Some(bias) = bias {
        y.iter_mut().enumerate().for_each(|(index, y)| *y += bias[index % n]);
    }
    y
}

/// `(dx, dW, dbias)` for the gradient g `[m, n]` of y: `dx = g W`, `dW = gᵀ x`, `dbias = Σ rows of g`.
pub fn backward(x: &[f64], w: &[f64], g: &[f64], size: [usize; 3]) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let [m, k, n] = size;
    let dx = product([m, n, k], |i, j| g[i * n + j], |j, p| w[j * k + p]);
    let dw = product([n, m, k], |j, i| g[i * n + j], |i, p| x[i * k + p]);
    let dbias = product([1, m, n], |_, _| 1.0, |i, j| g[i * n + j]);
    (dx, dw, dbias)
}

/// `lhs · rhs`, `[rows, cols]`, of two matrices given element by element; `size` is `[rows, inner, cols]`.
pub(super) fn product(
    [rows, inner, cols]: [usize; 3],
    lhs: impl Fn(usize, usize) -> f64,
    rhs: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    let element = |index: usize| (0..inner).map(|p| lhs(index / cols, p) * rhs(p, index % cols)).sum();
    (0..rows * cols).map(element).collect()
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::*;

    #[test]
    fn backward_is_the_derivative() {
        let size = [3, 4, 5];
        let (x, w, bias, g) = (values(12, 1), values(20, 2), values(5, 3), values(15, 4));
        let (dx, dw, dbias) = backward(&x, &w, &g, size);
        let loss = |x: &[f64], w: &[f64], bias: &[f64]| weighted_sum(&forward(x, w, Some(bias), size), &g);
        assert_gradient("dx", &x, &dx, |x| loss(x, &w, &bias));
        assert_gradient("dW", &w, &dw, |w| loss(&x, w, &bias));
        assert_gradient("dbias", &bias, &dbias, |bias| loss(&x, &w, bias));
    }
}
