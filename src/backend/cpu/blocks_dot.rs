//! Dot products of a few rows of x with rows of quantized blocks, for decoding: `Σ x · (d · code + m)` is summed by groups of 32 as
//! `d · Σ x · code + m · Σ x`, so each code costs one conversion and one product, and x stays f32.
//!
//! With AVX-512 the kinds of 4 bits look their codes up in a register of sixteen values, and Q8_0 converts them. Other kinds, and
//! other processors, widen a row and multiply it.

use super::blocks::{Blocks, GROUP};
use super::linear::dot;

/// Rows of x with the sums of their groups.
pub struct Rows<'a> {
    x: &'a [f32],
    k: usize,
    /// Which only the kernels of one architecture need.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    sums: Vec<f32>,
}

impl<'a> Rows<'a> {
    /// x `[m, k]`, k a multiple of 32.
    pub fn new(x: &'a [f32], k: usize) -> Self {
        let sums = x.as_chunks::<GROUP>().0.iter().map(|group| group.iter().sum()).collect();
        Self { x, k, sums }
    }

    /// `columns[j, i]` = row `first + j` of `w` times row i of x, `[rows, m]`.
    pub fn dots(&self, w: &Blocks, first: usize, columns: &mut [f32]) {
        let (k, m) = (self.k, self.x.len() / self.k);
        #[cfg(target_arch = "x86_64")]
        if avx512::takes(w.kind()) {
            for (j, columns) in columns.chunks_exact_mut(m).enumerate() {
                let row = w.bytes((first + j) * k, k);
                let x = self.x.chunks_exact(k).zip(self.sums.chunks_exact(k / GROUP));
                for (to, (x, sums)) in columns.iter_mut().zip(x) {
                    *to = avx512::dot(w.kind(), row, x, sums);
                }
            }
            return;
        }
        let mut wide = vec![0.0; k];
        for (j, columns) in columns.chunks_exact_mut(m).enumerate() {
            w.widen_into((first + j) * k, &mut wide);
            for (to, x) in columns.iter_mut().zip(self.x.chunks_exact(k)) {
                *to = dot(x, &wide);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m128, __m128i, __m512, __m512i, _mm_cvtph_ps, _mm_cvtsi32_si128, _mm_cvtss_f32, _mm_loadu_si128,
        _mm_movehdup_ps, _mm_set_ps, _mm512_add_ps, _mm512_broadcastss_ps, _mm512_cvtepi8_epi32, _mm512_cvtepi32_ps,
        _mm512_cvtepu8_epi32, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_permutexvar_ps,
        _mm512_reduce_add_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_srli_epi32,
    };
    use std::sync::LazyLock;

    use super::super::blocks::{NF4, k_scales};
    use super::*;
    use crate::backend::quantized::Kind;

    const WHOLE: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    const LESS_8: [f32; 16] = [-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.];

    /// Whether the processor has the instructions and the kind a kernel.
    pub fn takes(kind: Kind) -> bool {
        static AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
            is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("f16c") && is_x86_feature_detected!("fma")
        });
        *AVAILABLE && matches!(kind, Kind::Q8_0 | Kind::Q4_0 | Kind::Q4_1 | Kind::Q4K | Kind::Nf4 | Kind::Affine4)
    }

    /// A row of blocks times x, with the sums of x's groups.
    ///
    /// # Panics
    /// When the lengths do not fit, or [`takes`] says no; callers have checked them.
    pub fn dot(kind: Kind, row: &[u8], x: &[f32], sums: &[f32]) -> f32 {
        let len = row.len() / kind.block_bytes() * kind.block_len();
        assert!(takes(kind) && x.len() == len && sums.len() == len / GROUP, "a row of {kind:?} and its x");
        // SAFETY: the processor has the instructions (takes), and x has the row's length.
        unsafe {
            match kind {
                Kind::Q8_0 => q8_0(row, x),
                Kind::Q4_0 => q4_0(row, x, sums),
                Kind::Q4_1 => q4_1(row, x, sums),
                Kind::Affine4 => affine4(row, x, sums),
                Kind::Nf4 => nf4(row, x, sums),
                _ => q4_k(row, x, sums),
            }
        }
    }

