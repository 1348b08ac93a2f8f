//! Matrix products of f32 slices on all cores, through the `gemm` crate (the one that Candle uses).
//!
//! `dst = keep · dst + scale · lhs · rhs`, every matrix with a stride for rows and one for columns. The order of the sums
//! depends on the shape and the processor's caches, never on the number of threads.

/// A matrix in a slice: element `(i, j)` lies at `i · row_stride + j · col_stride`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows end to end. `data` may be longer than needed.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::with_row_stride(data, rows, cols, cols)
    }

    /// Rows whose starts lie `row_stride` elements apart: some columns of a wider matrix.
    pub fn with_row_stride(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check_bounds(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose; nothing is copied.
    pub fn t(self) -> Self {
        let Self { data, rows, cols, row_stride, col_stride } = self;
        Self { data, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }
}

/// A row-major matrix in a slice, to write to.
#[derive(Debug)]
pub struct MatrixMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatrixMut<'a> {
    /// Rows end to end. `data` may be longer than needed.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::with_row_stride(data, rows, cols, cols)
    }

    /// Rows whose starts lie `row_stride` elements apart: some columns of a wider matrix.
    pub fn with_row_stride(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check_bounds(data.len(), rows, cols, row_stride);
        Self { data, rows, cols, row_stride }
    }
}

/// `dst = keep · dst + scale · lhs · rhs` on all cores of rayon's pool. With `keep` zero, `dst` is not read.
///
/// # Panics
/// When the shapes do not fit; callers have checked them.
pub fn gemm(dst: MatrixMut, keep: f32, scale: f32, lhs: Matrix, rhs: Matrix) {
    run(dst, keep, scale, lhs, rhs, gemm::Parallelism::Rayon(0));
}

/// [`gemm()`] on this thread alone, for callers that split the work themselves.
///
/// # Panics
/// When the shapes do not fit; callers have checked them.
pub fn gemm_on_this_thread(dst: MatrixMut, keep: f32, scale: f32, lhs: Matrix, rhs: Matrix) {
    run(dst, keep, scale, lhs, rhs, gemm::Parallelism::None);
}

fn run(dst: MatrixMut, keep: f32, scale: f32, lhs: Matrix, rhs: Matrix, parallelism: gemm::Parallelism) {
    assert_eq!((dst.rows, lhs.cols, dst.cols), (lhs.rows, rhs.rows, rhs.cols), "shapes of a matrix product");
    // SAFETY: the constructors checked that every element of the three matrices lies inside its slice; `dst` is borrowed
    // mutably and so overlaps neither of the others.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            lhs.cols,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            keep != 0.0,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            keep,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

fn check_bounds(len: usize, rows: usize, cols: usize, row_stride: usize) {
    let last = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
    assert!(cols <= row_stride && last <= len, "a {rows} x {cols} matrix of stride {row_stride} in {len} elements");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(m: usize, k: usize, n: usize, lhs: &[f32], rhs: &[f32]) -> Vec<f32> {
        let at = |i: usize, j: usize| (0..k).map(|p| lhs[i * k + p] * rhs[p * n + j]).sum();
        (0..m * n).map(|index| at(index / n, index % n)).collect()
    }

    #[test]
    fn keeps_scales_and_strides() {
        let (m, k, n, wide) = (5, 7, 3, 8);
        let lhs: Vec<f32> = (0..m * k).map(|i| (i % 11) as f32 - 5.0).collect();
        let rhs: Vec<f32> = (0..k * n).map(|i| (i % 7) as f32 - 3.0).collect();
        let want = naive(m, k, n, &lhs, &rhs);
        let mut dst = vec![1.0; m * wide];
        let columns = MatrixMut::with_row_stride(&mut dst[2..], m, n, wide);
        gemm(columns, 2.0, 3.0, Matrix::new(&lhs, m, k), Matrix::new(&rhs, k, n));
        for (index, &value) in dst.iter().enumerate() {
            let (i, j) = (index / wide, index % wide);
            let expected = if (2..2 + n).contains(&j) { 2.0 + 3.0 * want[i * n + j - 2] } else { 1.0 };
            assert_eq!(value, expected, "row {i} column {j}");
        }
        let rhs_t: Vec<f32> = (0..n * k).map(|i| rhs[(i % k) * n + i / k]).collect();
        let mut dst = vec![f32::NAN; m * n];
        gemm_on_this_thread(
            MatrixMut::new(&mut dst, m, n),
            0.0,
            1.0,
            Matrix::new(&lhs, m, k),
            Matrix::new(&rhs_t, n, k).t(),
        );
        assert_eq!(dst, want);
    }
}
