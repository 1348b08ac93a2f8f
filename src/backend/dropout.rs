//! Dropout drawn from a counter, so that backward draws the same mask again instead of storing it.
//!
//! The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
//! 64-bit seed; the counter is (element index / 4 as 64 bits, stream as 64 bits); element `i` takes word `i % 4`. The Metal
//! and CUDA kernels draw the same words.

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

    /// `p · 2³²`, rounded down.
    #[inline(always)]
    pub fn threshold(&self) -> u32 {
        (self.p as f64 * 4_294_967_296.0) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
