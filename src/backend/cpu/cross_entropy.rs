//! Cross entropy fused with the output projection, on the CPU: chunks of rows against the whole vocabulary.
//!
//! For each chunk: logits `z = x · headᵀ`, in place `z ← scale · (softmax(z) - onehot)`, then `dx = z · head` and
//! `dhead += zᵀ · x`. The products are the linear layer's; where they are of bf16, z is rounded to bf16 for the gradients. The head is read
//! once a chunk and direction.

use half::bf16;
use rayon::prelude::*;

use super::bf16_product;
use super::exp::{exp_shifted, max};
use super::floats::{Floats, narrow};
use super::{linear, simd};
use crate::backend::custom_ops::cross_entropy::chunk_rows;

/// Sums over the vocabulary are f32 within runs of this length and f64 over them.
const RUN: usize = 4096;

/// Rows of length `n` against a vocabulary, with the target of each; only the rows `counted` are looked at.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// `[T, n]`
    pub hidden: Floats<'a>,
    /// `[V, n]`
    pub head: Floats<'a>,
    /// Columns of both.
    pub n: usize,
    /// One for each row of `hidden`.
    pub targets: &'a [u32],
    /// Rows, in order.
    pub counted: &'a [usize],
}

impl Problem<'_> {
    /// The summed loss.
    pub fn loss(&self) -> f64 {
        self.chunks(0.0, false, |_, _, _| ())
    }

    /// The summed loss and `dhidden = scale · ∂loss/∂hidden`, `[T, n]`, zero in rows that are not counted; `dhead` +=.
    pub fn loss_and_gradients(&self, scale: f32, mut dhead: Option<&mut [f32]>) -> (f64, Vec<f32>) {
        let Self { n, head, .. } = *self;
        let vocab = head.len() / n;
        let mut dhidden = vec![0.0; self.hidden.len()];
        let loss = self.chunks(scale, dhead.is_none(), |rows, x, z| {
            let mut dx = vec![0.0; x.len()];
            linear::input_gradient(&z, &head, &mut dx, rows.len(), n, vocab);
            for (row, dx) in rows.iter().zip(dx.chunks_exact(n)) {
                dhidden[row * n..][..n].copy_from_slice(dx);
            }
            if let Some(dhead) = &mut dhead {
                linear::weight_gradient(&x.to_f32(), &z.to_f32(), dhead, rows.len(), n, vocab);
            }
        });
        (loss, dhidden)
    }

    /// Calls `use_chunk(rows, their x, scale · (softmax - onehot))` for each chunk; returns the loss.
    fn chunks(&self, scale: f32, round: bool, mut use_chunk: impl FnMut(&[usize], Floats, Floats)) -> f64 {
        let Self { hidden, head, n, targets, counted } = *self;
        if counted.is_empty() {
            return 0.0;
        }
        let vocab = head.len() / n;
        let size = chunk_rows(counted.len(), vocab, true);
        let mut z = vec![0.0; size * vocab];
        // Where the products are of bf16, z is rounded to it for the gradient of hidden alone (dhead's buffer is f32); x is bf16 as it lies.
        let (mut x16, mut z16) = (Vec::new(), Vec::new());
        if let (Floats::BF16(_), Floats::BF16(_) | Floats::Quantized(_)) = (hidden, head)
            && bf16_product::takes(n)
            && bf16_product::takes(vocab)
        {
            x16.resize(size * n, bf16::ZERO);
            z16.resize(if round { size * vocab } else { 0 }, bf16::ZERO);
        }
        let mut x = vec![0.0; if x16.is_empty() { size * n } else { 0 }];
        let mut sum = 0.0;
        for rows in counted.chunks(size) {
            let z = &mut z[..rows.len() * vocab];
            let x = if let (Floats::BF16(hidden), false) = (hidden, x16.is_empty()) {
                rows.iter()
                    .zip(x16.chunks_exact_mut(n))
                    .for_each(|(row, x)| x.copy_from_slice(&hidden[row * n..][..n]));
                Floats::BF16(&x16[..rows.len() * n])
            } else {
                rows.iter().zip(x.chunks_exact_mut(n)).for_each(|(row, x)| hidden.widen_into(row * n, x));
                Floats::F32(&x[..rows.len() * n])
            };
            linear::forward_into(z, &x, &head, None, n);
            let one = |(z, &row): (&mut [f32], &usize)| softmax_row(z, targets[row] as usize, scale);
            let losses = z.par_chunks_mut(vocab).zip(rows);
            let losses: Vec<f64> = if z16.is_empty() {
                losses.map(one).collect()
            } else {
                let rounded = |((z, row), z16): ((&mut [f32], &usize), &mut [bf16])| {
                    let loss = one((z, row));
                    narrow(z, z16);
                    loss
                };
                losses.zip(z16.par_chunks_mut(vocab)).map(rounded).collect()
            };
            sum += losses.iter().sum::<f64>();
            use_chunk(rows, x, if z16.is_empty() { Floats::F32(z) } else { Floats::BF16(&z16[..z.len()]) });
        }
        sum
    }
}

/// Returns `logsumexp(z) - z[target]` and turns `z` into `scale · (softmax(z) - onehot)`.
fn softmax_row(z: &mut [f32], target: usize, scale: f32) -> f64 {
    simd(
        #[inline(always)]
        || {
            let (largest, correct) = (max(z), z[target]);
            let mut sum = 0.0_f64;
            for run in z.chunks_mut(RUN) {
                sum += exp_shifted(run, largest) as f64;
            }
            let factor = (scale as f64 / sum) as f32;
            z.iter_mut().for_each(|z| *z *= factor);
            z[target] -= scale;
            sum.ln() + (largest as f64 - correct as f64)
        },
    )
}
