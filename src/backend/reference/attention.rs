//! Causal attention in f64, with the whole matrix of probabilities of one head at a time.

use crate::backend::custom_ops::attention::Sequence;

/// Sizes and arguments: heads of `q`, heads of `k` and `v`, head size, and the op's own arguments.
#[derive(Debug, Clone)]
pub struct Problem {
    /// Heads of `q`.
    pub q_heads: usize,
    /// Heads of `k` and `v`.
    pub kv_heads: usize,
    /// Head size.
    pub dim: usize,
    /// The sequences of the batch.
    pub sequences: Vec<Sequence>,
    /// Multiplies the scores.
    pub scale: f64,
    /// The sliding window.
    pub window: Option<usize>,
}

impl Problem {
    fn q_at(&self, s: &Sequence, i: usize, head: usize) -> usize {
        ((s.q_start + i) * self.q_heads + head) * self.dim
    }

    fn k_at(&self, s: &Sequence, j: usize, head: usize) -> usize {
        ((s.k_start + j) * self.kv_heads + head / (self.q_heads / self.kv_heads)) * self.dim
    }

    /// Probabilities `[q_len][k_len]` of one head, and the log of each row's denominator.
    fn probabilities(&self, q: &[f64], k: &[f64], s: &Sequence, head: usize) -> (Vec<Vec<f64>>, Vec<f64>) {
        let row = |i: usize| {
            let position = s.k_len - s.q_len + i;
            let sees = |j: usize| j <= position && self.window.is_none_or(|window| position - j < window);
            let (q, k) = (&q[self.q_at(s, i, head)..], |j| &k[self.k_at(s, j, head)..]);
            let weight = |j| if sees(j) { (self.scale * dot(q, k(j), self.dim)).exp() } else { 0.0 };
            let weights: Vec<f64> = (0..s.k_len).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            (weights.iter().map(|w| w / sum).collect(), sum.ln())
        };
        (0..s.q_len).map(row).unzip()
    }
}

/// `(o, lse)`; rows of no sequence are 0 and minus infinity.
pub fn forward(q: &[f64], k: &[f64], v: &[f64], problem: &Problem) -> (Vec<f64>, Vec<f64>) {
    let dim = problem.dim;
    let (mut o, mut lse) = (vec![0.0; q.len()], vec![f64::NEG_INFINITY; q.len() / dim]);
    for s in &problem.sequences {
        for head in 0..problem.q_heads {
            let (p, denominators) = problem.probabilities(q, k, s, head);
            for i in 0..s.q_len {
                let row = problem.q_at(s, i, head);
                lse[row / dim] = denominators[i];
                for j in 0..s.k_len {
                    for d in 0..dim {
                        o[row + d] += p[i][j] * v[problem.k_at(s, j, head) + d];
                    }
                }
            }
        }
    }
    (o, lse)
}

/// `(dq, dk, dv)`.
pub fn backward(q: &[f64], k: &[f64], v: &[f64], g: &[f64], problem: &Problem) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let dim = problem.dim;
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for s in &problem.sequences {
        for head in 0..problem.q_heads {
            let (p, _) = problem.probabilities(q, k, s, head);
            for (i, p) in p.iter().enumerate() {
                let row = problem.q_at(s, i, head);
                let key = |j| problem.k_at(s, j, head);
                let dp: Vec<f64> = (0..s.k_len).map(|j| dot(&g[row..], &v[key(j)..], dim)).collect();
                let mean: f64 = dot(p, &dp, s.k_len);
                for j in 0..s.k_len {
                    let ds = problem.scale * p[j] * (dp[j] - mean);
                    for d in 0..dim {
                        dq[row + d] += ds * k[key(j) + d];
                        dk[key(j) + d] += ds * q[row + d];
                        dv[key(j) + d] += p[j] * g[row + d];
                    }
                }
            }
        }
    }
    (dq, dk, dv)
}

fn dot(a: &[f64], b: &[f64], n: usize) -> f64 {
    a[..n].iter().zip(&b[..n]).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::super::differences::{assert_gradient, values, weighted_sum};
    use super::*;

    #[test]
    fn backward_is_the_derivative() {
        // A sequence, and one query that continues keys which another query has read too.
        let sequences = vec![
            Sequence { q_start: 0, q_len: 3, k_start: 1, k_len: 3 },
            Sequence { q_start: 4, q_len: 1, k_start: 0, k_len: 4 },
        ];
        for window in [None, Some(2)] {
            let sequences = sequences.clone();
            let problem = Problem { q_heads: 4, kv_heads: 2, dim: 3, sequences, scale: 0.7, window };
            let (q, k, v, g) = (values(60, 1), values(24, 2), values(24, 3), values(60, 4));
            let (dq, dk, dv) = backward(&q, &k, &v, &g, &problem);
            assert_gradient("dq", &q, &dq, |q| weighted_sum(&forward(q, &k, &v, &problem).0, &g));
            assert_gradient("dk", &k, &dk, |k| weighted_sum(&forward(&q, k, &v, &problem).0, &g));
            assert_gradient("dv", &v, &dv, |v| weighted_sum(&forward(&q, &k, v, &problem).0, &g));
        }
    }
}
