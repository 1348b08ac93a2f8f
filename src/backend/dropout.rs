//! Dropout drawn from a counter, so that backward draws the same mask again instead of storing it.
//!
//! The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
//! 64-bit seed; the counter is (element index / 4 as 64 bits, stream as 64 bits); element `i` takes word `i % 4`. The Metal
//! and CUDA kernels draw the same words.

use super::cpu::simd;

/// One Philox4x32-10 block: four uniform 32-bit words for one counter and key.
#[inline(always)]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let first = 0xD251_1F53_u64 * counter[0] as u64;
        let second = 0xCD9E_8D57_u64 * counter[2] as u64;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// [`philox`] of N counters, word by word.
#[inline(always)]
fn philox_many<const N: usize>(words: &mut [[u32; N]; 4], mut key: [u32; 2]) {
    let [a, b, c, d] = words;
    for _ in 0..10 {
        for lane in 0..N {
            let first = 0xD251_1F53_u64 * a[lane] as u64;
            let second = 0xCD9E_8D57_u64 * c[lane] as u64;
            a[lane] = (second >> 32) as u32 ^ b[lane] ^ key[0];
            b[lane] = second as u32;
            c[lane] = (first >> 32) as u32 ^ d[lane] ^ key[1];
            d[lane] = first as u32;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
}

/// Inverted dropout, as PEFT applies it to the input of an adapter: an element is kept with probability `1 - p` and then
/// scaled by `1 / (1 - p)`, else it is zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// The probability to drop an element, in [0, 1).
    pub p: f32,
    /// The run's seed.
    pub seed: u64,
    /// Distinguishes the masks of one seed: a layer's number and a step's, say.
    pub stream: u64,
}

impl Dropout {
    /// The factor for element `index` (row · k + column): 0 or `1 / (1 - p)`. Dropped when the element's word, as a
    /// fraction of 2³², is under `p`.
    #[inline(always)]
    pub fn factor(&self, index: u64) -> f32 {
        let block = index / 4;
        let counter = [block as u32, (block >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32];
        let words = philox(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        if words[(index % 4) as usize] < self.threshold() { 0.0 } else { 1.0 / (1.0 - self.p) }
    }

    /// Multiplies `values` with the factors of the elements from `start` on, on this thread.
    pub fn apply(&self, start: u64, values: &mut [f32]) {
        /// Blocks drawn at once, so that each step of the generator is a few wide instructions.
        const BLOCKS: usize = 16;
        let (threshold, kept) = (self.threshold(), 1.0 / (1.0 - self.p));
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let factor = |word: u32| if word < threshold { 0.0 } else { kept };
        // Up to the first whole block, and after the last: one element at a time.
        let head = (start.next_multiple_of(4) - start).min(values.len() as u64) as usize;
        let (head, body) = values.split_at_mut(head);
        for (index, value) in (start..).zip(head.iter_mut()) {
            *value *= self.factor(index);
        }
        let mut block = start.div_ceil(4);
        let mut chunks = body.chunks_exact_mut(4 * BLOCKS);
        for chunk in chunks.by_ref() {
            simd(
                #[inline(always)]
                || {
                    let stream = [self.stream as u32, (self.stream >> 32) as u32];
                    let mut words = [[0; BLOCKS], [0; BLOCKS], [stream[0]; BLOCKS], [stream[1]; BLOCKS]];
                    let [low, high, ..] = &mut words;
                    for (lane, (low, high)) in low.iter_mut().zip(high).enumerate() {
                        let block = block + lane as u64;
                        (*low, *high) = (block as u32, (block >> 32) as u32);
                    }
                    philox_many(&mut words, key);
                    for (lane, four) in chunk.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                        for (value, words) in four.iter_mut().zip(&words) {
                            *value *= factor(words[lane]);
                        }
                    }
                },
            );
            block += BLOCKS as u64;
        }
        for (index, value) in (4 * block..).zip(chunks.into_remainder()) {
            *value *= self.factor(index);
        }
    }

    /// `p · 2³²`, rounded down.
    #[inline(always)]
    pub fn threshold(&self) -> u32 {
        (self.p as f64 * 4_294_967_296.0) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From any start, for any length, past 2³² elements too.
    #[test]
    fn many_factors_are_the_single_ones() {
        let dropout = Dropout { p: 0.4, seed: 0x1234_5678_9abc, stream: 7 << 32 | 9 };
        for start in [0, 1, 3, 64, (1 << 34) - 30] {
            for len in [0, 1, 2, 5, 64, 300] {
                let mut values = vec![1.0; len];
                dropout.apply(start, &mut values);
                let want: Vec<f32> = (start..start + len as u64).map(|index| dropout.factor(index)).collect();
                assert_eq!(values, want, "from {start}, {len} elements");
            }
        }
    }

    /// Known answers of the Random123 library's test vectors (kat_vectors, philox4x32 10).
    #[test]
    fn philox_matches_random123() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
