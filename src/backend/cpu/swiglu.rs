//! SwiGLU on the CPU, elementwise.

use rayon::prelude::*;

use super::exp::exp;
use super::{Element, simd};

/// Elements that one task works on.
const BLOCK: usize = 16_384;

/// `y = silu(gate) · up`.
pub fn forward<T: Element>(gate: &[T], up: &[T], y: &mut [T]) {
    y.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK)).for_each(|((y, gate), up)| {
        simd(
            #[inline(always)]
            || {
                for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
                    let gate = gate.widen();
                    *y = T::narrow(gate * sigmoid(gate) * up.widen());
                }
            },
        )
    });
}

/// `dgate = g · up · σ(gate) · (1 + gate · (1 - σ(gate)))`, `dup = g · silu(gate)`.
pub fn backward<T: Element>(gate: &[T], up: &[T], g: &[T], dgate: &mut [T], dup: &mut [T]) {
    let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(g.par_chunks(BLOCK));
    let outputs = dgate.par_chunks_mut(BLOCK).zip(dup.par_chunks_mut(BLOCK));
    outputs.zip(inputs).for_each(|((dgate, dup), ((gate, up), g))| {
        simd(
            #[inline(always)]
            || {
                let inputs = gate.iter().zip(up).zip(g);
                for ((dgate, dup), ((&gate, &up), &g)) in dgate.iter_mut().zip(dup).zip(inputs) {
                    let (gate, up, g) = (gate.widen(), up.widen(), g.widen());
                    let sigmoid = sigmoid(gate);
                    *dgate = T::narrow(g * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)));
                    *dup = T::narrow(g * gate * sigmoid);
                }
            },
        )
    });
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}
