//! Quantized blocks on the CPU: widened to f32 by the 32 values that share a scale, and NF4 made from f32.
//!
//! Layouts: `backend::quantized`. Where a byte holds two codes of a block of 32, value j is the low half of byte j and value
//! j + 16 the high half, as llama.cpp has it; NF4 and the affine kinds are brought into that order when they are read.

use half::f16;
use rayon::prelude::*;

use super::simd;
use crate::backend::quantized::Kind;

/// Values that share a scale, or two.
pub const GROUP: usize = 32;

/// NF4's sixteen values (QLoRA, appendix E; bitsandbytes `create_normal_map`).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.091050036,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

/// Blocks of one kind, end to end.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    kind: Kind,
    bytes: &'a [u8],
}

impl<'a> Blocks<'a> {
    /// # Panics
    /// When the bytes are not whole blocks; `QuantizedTensor` has checked it.
    pub fn new(kind: Kind, bytes: &'a [u8]) -> Self {
        assert!(bytes.len().is_multiple_of(kind.block_bytes()), "whole blocks of {kind:?}");
        Self { kind, bytes }
    }

    /// How they store values.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.kind.block_bytes() * self.kind.block_len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The bytes of values `start..start + len`, whole blocks.
    pub fn bytes(&self, start: usize, len: usize) -> &'a [u8] {
        let at = |value: usize| value / self.kind.block_len() * self.kind.block_bytes();
        &self.bytes[at(start)..at(start + len)]
    }

    /// Widens `dst.len()` values from `start` on, on this thread.
    pub fn widen_into(&self, start: usize, dst: &mut [f32]) {
        match self.kind {
            Kind::Q8_0 => self.widen_groups(start, dst, q8_0),
            Kind::Q4_0 => self.widen_groups(start, dst, q4_0),
            Kind::Q4_1 => self.widen_groups(start, dst, q4_1),
            Kind::Q5_0 => self.widen_groups(start, dst, q5_0),
            Kind::Q5_1 => self.widen_groups(start, dst, q5_1),
            Kind::Q4K => self.widen_groups(start, dst, q4_k),
            Kind::Q5K => self.widen_groups(start, dst, q5_k),
            Kind::Q6K => self.widen_groups(start, dst, q6_k),
            Kind::Nf4 => self.widen_groups(start, dst, nf4),
            Kind::Affine4 => self.widen_groups(start, dst, affine4),
            Kind::Affine8 => self.widen_groups(start, dst, affine8),
        }
    }

    /// `group(block, which, to)` widens one group of a block. A range that begins or ends inside a group goes through a buffer.
    #[inline(always)]
    fn widen_groups(&self, start: usize, dst: &mut [f32], group: impl Fn(&[u8], usize, &mut [f32; GROUP])) {
        let (len, size) = (self.kind.block_len() / GROUP, self.kind.block_bytes());
        let one = |index: usize, to: &mut [f32; GROUP]| {
            group(&self.bytes[index / len * size..][..size], index % len, to);
        };
        simd(
            #[inline(always)]
            || {
                let (mut index, skip) = (start / GROUP, start % GROUP);
                let (head, rest) = dst.split_at_mut(if skip == 0 { 0 } else { (GROUP - skip).min(dst.len()) });
                let mut buffer = [0.0; GROUP];
                if !head.is_empty() {
                    one(index, &mut buffer);
                    head.copy_from_slice(&buffer[skip..][..head.len()]);
                    index += 1;
                }
                let (groups, tail) = rest.as_chunks_mut::<GROUP>();
                for to in groups {
                    one(index, to);
                    index += 1;
                }
                if !tail.is_empty() {
                    one(index, &mut buffer);
                    tail.copy_from_slice(&buffer[..tail.len()]);
                }
            },
        );
    }
}

#[inline(always)]
fn f16_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

