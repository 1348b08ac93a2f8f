//! DoRA's scale on the CPU, rows of length `n` in parallel.

use rayon::prelude::*;

use super::{Element, simd};

/// Rows that one task works on; sums over rows are made within these blocks, then over them in order.
const BLOCK: usize = 64;

/// `y = c ∘ u + bias (+ residual)`, rounded once.
pub fn forward<T: Element>(u: &[T], c: &[f32], bias: Option<&[f32]>, residual: Option<&[T]>, y: &mut [T]) {
    let n = c.len();
    y.par_chunks_mut(n).enumerate().with_min_len(4).for_each(|(row, y)| {
        let range = row * n..(row + 1) * n;
        let (u, residual) = (&u[range.clone()], residual.map(|residual| &residual[range]));
        simd(
            #[inline(always)]
            || {
                for j in 0..n {
                    let bias = bias.map_or(0.0, |bias| bias[j]);
                    let residual = residual.map_or(0.0, |residual| residual[j].widen());
                    y[j] = T::narrow(c[j] * u[j].widen() + bias + residual);
                }
            },
        )
    });
}

/// `du = c ∘ g`; returns the sum over rows of `g ∘ u` when asked.
pub fn backward<T: Element>(u: &[T], g: &[T], c: &[f32], du: &mut [T], with_sums: bool) -> Vec<f32> {
    let n = c.len();
    let width = if with_sums { n } else { 0 };
    let blocks = du.par_chunks_mut(BLOCK * n).zip(u.par_chunks(BLOCK * n)).zip(g.par_chunks(BLOCK * n));
    let partial: Vec<Vec<f32>> = blocks
        .map(|((du, u), g)| {
            let mut sums = vec![0.0; width];
            simd(
                #[inline(always)]
                || {
                    for ((du, u), g) in du.chunks_exact_mut(n).zip(u.chunks_exact(n)).zip(g.chunks_exact(n)) {
                        du.iter_mut().zip(g).zip(c).for_each(|((du, g), c)| *du = T::narrow(c * g.widen()));
                        sums.iter_mut().zip(u).zip(g).for_each(|((sum, u), g)| *sum += g.widen() * u.widen());
                    }
                },
            );
            sums
        })
        .collect();
    let mut sums = vec![0.0; width];
    for block in partial {
        sums.iter_mut().zip(block).for_each(|(sum, part)| *sum += part);
    }
    sums
}
