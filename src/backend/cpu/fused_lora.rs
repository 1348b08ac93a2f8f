//! The LoRA delta and its gradients on the CPU, fused by tiles of rows.
//!
//! `Δ = s · (drop(x) A) B`: a task takes a tile of rows, makes its `h = drop(x) A` and multiplies it on, so that x is read
//! and Δ written once, and no more of h than a tile exists unless backward wants it. Backward takes a tile's rows of x and
//! g once for all it makes of them: `u = s · g Bᵀ`, `dx += drop(u Aᵀ)`, and the tile's shares of `dA = drop(x)ᵀ u` and
//! `dB = s · hᵀ g`, which are then added up in order.

use std::borrow::Cow;
use std::sync::OnceLock;

use rayon::prelude::*;

use super::floats::Floats;
use super::linear::FEW_ROWS;
use super::simd;
use super::skinny::{Packed, expand, project, reduce};
use crate::backend::dropout::Dropout;

/// Multiplications of a task: a few microseconds' work.
const TASK: usize = 1 << 17;
/// Up to this many multiplications of a call stay on the calling thread: waking others takes longer.
const ALONE: usize = 1 << 20;
/// Elements of dA and dB that all tiles of backward hold together (8 MiB), but at least four tiles'.
const SHARES: usize = 1 << 21;
/// The least rows of a tile in backward: adding up the shares of smaller ones takes longer than making them.
const BACKWARD_ROWS: usize = 64;

/// One call's inputs: x `[m, k]`, A `[k, r]`, B `[r, n]`.
pub struct Lora<'a> {
    x: Floats<'a>,
    a: Cow<'a, [f32]>,
    b: Cow<'a, [f32]>,
    /// s · B, once it is needed.
    sb: OnceLock<Vec<f32>>,
    s: f32,
    dropout: Option<Dropout>,
    m: usize,
    k: usize,
    r: usize,
    n: usize,
}

/// A buffer to add dx to, and which of dA and dB are wanted.
pub struct Wanted<'a> {
    /// `[m, k]`
    pub dx: Option<&'a mut [f32]>,
    /// dA `[k, r]`.
    pub da: bool,
    /// dB `[r, n]`.
    pub db: bool,
}

impl<'a> Lora<'a> {
    /// `size` is `[m, k, r, n]`; the slices have been checked against it.
    pub fn new(
        x: Floats<'a>,
        a: Floats<'a>,
        b: Floats<'a>,
        s: f64,
        dropout: Option<Dropout>,
        size: [usize; 4],
    ) -> Self {
        let ([m, k, r, n], s) = (size, s as f32);
        Self { x, a: a.to_f32(), b: b.to_f32(), sb: OnceLock::new(), s, dropout, m, k, r, n }
    }

    /// `s · drop(x) A B`, `[m, n]`.
    pub fn delta(&self) -> Vec<f32> {
        let mut y = vec![0.0; self.m * self.n];
        self.tiles(&mut y, false);
        y
    }

    /// `y += s · drop(x) A B`.
    pub fn add_delta(&self, y: &mut [f32]) {
        self.tiles(y, true);
    }

    /// As [`Self::add_delta`]; returns `h = drop(x) A`, `[m, r]`.
    pub fn add_delta_keeping_h(&self, y: &mut [f32]) -> Vec<f32> {
        let mut h = vec![0.0; self.m * self.r];
        if self.m <= FEW_ROWS && self.r.is_multiple_of(8) {
            self.add_few(y, &mut h);
            return h;
        }
        let (a, rows) = (self.packed_a(), self.rows());
        let sb = self.sb();
        let tile = |(tile, (y, h)): (usize, (&mut [f32], &mut [f32]))| {
            project(&self.dropped(tile * rows, h.len() / self.r), &a, h);
            expand(h, sb, self.r, y, true);
        };
        if self.work() <= ALONE {
            y.chunks_mut(rows * self.n).zip(h.chunks_mut(rows * self.r)).enumerate().for_each(tile);
        } else {
            y.par_chunks_mut(rows * self.n).zip(h.par_chunks_mut(rows * self.r)).enumerate().for_each(tile);
        }
        h
    }

