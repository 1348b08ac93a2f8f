//! The linear with its adapter on CUDA. Where `shared_linear` takes a call, its kernels make it; else the LoRA kernel writes `s · (drop(x) A) B`, and cuBLASLt adds `x Wᵀ + bias` to it in its
//! epilogue; the same with dx. So the adapter costs one pass over x and y beside the base's product, and y is read once more.

use candle_core::cuda_backend::CudaDevice;
use candle_core::{CudaStorage, DType, Layout, Shape, Tensor};

use super::device::{Held, View, cuda_device, empty, tensor, uninit};
use super::fused_lora::{self, Size, with_last};
use super::shared_linear::{AdapterViews, PartViews};
use super::{linear, shared_linear};
use crate::Result;
use crate::backend::custom_ops::fused_lora::Sink;
use crate::backend::custom_ops::lora_linear::{Adapter, Part};
use crate::backend::dropout::Dropout;
use crate::backend::fallback;

const OP: &str = "lora_linear";
/// Elements of a matrix for which an f32 copy costs nothing.
const SMALL: usize = 1 << 16;

/// Whether the sum of base and adapter is made in f32 and rounded once. Else the adapter's part is rounded to x's dtype before
/// the base's is added, which doubles the rounding error where the two cancel over a whole small matrix.
pub(crate) fn in_f32(x: &Tensor, Size { m, k, n, .. }: Size) -> bool {
    m > 0 && x.dtype() != DType::F32 && m * n <= SMALL && m * k <= SMALL && n * k <= SMALL
}

/// `(y, h)`; see `custom_ops::lora_linear::forward`.
///
/// # Errors
/// When memory or a launch is refused.
#[allow(clippy::too_many_arguments)]
pub fn forward(
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    a: &Tensor,
    b: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
) -> Result<(Tensor, Tensor)> {
    let Size { m, k, r, n } = size;
    if m == 0 {
        let device = cuda_device(OP, x)?;
        return Ok((empty(device, with_last(x, n), x.dtype())?, empty(device, (0, r), DType::F32)?));
    }
    if x.dtype() != w.dtype() || in_f32(x, size) {
        let base = linear::forward(&x.to_dtype(DType::F32)?, &w.to_dtype(DType::F32)?, bias, [m, k, n])?;
        let h = fused_lora::add_into(&base, x, a, b, s, dropout, size)?;
        return Ok((base.to_dtype(x.dtype())?, h));
    }
    let adapter = Some(Adapter { a, b, s, dropout });
    if let Some(mut all) = shared_linear::forward(x, &[Part { w: w.into(), bias, adapter }])?
        && let Some((y, Some(h))) = all.pop()
    {
        return Ok((y, h));
    }
    let (device, shape) = (cuda_device(OP, x)?, with_last(x, n));
    let (x, w, a, b) = (x.contiguous()?, w.contiguous()?, a.contiguous()?, b.contiguous()?);
    let bias = bias.map(|bias| bias.to_dtype(x.dtype())?.contiguous()).transpose()?;
    let h = tensor(uninit(device, &Shape::from((m, r)), DType::F32)?, (m, r));
    let h_view = Held::of(OP, "h", &h)?.view;
    let (x, w) = (Held::of(OP, "x", &x)?, Held::of(OP, "w", &w)?);
    let (a, b) = (Held::of(OP, "a", &a)?, Held::of(OP, "b", &b)?);
    let bias = Held::option(OP, "bias", bias.as_ref())?.map(|bias| bias.view);
    let y = storage_forward(device, [x.view, w.view, a.view, b.view], bias, s, dropout, size, Some(h_view))?;
    Ok((tensor(y, shape), h))
}

/// y as storage, and h where it is given; `[x, W, A, B]`; x, W and bias share a dtype.
pub(super) fn storage_forward(
    device: &CudaDevice,
    [x, w, a, b]: [View; 4],
    bias: Option<View>,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
    h: Option<View>,
) -> Result<CudaStorage> {
    let Size { m, k, n, .. } = size;
    let storage = fused_lora::storage_delta(device, [x, a, b], s, dropout, size, h)?;
    let y = View::of(OP, "y", &storage, &Layout::contiguous((m, n)))?;
    linear::multiply_w(device, x, w, bias, y, true, [m, k, n])?;
    Ok(storage)
}

