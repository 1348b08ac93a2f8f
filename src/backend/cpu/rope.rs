//! Rotary position embedding on the CPU, tokens in parallel.

use rayon::prelude::*;

use super::{Element, simd};

/// Rotates `x` `[T, heads, dim]` in place: with `x1`, `x2` the halves of a head, `x1 · cos - x2 · sin` and
/// `x2 · cos + x1 · sin`. `cos`, `sin` `[P, dim / 2]`; `sign` is 1, or -1 for the inverse.
pub fn rotate<T: Element>(
    x: &mut [T],
    cos: &[f32],
    sin: &[f32],
    positions: &[u32],
    heads: usize,
    dim: usize,
    sign: f32,
) {
    let half = dim / 2;
    // One task takes at least this many elements: less is not worth another core.
    let tokens = (16_384 / (heads * dim)).max(1);
    x.par_chunks_mut(tokens * heads * dim).zip(positions.par_chunks(tokens)).for_each(|(x, positions)| {
        simd(
            #[inline(always)]
            || {
                for (x, &position) in x.chunks_exact_mut(heads * dim).zip(positions) {
                    let row = position as usize * half..(position as usize + 1) * half;
                    let (cos, sin) = (&cos[row.clone()], &sin[row]);
                    for head in x.chunks_exact_mut(dim) {
                        let (first, second) = head.split_at_mut(half);
                        for (((x1, x2), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                            let (a, b) = (x1.widen(), x2.widen());
                            *x1 = T::narrow(a * cos - b * (sign * sin));
                            *x2 = T::narrow(b * cos + a * (sign * sin));
                        }
                    }
                }
            },
        )
    });
}
