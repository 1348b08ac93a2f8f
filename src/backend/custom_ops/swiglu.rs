//! SwiGLU and GeGLU (Shazeer, 2020): `y = act(gate) · up`, elementwise.
//!
//! `silu(z) = z · σ(z)`; GELU in its tanh form, `gelu(z) = z / 2 · (1 + tanh(√(2/π) (z + 0.044715 z³)))` (`gelu_pytorch_tanh` of Gemma).
//! `gate`, `up`, `g` and `y` have one shape and dtype: f32, f16 or bf16. Arithmetic is f32, rounded once. Nothing is saved:
//! `dgate = g · up · act'(gate)`, `dup = g · act(gate)`, and y is made again on the way where backward is done in place.

use candle_core::Tensor;

use super::check::{expect_dtype, float, on_cpu, shape};
use super::tape::record;
use crate::backend::cpu::{self, by_dtype, same_storage, tensor, update, view};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
use crate::backend::metal;
use crate::{Error, Result};

const OP: &str = "swiglu";

/// What the gate goes through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Activation {
    /// SwiGLU
    #[default]
    Silu,
    /// GeGLU, in the tanh form
    GeluTanh,
}

/// `act(gate) · up` of contiguous tensors.
pub fn forward(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    check(gate, &[("up", up)])?;
    #[cfg(feature = "cuda")]
    if cuda::takes(gate.device()) {
        return cuda::swiglu::forward(gate, up, activation);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if gate.device().is_metal() {
        return metal::swiglu::forward(gate, up, activation);
    }
    on_cpu(OP, &[gate, up])?;
    by_dtype!(OP, "gate", gate.dtype(), T => {
        let mut y = vec![T::default(); gate.elem_count()];
        cpu::swiglu::forward::<T>(&view(OP, "gate", gate)?, &view(OP, "up", up)?, &mut y, activation);
        tensor(y, gate.shape())
    })
}

/// `(dgate, dup)` from the gradient `g` of the output.
pub fn backward(gate: &Tensor, up: &Tensor, g: &Tensor, activation: Activation) -> Result<(Tensor, Tensor)> {
    check(gate, &[("up", up), ("g", g)])?;
    #[cfg(feature = "cuda")]
    if cuda::takes(gate.device()) {
        return cuda::swiglu::backward(gate, up, g, activation);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if gate.device().is_metal() {
        return metal::swiglu::backward(gate, up, g, activation);
    }
    on_cpu(OP, &[gate, up, g])?;
    by_dtype!(OP, "gate", gate.dtype(), T => {
        let (mut dgate, mut dup) = (vec![T::default(); gate.elem_count()], vec![T::default(); gate.elem_count()]);
        let (gate_view, up, g) = (view::<T>(OP, "gate", gate)?, view(OP, "up", up)?, view(OP, "g", g)?);
        cpu::swiglu::backward::<T>(&gate_view, &up, &g, &mut dgate, &mut dup, activation);
        Ok((tensor(dgate, gate.shape())?, tensor(dup, gate.shape())?))
    })
}

/// [`backward`] without new memory, and y on the way: `gate` becomes dgate, `up` becomes dup and `g` becomes y.
///
/// # Errors
/// Also where two of the three share memory.
pub fn backward_in_place(gate: &Tensor, up: &Tensor, g: &Tensor, activation: Activation) -> Result<()> {
    check(gate, &[("up", up), ("g", g)])?;
    if same_storage(gate, up) || same_storage(gate, g) || same_storage(up, g) {
        return Err(Error::op(OP, "gate, up and g are changed in place, but two of them share memory"));
    }
    #[cfg(feature = "cuda")]
    if cuda::takes(gate.device()) {
        return cuda::swiglu::backward_in_place(gate, up, g, activation);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if gate.device().is_metal() {
        let y = metal::swiglu::forward(gate, up, activation)?;
        let (dgate, dup) = metal::swiglu::backward(gate, up, g, activation)?;
        for (to, from) in [(gate, dgate), (up, dup), (g, y)] {
            to.slice_set(&from, 0, 0)?;
        }
        return Ok(());
    }
    on_cpu(OP, &[gate, up, g])?;
    by_dtype!(OP, "gate", gate.dtype(), T => update::<T, _>(OP, "gate", gate, |gate| {
        update::<T, _>(OP, "up", up, |up| {
            update::<T, _>(OP, "g", g, |g| {
                cpu::swiglu::backward_in_place(gate, up, g, activation);
                Ok(())
            })
        })
    }))
}

/// SwiGLU on Candle's tape, with gradients for both inputs. Any layout.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    on_tape(gate, up, Activation::Silu)
}

/// GeGLU on Candle's tape, with gradients for both inputs. Any layout.
pub fn geglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    on_tape(gate, up, Activation::GeluTanh)
}

fn on_tape(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let (gate, up) = (gate.contiguous()?, up.contiguous()?);
    let (saved_gate, saved_up) = (gate.detach(), up.detach());
    let y = forward(&saved_gate, &saved_up, activation)?;
    record(OP, [&gate, &up], y, move |g| {
        let (dgate, dup) = backward(&saved_gate, &saved_up, g, activation)?;
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
