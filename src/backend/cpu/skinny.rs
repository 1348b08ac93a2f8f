//! Products with one small dimension r, on this thread: what the adapters need, where `gemm` spends its time on packing.
//!
//! [`project`] `[m, k] · [k, r]`, [`expand`] `[m, r] · [r, n]`, [`reduce`] `[m, r]ᵀ · [m, n]`. Each output element is one sum in
//! the order of its index, so how the rows are split over tasks does not change a bit.

// Indexed loops of constant length are unrolled, which keeps the sums in registers; iterators over arrays are not, and
// iterators over chunks stay calls in the inner loops.
#![allow(clippy::needless_range_loop)]

use pulp::{Simd, WithSimd};

use super::arch;

/// A `[k, r]` matrix in panels of one vector's width, each `[k, width]`, the last filled up with zeros.
pub struct Packed {
    panels: Vec<f32>,
    k: usize,
    r: usize,
}

impl Packed {
    /// Element `(p, q)` of the matrix is `element(p, q)`.
    pub fn new(k: usize, r: usize, element: impl Fn(usize, usize) -> f32) -> Self {
        struct Lanes;
        impl WithSimd for Lanes {
            type Output = usize;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> usize {
                S::F32_LANES
            }
        }
        let lanes = arch().dispatch(Lanes);
        let mut panels = vec![0.0; r.div_ceil(lanes) * k * lanes];
        for (panel, start) in panels.chunks_exact_mut(k * lanes).zip((0..r).step_by(lanes)) {
            for (p, row) in panel.chunks_exact_mut(lanes).enumerate() {
                for (q, value) in (start..r).zip(row) {
                    *value = element(p, q);
                }
            }
        }
        Self { panels, k, r }
    }
}

/// `h = x A`: x `[m, k]`, h `[m, r]`.
pub fn project(x: &[f32], a: &Packed, h: &mut [f32]) {
    struct Project<'a>(&'a [f32], &'a Packed, &'a mut [f32]);
    impl WithSimd for Project<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(x, &Packed { ref panels, k, r }, h) = self;
            for (panel, start) in panels.chunks_exact(k * S::F32_LANES).zip((0..r).step_by(S::F32_LANES)) {
                let columns = start..(start + S::F32_LANES).min(r);
                let (panel, _) = S::as_simd_f32s(panel);
                let (mut x, mut h) = (x.chunks_exact(8 * k), h.chunks_exact_mut(8 * r));
                for (x, h) in x.by_ref().zip(h.by_ref()) {
                    rows::<S, 8>(simd, x, panel, h, &columns);
                }
                for (x, h) in x.remainder().chunks_exact(k).zip(h.into_remainder().chunks_exact_mut(r)) {
                    rows::<S, 1>(simd, x, panel, h, &columns);
                }
            }
        }
    }
    #[inline(always)]
    fn rows<S: Simd, const R: usize>(
        simd: S,
        x: &[f32],
        panel: &[S::f32s],
        h: &mut [f32],
        columns: &std::ops::Range<usize>,
    ) {
        // So many values of a row are taken at once, which leaves one check of bounds for all of them.
        const STEP: usize = 8;
        let (k, r) = (x.len() / R, h.len() / R);
        let x: [(&[[f32; STEP]], &[f32]); R] = std::array::from_fn(|i| x[i * k..][..k].as_chunks());
        let mut sums = [simd.splat_f32s(0.0); R];
        let (whole, rest) = panel[..k].as_chunks::<STEP>();
        for (step, a) in whole.iter().enumerate() {
            let mut values = [&x[0].0[step]; R];
            for i in 1..R {
                values[i] = &x[i].0[step];
            }
            for p in 0..STEP {
                for i in 0..R {
                    sums[i] = simd.mul_add_f32s(simd.splat_f32s(values[i][p]), a[p], sums[i]);
                }
            }
        }
        for (p, &a) in rest.iter().enumerate() {
            for i in 0..R {
                sums[i] = simd.mul_add_f32s(simd.splat_f32s(x[i].1[p]), a, sums[i]);
            }
        }
        for (h, sum) in h.chunks_exact_mut(r).zip(sums) {
            simd.partial_store_f32s(&mut h[columns.clone()], sum);
        }
    }
    arch().dispatch(Project(x, a, h));
}

