//! SwiGLU (Shazeer, 2020): `y = silu(gate) · up`, `silu(z) = z · σ(z)`, elementwise.
//!
//! `gate`, `up`, `g` and `y` have one shape and dtype: f32, f16 or bf16. Arithmetic is f32, rounded once. Nothing is saved:
//! `dgate = g · up · σ(gate) · (1 + gate · (1 - σ(gate)))`, `dup = g · silu(gate)`.

use candle_core::Tensor;

use super::check::{expect_dtype, float, on_cpu, shape};
use super::tape::record;
use crate::Result;
use crate::backend::cpu::{self, by_dtype, tensor, view};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
use crate::backend::metal;

const OP: &str = "swiglu";

/// `silu(gate) · up` of contiguous tensors.
pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    check(gate, &[("up", up)])?;
    #[cfg(feature = "cuda")]
    if cuda::takes(gate.device()) {
        return cuda::swiglu::forward(gate, up);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if gate.device().is_metal() {
        return metal::swiglu::forward(gate, up);
    }
    on_cpu(OP, &[gate, up])?;
    by_dtype!(OP, "gate", gate.dtype(), T => {
        let mut y = vec![T::default(); gate.elem_count()];
        cpu::swiglu::forward::<T>(&view(OP, "gate", gate)?, &view(OP, "up", up)?, &mut y);
        tensor(y, gate.shape())
    })
}

/// `(dgate, dup)` from the gradient `g` of the output.
pub fn backward(gate: &Tensor, up: &Tensor, g: &Tensor) -> Result<(Tensor, Tensor)> {
    check(gate, &[("up", up), ("g", g)])?;
    #[cfg(feature = "cuda")]
    if cuda::takes(gate.device()) {
        return cuda::swiglu::backward(gate, up, g);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if gate.device().is_metal() {
        return metal::swiglu::backward(gate, up, g);
    }
    on_cpu(OP, &[gate, up, g])?;
    by_dtype!(OP, "gate", gate.dtype(), T => {
        let (mut dgate, mut dup) = (vec![T::default(); gate.elem_count()], vec![T::default(); gate.elem_count()]);
        let (gate_view, up, g) = (view::<T>(OP, "gate", gate)?, view(OP, "up", up)?, view(OP, "g", g)?);
        cpu::swiglu::backward::<T>(&gate_view, &up, &g, &mut dgate, &mut dup);
        Ok((tensor(dgate, gate.shape())?, tensor(dup, gate.shape())?))
    })
}

/// SwiGLU on Candle's tape, with gradients for both inputs. Any layout.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let (saved_gate, saved_up) = (gate.detach(), up.detach());
    let y = forward(&saved_gate, &saved_up)?;
    record(OP, [&gate, &up], y, move |g| {
        let (dgate, dup) = backward(&saved_gate, &saved_up, g)?;
        Ok([Some(dgate), Some(dup)])
    })
}

/// `others` are of the gate's shape and dtype.
fn check(gate: &Tensor, others: &[(&str, &Tensor)]) -> Result<()> {
    float(OP, "gate", gate)?;
    for (name, tensor) in others {
        shape(OP, name, tensor, gate.dims())?;
        expect_dtype(OP, name, tensor, gate.dtype())?;
    }
    Ok(())
}
