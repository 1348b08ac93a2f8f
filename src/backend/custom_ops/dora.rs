//! DoRA's scale (Liu et al., 2024): the rows of `W + s (A B)ᵀ` are brought to learned lengths m.
//! `y = c ∘ u + bias (+ residual)`, `c = m / ‖W + s (A B)ᵀ‖` over rows, with `u = x Wᵀ + s · (x A) B` from
//! [`mod@super::lora_linear`].
//!
//! u, y, g and the residual `[.., n]` of one dtype, f32, f16 or bf16; c, m and the norms `[n]` f32; bias `[n]`. Sums are f32, y is rounded
//! once. Gradients: `du = c ∘ g`, `dm += Σ over rows of g ∘ u / norm`. The norm counts as a constant, as in the paper
//! (section 4.3), PEFT and mlx-lm.
//!
//! The norms are small products: with P = `Aᵀ Wᵀ` `[r, n]`,
//! `‖W_j + s (A B)_j‖² = ‖W_j‖² + Σ_q B_qj (2 s P + s² (Aᵀ A) B)_qj`, so that `W + s (A B)ᵀ` is never made.

use candle_core::{DType, Tensor};

use super::check::{expect_dtype, float, gradient, rows, same_device, shape, sink};
use super::tape::record;
use super::weight::Weight;
use super::{check, linear};
use crate::Result;
use crate::backend::cpu::{self, by_dtype, tensor, update, view};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
use crate::backend::fallback::accumulate;

const OP: &str = "dora";

/// The least norm: a row of zeros has no direction, and stays what it is.
pub const SHORTEST: f64 = 1e-30;

/// From more ranks on CUDA's kernel, whose work grows with the square of them, is slower than Candle's products.
#[cfg(feature = "cuda")]
const MOST_RANKS: usize = 64;

/// Rows whose squares are summed at once: bounds the copy in f32 that it takes.
const CHUNK: usize = 1 << 22;

/// `‖W_j‖²` for each row of W `[n, k]`, `[n]` f32.
///
/// # Errors
/// A dtype that is no float; a device without the kernels for a quantized W.
pub fn squared_norms<'a>(w: impl Into<Weight<'a>>) -> Result<Tensor> {
    let w = w.into();
    let squares = |part: &Tensor| Ok::<_, crate::Error>(part.to_dtype(DType::F32)?.sqr()?.sum(1)?);
    let dense = match w {
        Weight::Dense(tensor) => tensor.detach(),
        Weight::Quantized(_) => w.to_dense(DType::F32)?,
    };
    float(OP, "w", &dense)?;
    let (n, k) = check::dims2(OP, "w", &dense, "[n, k]")?;
    let height = (CHUNK / k.max(1)).max(1);
    let parts = (0..n).step_by(height).map(|first| squares(&dense.narrow(0, first, height.min(n - first))?));
    Ok(Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
}

/// `‖W_j + s (A B)_j‖` for each row j of W `[n, k]`, `[n]` f32 and at least [`SHORTEST`], from [`squared_norms`] of W, A `[k, r]`
/// and B `[r, n]`. On CUDA the part that W and the adapter share is rounded to W's dtype, or to bf16 where W is quantized.
///
/// # Errors
/// A wrong shape, dtype or device.
pub fn norms<'a>(w: impl Into<Weight<'a>>, squares: &Tensor, a: &Tensor, b: &Tensor, s: f64) -> Result<Tensor> {
    let w = w.into();
    let dims = w.dims();
    shape(OP, "a", a, &[dims[1], b.dims()[0]])?;
    shape(OP, "b", b, &[a.dims()[1], dims[0]])?;
    sink(OP, "squares", squares, &[dims[0]], a)?;
    let (a, b) = (a.detach().to_dtype(DType::F32)?, b.detach().to_dtype(DType::F32)?);
    let rows_of_a = a.t()?.contiguous()?;
    #[cfg(feature = "cuda")]
    if cuda::takes(a.device()) && a.dims()[1] <= MOST_RANKS {
        // Products of two dtypes would be made in f32 there, from a copy of W.
        let shared = match w {
            Weight::Dense(dense) => linear::forward(&rows_of_a.to_dtype(dense.dtype())?, dense, None)?,
            Weight::Quantized(_) => linear::forward(&rows_of_a.to_dtype(DType::BF16)?, w, None)?,
        };
        return cuda::dora::norms(&shared, &rows_of_a.matmul(&a)?, &b.contiguous()?, &squares.contiguous()?, s);
    }
    let shared = linear::forward(&rows_of_a, w, None)?;
    let own = rows_of_a.matmul(&a)?.matmul(&b)?;
    let cross = ((shared * (2.0 * s))? + (own * (s * s))?)?;
    // Rounding may take a row of zeros below zero.
    Ok((cross.mul(&b)?.sum(0)? + squares)?.relu()?.sqrt()?.maximum(SHORTEST)?)
}

