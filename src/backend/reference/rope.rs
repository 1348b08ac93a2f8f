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
