//! RMS norm on the CPU, rows of length `n` in parallel.

use rayon::prelude::*;

use super::{Element, simd};

/// Rows that one task works on; `dweight` is summed first within these blocks, then over them in order.
const BLOCK: usize = 32;

/// `rstd = 1 / sqrt(mean(x²) + eps)` of each row and `y = cast(x · rstd) · weight`.
pub fn forward<T: Element, W: Element>(x: &[T], weight: &[W], eps: f32, y: &mut [T], rstd: &mut [f32]) {
    let n = weight.len();
    let blocks = y.par_chunks_mut(BLOCK * n).zip(rstd.par_chunks_mut(BLOCK)).zip(x.par_chunks(BLOCK * n));
    blocks.for_each(|((y, rstd), x)| {
        simd(
            #[inline(always)]
            || {
                for ((y, rstd), x) in y.chunks_exact_mut(n).zip(rstd).zip(x.chunks_exact(n)) {
                    *rstd = norm_row(x, weight, eps, y);
                }
            },
        )
    });
}

/// As [`forward`], of `sum = x + residual`, which is kept.
pub fn forward_add<T: Element, W: Element>(
    x: &[T],
    residual: &[T],
    weight: &[W],
    eps: f32,
    sum: &mut [T],
    y: &mut [T],
    rstd: &mut [f32],
) {
    let n = weight.len();
    let outputs = sum.par_chunks_mut(BLOCK * n).zip(y.par_chunks_mut(BLOCK * n)).zip(rstd.par_chunks_mut(BLOCK));
    let inputs = x.par_chunks(BLOCK * n).zip(residual.par_chunks(BLOCK * n));
    outputs.zip(inputs).for_each(|(((sum, y), rstd), (x, residual))| {
        simd(
            #[inline(always)]
            || {
                for ((sum, &x), &residual) in sum.iter_mut().zip(x).zip(residual) {
                    *sum = T::narrow(x.widen() + residual.widen());
                }
                for ((y, rstd), sum) in y.chunks_exact_mut(n).zip(rstd).zip(sum.chunks_exact(n)) {
                    *rstd = norm_row(sum, weight, eps, y);
                }
            },
        )
    });
}

/// `dx += rstd · (g w - x̂ · mean(g w · x̂))` with `x̂ = x · rstd`; returns `dweight = sum over rows of g · x̂` when asked.
pub fn backward<T: Element, W: Element>(
    x: &[T],
    weight: &[W],
    rstd: &[f32],
    g: &[T],
    dx: &mut [T],
    with_dweight: bool,
) -> Vec<f32> {
    let n = weight.len();
    let blocks = dx.par_chunks_mut(BLOCK * n).zip(x.par_chunks(BLOCK * n)).zip(g.par_chunks(BLOCK * n));
    let partial: Vec<Vec<f32>> = blocks
        .zip(rstd.par_chunks(BLOCK))
        .map(|(((dx, x), g), rstd)| {
            let mut dweight = vec![0.0; if with_dweight { n } else { 0 }];
            simd(
                #[inline(always)]
                || {
                    let rows = dx.chunks_exact_mut(n).zip(x.chunks_exact(n)).zip(g.chunks_exact(n)).zip(rstd);
                    for (((dx, x), g), &rstd) in rows {
                        backward_row(x, weight, rstd, g, dx, &mut dweight);
                    }
                },
            );
            dweight
        })
        .collect();
    let mut dweight = vec![0.0; if with_dweight { n } else { 0 }];
    for block in partial {
        for (sum, part) in dweight.iter_mut().zip(block) {
            *sum += part;
        }
    }
    dweight
}

#[inline(always)]
fn norm_row<T: Element, W: Element>(x: &[T], weight: &[W], eps: f32, y: &mut [T]) -> f32 {
    let square = sum8(x.len(), |i| x[i].widen() * x[i].widen());
    let rstd = 1.0 / (square / x.len() as f32 + eps).sqrt();
    for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight) {
        *y = T::narrow(T::narrow(x.widen() * rstd).widen() * w.widen());
    }
    rstd
}

#[inline(always)]
fn backward_row<T: Element, W: Element>(x: &[T], weight: &[W], rstd: f32, g: &[T], dx: &mut [T], dweight: &mut [f32]) {
    let n = x.len();
    let (weight, g, dx) = (&weight[..n], &g[..n], &mut dx[..n]);
    let mean = sum8(n, |i| g[i].widen() * weight[i].widen() * x[i].widen()) * rstd / n as f32;
    for i in 0..n {
        let normed = x[i].widen() * rstd;
        dx[i] = T::narrow(dx[i].widen() + rstd * (g[i].widen() * weight[i].widen() - normed * mean));
    }
    for ((dw, &x), &g) in dweight.iter_mut().zip(x).zip(g) {
        *dw += g.widen() * T::narrow(x.widen() * rstd).widen();
    }
}

/// The sum of `term(0..n)`, in eight running sums, which the compiler keeps in one vector.
#[inline(always)]
fn sum8(n: usize, term: impl Fn(usize) -> f32) -> f32 {
    let mut sums = [0.0_f32; 8];
    let whole = n / 8 * 8;
    for start in (0..whole).step_by(8) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    for i in whole..n {
        sums[i - whole] += term(i);
    }
    sums.iter().sum()
}
