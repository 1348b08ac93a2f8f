//! `exp` in f32 without a call, so that loops over it stay vectorised.
//!
//! Cephes' expf: `exp(x) = 2ⁿ · exp(r)` with `n = round(x / ln 2)` and `|r| <= ln 2 / 2`, where `exp(r)` is a polynomial of
//! degree 6 in `r`; ln 2 is taken off in two parts. Relative error under 2e-7 where the result is a normal number.

/// `exp(x)`. Below -87.3 (the smallest normal result) it gives 0, above 88.7 infinity; NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // 1.5 · 2²³: adding it rounds to the nearest integer, which then sits in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.336_54, 88.722_83);
    let shifted = clamped * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = clamped - n * LN2_HIGH - n * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let value = p * r * r + r + 1.0;
    // Two factors, since 2¹²⁸ is no f32 although value · 2¹²⁸ may be one.
    let n = shifted.to_bits() as i32 - SHIFT.to_bits() as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let result = value * power(half) * power(n - half);
    let result = if x < -87.336_54 { 0.0 } else { result };
    if x > 88.722_83 { f32::INFINITY } else { result }
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