#[inline(always)]
fn f32_at(block: &[u8], at: usize) -> f32 {
    f32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

/// Sixteen bytes as 32 codes of 4 bits, turned to values by `value(code, which)`.
#[inline(always)]
fn nibbles(codes: &[u8], to: &mut [f32; GROUP], value: impl Fn(u8, usize) -> f32) {
    let codes = &codes[..16];
    for j in 0..16 {
        to[j] = value(codes[j] & 15, j);
    }
    for j in 0..16 {
        to[j + 16] = value(codes[j] >> 4, j + 16);
    }
}

#[inline(always)]
fn q8_0(block: &[u8], _: usize, to: &mut [f32; GROUP]) {
    let d = f16_at(block, 0);
    for (to, &code) in to.iter_mut().zip(&block[2..34]) {
        *to = d * f32::from(code as i8);
    }
}

#[inline(always)]
fn q4_0(block: &[u8], _: usize, to: &mut [f32; GROUP]) {
    let d = f16_at(block, 0);
    nibbles(&block[2..], to, |code, _| d * f32::from(code as i8 - 8));
}

#[inline(always)]
fn q4_1(block: &[u8], _: usize, to: &mut [f32; GROUP]) {
    let (d, m) = (f16_at(block, 0), f16_at(block, 2));
    nibbles(&block[4..], to, |code, _| d * f32::from(code) + m);
}

#[inline(always)]
fn fifth_bit(block: &[u8], at: usize) -> impl Fn(usize) -> u8 {
    let bits = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    move |j| ((bits >> j & 1) << 4) as u8
}

#[inline(always)]
fn q5_0(block: &[u8], _: usize, to: &mut [f32; GROUP]) {
    let (d, high) = (f16_at(block, 0), fifth_bit(block, 2));
    nibbles(&block[6..], to, |code, j| d * f32::from((code | high(j)) as i8 - 16));
}

#[inline(always)]
fn q5_1(block: &[u8], _: usize, to: &mut [f32; GROUP]) {
    let (d, m, high) = (f16_at(block, 0), f16_at(block, 2), fifth_bit(block, 4));
    nibbles(&block[8..], to, |code, j| d * f32::from(code | high(j)) + m);
}

/// The scale and the minimum of one of the eight groups, from 12 bytes of 6 bits each.
#[inline(always)]
pub fn k_scales(packed: &[u8], group: usize) -> (u8, u8) {
    let packed = &packed[..12];
    match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => (packed[group + 4] & 15 | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4),
    }
}

/// d · scale and dmin · minimum of a group of Q4_K or Q5_K.
#[inline(always)]
fn k_affine(block: &[u8], group: usize) -> (f32, f32) {
    let (scale, min) = k_scales(&block[4..16], group);
    (f16_at(block, 0) * f32::from(scale), f16_at(block, 2) * f32::from(min))
}

#[inline(always)]
fn q4_k(block: &[u8], group: usize, to: &mut [f32; GROUP]) {
    let (d, m) = k_affine(block, group);
    let (codes, shift) = (&block[16 + group / 2 * 32..][..32], group % 2 * 4);
    for (to, &code) in to.iter_mut().zip(codes) {
        *to = d * f32::from(code >> shift & 15) - m;
    }
}

#[inline(always)]
fn q5_k(block: &[u8], group: usize, to: &mut [f32; GROUP]) {
    let (d, m) = k_affine(block, group);
    let (codes, shift) = (&block[48 + group / 2 * 32..][..32], group % 2 * 4);
    for ((to, &code), &high) in to.iter_mut().zip(codes).zip(&block[16..48]) {
        *to = d * f32::from(code >> shift & 15 | (high >> group & 1) << 4) - m;
    }
}

#[inline(always)]
fn q6_k(block: &[u8], group: usize, to: &mut [f32; GROUP]) {
    let d = f16_at(block, 208);
    let (half, part) = (group / 4, group % 4);
    let low = &block[64 * half + part % 2 * 32..][..32];
    let high = &block[128 + 32 * half..][..32];
    let scales = &block[192 + 8 * half + 2 * part..][..2];
    let scales = [d * f32::from(scales[0] as i8), d * f32::from(scales[1] as i8)];
    for j in 0..GROUP {
        let code = low[j] >> (part / 2 * 4) & 15 | (high[j] >> (2 * part) & 3) << 4;
        to[j] = scales[j / 16] * f32::from(code as i8 - 32);
    }
}

#[inline(always)]
fn nf4(block: &[u8], group: usize, to: &mut [f32; GROUP]) {
    let scale = f32_at(block, 0);
    nibbles(&block[4 + 16 * group..], to, |code, _| scale * NF4[usize::from(code)]);
}

#[inline(always)]
fn affine4(block: &[u8], _: usize, to: &mut [f32; GROUP]) {
    let (d, m) = (f32_at(block, 0), f32_at(block, 4));
    nibbles(&block[8..], to, |code, _| d * f32::from(code) + m);
}

