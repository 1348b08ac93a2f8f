//! SwiGLU and GeGLU on CUDA: `swiglu.cuh`. Shapes and dtypes were checked by `custom_ops::swiglu`.

use candle_core::Tensor;

use super::device::{Gpu, Held, View, cuda_device, empty, tensor, uninit, wide};
use crate::Result;
use crate::backend::custom_ops::swiglu::Activation;

const OP: &str = "swiglu";

#[repr(C)]
#[derive(Default)]
struct Args {
    gate: u64,
    up: u64,
    g: u64,
    y: u64,
    dgate: u64,
    dup: u64,
    count: i64,
}

/// `act(gate) · up`.
pub fn forward(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let device = cuda_device(OP, gate)?;
    if gate.elem_count() == 0 {
        return empty(device, gate.shape(), gate.dtype());
    }
    let y = tensor(uninit(device, gate.shape(), gate.dtype())?, gate.shape());
    let views = [Held::of(OP, "gate", gate)?.view, Held::of(OP, "up", up)?.view];
    let count = gate.elem_count() as i64;
    let y_ptr = Held::of(OP, "y", &y)?.view.ptr;
    let args = Args { gate: views[0].ptr, up: views[1].ptr, y: y_ptr, count, ..Args::default() };
    let fits = gate.elem_count().is_multiple_of(8) && views.iter().all(View::aligned);
    let kernel = match activation {
        Activation::Silu => wide!("swiglu_forward", gate.dtype(), fits),
        Activation::GeluTanh => wide!("geglu_forward", gate.dtype(), fits),
    };
    launch(gate, kernel, fits, &args)?;
    Ok(y)
}

/// `(dgate, dup)`.
pub fn backward(gate: &Tensor, up: &Tensor, g: &Tensor, activation: Activation) -> Result<(Tensor, Tensor)> {
    let device = cuda_device(OP, gate)?;
    if gate.elem_count() == 0 {
        let none = || empty(device, gate.shape(), gate.dtype());
        return Ok((none()?, none()?));
    }
    let like = || Ok::<_, crate::Error>(tensor(uninit(device, gate.shape(), gate.dtype())?, gate.shape()));
    let (dgate, dup) = (like()?, like()?);
    differentiate([gate, up, g], [&dgate, &dup], None, activation)?;
    Ok((dgate, dup))
}

/// gate becomes dgate, up becomes dup and g becomes y.
pub fn backward_in_place(gate: &Tensor, up: &Tensor, g: &Tensor, activation: Activation) -> Result<()> {
    if gate.elem_count() == 0 {
        return Ok(());
    }
    differentiate([gate, up, g], [gate, up], Some(g), activation)
}

fn differentiate(from: [&Tensor; 3], to: [&Tensor; 2], y: Option<&Tensor>, activation: Activation) -> Result<()> {
    let [gate, up, g] = from;
    let views = [Held::of(OP, "gate", gate)?.view, Held::of(OP, "up", up)?.view, Held::of(OP, "g", g)?.view];
    let args = Args {
        gate: views[0].ptr,
        up: views[1].ptr,
        g: views[2].ptr,
        y: Held::option(OP, "y", y)?.map_or(0, |y| y.view.ptr),
        dgate: Held::of(OP, "dgate", to[0])?.view.ptr,
        dup: Held::of(OP, "dup", to[1])?.view.ptr,
        count: gate.elem_count() as i64,
    };
    let fits = gate.elem_count().is_multiple_of(8) && views.iter().all(View::aligned);
    let kernel = match activation {
        Activation::Silu => wide!("swiglu_backward", gate.dtype(), fits),
        Activation::GeluTanh => wide!("geglu_backward", gate.dtype(), fits),
    };
    launch(gate, kernel, fits, &args)
}

fn launch(gate: &Tensor, kernel: super::device::Kernel, fits: bool, args: &Args) -> Result<()> {
    let device = cuda_device(OP, gate)?;
    let gpu = Gpu::of(device)?;
    let blocks = gpu.blocks(gate.elem_count() / if fits { 8 } else { 1 });
    // SAFETY: `Args` mirrors the kernels'; all tensors have `count` elements; memory is of this stream.
    unsafe { gpu.launch(kernel, blocks, 8, 0, &device.cuda_stream(), args) }
}
