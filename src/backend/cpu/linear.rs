//! `y = x Wᵀ + bias` and its gradients on the CPU: x `[m, k]`, W `[n, k]`, bias `[n]`, g `[m, n]`.
//!
//! Where x (or g) is bf16, W bf16 or quantized, and the processor multiplies bf16 itself, the products are `bf16_product`'s. Else
//! all is read as f32, and half-precision or quantized weights are widened a tile of rows at a time, so W never exists twice. A few
//! rows (decoding) take a path of their own: it is bound by reading W once, which `gemm` does on one core only.

use rayon::prelude::*;

use super::bf16_product::{self, Rhs, product};
use super::blocks_dot;
use super::floats::Floats;
use super::gemm::{Matrix, MatrixMut, gemm};
use super::simd;

/// f32 elements of W widened at a time (1 MiB: a share of the last-level cache).
const WEIGHT_TILE: usize = 1 << 18;
/// Up to this many rows of x, dot products beat `gemm`.
pub const FEW_ROWS: usize = 4;
/// Columns that one task of a column sum takes.
const SUM_COLUMNS: usize = 256;

/// `y = x Wᵀ + bias`, `[m, n]`.
pub fn forward(x: &Floats, w: &Floats, bias: Option<&[f32]>, m: usize, k: usize, n: usize) -> Vec<f32> {
    let mut y = vec![0.0; m * n];
    forward_into(&mut y, x, w, bias, k);
    y
}

/// `y = x Wᵀ + bias`, `[m, n]`; what y held is not read.
pub fn forward_into(y: &mut [f32], x: &Floats, w: &Floats, bias: Option<&[f32]>, k: usize) {
    let (m, n) = (x.len() / k, w.len() / k);
    let few = m <= FEW_ROWS;
    if let (Floats::BF16(x), Some(rhs)) =
        (x, Rhs::transposed(w).filter(|rhs| !few || matches!(rhs, Rhs::Transposed(_))))
        && bf16_product::takes(k)
    {
        match bias {
            Some(bias) if !few => y.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias)),
            _ => {}
        }
        match rhs {
            Rhs::Transposed(w) if few => bf16_product::few_rows(y, x, w, k),
            rhs => product(y, bias.is_some(), x, rhs, k, n),
        }
        if let Some(bias) = bias.filter(|_| few) {
            y.chunks_exact_mut(n).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
        }
        return;
    }
    match bias {
        Some(bias) => y.chunks_exact_mut(n).for_each(|row| row.copy_from_slice(bias)),
        None if few => y.fill(0.0),
        None => {}
    }
    let x = x.to_f32();
    if few {
        return few_rows(&x, w, y, m, k, n);
    }
    let keep = if bias.is_some() { 1.0 } else { 0.0 };
    for_weight_tiles(w, k, n, |start, tile, rows| {
        let columns = MatrixMut::with_row_stride(&mut y[start..], m, rows, n);
        gemm(columns, keep, 1.0, Matrix::new(&x, m, k), Matrix::new(tile, rows, k).t());
    });
}

/// `dx += g W`, `[m, k]`.
pub fn input_gradient(g: &Floats, w: &Floats, dx: &mut [f32], m: usize, k: usize, n: usize) {
    if let (Floats::BF16(g), Some(rhs)) = (g, Rhs::plain(w))
        && bf16_product::takes(n)
    {
        return product(dx, true, g, rhs, n, k);
    }
    let g = g.to_f32();
    for_weight_tiles(w, k, n, |start, tile, rows| {
        let g = if m == 0 { &g } else { &g[start..] };
        let columns = Matrix::with_row_stride(g, m, rows, n);
        gemm(MatrixMut::new(dx, m, k), 1.0, 1.0, columns, Matrix::new(tile, rows, k));
    });
}

/// `dW += gᵀ x`, `[n, k]`.
pub fn weight_gradient(x: &[f32], g: &[f32], dw: &mut [f32], m: usize, k: usize, n: usize) {
    gemm(MatrixMut::new(dw, n, k), 1.0, 1.0, Matrix::new(g, m, n).t(), Matrix::new(x, m, k));
}

