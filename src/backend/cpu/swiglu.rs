//! SwiGLU and GeGLU on the CPU, elementwise. Both activations are `z · σ(w)`: w = z for SiLU, and for GELU in its tanh form
//! `w = 2 √(2/π) (z + 0.044715 z³)`, since `(1 + tanh(w/2)) / 2 = σ(w)`.

use rayon::prelude::*;

use super::exp::exp;
use super::{Element, simd};
use crate::backend::custom_ops::swiglu::Activation;

/// Elements that one task works on.
const BLOCK: usize = 16_384;

/// `y = act(gate) · up`.
pub fn forward<T: Element>(gate: &[T], up: &[T], y: &mut [T], activation: Activation) {
    match activation {
        Activation::Silu => run::<T, false>(gate, up, y),
        Activation::GeluTanh => run::<T, true>(gate, up, y),
    }
    fn run<T: Element, const GELU: bool>(gate: &[T], up: &[T], y: &mut [T]) {
        y.par_chunks_mut(BLOCK).zip(gate.par_chunks(BLOCK)).zip(up.par_chunks(BLOCK)).for_each(|((y, gate), up)| {
            simd(
                #[inline(always)]
                || {
                    for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
                        *y = T::narrow(activated::<GELU>(gate.widen()).0 * up.widen());
                    }
                },
            )
        });
    }
}

/// `dgate = g · up · act'(gate)`, `dup = g · act(gate)`.
pub fn backward<T: Element>(gate: &[T], up: &[T], g: &[T], dgate: &mut [T], dup: &mut [T], activation: Activation) {
    match activation {
        Activation::Silu => run::<T, false>(gate, up, g, dgate, dup),
        Activation::GeluTanh => run::<T, true>(gate, up, g, dgate, dup),
    }
    fn run<T: Element, const GELU: bool>(gate: &[T], up: &[T], g: &[T], dgate: &mut [T], dup: &mut [T]) {
        let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(g.par_chunks(BLOCK));
        let outputs = dgate.par_chunks_mut(BLOCK).zip(dup.par_chunks_mut(BLOCK));
        outputs.zip(inputs).for_each(|((dgate, dup), ((gate, up), g))| {
            simd(
                #[inline(always)]
                || {
                    let inputs = gate.iter().zip(up).zip(g);
                    for ((dgate, dup), ((&gate, &up), &g)) in dgate.iter_mut().zip(dup).zip(inputs) {
                        (*dgate, *dup, _) = gradients::<T, GELU>(gate, up, g);
                    }
                },
            )
        });
    }
}

/// gate becomes dgate, up becomes dup and g becomes y.
pub fn backward_in_place<T: Element>(gate: &mut [T], up: &mut [T], g: &mut [T], activation: Activation) {
    match activation {
        Activation::Silu => run::<T, false>(gate, up, g),
        Activation::GeluTanh => run::<T, true>(gate, up, g),
    }
    fn run<T: Element, const GELU: bool>(gate: &mut [T], up: &mut [T], g: &mut [T]) {
        let chunks = gate.par_chunks_mut(BLOCK).zip(up.par_chunks_mut(BLOCK)).zip(g.par_chunks_mut(BLOCK));
        chunks.for_each(|((gate, up), g)| {
            simd(
                #[inline(always)]
                || {
                    for ((gate, up), g) in gate.iter_mut().zip(up).zip(g) {
                        (*gate, *up, *g) = gradients::<T, GELU>(*gate, *up, *g);
                    }
                },
            )
        });
    }
}

/// `(dgate, dup, y)` of an element.
#[inline(always)]
fn gradients<T: Element, const GELU: bool>(gate: T, up: T, g: T) -> (T, T, T) {
    let (gate, up, g) = (gate.widen(), up.widen(), g.widen());
    let (value, derivative) = activated::<GELU>(gate);
    (T::narrow(g * up * derivative), T::narrow(g * value), T::narrow(value * up))
}

/// `act(z)` and its derivative `σ + z σ (1 - σ) w'`.
#[inline(always)]
fn activated<const GELU: bool>(z: f32) -> (f32, f32) {
    let (w, slope) = if GELU {
        const SCALE: f32 = 1.595_769;
        (SCALE * z * (0.044_715 * z * z + 1.0), SCALE * (0.134_145 * z * z + 1.0))
    } else {
        (z, 1.0)
    };
    let sigmoid = 1.0 / (1.0 + exp(-w));
    (z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid) * slope))
}
