//! The base linear layer: `y = x Wᵀ + bias`.
//!
//! x `[.., k]`, W `[n, k]`, bias `[n]`, y and g `[.., n]`, each f32, f16 or bf16, W also quantized; y has x's dtype. Sums are f32.
//! Gradients: `dx += g W`, `dW += gᵀ x`, `dbias += Σ rows of g`. Gradients of parameters are f32; dx is f32 or of x's dtype.
//! On Metal the products are Candle's own `matmul`, in f32 for gradients: that is the way there, not a fallback.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor};

use super::check::{self, with_last};
use super::tape::record;
use super::weight::{Frozen, Weight};
use crate::backend::cpu::floats::{Floats, Held, storage_of, tensor_of, update_f32};
use crate::backend::{cpu, cuda, fallback};
use crate::{Error, Result};

const OP: &str = "linear";

/// `x Wᵀ + bias`, `[.., n]`, of x's dtype.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn forward<'a>(x: &Tensor, w: impl Into<Weight<'a>>, bias: Option<&Tensor>) -> Result<Tensor> {
    let w = w.into();
    let size = Size::of(OP, x, w, bias)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        let sizes = [size.m, size.k, size.n];
        if let Weight::Quantized(w) = w
            && let Some(y) = cuda::few_rows::forward(x, w, bias, sizes)?
        {
            return Ok(y);
        }
        return cuda::linear::forward(x, &w.to_dense(x.dtype())?, bias, sizes);
    }
    let shape = with_last(x.dims(), size.n);
    if !x.device().is_cpu() {
        return composite(&x.detach(), &w.to_dense(x.dtype())?.detach(), bias, &size)?
            .detach()
            .reshape(shape)
            .map_err(Error::from);
    }
    let x = x.contiguous()?;
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let bias = bias.as_ref().map(|bias| Held::of(OP, "bias", bias)).transpose()?;
    let bias = bias.as_ref().map(|bias| bias.floats().to_f32());
    let values = Held::of(OP, "x", &x)?;
    let w = w.contiguous()?;
    let y = cpu::linear::forward(
        &values.floats(),
        &Held::weight(OP, "w", w.borrow())?.floats(),
        bias.as_deref(),
        size.m,
        size.k,
        size.n,
    );
    tensor_of(y, shape, x.dtype())
}

/// Adds the gradients that have somewhere to go; a `None` is not computed.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn backward<'a>(
    x: &Tensor,
    w: impl Into<Weight<'a>>,
    g: &Tensor,
    dx: Option<&Tensor>,
    dw: Option<&Tensor>,
    dbias: Option<&Tensor>,
) -> Result<()> {
    let w = w.into();
    let size = Size::of(OP, x, w, None)?;
    check::gradient(OP, "g", g, &with_last(x.dims(), size.n), x)?;
    if let Some(dx) = dx {
        check::gradient(OP, "dx", dx, x.dims(), x)?;
    }
    if let Some(dw) = dw {
        check::sink(OP, "dw", dw, w.dims(), x)?;
        if matches!(w, Weight::Quantized(_)) {
            return Err(Error::op(OP, "dw is wanted of a quantized w, which is frozen"));
        }
    }
    if let Some(dbias) = dbias {
        check::sink(OP, "dbias", dbias, &[size.n], x)?;
    }
    let Size { m, k, n } = size;
    #[cfg(feature = "cuda")]
    if cuda::takes(x.device()) {
        return cuda::linear::backward(x, &w.to_dense(x.dtype())?, g, dx, dw, dbias, [m, k, n]);
    }
    if !x.device().is_cpu() {
        let g = g.to_dtype(DType::F32)?.reshape((m, n))?;
        if let Some(dx) = dx {
            fallback::accumulate(dx, &g.matmul(&w.to_dense(DType::F32)?.to_dtype(DType::F32)?)?)?;
        }
        if let Some(dw) = dw {
            fallback::accumulate(dw, &g.t()?.matmul(&x.to_dtype(DType::F32)?.reshape((m, k))?)?)?;
        }
        if let Some(dbias) = dbias {
            fallback::accumulate(dbias, &g.sum(0)?)?;
        }
        return Ok(());
    }
    let g = g.contiguous()?;
    let g = Held::of(OP, "g", &g)?;
    if let Some(dx) = dx {
        let w = w.contiguous()?;
        let w = Held::weight(OP, "w", w.borrow())?;
        update_f32(OP, "dx", dx, |dx| {
            cpu::linear::input_gradient(&g.floats(), &w.floats(), dx, m, k, n);
            Ok(())
        })?;
    }
    if dw.is_none() && dbias.is_none() {
        return Ok(());
    }
    let g = g.floats().to_f32();
    if let Some(dw) = dw {
        let x = x.contiguous()?;
        let x = Held::of(OP, "x", &x)?;
        let x = x.floats().to_f32();
        cpu::update(OP, "dw", dw, |dw| {
            cpu::linear::weight_gradient(&x, &g, dw, m, k, n);
            Ok(())
        })?;
    }
    if let Some(dbias) = dbias {
        cpu::update(OP, "dbias", dbias, |dbias| {
            cpu::linear::bias_gradient(&g, dbias, n);
            Ok(())
        })?;
    }
    Ok(())
}

