//! Cross entropy of the projected rows in f64; `hidden` `[T, n]`, `head` `[V, n]`.

use crate::backend::custom_ops::cross_entropy::IGNORE;

/// The summed negative log likelihood and the number of counted rows.
pub fn forward(hidden: &[f64], head: &[f64], n: usize, targets: &[u32]) -> (f64, usize) {
    let (mut sum, mut count) = (0.0, 0);
    for (row, &target) in hidden.chunks_exact(n).zip(targets) {
        if target != IGNORE {
            sum -= softmax(row, head)[target as usize].ln();
            count += 1;
        }
    }
    (sum, count)
}

/// `(dhidden, dhead)` of `scale · sum`.
pub fn backward(hidden: &[f64], head: &[f64], n: usize, targets: &[u32], scale: f64) -> (Vec<f64>, Vec<f64>) {
    let (mut dhidden, mut dhead) = (vec![0.0; hidden.len()], vec![0.0; head.len()]);
    for (row, &target) in targets.iter().enumerate() {
        if target == IGNORE {
            continue;
        }
        let x = &hidden[row * n..][..n];
        for (id, p) in softmax(x, head).into_iter().enumerate() {
            let dz = scale * (p - if id == target as usize { 1.0 } else { 0.0 });
            for i in 0..n {
                dhidden[row * n + i] += dz * head[id * n + i];
                dhead[id * n + i] += dz * x[i];
            }
        }
    }
    (dhidden, dhead)
}

fn softmax(row: &[f64], head: &[f64]) -> Vec<f64> {
    let logit = |w: &[f64]| row.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
    let weights: Vec<f64> = head.chunks_exact(row.len()).map(|w| logit(w).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values};
    use super::*;

    #[test]
    fn backward_is_the_derivative_of_the_scaled_sum() {
        let (n, targets, scale) = (3, [4, IGNORE, 0, 2], 0.5);
        let (hidden, head) = (values(4 * n, 1), values(5 * n, 2));
        let (dhidden, dhead) = backward(&hidden, &head, n, &targets, scale);
        assert_gradient("dhidden", &hidden, &dhidden, |hidden| scale * forward(hidden, &head, n, &targets).0);
        assert_gradient("dhead", &head, &dhead, |head| scale * forward(&hidden, head, n, &targets).0);
        assert_eq!(forward(&hidden, &head, n, &targets).1, 3);
    }
}
