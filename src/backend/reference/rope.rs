//! Rotary position embedding in f64, half-split; `x` `[T, heads, dim]`, `cos` and `sin` `[P, dim / 2]`.

/// `x` rotated; its gradient is the rotation with `inverse`.
pub fn rotate(
    x: &[f64],
    cos: &[f64],
    sin: &[f64],
    positions: &[u32],
    heads: usize,
    dim: usize,
    inverse: bool,
) -> Vec<f64> {
    let half = dim / 2;
    let mut y = vec![0.0; x.len()];
    for (token, &position) in positions.iter().enumerate() {
        for head in 0..heads {
            let start = (token * heads + head) * dim;
            for i in 0..half {
                let angle = position as usize * half + i;
                let (c, s) = (cos[angle], if inverse { -sin[angle] } else { sin[angle] });
                y[start + i] = x[start + i] * c - x[start + half + i] * s;
                y[start + half + i] = x[start + half + i] * c + x[start + i] * s;
            }
        }
    }
    y
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::*;

    #[test]
    fn the_inverse_is_the_derivative_and_undoes_the_rotation() {
        let (heads, dim, positions) = (2, 6, [4, 0, 2]);
        let angles = values(5 * dim / 2, 1);
        let (cos, sin): (Vec<f64>, Vec<f64>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
        let (x, g) = (values(3 * heads * dim, 2), values(3 * heads * dim, 3));
        let rotated = |x: &[f64], inverse| rotate(x, &cos, &sin, &positions, heads, dim, inverse);
        assert_gradient("dx", &x, &rotated(&g, true), |x| weighted_sum(&rotated(x, false), &g));
        let back = rotated(&rotated(&x, false), true);
        assert!(x.iter().zip(back).all(|(x, back)| (x - back).abs() < 1e-14));
    }
}