/// `c ∘ u + bias (+ residual)`.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor.
pub fn forward(u: &Tensor, c: &Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
    let n = sizes(u, &[("c", Some(c))])?;
    if let Some(bias) = bias {
        float(OP, "bias", bias)?;
        shape(OP, "bias", bias, &[n])?;
        same_device(OP, "bias", bias, "u", u)?;
    }
    if let Some(residual) = residual {
        shape(OP, "residual", residual, u.dims())?;
        expect_dtype(OP, "residual", residual, u.dtype())?;
        same_device(OP, "residual", residual, "u", u)?;
    }
    let bias = bias.map(|bias| bias.detach().to_dtype(DType::F32)?.contiguous()).transpose()?;
    #[cfg(feature = "cuda")]
    if cuda::takes(u.device()) {
        return cuda::dora::forward(u, c, bias.as_ref(), residual, n);
    }
    if !u.device().is_cpu() {
        let wide = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
        let mut y = wide(u)?.broadcast_mul(&c.detach())?;
        if let Some(bias) = &bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(residual) = residual {
            y = (y + wide(residual)?)?;
        }
        return Ok(y.to_dtype(u.dtype())?);
    }
    by_dtype!(OP, "u", u.dtype(), T => {
        let (u_view, c) = (view::<T>(OP, "u", u)?, view::<f32>(OP, "c", c)?);
        let bias = bias.as_ref().map(|bias| view::<f32>(OP, "bias", bias)).transpose()?;
        let residual = residual.map(|residual| view::<T>(OP, "residual", residual)).transpose()?;
        let mut y = vec![T::default(); u.elem_count()];
        cpu::dora::forward(&u_view, &c, bias.as_deref(), residual.as_deref(), &mut y);
        tensor(y, u.shape())
    })
}

/// `du = c ∘ g`; and, when it is given, `dm` (f32 `[n]`) += the rows' sum of `g ∘ u / norm`.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor.
pub fn backward(u: &Tensor, g: &Tensor, c: &Tensor, norm: &Tensor, dm: Option<&Tensor>) -> Result<Tensor> {
    let n = sizes(u, &[("c", Some(c)), ("norm", Some(norm)), ("dm", dm)])?;
    gradient(OP, "g", g, u.dims(), u)?;
    expect_dtype(OP, "g", g, u.dtype())?;
    #[cfg(feature = "cuda")]
    if cuda::takes(u.device()) {
        return cuda::dora::backward(u, g, c, norm, dm, n);
    }
    if !u.device().is_cpu() {
        let wide = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
        let g32 = wide(g)?;
        if let Some(dm) = dm {
            let sums = (&g32 * wide(u)?)?.reshape((u.elem_count() / n, n))?.sum(0)?;
            accumulate(dm, &(sums / norm.detach())?)?;
        }
        return Ok(g32.broadcast_mul(&c.detach())?.to_dtype(u.dtype())?);
    }
    let (du, sums) = by_dtype!(OP, "u", u.dtype(), T => {
        let (u_view, g) = (view::<T>(OP, "u", u)?, view::<T>(OP, "g", g)?);
        let mut du = vec![T::default(); u.elem_count()];
        let sums = cpu::dora::backward(&u_view, &g, &view(OP, "c", c)?, &mut du, dm.is_some());
        Ok::<_, crate::Error>((tensor(du, u.shape())?, sums))
    })?;
    let Some(dm) = dm else { return Ok(du) };
    let norm = view::<f32>(OP, "norm", norm)?;
    update::<f32, _>(OP, "dm", dm, |dm| {
        dm.iter_mut().zip(&sums).zip(&*norm).for_each(|((to, sum), norm)| *to += sum / norm);
        Ok(())
    })?;
    Ok(du)
}

/// `m / norm ∘ u` on Candle's tape, with gradients for u and m, none for the norm. Any layout.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor.
pub fn dora(u: &Tensor, m: &Tensor, norm: &Tensor) -> Result<Tensor> {
    let (u, m) = (u.contiguous()?, m.contiguous()?);
    let (saved_u, norm) = (u.detach(), norm.detach().contiguous()?);
    sizes(&saved_u, &[("m", Some(&m)), ("norm", Some(&norm))])?;
    let c = (m.detach() / &norm)?;
    let y = forward(&saved_u, &c, None, None)?;
    record(OP, [&u, &m], y, move |g| {
        let dm = norm.zeros_like()?;
        let du = backward(&saved_u, g, &c, &norm, Some(&dm))?;
        Ok([Some(du), Some(dm)])
    })
}

/// n, the length of u's rows and of the f32 vectors.
fn sizes(u: &Tensor, vectors: &[(&'static str, Option<&Tensor>)]) -> Result<usize> {
    let (_, n) = rows(OP, "u", u)?;
    float(OP, "u", u)?;
    check::last(OP, "u", u.dims())?;
    for (name, vector) in vectors {
        if let Some(vector) = vector {
            sink(OP, name, vector, &[n], u)?;
        }
    }
    Ok(n)
}
