//! The LoRA delta and its gradients on the CPU.
use std::borrow::Cow;

use super::floats::Floats;
use super::gemm::{Matrix, MatrixMut, gemm};
use crate::backend::dropout::Dropout;

/// One call's inputs: x `[m, k]`, A `[k, r]`, B `[r, n]`.
pub struct Lora<'a> {
    x: Floats<'a>,
    a: Cow<'a, [f32]>,
    b: Cow<'a, [f32]>,
    s: f32,
    dropout: Option<Dropout>,
    m: usize,
    k: usize,
    r: usize,
    n: usize,
}

impl<'a> Lora<'a> {
    /// `size` is `[m, k, r, n]`; the slices have been checked against it.
    pub fn new(
        x: Floats<'a>,
        a: Floats<'a>,
        b: Floats<'a>,
        s: f64,
        dropout: Option<Dropout>,
        size: [usize; 4],
    ) -> Self {
        let [m, k, r, n] = size;
        Self { x, a: a.to_f32(), b: b.to_f32(), s: s as f32, dropout, m, k, r, n }
    }

    /// `y += s · h B`; `h` is [`Self::project`]'s.
    pub fn add(&self, h: &[f32], y: &mut [f32]) {
        let h = Matrix::new(h, self.m, self.r);
        gemm(MatrixMut::new(y, self.m, self.n), 1.0, self.s, h, Matrix::new(&self.b, self.r, self.n));
    }

    /// `h = drop(x) A`, `[m, r]`.
    pub fn project(&self) -> Vec<f32> {
        let mut h = vec![0.0; self.m * self.r];
        let x = self.dropped();
        let a = Matrix::new(&self.a, self.k, self.r);
        gemm(MatrixMut::new(&mut h, self.m, self.r), 0.0, 1.0, Matrix::new(&x, self.m, self.k), a);
        h
    }

    /// `y += s · drop(x) A B`.
    pub fn add_delta(&self, y: &mut [f32]) {
        self.add(&self.project(), y);
    }

    /// `s · drop(x) A B`, `[m, n]`.
    pub fn delta(&self) -> Vec<f32> {
        let mut y = vec![0.0; self.m * self.n];
        self.add_delta(&mut y);
        y
    }

    /// `u = s · g Bᵀ`, `[m, r]`.
    pub fn output_projection(&self, g: &Floats) -> Vec<f32> {
        let g = g.to_f32();
        let mut u = vec![0.0; self.m * self.r];
        let b = Matrix::new(&self.b, self.r, self.n).t();
        gemm(MatrixMut::new(&mut u, self.m, self.r), 0.0, self.s, Matrix::new(&g, self.m, self.n), b);
        u
    }

    /// `dx += drop(u Aᵀ)`.
    pub fn input_gradient(&self, u: &[f32], dx: &mut [f32]) {
        let mut d = vec![0.0; self.m * self.k];
        let a = Matrix::new(&self.a, self.k, self.r).t();
        gemm(MatrixMut::new(&mut d, self.m, self.k), 0.0, 1.0, Matrix::new(u, self.m, self.r), a);
        for (index, (dx, d)) in dx.iter_mut().zip(d).enumerate() {
            *dx += d * self.dropout.map_or(1.0, |dropout| dropout.factor(index as u64));
        }
    }

    /// `drop(x)ᵀ u`, `[k, r]`.
    pub fn a_gradient(&self, u: &[f32]) -> Vec<f32> {
        let mut da = vec![0.0; self.k * self.r];
        let x = self.dropped();
        let x = Matrix::new(&x, self.m, self.k).t();
        gemm(MatrixMut::new(&mut da, self.k, self.r), 0.0, 1.0, x, Matrix::new(u, self.m, self.r));
        da
    }

    /// `s · hᵀ g`, `[r, n]`.
    pub fn b_gradient(&self, h: &[f32], g: &Floats) -> Vec<f32> {
        let g = g.to_f32();
        let mut db = vec![0.0; self.r * self.n];
        let h = Matrix::new(h, self.m, self.r).t();
        gemm(MatrixMut::new(&mut db, self.r, self.n), 0.0, self.s, h, Matrix::new(&g, self.m, self.n));
        db
    }

    fn dropped(&self) -> Cow<'_, [f32]> {
        let mut x = self.x.to_f32();
        if let Some(dropout) = self.dropout {
            for (index, value) in x.to_mut().iter_mut().enumerate() {
                *value *= dropout.factor(index as u64);
            }
        }
        x
    }
}