/// `dbias += Σ rows of g`, `[n]`.
pub fn bias_gradient(g: &[f32], dbias: &mut [f32], n: usize) {
    dbias.par_chunks_mut(SUM_COLUMNS).enumerate().for_each(|(task, dbias)| {
        let start = task * SUM_COLUMNS;
        for row in g.chunks_exact(n) {
            let row = &row[start..start + dbias.len()];
            dbias.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
    });
}

/// Calls `f(first row, f32 rows, their number)` for W in order: at once when it is f32, else tile by tile.
fn for_weight_tiles(w: &Floats, k: usize, n: usize, mut f: impl FnMut(usize, &[f32], usize)) {
    if let Some(w) = w.as_f32() {
        return f(0, w, n);
    }
    let tile_rows = (WEIGHT_TILE / k).clamp(1, n.max(1));
    let mut tile = vec![0.0; tile_rows * k];
    for start in (0..n).step_by(tile_rows) {
        let rows = tile_rows.min(n - start);
        let part = (rows.div_ceil(8)).max(1) * k;
        let parts = tile[..rows * k].par_chunks_mut(part).enumerate();
        parts.for_each(|(index, dst)| w.widen_into(start * k + index * part, dst));
        f(start, &tile[..rows * k], rows);
    }
}

/// `x Wᵀ` of each W, `[m, n]`, for few rows: in one go over all of them, since a processor's cores take longer to wake than a
/// small product to make. Sums are f32 of widened values, bf16 ones too.
pub fn few_rows_shared(x: &Floats, all: &[Floats], k: usize) -> Vec<Vec<f32>> {
    let m = x.len() / k;
    let wide = x.to_f32();
    let rows = blocks_dot::Rows::new(&wide, k);
    let mut columns: Vec<Vec<f32>> = all.iter().map(|w| vec![0.0; w.len() / k * m]).collect();
    let tasks: Vec<(&Floats, usize, &mut [f32])> = columns
        .iter_mut()
        .zip(all)
        .flat_map(|(columns, w)| {
            let task = task_rows(k, w);
            let parts = columns.chunks_mut(task * m.max(1)).enumerate();
            parts.map(move |(index, columns)| (w, index * task, columns))
        })
        .collect();
    tasks.into_par_iter().for_each(|(w, first, columns)| match w {
        Floats::Quantized(w) => rows.dots(w, first, columns),
        w => dots(&wide, w, first, k, columns),
    });
    if m == 1 {
        return columns;
    }
    let turned = columns.iter().map(|columns| {
        let mut y = vec![0.0; columns.len()];
        add_columns(columns, &mut y, m, columns.len() / m.max(1));
        y
    });
    turned.collect()
}

/// Rows of W for a task: a number that does not depend on the machine.
fn task_rows(k: usize, w: &Floats) -> usize {
    // About 64 KiB of f32, or as long a time.
    let values = if matches!(w, Floats::Quantized(_)) { 1 << 16 } else { 1 << 14 };
    (values / k).max(1)
}

/// `y += x Wᵀ` for few rows: each row of W is read once and multiplied with every row of x.
fn few_rows(x: &[f32], w: &Floats, y: &mut [f32], m: usize, k: usize, n: usize) {
    if m == 0 {
        return;
    }
    let task = task_rows(k, w);
    let mut columns = vec![0.0; n * m];
    let rows = blocks_dot::Rows::new(x, k);
    columns.par_chunks_mut(task * m).enumerate().for_each(|(index, columns)| match w {
        Floats::Quantized(w) => rows.dots(w, index * task, columns),
        w => dots(x, w, index * task, k, columns),
    });
    add_columns(&columns, y, m, n);
}

/// Rows of W from `first` on times each row of x, `[rows, m]`.
fn dots(x: &[f32], w: &Floats, first: usize, k: usize, columns: &mut [f32]) {
    let m = x.len() / k;
    let mut wide = if w.as_f32().is_some() { Vec::new() } else { vec![0.0; k] };
    for (offset, sums) in columns.chunks_exact_mut(m).enumerate() {
        let start = (first + offset) * k;
        let row = match w.as_f32() {
            Some(w) => &w[start..start + k],
            None => {
                w.widen_into(start, &mut wide);
                &wide
            }
        };
        for (sum, x) in sums.iter_mut().zip(x.chunks_exact(k)) {
            *sum = dot(x, row);
        }
    }
}

/// `y += columnsᵀ`: columns `[n, m]`, y `[m, n]`.
fn add_columns(columns: &[f32], y: &mut [f32], m: usize, n: usize) {
    for (j, sums) in columns.chunks_exact(m).enumerate() {
        for (i, sum) in sums.iter().enumerate() {
            y[i * n + j] += sum;
        }
    }
}

/// `Σ a · b` in 32 partial sums.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    simd(
        #[inline(always)]
        || {
            let mut sums = [0.0_f32; 32];
            let (a, b) = (a.as_chunks::<32>(), b.as_chunks::<32>());
            for (a, b) in a.0.iter().zip(b.0) {
                for lane in 0..32 {
                    sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
                }
            }
            let tail: f32 = a.1.iter().zip(b.1).map(|(a, b)| a * b).sum();
            tail + sums.iter().sum::<f32>()
        },
    )
}