#[inline(always)]
fn affine8(block: &[u8], _: usize, to: &mut [f32; GROUP]) {
    let (d, m) = (f32_at(block, 0), f32_at(block, 4));
    for (to, &code) in to.iter_mut().zip(&block[8..40]) {
        *to = d * f32::from(code) + m;
    }
}

/// NF4 blocks of values whose number is a multiple of 64: the scale is the largest magnitude, each code the nearest value.
pub fn quantize_nf4(values: &[f32]) -> Vec<u8> {
    const LEN: usize = Kind::Nf4.block_len();
    const BYTES: usize = Kind::Nf4.block_bytes();
    let mut all = vec![0; values.len() / LEN * BYTES];
    all.par_chunks_exact_mut(BYTES).zip(values.par_chunks_exact(LEN)).for_each(|(block, values)| {
        let scale = values.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        block[..4].copy_from_slice(&scale.to_le_bytes());
        let codes = pack_nibbles(values.iter().map(|value| nearest_nf4(value * inverse)));
        block[4..].copy_from_slice(&codes);
    });
    all
}

/// Codes of 4 bits in the order of this file, by groups of 32.
pub fn pack_nibbles(codes: impl Iterator<Item = u8>) -> Vec<u8> {
    let codes: Vec<u8> = codes.collect();
    let groups = codes.chunks_exact(GROUP);
    groups.flat_map(|group| (0..16).map(move |j| group[j] | group[j + 16] << 4)).collect()
}

fn nearest_nf4(value: f32) -> u8 {
    // The number of midpoints below it.
    NF4.windows(2).filter(|pair| value > (pair[0] + pair[1]) / 2.0).count() as u8
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    use super::*;
    use crate::backend::cpu::floats::Held;
    use crate::backend::quantized::QuantizedTensor;

    fn random(count: usize) -> Vec<f32> {
        let mut rng = fastrand::Rng::with_seed(3);
        (0..count).map(|_| (rng.f32() - 0.5) * (1.0 + 5.0 * rng.f32())).collect()
    }

    #[test]
    fn every_ggml_kind_widens_as_candle_does() {
        let values = Tensor::from_vec(random(5 * 512), (5, 512), &Device::Cpu).unwrap();
        for kind in Kind::ALL {
            let Some(dtype) = kind.ggml() else { continue };
            let want = QTensor::quantize(&values, dtype).unwrap().dequantize(&Device::Cpu).unwrap();
            let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
            let quantized = QuantizedTensor::quantize(&values, kind).unwrap();
            let held = Held::quantized("test", "w", &quantized).unwrap();
            let blocks = held.floats();
            assert_eq!(blocks.len(), want.len());
            // Ranges that begin and end inside groups too.
            for (start, len) in [(0, want.len()), (512, 512), (32, 64), (5, 20), (5, 70), (40, 7), (0, 0)] {
                let mut got = vec![f32::NAN; len];
                blocks.widen_into(start, &mut got);
                for (got, want) in got.iter().zip(&want[start..]) {
                    assert!((got - want).abs() <= 1e-6 * want.abs().max(1e-3), "{kind:?}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn nf4_takes_the_nearest_value() {
        let values = random(64 * 6);
        let bytes = quantize_nf4(&values);
        let mut got = vec![0.0; values.len()];
        Blocks::new(Kind::Nf4, &bytes).widen_into(0, &mut got);
        for (block, got) in values.chunks_exact(64).zip(got.chunks_exact(64)) {
            let scale = block.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
            for (value, got) in block.iter().zip(got) {
                let nearest = NF4.iter().map(|code| (code * scale - value).abs()).fold(f32::INFINITY, f32::min);
                assert!((got - value).abs() <= nearest + 1e-6, "{value} became {got}");
            }
        }
        assert!(quantize_nf4(&[0.0; 64]).iter().skip(4).all(|byte| *byte == 0x77), "zeros stay zero");
    }

    #[test]
    fn rows_that_are_no_whole_blocks_are_refused() {
        let values = Tensor::zeros((2, 576), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(QuantizedTensor::quantize(&values, Kind::Nf4).is_ok());
        let error = QuantizedTensor::quantize(&values, Kind::Q4K).unwrap_err().to_string();
        assert!(error.contains("576") && error.contains("256"), "{error}");
        let error = QuantizedTensor::new(Kind::Q8_0, vec![0; 33], (1, 32), &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("34"), "{error}");
    }
}