/// `y = h B`, or `y += h B`: h `[m, r]`, B `[r, n]`, y `[m, n]`.
pub fn expand(h: &[f32], b: &[f32], r: usize, y: &mut [f32], keep: bool) {
    struct Expand<'a>(&'a [f32], &'a [f32], usize, &'a mut [f32], bool);
    impl WithSimd for Expand<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(h, b, r, y, keep) = self;
            let n = b.len() / r;
            let (mut h, mut y) = (h.chunks_exact(4 * r), y.chunks_exact_mut(4 * n));
            for (h, y) in h.by_ref().zip(y.by_ref()) {
                rows::<S, 4>(simd, h, b, r, y, keep);
            }
            for (h, y) in h.remainder().chunks_exact(r).zip(y.into_remainder().chunks_exact_mut(n)) {
                rows::<S, 1>(simd, h, b, r, y, keep);
            }
        }
    }
    #[inline(always)]
    fn rows<S: Simd, const R: usize>(simd: S, h: &[f32], b: &[f32], r: usize, y: &mut [f32], keep: bool) {
        let (n, mut column) = (b.len() / r, 0);
        while column + 4 * S::F32_LANES <= n {
            vectors::<S, R, 4>(simd, h, b, r, y, keep, column);
            column += 4 * S::F32_LANES;
        }
        while column + S::F32_LANES <= n {
            vectors::<S, R, 1>(simd, h, b, r, y, keep, column);
            column += S::F32_LANES;
        }
        for column in column..n {
            for (h, y) in h.chunks_exact(r).zip(y.chunks_exact_mut(n)) {
                let sum = h.iter().zip(b.chunks_exact(n)).map(|(h, b)| h * b[column]).sum::<f32>();
                y[column] = if keep { y[column] + sum } else { sum };
            }
        }
    }
    /// V vectors from `column` on, of R rows.
    #[inline(always)]
    fn vectors<S: Simd, const R: usize, const V: usize>(
        simd: S,
        h: &[f32],
        b: &[f32],
        r: usize,
        y: &mut [f32],
        keep: bool,
        column: usize,
    ) {
        let n = b.len() / r;
        let h: [&[f32]; R] = std::array::from_fn(|i| &h[i * r..][..r]);
        let mut sums = [[simd.splat_f32s(0.0); V]; R];
        for q in 0..r {
            let (b, _) = S::as_simd_f32s(&b[q * n + column..][..V * S::F32_LANES]);
            let b = &b[..V];
            for i in 0..R {
                let h = simd.splat_f32s(h[i][q]);
                for v in 0..V {
                    sums[i][v] = simd.mul_add_f32s(h, b[v], sums[i][v]);
                }
            }
        }
        for i in 0..R {
            let (y, _) = S::as_mut_simd_f32s(&mut y[i * n + column..][..V * S::F32_LANES]);
            for v in 0..V {
                y[v] = if keep { simd.add_f32s(y[v], sums[i][v]) } else { sums[i][v] };
            }
        }
    }
    arch().dispatch(Expand(h, b, r, y, keep));
}

/// `d += hᵀ g`: h `[m, r]`, g `[m, n]`, d `[r, n]`.
pub fn reduce(h: &[f32], g: &[f32], r: usize, d: &mut [f32]) {
    struct Reduce<'a>(&'a [f32], &'a [f32], usize, &'a mut [f32]);
    impl WithSimd for Reduce<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let Self(h, g, r, d) = self;
            let (n, mut q) = (d.len() / r, 0);
            while q + 8 <= r {
                rows::<S, 8>(simd, h, g, r, &mut d[q * n..][..8 * n], q);
                q += 8;
            }
            while q + 2 <= r {
                rows::<S, 2>(simd, h, g, r, &mut d[q * n..][..2 * n], q);
                q += 2;
            }
            if q < r {
                rows::<S, 1>(simd, h, g, r, &mut d[q * n..][..n], q);
            }
        }
    }
    /// Q rows of d, those of h's columns from `q` on.
    #[inline(always)]
    fn rows<S: Simd, const Q: usize>(simd: S, h: &[f32], g: &[f32], r: usize, d: &mut [f32], q: usize) {
        let (n, mut column) = (d.len() / Q, 0);
        while column + 2 * S::F32_LANES <= n {
            vectors::<S, Q, 2>(simd, h, g, r, d, q, column);
            column += 2 * S::F32_LANES;
        }
        while column + S::F32_LANES <= n {
            vectors::<S, Q, 1>(simd, h, g, r, d, q, column);
            column += S::F32_LANES;
        }
        for (h, g) in h.chunks_exact(r).zip(g.chunks_exact(n)) {
            for (d, &h) in d.chunks_exact_mut(n).zip(&h[q..]) {
                d[column..].iter_mut().zip(&g[column..]).for_each(|(d, g)| *d += h * g);
            }
        }
    }
    #[inline(always)]
    fn vectors<S: Simd, const Q: usize, const V: usize>(
        simd: S,
        h: &[f32],
        g: &[f32],
        r: usize,
        d: &mut [f32],
        q: usize,
        column: usize,
    ) {
        let n = d.len() / Q;
        let mut sums = [[simd.splat_f32s(0.0); V]; Q];
        for row in 0..h.len() / r {
            let (g, _) = S::as_simd_f32s(&g[row * n + column..][..V * S::F32_LANES]);
            let (g, h) = (&g[..V], &h[row * r + q..][..Q]);
            for i in 0..Q {
                let h = simd.splat_f32s(h[i]);
                for v in 0..V {
                    sums[i][v] = simd.mul_add_f32s(h, g[v], sums[i][v]);
                }
            }
        }
        for i in 0..Q {
            let (d, _) = S::as_mut_simd_f32s(&mut d[i * n + column..][..V * S::F32_LANES]);
            for v in 0..V {
                d[v] = simd.add_f32s(d[v], sums[i][v]);
            }
        }
    }
    arch().dispatch(Reduce(h, g, r, d));
}
