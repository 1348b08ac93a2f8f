//! Causal attention on the CPU.

use rayon::prelude::*;

use super::exp::exp;
use super::{Element, simd};
use crate::backend::custom_ops::attention::AttentionArgs;

/// Heads and head size.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Heads of `q`.
    pub q_heads: usize,
    /// Heads of `k` and `v`.
    pub kv_heads: usize,
    /// Head size.
    pub dim: usize,
}

/// `(o, lse)`.
pub fn forward<T: Element>(q: &[T], k: &[T], v: &[T], sizes: Sizes, args: AttentionArgs) -> (Vec<T>, Vec<f32>) {
    let Sizes { q_heads, kv_heads, dim } = sizes;
    let (mut o, mut lse) = (vec![T::narrow(0.0); q.len()], vec![f32::NEG_INFINITY; q.len() / dim]);
    for sequence in args.sequences {
        let rows = sequence.q_start..sequence.q_start + sequence.q_len;
        let o = &mut o[rows.start * q_heads * dim..rows.end * q_heads * dim];
        let lse = &mut lse[rows.start * q_heads..rows.end * q_heads];
        o.par_chunks_mut(dim).zip(lse).enumerate().for_each(|(row, (o, lse))| {
            simd(
                #[inline(always)]
                || {
                    let (i, head) = (row / q_heads, row % q_heads);
                    let q = &q[((sequence.q_start + i) * q_heads + head) * dim..][..dim];
                    let key = |j: usize| ((sequence.k_start + j) * kv_heads + head / (q_heads / kv_heads)) * dim;
                    let keys = sequence.keys(i, args.window);
                    let mut scores: Vec<f32> = keys.clone().map(|j| args.scale * dot(q, &k[key(j)..][..dim])).collect();
                    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &score| max.max(score));
                    scores.iter_mut().for_each(|score| *score = exp(*score - max));
                    let sum: f32 = scores.iter().sum();
                    let mut acc = vec![0.0; dim];
                    for (j, &p) in keys.zip(&scores) {
                        for (acc, v) in acc.iter_mut().zip(&v[key(j)..][..dim]) {
                            *acc += p * v.widen();
                        }
                    }
                    for (o, acc) in o.iter_mut().zip(&acc) {
                        *o = T::narrow(acc / sum);
                    }
                    *lse = max + sum.ln();
                },
            )
        });
    }
    (o, lse)
}

/// `(dq, dk, dv)`.
#[allow(clippy::too_many_arguments)]
pub fn backward<T: Element>(
    q: &[T],
    k: &[T],
    v: &[T],
    o: &[T],
    lse: &[f32],
    g: &[T],
    sizes: Sizes,
    args: AttentionArgs,
) -> (Vec<T>, Vec<T>, Vec<T>) {
    let Sizes { q_heads, kv_heads, dim } = sizes;
    let (mut dq, mut dk, mut dv) = (vec![0.0_f32; q.len()], vec![0.0_f32; k.len()], vec![0.0_f32; v.len()]);
    for sequence in args.sequences {
        for head in 0..q_heads {
            for i in 0..sequence.q_len {
                simd(
                    #[inline(always)]
                    || {
                        let row = (sequence.q_start + i) * q_heads + head;
                        let range = row * dim..(row + 1) * dim;
                        let (q, g, o) = (&q[range.clone()], &g[range.clone()], &o[range.clone()]);
                        let dq = &mut dq[range];
                        let delta = dot(g, o);
                        for j in sequence.keys(i, args.window) {
                            let key = ((sequence.k_start + j) * kv_heads + head / (q_heads / kv_heads)) * dim;
                            let range = key..key + dim;
                            let p = exp(args.scale * dot(q, &k[range.clone()]) - lse[row]);
                            let ds = args.scale * p * (dot(g, &v[range.clone()]) - delta);
                            for d in 0..dim {
                                dq[d] += ds * k[key + d].widen();
                                dk[key + d] += ds * q[d].widen();
                                dv[key + d] += p * g[d].widen();
                            }
                        }
                    },
                )
            }
        }
    }
    let narrow = |elements: Vec<f32>| elements.into_iter().map(T::narrow).collect();
    (narrow(dq), narrow(dk), narrow(dv))
}

#[inline(always)]
fn dot<T: Element>(a: &[T], b: &[T]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a.widen() * b.widen()).sum()
}
