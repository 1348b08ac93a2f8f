//! Products of bf16 matrices with f32 sums, by the processor's own instruction: AVX-512 BF16's `vdpbf16ps`, which multiplies two pairs
//! and adds both products to an f32 sum (Intel's Instruction Set Extensions reference; denormals count as zero).
//!
//! `dst = keep · dst + lhs · rhs`: lhs `[m, d]` bf16, rhs `[d, c]` or its transpose bf16, dst `[m, c]` f32. Pairs run along d, so
//! that lhs is read as it lies; a panel of rhs, up to `DEPTH` by 32 columns, is brought into the order of pairs once and used for
//! all m rows. Moves at least `2 (m d + d c) + 4 m c` bytes, of which the panels `2 d c` twice. A task is 32 columns, so the
//! order of the sums depends on nothing but d.

use half::bf16;

use super::blocks::Blocks;
use super::floats::Floats;

/// The right side of a product.
#[derive(Debug, Clone, Copy)]
pub enum Rhs<'a> {
    /// `[d, c]`, row-major.
    Plain(&'a [bf16]),
    /// The transpose of `[c, d]`, row-major.
    Transposed(&'a [bf16]),
    /// `[d, c]`, row-major, quantized.
    Blocks(Blocks<'a>),
    /// The transpose of `[c, d]`, row-major, quantized.
    BlocksTransposed(Blocks<'a>),
}

impl<'a> Rhs<'a> {
    /// `w` as it lies; `None` where it is of another dtype.
    pub fn plain(w: &Floats<'a>) -> Option<Self> {
        match *w {
            Floats::BF16(w) => Some(Self::Plain(w)),
            Floats::Quantized(w) => Some(Self::Blocks(w)),
            _ => None,
        }
    }

    /// The transpose of `w`; `None` where it is of another dtype.
    pub fn transposed(w: &Floats<'a>) -> Option<Self> {
        match *w {
            Floats::BF16(w) => Some(Self::Transposed(w)),
            Floats::Quantized(w) => Some(Self::BlocksTransposed(w)),
            _ => None,
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn len(self) -> usize {
        match self {
            Self::Plain(w) | Self::Transposed(w) => w.len(),
            Self::Blocks(w) | Self::BlocksTransposed(w) => w.len(),
        }
    }
}

/// Whether this processor has the instruction and the depth makes pairs.
pub fn takes(depth: usize) -> bool {
    depth > 0 && depth.is_multiple_of(2) && available()
}

#[cfg(not(target_arch = "x86_64"))]
pub use absent::*;
#[cfg(target_arch = "x86_64")]
pub use avx512::*;

#[cfg(not(target_arch = "x86_64"))]
mod absent {
    use super::*;

    /// Never on this architecture.
    pub fn available() -> bool {
        false
    }

    /// Never called, since [`takes`] says no.
    pub fn product(_: &mut [f32], _: bool, _: &[bf16], _: Rhs, _: usize, _: usize) {
        unreachable!("takes() says no");
    }

    /// Never called, since [`takes`] says no.
    pub fn few_rows(_: &mut [f32], _: &[bf16], _: &[bf16], _: usize) {
        unreachable!("takes() says no");
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, __mmask16, __mmask32, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_epi32,
        _mm512_mask_storeu_ps, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps, _mm512_reduce_add_ps,
        _mm512_set1_epi32, _mm512_setzero_ps,
    };
    use std::sync::LazyLock;

    use rayon::prelude::*;

    use super::*;

    /// Columns of a panel: two vectors of f32.
    const COLUMNS: usize = 32;
    /// Rows of lhs that are summed at a time: 24 of the 32 registers hold sums.
    const ROWS: usize = 12;
    /// Elements of d that a panel holds at most (128 KiB: a share of the second-level cache).
    const DEPTH: usize = 2048;

    /// Whether this processor has the instruction.
    pub fn available() -> bool {
        static AVAILABLE: LazyLock<bool> =
            LazyLock::new(|| is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"));
        *AVAILABLE
    }

    /// `dst = lhs · rhs`, or `dst += lhs · rhs` with `keep`, on all cores: lhs `[m, depth]`, dst `[m, columns]`.
    ///
    /// # Panics
    /// When the shapes do not fit, or [`takes`] says no; callers have checked them.
    pub fn product(dst: &mut [f32], keep: bool, lhs: &[bf16], rhs: Rhs, depth: usize, columns: usize) {
        assert!(takes(depth), "no bf16 product of depth {depth} here");
        let rows = lhs.len() / depth;
        let sizes = (lhs.len(), rhs.len(), dst.len());
        assert_eq!(sizes, (rows * depth, depth * columns, rows * columns), "shapes of a bf16 product");
        let out = Columns { data: dst.as_mut_ptr(), stride: columns };
        (0..columns.div_ceil(COLUMNS)).into_par_iter().for_each_init(
            || vec![0_u32; DEPTH.min(depth) / 2 * COLUMNS],
            |panel, task| {
                let first = task * COLUMNS;
                let width = COLUMNS.min(columns - first);
                for from in (0..depth).step_by(DEPTH) {
                    let deep = DEPTH.min(depth - from);
                    pack(rhs, (from, deep, depth), (first, width, columns), panel);
                    let lhs = &lhs[from..];
                    // SAFETY: the processor has the instructions (takes). `lhs` holds `rows` rows of `depth` from `from` on, `deep` of them
                    // looked at; the panel holds `deep / 2` times 32 words; columns `first..first + width` of dst belong to this task alone.
                    unsafe {
                        let dst = Columns { data: out.at(first), ..out };
                        strip(dst, keep || from > 0, lhs, (rows, depth), &panel[..deep / 2 * COLUMNS], width);
                    }
                }
            },
        );
    }

    /// `dst = lhs · rhsᵀ` for few rows of lhs: rhs `[c, depth]` is read once, as it lies; dst `[m, c]`.
    ///
    /// # Panics
    /// When the shapes do not fit, or [`takes`] says no; callers have checked them.
    pub fn few_rows(dst: &mut [f32], lhs: &[bf16], rhs: &[bf16], depth: usize) {
        assert!(takes(depth), "no bf16 product of depth {depth} here");
        let (rows, columns) = (lhs.len() / depth, rhs.len() / depth);
        assert_eq!(dst.len(), rows * columns, "shapes of a bf16 product");
        // About 64 KiB of rhs a task, and a number that does not depend on the machine.
        let task = ((1 << 15) / depth).clamp(1, columns.max(1));
        let out = Columns { data: dst.as_mut_ptr(), stride: columns };
        rhs.par_chunks(task * depth).enumerate().for_each(|(index, rhs)| {
            for (offset, row) in rhs.chunks_exact(depth).enumerate() {
                for (i, x) in lhs.chunks_exact(depth).enumerate() {
                    // SAFETY: the processor has the instructions (takes); column `index * task + offset` is this task's alone.
                    unsafe { *out.at(i * columns + index * task + offset) = dot(x, row) };
                }
            }
        });
    }

    /// Columns of a row-major f32 matrix, shared between tasks that each write their own.
    #[derive(Clone, Copy)]
    struct Columns {
        data: *mut f32,
        stride: usize,
    }

    // SAFETY: tasks write disjoint columns, and the matrix outlives them: `product` and `few_rows` borrow it for the whole call.
    unsafe impl Send for Columns {}
    // SAFETY: as above.
    unsafe impl Sync for Columns {}

    impl Columns {
        /// # Safety
        /// `index` is inside the matrix.
        unsafe fn at(&self, index: usize) -> *mut f32 {
            // SAFETY: the caller's promise.
            unsafe { self.data.add(index) }
        }
    }

    /// Rows `from..from + deep` and columns `first..first + width` of rhs as words of two elements of neighbouring rows, `[deep / 2, 32]`;
    /// columns beyond the width are zero.
    fn pack(
        rhs: Rhs,
        (from, deep, depth): (usize, usize, usize),
        (first, width, columns): (usize, usize, usize),
        panel: &mut [u32],
    ) {
        let word = |low: bf16, high: bf16| u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
        let panel = &mut panel[..deep / 2 * COLUMNS];
        if width < COLUMNS {
            panel.fill(0);
        }
        match rhs {
            Rhs::Plain(rhs) => {
                for (pair, words) in panel.chunks_exact_mut(COLUMNS).enumerate() {
                    let start = (from + 2 * pair) * columns + first;
                    let (low, high) = (&rhs[start..start + width], &rhs[start + columns..][..width]);
                    for ((to, &low), &high) in words.iter_mut().zip(low).zip(high) {
                        *to = word(low, high);
                    }
                }
            }
            Rhs::Transposed(rhs) => {
                // A square of 16 words at a time, so that what is written stays in the first-level cache.
                for (block, words) in panel.chunks_mut(16 * COLUMNS).enumerate() {
                    let pairs = words.len() / COLUMNS;
                    for j in 0..width {
                        let row = &rhs[(first + j) * depth + from + 32 * block..][..2 * pairs];
                        for (p, pair) in row.as_chunks::<2>().0.iter().enumerate() {
                            words[p * COLUMNS + j] = word(pair[0], pair[1]);
                        }
                    }
                }
            }
            Rhs::Blocks(rhs) => {
                let mut rows = [[0.0; COLUMNS]; 2];
                for (pair, words) in panel.chunks_exact_mut(COLUMNS).enumerate() {
                    for (i, row) in rows.iter_mut().enumerate() {
                        rhs.widen_into((from + 2 * pair + i) * columns + first, &mut row[..width]);
                    }
                    let [low, high] = &rows;
                    for ((to, &low), &high) in words[..width].iter_mut().zip(low).zip(high) {
                        *to = word(bf16::from_f32(low), bf16::from_f32(high));
                    }
                }
            }
            Rhs::BlocksTransposed(rhs) => {
                let mut row = [0.0; DEPTH];
                for j in 0..width {
                    let row = &mut row[..deep];
                    rhs.widen_into((first + j) * depth + from, row);
                    for (p, pair) in row.as_chunks::<2>().0.iter().enumerate() {
                        panel[p * COLUMNS + j] = word(bf16::from_f32(pair[0]), bf16::from_f32(pair[1]));
                    }
                }
            }
        }
    }

    /// One panel against all rows.
    ///
    /// # Safety
    /// `lhs` holds `rows` rows `stride` apart, of as many elements as the panel has; `dst` holds `width` columns of as many rows,
    /// which no one else uses.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn strip(
        dst: Columns,
        keep: bool,
        lhs: &[bf16],
        (rows, stride): (usize, usize),
        panel: &[u32],
        width: usize,
    ) {
        let mut row = 0;
        macro_rules! tiles {
            ($($count:literal)*) => {$(
                while rows - row >= $count {
                    // SAFETY: rows `row..row + count` are inside, by the caller's promise.
                    unsafe {
                        let to = Columns { data: dst.at(row * dst.stride), ..dst };
                        tile::<$count>(to, keep, lhs.as_ptr().add(row * stride), stride, panel, width);
                    }
                    row += $count;
                }
            )*};
        }
        tiles!(12 8 4 2 1);
        const { assert!(ROWS == 12) };
    }

    /// R rows of lhs against a panel.
    ///
    /// # Safety
    /// As for [`strip`], with R rows at `lhs` and `dst`.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn tile<const R: usize>(
        dst: Columns,
        keep: bool,
        lhs: *const bf16,
        stride: usize,
        panel: &[u32],
        width: usize,
    ) {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for (pair, words) in panel.as_chunks::<COLUMNS>().0.iter().enumerate() {
            // SAFETY: `words` has 32 elements; the pair lies inside each row, by the caller's promise.
            unsafe {
                let b = [0, 16].map(|at| bits(_mm512_loadu_epi32(words.as_ptr().add(at).cast())));
                for i in 0..R {
                    let a = lhs.add(i * stride + 2 * pair).cast::<i32>().read_unaligned();
                    let a = bits(_mm512_set1_epi32(a));
                    sums[i] = [0, 1].map(|v| _mm512_dpbf16_ps(sums[i][v], a, b[v]));
                }
            }
        }
        let masks = [width.min(16), width.saturating_sub(16)].map(|lanes| ((1_u32 << lanes) - 1) as __mmask16);
        for i in 0..R {
            for v in 0..2 {
                // SAFETY: the mask leaves out what lies beyond the width; row i is inside, by the caller's promise.
                unsafe {
                    let to = dst.data.wrapping_add(i * dst.stride + 16 * v);
                    let before = if keep { _mm512_maskz_loadu_ps(masks[v], to) } else { _mm512_setzero_ps() };
                    _mm512_mask_storeu_ps(to, masks[v], _mm512_add_ps(before, sums[i][v]));
                }
            }
        }
    }

    /// `Σ a · b` in 64 partial sums, of an even number of elements.
    ///
    /// # Safety
    /// None beyond the processor's: both slices are as long as each other.
    #[target_feature(enable = "avx512f,avx512bf16,avx512bw")]
    unsafe fn dot(a: &[bf16], b: &[bf16]) -> f32 {
        let mut sums = [_mm512_setzero_ps(); 4];
        let (a, a_rest) = a.as_chunks::<128>();
        let (b, b_rest) = b.as_chunks::<128>();
        // SAFETY: every load is of 32 elements inside a chunk of 128.
        let load = |from: &[bf16; 128], v: usize| unsafe { bits(_mm512_loadu_epi32(from.as_ptr().add(32 * v).cast())) };
        for (a, b) in a.iter().zip(b) {
            for v in 0..4 {
                sums[v] = _mm512_dpbf16_ps(sums[v], load(a, v), load(b, v));
            }
        }
        for (v, (a, b)) in a_rest.chunks(32).zip(b_rest.chunks(32)).enumerate() {
            let mask = ((1_u64 << a.len()) - 1) as __mmask32;
            // SAFETY: the mask leaves out what lies beyond the slice.
            let [a, b] = [a, b].map(|from| unsafe { bits(_mm512_maskz_loadu_epi16(mask, from.as_ptr().cast())) });
            sums[v] = _mm512_dpbf16_ps(sums[v], a, b);
        }
        let [s0, s1, s2, s3] = sums;
        _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(s0, s1), _mm512_add_ps(s2, s3)))
    }

    #[inline(always)]
    fn bits(words: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits without an invalid value.
        unsafe { std::mem::transmute(words) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(count: usize, seed: u64) -> Vec<bf16> {
        let mut generator = fastrand::Rng::with_seed(seed);
        (0..count).map(|_| bf16::from_f32(generator.f32() * 2.0 - 1.0)).collect()
    }

    #[test]
    fn equals_plain_loops() {
        if !available() {
            println!("SKIPPED: this processor has no bf16 products");
            return;
        }
        for (m, d, c) in [(1, 2, 1), (13, 6, 33), (25, 34, 31), (7, 4098, 40), (30, 576, 64), (3, 70, 1), (0, 4, 5)] {
            let (lhs, rhs) = (random(m * d, 1), random(d * c, 2));
            let transposed: Vec<bf16> = (0..c * d).map(|i| rhs[i % d * c + i / d]).collect();
            let want =
                |i: usize, j: usize| (0..d).map(|p| lhs[i * d + p].to_f64() * rhs[p * c + j].to_f64()).sum::<f64>();
            let close = |name: &str, got: &[f32], scale: f64, shift: f64| {
                for (index, &got) in got.iter().enumerate() {
                    let want = scale * want(index / c, index % c) + shift;
                    assert!(
                        (f64::from(got) - want).abs() < 2e-6 * (d as f64).sqrt() * 4.0,
                        "{name} {m} {d} {c} at {index}: {got} {want}"
                    );
                }
            };
            let mut dst = vec![f32::NAN; m * c];
            product(&mut dst, false, &lhs, Rhs::Plain(&rhs), d, c);
            close("plain", &dst, 1.0, 0.0);
            dst.fill(3.0);
            product(&mut dst, true, &lhs, Rhs::Transposed(&transposed), d, c);
            close("transposed, added", &dst, 1.0, 3.0);
            dst.fill(f32::NAN);
            few_rows(&mut dst, &lhs, &transposed, d);
            close("few rows", &dst, 1.0, 0.0);
        }
    }

    #[test]
    fn keeps_what_is_not_a_number() {
        if !available() {
            println!("SKIPPED: this processor has no bf16 products");
            return;
        }
        let (mut lhs, rhs) = (random(2 * 8, 3), random(8 * 3, 4));
        lhs[9] = bf16::NAN;
        let mut dst = vec![0.0; 6];
        product(&mut dst, false, &lhs, Rhs::Plain(&rhs), 8, 3);
        assert!(dst[..3].iter().all(|y| y.is_finite()) && dst[3..].iter().all(|y| y.is_nan()), "{dst:?}");
    }
}