    #[inline(always)]
    fn float(block: &[u8], at: usize) -> f32 {
        f32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn single(block: &[u8], at: usize) -> __m512 {
        _mm512_set1_ps(float(block, at))
    }

    /// Two f16, the first two lanes.
    #[inline]
    #[target_feature(enable = "avx512f,f16c")]
    fn halves(block: &[u8]) -> __m128 {
        _mm_cvtph_ps(_mm_cvtsi32_si128(i32::from_le_bytes([block[0], block[1], block[2], block[3]])))
    }

    #[inline]
    #[target_feature(enable = "avx512f,f16c")]
    fn half(block: &[u8]) -> __m512 {
        _mm512_broadcastss_ps(halves(block))
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn sixteen_bytes(from: &[u8]) -> __m128i {
        let from = &from[..16];
        // SAFETY: sixteen bytes are there.
        unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn vector(x: &[f32], at: usize) -> __m512 {
        let x = &x[at..at + 16];
        // SAFETY: sixteen values are there.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    /// The low and the high codes of sixteen bytes, looked up.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn look_up(bytes: &[u8], table: __m512) -> [__m512; 2] {
        // The look-up takes the lowest four bits of each lane and ignores the others.
        let codes: __m512i = _mm512_cvtepu8_epi32(sixteen_bytes(bytes));
        [_mm512_permutexvar_ps(codes, table), _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(codes), table)]
    }

    /// A kernel for blocks of `$bytes` bytes that end with `$groups` groups of sixteen bytes, with one scale and minimum for all of
    /// them. A macro, for a closure is not inlined into a function of other target features.
    macro_rules! nibbles {
        ($name:ident, $bytes:literal, $groups:literal, $table:expr, |$block:ident| $scales:expr) => {
            #[target_feature(enable = "avx512f,f16c,fma")]
            fn $name(row: &[u8], x: &[f32], sums: &[f32]) -> f32 {
                let table = vector(&$table, 0);
                let mut total = [_mm512_setzero_ps(); 2];
                let mut low = 0.0_f32;
                let blocks = row.as_chunks::<$bytes>().0.iter().zip(x.as_chunks::<{ $groups * GROUP }>().0);
                for (index, (($block, x), sums)) in blocks.zip(sums.as_chunks::<$groups>().0).enumerate() {
                    let (scale, min): (__m512, f32) = $scales;
                    for group in 0..$groups {
                        let codes = look_up(&$block[$bytes - 16 * ($groups - group)..][..16], table);
                        let sum = _mm512_mul_ps(codes[0], vector(x, group * GROUP));
                        let sum = _mm512_fmadd_ps(codes[1], vector(x, group * GROUP + 16), sum);
                        let lane = (index + group) % 2;
                        total[lane] = _mm512_fmadd_ps(sum, scale, total[lane]);
                        low = min.mul_add(sums[group], low);
                    }
                }
                _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1])) + low
            }
        };
    }

    nibbles!(q4_0, 18, 1, LESS_8, |block| (half(block), 0.0));
    nibbles!(q4_1, 20, 1, WHOLE, |block| {
        let both = halves(block);
        (_mm512_broadcastss_ps(both), _mm_cvtss_f32(_mm_movehdup_ps(both)))
    });
    nibbles!(affine4, 24, 1, WHOLE, |block| (single(block, 0), float(block, 4)));
    nibbles!(nf4, 36, 2, NF4, |block| (single(block, 0), 0.0));

    #[target_feature(enable = "avx512f,f16c,fma")]
    fn q8_0(row: &[u8], x: &[f32]) -> f32 {
        let mut total = [_mm512_setzero_ps(); 2];
        for (index, (block, x)) in row.as_chunks::<34>().0.iter().zip(x.as_chunks::<GROUP>().0).enumerate() {
            let low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen_bytes(&block[2..])));
            let high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen_bytes(&block[18..])));
            let sum = _mm512_fmadd_ps(high, vector(x, 16), _mm512_mul_ps(low, vector(x, 0)));
            total[index % 2] = _mm512_fmadd_ps(sum, half(block), total[index % 2]);
        }
        _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1]))
    }

    #[target_feature(enable = "avx512f,f16c,fma")]
    fn q4_k(row: &[u8], x: &[f32], sums: &[f32]) -> f32 {
        let table = vector(&WHOLE, 0);
        let mut total = [_mm512_setzero_ps(); 2];
        let mut low = 0.0_f32;
        let blocks = row.as_chunks::<144>().0.iter().zip(x.as_chunks::<256>().0);
        for ((block, x), sums) in blocks.zip(sums.as_chunks::<8>().0) {
            let both = halves(block);
            let (d, dmin) = (_mm_cvtss_f32(both), _mm_cvtss_f32(_mm_movehdup_ps(both)));
            for pair in 0..4 {
                let bytes = &block[16 + 32 * pair..][..32];
                let (first, second) = (look_up(bytes, table), look_up(&bytes[16..], table));
                for side in 0..2 {
                    let group = 2 * pair + side;
                    let at = group * GROUP;
                    let sum = _mm512_mul_ps(first[side], vector(x, at));
                    let sum = _mm512_fmadd_ps(second[side], vector(x, at + 16), sum);
                    let (scale, min) = k_scales(&block[4..16], group);
                    let scale = _mm512_broadcastss_ps(_mm_set_ps(0.0, 0.0, 0.0, d * f32::from(scale)));
                    total[side] = _mm512_fmadd_ps(sum, scale, total[side]);
                    low = (-dmin * f32::from(min)).mul_add(sums[group], low);
                }
            }
        }
        _mm512_reduce_add_ps(_mm512_add_ps(total[0], total[1])) + low
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::blocks::quantize_nf4;
    use crate::backend::quantized::Kind;

    #[test]
    fn every_kind_gives_the_dot_of_what_it_widens_to() {
        let mut rng = fastrand::Rng::with_seed(9);
        let (rows, k, m) = (3, 512, 3);
        let x: Vec<f32> = (0..m * k).map(|_| rng.f32() - 0.3).collect();
        for kind in Kind::ALL {
            let mut bytes: Vec<u8> =
                (0..rows * k / kind.block_len() * kind.block_bytes()).map(|_| rng.u8(..)).collect();
            if kind == Kind::Nf4 {
                bytes = quantize_nf4(&(0..rows * k).map(|_| rng.f32() - 0.5).collect::<Vec<f32>>());
            } else {
                // Scales that are numbers: f16 or f32 of a few bits.
                for block in bytes.chunks_exact_mut(kind.block_bytes()) {
                    let scales: &[usize] = match kind {
                        Kind::Q6K => &[208],
                        Kind::Affine4 | Kind::Affine8 => &[2, 6],
                        Kind::Q4_1 | Kind::Q5_1 | Kind::Q4K | Kind::Q5K => &[0, 2],
                        _ => &[0],
                    };
                    let wide = matches!(kind, Kind::Affine4 | Kind::Affine8);
                    for &at in scales {
                        let half = half::f16::from_f32(rng.f32() - 0.5).to_bits();
                        let brain = half::bf16::from_f32(rng.f32() - 0.5).to_bits();
                        block[at..at + 2].copy_from_slice(&if wide { brain } else { half }.to_le_bytes());
                    }
                }
            }
            let blocks = Blocks::new(kind, &bytes);
            let mut wide = vec![0.0; rows * k];
            blocks.widen_into(0, &mut wide);
            let mut got = vec![f32::NAN; (rows - 1) * m];
            Rows::new(&x, k).dots(&blocks, 1, &mut got);
            for (index, got) in got.iter().enumerate() {
                let (j, i) = (1 + index / m, index % m);
                let pairs = || wide[j * k..][..k].iter().zip(&x[i * k..][..k]);
                let want: f64 = pairs().map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                let size: f64 = pairs().map(|(w, x)| f64::from((w * x).abs())).sum();
                assert!((f64::from(*got) - want).abs() < 1e-5 * size, "{kind:?} row {j} of x {i}: {got} {want}");
            }
        }
    }
}