/// [`forward`] on Candle's tape: x gets a gradient where it is tracked; W and bias are frozen and get none, even where they
/// are variables. What is quantized stays so until backward.
///
/// # Errors
/// A wrong shape, dtype or device; the message names the tensor and both shapes.
pub fn linear<'a>(x: &Tensor, w: impl Into<Weight<'a>>, bias: Option<&Tensor>) -> Result<Tensor> {
    let w = w.into();
    let size = Size::of(OP, x, w, bias)?;
    let bias = bias.map(Tensor::detach);
    if cuda::takes(x.device()) && size.m > 0 && w.differs_from(x.dtype()) {
        // Two dtypes meet in f32 on this device, as they do on the CPU.
        let y = linear(&x.to_dtype(DType::F32)?, w.to_dtype(DType::F32)?.borrow(), bias.as_ref())?;
        return Ok(y.to_dtype(x.dtype())?);
    }
    if !x.device().is_cpu() && !cuda::takes(x.device()) {
        return match w {
            Weight::Dense(w) => {
                let y = composite(x, &w.detach(), bias.as_ref(), &size)?;
                Ok(y.reshape(with_last(x.dims(), size.n))?)
            }
            Weight::Quantized(_) => recorded(x, w, bias.as_ref()),
        };
    }
    let bias = bias.map(|bias| match cuda::takes(x.device()) {
        true => bias.to_dtype(x.dtype())?.contiguous(),
        false => bias.contiguous(),
    });
    let taped = Taped { w: w.contiguous()?, bias: bias.transpose()?, size };
    Ok(x.contiguous()?.apply_op1(taped)?)
}

/// [`linear`] of plain functions: the products of Candle's tape would keep the weight as a tensor.
fn recorded(x: &Tensor, w: Weight, bias: Option<&Tensor>) -> Result<Tensor> {
    let (of, w) = (x.detach(), w.contiguous()?);
    record(OP, [x], forward(&of, w.borrow(), bias)?, move |g| {
        let dx = of.zeros_like()?;
        backward(&of, w.borrow(), g, Some(&dx), None, None)?;
        Ok([Some(dx)])
    })
}

/// The op on the tape; its tensors are contiguous.
struct Taped {
    w: Frozen,
    bias: Option<Tensor>,
    size: Size,
}

impl CustomOp1 for Taped {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let bias = self.bias.as_ref().map(|bias| Held::of(OP, "bias", bias)).transpose()?;
        let bias = bias.as_ref().map(|bias| bias.floats().to_f32());
        let (w, Size { m, k, n }) = (Held::weight(OP, "w", self.w.borrow())?, self.size);
        let values = Floats::of(OP, "x", x, layout)?;
        let y = cpu::linear::forward(&values, &w.floats(), bias.as_deref(), m, k, n);
        Ok((storage_of(y, x.dtype()), with_last(layout.dims(), n).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let Size { m, k, n } = self.size;
        let w = self.w.borrow().to_dense(x.dtype())?;
        let y = cuda::linear::taped((x, layout), &w, self.bias.as_ref(), [m, k, n])?;
        Ok((y, with_last(layout.dims(), n).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if cuda::takes(x.device()) {
            let Size { m, k, n } = self.size;
            let w = self.w.borrow().to_dense(x.dtype())?;
            return Ok(Some(cuda::linear::gradient(x, &w, g, [m, k, n])?));
        }
        let dx = x.zeros_like()?;
        backward(x, self.w.borrow(), g, Some(&dx), None, None)?;
        Ok(Some(dx))
    }
}

/// m rows of x, k and n columns of x and y.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub m: usize,
    pub k: usize,
    pub n: usize,
}

impl Size {
    /// Checks shapes, dtypes and devices.
    pub fn of(op: &'static str, x: &Tensor, w: Weight, bias: Option<&Tensor>) -> Result<Self> {
        let k = check::last(op, "x", x.dims())?;
        check::float(op, "x", x)?;
        w.check(op, "w", x)?;
        let n = match *w.dims() {
            [n, columns] if columns == k && n > 0 => n,
            _ => {
                let (w, x) = (w.dims(), x.dims());
                return Err(Error::op(
                    op,
                    format!("w {w:?} does not fit x {x:?}: w must be [n, {k}] with n at least 1"),
                ));
            }
        };
        if let Some(bias) = bias {
            check::float(op, "bias", bias)?;
            check::same_device(op, "bias", bias, "x", x)?;
            check::shape(op, "bias", bias, &[n])?;
        }
        Ok(Self { m: x.elem_count() / k, k, n })
    }
}

/// The same by Candle's ops, `[m, n]`.
pub(super) fn composite(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, size: &Size) -> Result<Tensor> {
    let rows = x.reshape((size.m, size.k))?;
    let y = rows.matmul(&w.to_dtype(x.dtype())?.t()?)?;
    Ok(match bias {
        Some(bias) => y.broadcast_add(&bias.to_dtype(x.dtype())?)?,
        None => y,
    })
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::backend::quantized::{Kind, QuantizedTensor};

    /// Where there is no op of our own on the tape, it records the plain functions.
    #[test]
    fn recorded_is_taped() {
        let random = |shape: (usize, usize)| Tensor::randn(0f32, 1.0, shape, &Device::Cpu).unwrap();
        let w = QuantizedTensor::quantize(&random((5, 64)), Kind::Nf4).unwrap();
        let (x, g) = (Var::from_tensor(&random((64, 3))).unwrap(), random((3, 5)));
        let x_rows = x.t().unwrap();
        let both = [linear(&x_rows, &w, None).unwrap(), recorded(&x_rows, (&w).into(), None).unwrap()];
        let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let dx = |y: &Tensor| {
            let gradients = (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
            values(gradients.get(&x).unwrap())
        };
        assert_eq!(values(&both[0]), values(&both[1]));
        assert_eq!(dx(&both[0]), dx(&both[1]));
        assert!(dx(&both[0]).iter().any(|dx| *dx != 0.0));
    }
}
