//! RMS norm: `y = cast(x · rstd) · weight`, `rstd = 1 / sqrt(mean(x²) + eps)` over the last dimension (Zhang & Sennrich,
//! 2019), with the rounding of transformers' LlamaRMSNorm: `x · rstd` in f32, cast to x's dtype, then times the weight.
//!
//! `x` `[.., n]` f32, f16 or bf16; `weight` `[n]` of x's dtype or f32; `y` has x's dtype. With `x̂ = x · rstd`:
//! `dx = rstd · (g w - x̂ · mean(g w · x̂))`, `dweight = Σ g · x̂` over rows. Sums are f32.

use candle_core::{DType, Tensor};

use super::check::{expect_dtype, on_cpu, rows, shape};
use super::tape::record;
use crate::backend::cpu::{self, by_dtype, tensor, update, view};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
use crate::backend::metal;
use crate::{Error, Result};

const OP: &str = "rms_norm";

/// Normalises contiguous `x` `[.., n]`; returns `y` and `rstd` `[m]` f32, which [`backward`] needs.
pub fn forward(x: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    let m = check(x, weight, eps)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        let (_, y, rstd) = cuda::rms_norm::forward(x, None, weight, eps, m)?;
        return Ok((y, rstd));
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if x.device().is_metal() {
        let (_, y, rstd) = metal::rms_norm::forward(x, None, weight, eps)?;
        return Ok((y, rstd));
    }
    on_cpu(OP, &[x, weight])?;
    by_dtype!(OP, "x", x.dtype(), T => by_dtype!(OP, "weight", weight.dtype(), W => {
        let (mut y, mut rstd) = (vec![T::default(); x.elem_count()], vec![0.0; m]);
        cpu::rms_norm::forward::<T, W>(&view(OP, "x", x)?, &view(OP, "weight", weight)?, eps as f32, &mut y, &mut rstd);
        Ok((tensor(y, x.shape())?, tensor(rstd, m)?))
    }))
}

/// Normalises `sum = x + residual`; returns `sum`, `y` and `rstd`. All contiguous, `residual` as `x`.
pub fn forward_add(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor, Tensor)> {
    let m = check(x, weight, eps)?;
    shape(OP, "residual", residual, x.dims())?;
    expect_dtype(OP, "residual", residual, x.dtype())?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device())
        && let (Some(sum), y, rstd) = cuda::rms_norm::forward(x, Some(residual), weight, eps, m)?
    {
        return Ok((sum, y, rstd));
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if x.device().is_metal()
        && let (Some(sum), y, rstd) = metal::rms_norm::forward(x, Some(residual), weight, eps)?
    {
        return Ok((sum, y, rstd));
    }
    on_cpu(OP, &[x, residual, weight])?;
    by_dtype!(OP, "x", x.dtype(), T => by_dtype!(OP, "weight", weight.dtype(), W => {
        let (mut sum, mut y) = (vec![T::default(); x.elem_count()], vec![T::default(); x.elem_count()]);
        let mut rstd = vec![0.0; m];
        let (x_view, residual) = (view(OP, "x", x)?, view(OP, "residual", residual)?);
        let weight = view(OP, "weight", weight)?;
        cpu::rms_norm::forward_add::<T, W>(&x_view, &residual, &weight, eps as f32, &mut sum, &mut y, &mut rstd);
        Ok((tensor(sum, x.shape())?, tensor(y, x.shape())?, tensor(rstd, m)?))
    }))
}

/// `dx` += and, when given, `dweight` (f32 `[n]`) +=. `x` is the tensor that was normalised (the sum, after
/// [`forward_add`]); `dx` has its dtype and must not share storage with it.
pub fn backward(
    x: &Tensor,
    weight: &Tensor,
    rstd: &Tensor,
    g: &Tensor,
    dx: &Tensor,
    dweight: Option<&Tensor>,
) -> Result<()> {
    let m = check(x, weight, 0.0)?;
    shape(OP, "g", g, x.dims())?;
    shape(OP, "dx", dx, x.dims())?;
    shape(OP, "rstd", rstd, &[m])?;
    if let Some(dweight) = dweight {
        shape(OP, "dweight", dweight, weight.dims())?;
        expect_dtype(OP, "dweight", dweight, DType::F32)?;
    }
    for (name, tensor) in [("g", g), ("dx", dx)] {
        expect_dtype(OP, name, tensor, x.dtype())?;
    }
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        return cuda::rms_norm::backward(x, weight, rstd, g, dx, dweight, m);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if x.device().is_metal() {
        return metal::rms_norm::backward(x, weight, rstd, g, dx, dweight);
    }
    on_cpu(OP, &[x, weight, rstd, g, dx])?;
    let sums = by_dtype!(OP, "x", x.dtype(), T => by_dtype!(OP, "weight", weight.dtype(), W => {
        let (x, g) = (view(OP, "x", x)?, view(OP, "g", g)?);
        let (weight, rstd) = (view(OP, "weight", weight)?, view(OP, "rstd", rstd)?);
        update::<T, _>(OP, "dx", dx, |dx| {
            Ok(cpu::rms_norm::backward::<T, W>(&x, &weight, &rstd, &g, dx, dweight.is_some()))
        })
    }))?;
    let Some(dweight) = dweight else { return Ok(()) };
    update::<f32, _>(OP, "dweight", dweight, |dweight| {
        dweight.iter_mut().zip(&sums).for_each(|(to, from)| *to += from);
        Ok(())
    })
}

/// RMS norm on Candle's tape, with gradients for `x` and `weight`. Any layout.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let (saved_x, saved_weight) = (x.detach(), weight.detach());
    let (y, rstd) = forward(&saved_x, &saved_weight, eps)?;
    record(OP, [&x, &weight], y, move |g| {
        let dx = saved_x.zeros_like()?;
        let dweight = Tensor::zeros(saved_weight.shape(), DType::F32, saved_weight.device())?;
        backward(&saved_x, &saved_weight, &rstd, g, &dx, Some(&dweight))?;
        Ok([Some(dx), Some(dweight.to_dtype(saved_weight.dtype())?)])
    })
}

/// The number of rows of `x`.
fn check(x: &Tensor, weight: &Tensor, eps: f64) -> Result<usize> {
    let (m, n) = rows(OP, "x", x)?;
    shape(OP, "weight", weight, &[n])?;
    if n == 0 {
        return Err(Error::op(OP, format!("x has shape {:?}; rows of length 0 have no norm", x.dims())));
    }
    if weight.dtype() != DType::F32 {
        expect_dtype(OP, "weight", weight, x.dtype())?;
    }
    if !(eps.is_finite() && eps >= 0.0) {
        return Err(Error::op(OP, format!("eps is {eps}; a number >= 0 is needed")));
    }
    Ok(m)
}
