//! `exp` in f32 without a call, so that loops over it stay vectorised, and the pieces of a softmax that are made of it.
//!
//! Cephes' expf: `exp(x) = 2ⁿ · exp(r)` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`, where `exp(r)` is a polynomial of
//! degree 6 in `r`; ln 2 is taken off in two parts. Relative error under 2e-7 where the result is a normal number.
//! For use inside [`super::simd`] only: elsewhere a fused multiply-add may be a call.

/// `exp(x)`. Below -87.3 (the smallest normal result) it gives 0, above 88.7 infinity; NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // 1.5 · 2²³: adding it rounds to the nearest integer, which then sits in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, SHIFT);
    let n = shifted - SHIFT;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = r.mul_add(p, c);
    }
    let value = (p * r).mul_add(r, r) + 1.0;
    // Two factors, since 2¹²⁸ is no f32 although value · 2¹²⁸ may be one.
    let n = shifted.to_bits() as i32 - SHIFT.to_bits() as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let result = value * power(half) * power(n - half);
    let result = if x < -87.336_54 { 0.0 } else { result };
    if x > 88.722_83 { f32::INFINITY } else { result }
}

/// Lanes of the running sums and maxima below: one vector of 512 bits.
const LANES: usize = 16;

/// The largest value; minus infinity of none. NaN is passed over.
#[inline(always)]
pub fn max(values: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (whole, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in whole {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |max, &value| larger(max, value))
}

/// Turns each value into `exp(value - shift)` and returns their sum.
#[inline(always)]
pub fn exp_shifted(values: &mut [f32], shift: f32) -> f32 {
    let (whole, rest) = values.as_chunks_mut::<LANES>();
    let mut lanes = [0.0_f32; LANES];
    for chunk in whole {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] - shift);
            lanes[lane] += chunk[lane];
        }
    }
    let mut sum: f32 = lanes.iter().sum();
    for value in rest {
        *value = exp(*value - shift);
        sum += *value;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_error_is_under_2e_7() {
        let mut worst = (0.0_f64, 0.0);
        for i in -873_000..=887_000_i32 {
            let x = i as f32 * 1e-4;
            let exact = (x as f64).exp();
            let error = (exp(x) as f64 / exact - 1.0).abs();
            if error > worst.0 {
                worst = (error, x);
            }
        }
        eprintln!("largest relative error {:.3e} at {}", worst.0, worst.1);
        assert!(worst.0 < 2e-7, "relative error {:.3e} at {}", worst.0, worst.1);
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }
}