    /// `(dA, dB)` for the gradient g `[m, n]` of the output, those that are wanted; h `[m, r]` is made again when it is not
    /// given and dB needs it.
    pub fn gradients(&self, g: &Floats, h: Option<&[f32]>, wanted: Wanted) -> (Option<Vec<f32>>, Option<Vec<f32>>) {
        let Self { m, k, r, n, .. } = *self;
        let Wanted { dx, da: want_da, db: want_db } = wanted;
        let most = (SHARES / ((k + n) * r)).clamp(4, 32);
        let rows = m.div_ceil(most).next_multiple_of(8).max(BACKWARD_ROWS);
        let a = if want_db && h.is_none() { Some(self.packed_a()) } else { None };
        let (bt, at) = if want_da || dx.is_some() {
            let sb = self.sb();
            (Some(Packed::new(n, r, |j, q| sb[q * n + j])), transposed(&self.a, k, r))
        } else {
            (None, Vec::new())
        };
        let share = |start: usize, dx: Option<&mut [f32]>| {
            let count = rows.min(m - start);
            let g = g.range(start * n, count * n);
            let x = if want_da || a.is_some() { self.dropped(start, count) } else { Cow::Borrowed(&[][..]) };
            let mut da = vec![0.0; if want_da { r * k } else { 0 }];
            let mut db = vec![0.0; if want_db { r * n } else { 0 }];
            if let Some(bt) = &bt {
                let mut u = vec![0.0; count * r];
                project(&g, bt, &mut u);
                if want_da {
                    reduce(&u, &x, r, &mut da);
                }
                match (dx, self.dropout) {
                    (Some(dx), None) => expand(&u, &at, r, dx, true),
                    (Some(dx), Some(dropout)) => {
                        let mut through = vec![0.0; count * k];
                        expand(&u, &at, r, &mut through, false);
                        dropout.apply((start * k) as u64, &mut through);
                        dx.iter_mut().zip(&through).for_each(|(dx, through)| *dx += through);
                    }
                    (None, _) => {}
                }
            }
            if want_db {
                let made = a.as_ref().map(|a| {
                    let mut h = vec![0.0; count * r];
                    project(&x, a, &mut h);
                    h
                });
                let h = made.as_deref().or(h.map(|h| &h[start * r..][..count * r])).unwrap_or(&[]);
                reduce(h, &g, r, &mut db);
            }
            (da, db)
        };
        let shares: Vec<_> = match dx {
            Some(dx) => {
                let tiles = dx.par_chunks_mut(rows * k).enumerate();
                tiles.map(|(tile, dx)| share(tile * rows, Some(dx))).collect()
            }
            None => (0..m.div_ceil(rows)).into_par_iter().map(|tile| share(tile * rows, None)).collect(),
        };
        let (mut da, mut db) = (vec![0.0; r * k], vec![0.0; r * n]);
        for (da_share, db_share) in &shares {
            da.iter_mut().zip(da_share).for_each(|(sum, share)| *sum += share);
            db.iter_mut().zip(db_share).for_each(|(sum, share)| *sum += share);
        }
        db.iter_mut().for_each(|db| *db *= self.s);
        (want_da.then(|| transposed(&da, r, k)), want_db.then_some(db))
    }

    fn tiles(&self, y: &mut [f32], keep: bool) {
        let (a, rows) = (self.packed_a(), self.rows());
        let sb = self.sb();
        let tile = |(tile, y): (usize, &mut [f32])| {
            let count = y.len() / self.n;
            let mut h = vec![0.0; count * self.r];
            project(&self.dropped(tile * rows, count), &a, &mut h);
            expand(&h, sb, self.r, y, keep);
        };
        if self.work() <= ALONE {
            y.chunks_mut(rows * self.n).enumerate().for_each(tile);
        } else {
            y.par_chunks_mut(rows * self.n).enumerate().for_each(tile);
        }
    }

    /// A few rows (decoding): A and B are read as they lie, for bringing them into order would take longer than the products.
    fn add_few(&self, y: &mut [f32], h: &mut [f32]) {
        let x = self.dropped(0, self.m);
        for (x, h) in x.chunks_exact(self.k).zip(h.chunks_exact_mut(self.r)) {
            project_row(x, &self.a, h);
        }
        let scaled: Vec<f32> = h.iter().map(|h| self.s * h).collect();
        expand(&scaled, &self.b, self.r, y, true);
    }

    fn sb(&self) -> &[f32] {
        self.sb.get_or_init(|| self.b.iter().map(|b| self.s * b).collect())
    }

    /// Multiplications of the delta.
    fn work(&self) -> usize {
        self.m * (self.k + self.n) * self.r
    }

    /// Rows of a task, a multiple of the eight that the kernels take at once.
    fn rows(&self) -> usize {
        (TASK / ((self.k + self.n) * self.r)).clamp(8, 256) / 8 * 8
    }

    fn packed_a(&self) -> Packed {
        Packed::new(self.k, self.r, |p, q| self.a[p * self.r + q])
    }

    /// `drop(x)` of some rows.
    fn dropped(&self, start: usize, count: usize) -> Cow<'_, [f32]> {
        let mut x = self.x.range(start * self.k, count * self.k);
        if let Some(dropout) = self.dropout {
            dropout.apply((start * self.k) as u64, x.to_mut());
        }
        x
    }
}

/// `h = x A` of one row, r a multiple of 8.
fn project_row(x: &[f32], a: &[f32], h: &mut [f32]) {
    let r = h.len();
    simd(
        #[inline(always)]
        || {
            for (start, h) in (0..r).step_by(8).zip(h.as_chunks_mut::<8>().0) {
                let mut sums = [[0.0_f32; 8]; 4];
                let (rows, rest) = x.as_chunks::<4>();
                for (x, a) in rows.iter().zip(a.chunks_exact(4 * r)) {
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let a = &a[i * r + start..][..8];
                        for q in 0..8 {
                            sums[q] = x[i].mul_add(a[q], sums[q]);
                        }
                    }
                }
                for (x, a) in rest.iter().zip(a[4 * rows.len() * r..].chunks_exact(r)) {
                    for q in 0..8 {
                        sums[0][q] = x.mul_add(a[start + q], sums[0][q]);
                    }
                }
                for q in 0..8 {
                    h[q] = (sums[0][q] + sums[1][q]) + (sums[2][q] + sums[3][q]);
                }
            }
        },
    );
}

/// `[cols, rows]` from `[rows, cols]`.
fn transposed(matrix: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    let mut transposed = vec![0.0; rows * cols];
    for (i, row) in matrix.chunks_exact(cols).enumerate() {
        for (j, &value) in row.iter().enumerate() {
            transposed[j * rows + i] = value;
        }
    }
    transposed
}