/// y for an op on Candle's tape, whose arguments are contiguous `(storage, layout)`; and h, for [`gradients`]. W and bias have
/// x's dtype.
#[allow(clippy::too_many_arguments)]
pub(crate) fn taped(
    [x, a, b]: [(&CudaStorage, &Layout); 3],
    w: &Tensor,
    bias: Option<&Tensor>,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
) -> Result<(CudaStorage, Tensor)> {
    let device = &x.0.device;
    if size.m == 0 {
        return fused_lora::taped([x, a, b], s, dropout, size);
    }
    let views = (View::of(OP, "x", x.0, x.1)?, View::of(OP, "a", a.0, a.1)?, View::of(OP, "b", b.0, b.1)?);
    let adapter = Some(AdapterViews { a: views.1, b: views.2, r: size.r, s, dropout });
    let frozen = (Held::of(OP, "w", w)?.view, Held::option(OP, "bias", bias)?.map(|bias| bias.view));
    let part = PartViews { w: Some(frozen.0), bias: frozen.1, n: size.n, adapter };
    if let Some(mut all) = shared_linear::storage_forward(device, views.0, size.m, size.k, &[part])?
        && let Some((y, Some(h))) = all.pop()
    {
        return Ok((y, h));
    }
    let h = tensor(uninit(device, &Shape::from((size.m, size.r)), DType::F32)?, (size.m, size.r));
    let h_view = Held::of(OP, "h", &h)?.view;
    let ((x, a, b), (w, bias)) = (views, frozen);
    Ok((storage_forward(device, [x, w, a, b], bias, s, dropout, size, Some(h_view))?, h))
}

/// The gradients of the wanted ones of x, A and B: dx of x's dtype, dA and dB f32. Nothing is zeroed first.
///
/// # Errors
/// When memory or a launch is refused.
#[allow(clippy::too_many_arguments)]
pub fn gradients(
    x: &Tensor,
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
    wanted: [bool; 3],
) -> Result<[Option<Tensor>; 3]> {
    let gradients = fused_lora::buffers(x, a, b, wanted)?;
    backward(x, w, a, b, h, g, s, dropout, size, &fused_lora::sink(&gradients), false)?;
    Ok(gradients)
}

/// Adds the gradients to the sinks, or with `add` false writes them; see `custom_ops::lora_linear::backward`.
///
/// # Errors
/// When memory or a launch is refused, or a sink is not contiguous.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    x: &Tensor,
    w: &Tensor,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    size: Size,
    sink: &Sink,
    add: bool,
) -> Result<()> {
    if let Some(dx) = sink.dx
        && dx.dtype() != DType::F32
        && size.m > 0
        && in_f32(x, size)
    {
        let sum = Tensor::zeros(dx.shape(), DType::F32, dx.device())?;
        backward(x, w, a, b, h, g, s, dropout, size, &Sink { dx: Some(&sum), ..*sink }, add)?;
        return match add {
            true => fallback::accumulate(dx, &sum),
            false => Ok(dx.detach().slice_set(&sum.to_dtype(dx.dtype())?, 0, 0)?),
        };
    }
    if size.m > 0 {
        let part = Part { w: w.into(), bias: None, adapter: Some(Adapter { a, b, s, dropout }) };
        let (dx, sinks) = (sink.dx.map(|dx| (dx, add)), [(sink.da, sink.db)]);
        let wanted = shared_linear::Wanted { h: &[h], g: &[g], dx, sinks: &sinks, add };
        if shared_linear::backward(x, &[part], &wanted)? {
            return Ok(());
        }
    }
    fused_lora::differentiate(x, a, b, h, g, s, dropout, size, sink, add)?;
    match sink.dx {
        Some(dx) if size.m > 0 => linear::input_gradient(w, g, dx, true, [size.m, size.k, size.n]),
        _ => Ok(()),
    }
}
