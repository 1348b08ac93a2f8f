//! Rotary position embedding (Su et al., 2021), half-split as in Llama and GPT-NeoX: with `x1`, `x2` the first and second
//! half of a head at position p, `y1 = x1 · cos[p] - x2 · sin[p]`, `y2 = x2 · cos[p] + x1 · sin[p]`.
//!
//! `x` `[T, H, D]` f32, f16 or bf16 with D even; `cos`, `sin` `[P, D / 2]` f32; one position a token. A rotation's
//! gradient is the inverse rotation of `g`. Arithmetic is f32, rounded once.

use candle_core::{DType, Tensor};

use super::check::{dims3, expect_dtype, on_cpu, shape};
use super::tape::record;
use crate::backend::cpu::{self, by_dtype, update, view};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
use crate::backend::metal;
use crate::{Error, Result};

const OP: &str = "rope";

/// Rotates contiguous `x` in place; `inverse` rotates back, which is also the backward.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &[u32], inverse: bool) -> Result<()> {
    let (tokens, heads, dim) = dims3(OP, "x", x, "[tokens, heads, head size]")?;
    if dim % 2 != 0 {
        return Err(Error::op(OP, format!("x has shape {:?}; an even head size is needed", x.dims())));
    }
    let known = cos.dims().first().copied().unwrap_or(0);
    for (name, table) in [("cos", cos), ("sin", sin)] {
        shape(OP, name, table, &[known, dim / 2])?;
        expect_dtype(OP, name, table, DType::F32)?;
    }
    if positions.len() != tokens {
        return Err(Error::op(OP, format!("{} positions for {tokens} tokens; one each is needed", positions.len())));
    }
    if let Some((token, &position)) = positions.iter().enumerate().find(|&(_, &position)| position as usize >= known) {
        let many = positions.iter().filter(|&&position| position as usize >= known).count();
        let problem = format!("position {position} of token {token} is outside the table of {known} positions");
        return Err(Error::op(OP, format!("{problem} ({many} such tokens)")));
    }
    if x.elem_count() == 0 {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        return cuda::rope::rotate(x, cos, sin, positions, heads, inverse);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if x.device().is_metal() {
        return metal::rope::rotate(x, cos, sin, positions, inverse);
    }
    on_cpu(OP, &[x, cos, sin])?;
    let (cos, sin) = (view::<f32>(OP, "cos", cos)?, view::<f32>(OP, "sin", sin)?);
    let sign = if inverse { -1.0 } else { 1.0 };
    by_dtype!(OP, "x", x.dtype(), T => update::<T, _>(OP, "x", x, |x| {
        cpu::rope::rotate(x, &cos, &sin, positions, heads, dim, sign);
        Ok(())
    }))
}

/// The rotation on Candle's tape, with the gradient for `x`. `x` is left as it is and may have any layout.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, positions: &[u32]) -> Result<Tensor> {
    let (cos, sin) = (cos.detach().contiguous()?, sin.detach().contiguous()?);
    let y = x.detach().force_contiguous()?;
    rotate(&y, &cos, &sin, positions, false)?;
    let positions = positions.to_vec();
    record(OP, [x], y, move |g| {
        let dx = g.force_contiguous()?;
        rotate(&dx, &cos, &sin, &positions, true)?;
        Ok([Some(dx)])
    })
}
