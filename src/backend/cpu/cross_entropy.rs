//! Cross entropy fused with the output projection, on the CPU: chunks of rows against the whole vocabulary.

use rayon::prelude::*;

use super::exp::exp;
use super::{Element, simd};

/// The logits buffer holds at most this many elements (32 MiB), but always one row.
const LOGITS: usize = 8 << 20;

/// The summed loss of the rows `counted`.
pub fn forward<T: Element, W: Element>(hidden: &[T], head: &[W], n: usize, targets: &[u32], counted: &[usize]) -> f64 {
    chunks(hidden, head, n, targets, counted, 0.0, |_, _, _, _| ())
}

/// The summed loss; `dhidden` rows in `counted` are set, `dhead` +=.
#[allow(clippy::too_many_arguments)]
pub fn forward_backward<T: Element, W: Element>(
    hidden: &[T],
    head: &[W],
    n: usize,
    targets: &[u32],
    counted: &[usize],
    scale: f32,
    dhidden: &mut [T],
    mut dhead: Option<&mut [f32]>,
) -> f64 {
    let vocab = head.len() / n;
    chunks(hidden, head, n, targets, counted, scale, |rows, x, head, p| {
        let mut dx = vec![0.0; rows.len() * n];
        gemm([rows.len(), n, vocab], &mut dx, 0.0, (p, vocab, 1), (head, n, 1));
        for (row, dx) in rows.iter().zip(dx.chunks_exact(n)) {
            dhidden[row * n..][..n].iter_mut().zip(dx).for_each(|(to, &from)| *to = T::narrow(from));
        }
        if let Some(dhead) = &mut dhead {
            gemm([vocab, n, rows.len()], dhead, 1.0, (p, 1, vocab), (x, n, 1));
        }
    })
}

/// Calls `use_chunk(rows, hidden rows, head, scale · (softmax - onehot))` for each chunk; returns the loss.
fn chunks<T: Element, W: Element>(
    hidden: &[T],
    head: &[W],
    n: usize,
    targets: &[u32],
    counted: &[usize],
    scale: f32,
    mut use_chunk: impl FnMut(&[usize], &[f32], &[f32], &[f32]),
) -> f64 {
    let vocab = head.len() / n;
    let head: Vec<f32> = head.par_iter().map(|w| w.widen()).collect();
    let size = (LOGITS / vocab).clamp(1, counted.len().max(1));
    let mut logits = vec![0.0; size * vocab];
    let mut sum = 0.0;
    for rows in counted.chunks(size) {
        let x: Vec<f32> = rows.iter().flat_map(|row| hidden[row * n..][..n].iter().map(|x| x.widen())).collect();
        let logits = &mut logits[..rows.len() * vocab];
        gemm([rows.len(), vocab, n], logits, 0.0, (&x, n, 1), (&head, 1, n));
        let losses: Vec<f64> = logits
            .par_chunks_mut(vocab)
            .zip(rows)
            .map(|(logits, &row)| softmax_row(logits, targets[row] as usize, scale))
            .collect();
        sum += losses.iter().sum::<f64>();
        use_chunk(rows, &x, &head, logits);
    }
    sum
}

/// Returns `logsumexp(z) - z[target]` and turns `z` into `scale · (softmax(z) - onehot)`.
fn softmax_row(z: &mut [f32], target: usize, scale: f32) -> f64 {
    simd(
        #[inline(always)]
        || {
            let max = z.iter().fold(f32::NEG_INFINITY, |max, &z| max.max(z));
            let correct = z[target];
            let mut sum = 0.0_f64;
            for z in z.iter_mut() {
                *z = exp(*z - max);
                sum += *z as f64;
            }
            let factor = (scale as f64 / sum) as f32;
            for z in z.iter_mut() {
                *z *= factor;
            }
            z[target] -= scale;
            sum.ln() + (max as f64 - correct as f64)
        },
    )
}

/// `c [m, n] = beta · c + a [m, k] · b [k, n]`; `a` and `b` as (elements, row stride, column stride).
fn gemm([m, n, k]: [usize; 3], c: &mut [f32], beta: f32, a: (&[f32], usize, usize), b: (&[f32], usize, usize)) {
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(c.len() >= m * n);
    assert!(a.0.len() > (m - 1) * a.1 + (k - 1) * a.2 && b.0.len() > (k - 1) * b.1 + (n - 1) * b.2);
    let parallelism = gemm::Parallelism::Rayon(rayon::current_num_threads());
    // SAFETY: the assertions above keep every index that the sizes and strides give inside the slices.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            beta != 0.0,
            a.0.as_ptr(),
            a.2 as isize,
            a.1 as isize,
            b.0.as_ptr(),
            b.2 as isize,
            b.1 as isize,
            beta,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}
