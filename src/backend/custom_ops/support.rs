//! What the ops share: choosing the element type, checks that name the tensor, and putting a computed result on the tape.

use std::sync::Mutex;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, MetalStorage, Shape, Storage,
    Tensor,
};

use crate::backend::fallback::device_name;
use crate::{Error, Result};

/// Evaluates an expression of type `Result` with `$T` standing for the element type of `$dtype`: f32, f16 or bf16.
macro_rules! by_dtype {
    ($op:expr, $name:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => Err($crate::Error::op($op, format!("{} has dtype {other:?}; f32, f16 and bf16 are taken", $name))),
        }
    };
}
pub(crate) use by_dtype;

/// Where an op has no kernel for `device`.
pub(crate) fn no_kernel(op: &str, device: &Device) -> Error {
    Error::Device {
        device: device_name(device).to_string(),
        problem: format!("{op} has no kernel for it; use the cpu"),
    }
}

/// All tensors must be on the CPU; else an error that names the op and the device.
pub(crate) fn on_cpu(op: &str, tensors: &[&Tensor]) -> Result<()> {
    match tensors.iter().find(|tensor| !tensor.device().is_cpu()) {
        Some(tensor) => Err(no_kernel(op, tensor.device())),
        None => Ok(()),
    }
}

/// `tensor` must have this dtype.
pub(crate) fn expect_dtype(op: &'static str, name: &str, tensor: &Tensor, dtype: DType) -> Result<()> {
    if tensor.dtype() == dtype {
        return Ok(());
    }
    Err(Error::op(op, format!("{name} has dtype {:?}, but {dtype:?} is needed", tensor.dtype())))
}

/// The three sizes of `tensor`, called `form` in the message.
pub(crate) fn dims3(op: &'static str, name: &str, tensor: &Tensor, form: &str) -> Result<(usize, usize, usize)> {
    match *tensor.dims() {
        [a, b, c] => Ok((a, b, c)),
        ref dims => Err(Error::op(op, format!("{name} has shape {dims:?}, but {form} is needed"))),
    }
}

/// The two sizes of `tensor`, called `form` in the message.
pub(crate) fn dims2(op: &'static str, name: &str, tensor: &Tensor, form: &str) -> Result<(usize, usize)> {
    match *tensor.dims() {
        [a, b] => Ok((a, b)),
        ref dims => Err(Error::op(op, format!("{name} has shape {dims:?}, but {form} is needed"))),
    }
}

/// Rows and row length of `tensor`, all leading dimensions taken as rows.
pub(crate) fn rows(op: &'static str, name: &str, tensor: &Tensor) -> Result<(usize, usize)> {
    match tensor.dims().split_last() {
        Some((&row, leading)) => Ok((leading.iter().product(), row)),
        None => Err(Error::op(op, format!("{name} is a scalar; at least one dimension is needed"))),
    }
}

/// A CPU tensor from the elements that a kernel wrote.
pub(crate) fn tensor<T: candle_core::WithDType>(elements: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(elements, shape.into(), &Device::Cpu)?)
}

/// Puts `output`, computed from `inputs` outside the tape, on Candle's tape: `backward` gets the gradient of the output,
/// contiguous and off the tape, and returns one gradient for each input, in the input's dtype (`None`: the input gets
/// none). One to three inputs. Where no input is tracked, `output` itself is returned; else its storage is copied once,
/// since Candle makes the tape's tensor from a storage that the op hands over.
pub(crate) fn record<const N: usize>(
    op: &'static str,
    inputs: [&Tensor; N],
    output: Tensor,
    backward: impl Fn(&Tensor) -> Result<[Option<Tensor>; N]> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !inputs.iter().any(|input| input.track_op()) {
        return Ok(output);
    }
    let backward = move |grad: &Tensor| Ok(backward(grad)?.into());
    let recorded = Recorded { op, output: Mutex::new(Some(output)), backward: Box::new(backward) };
    Ok(match inputs.as_slice() {
        [a] => a.apply_op1(recorded)?,
        [a, b] => a.apply_op2(b, recorded)?,
        [a, b, c] => a.apply_op3(b, c, recorded)?,
        _ => return Err(Error::op(op, format!("{N} tracked inputs; Candle's tape takes one to three"))),
    })
}

type Backward = Box<dyn Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

struct Recorded {
    op: &'static str,
    output: Mutex<Option<Tensor>>,
    backward: Backward,
}

impl Recorded {
    fn hand_over(&self) -> candle_core::Result<(Storage, Shape)> {
        let output = self.output.lock().ok().and_then(|mut output| output.take());
        let output = output.ok_or_else(|| Error::op(self.op, "its result was already taken"))?;
        let (storage, layout) = output.storage_and_layout();
        Ok((storage.try_clone(layout)?, output.shape().clone()))
    }

    fn cpu(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.hand_over()? {
            (Storage::Cpu(storage), shape) => Ok((storage, shape)),
            _ => Err(Error::op(self.op, "inputs are on the CPU, the result is not").into()),
        }
    }

    fn cuda(&self) -> candle_core::Result<(CudaStorage, Shape)> {
        match self.hand_over()? {
            (Storage::Cuda(storage), shape) => Ok((storage, shape)),
            _ => Err(Error::op(self.op, "inputs are on a CUDA device, the result is not").into()),
        }
    }

    fn metal(&self) -> candle_core::Result<(MetalStorage, Shape)> {
        match self.hand_over()? {
            (Storage::Metal(storage), shape) => Ok((storage, shape)),
            _ => Err(Error::op(self.op, "inputs are on a Metal device, the result is not").into()),
        }
    }

    fn gradients(&self, grad: &Tensor) -> candle_core::Result<impl Iterator<Item = Option<Tensor>>> {
        Ok((self.backward)(&grad.detach().contiguous()?)?.into_iter())
    }
}

impl CustomOp1 for Recorded {
    fn name(&self) -> &'static str {
        self.op
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        self.metal()
    }
    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let mut grads = self.gradients(grad)?;
        Ok(grads.next().flatten())
    }
}

impl CustomOp2 for Recorded {
    fn name(&self) -> &'static str {
        self.op
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        self.metal()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.gradients(grad)?;
        Ok((grads.next().flatten(), grads.next().flatten()))
    }
}

impl CustomOp3 for Recorded {
    fn name(&self) -> &'static str {
        self.op
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        self.metal()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.gradients(grad)?;
        Ok((grads.next().flatten(), grads.next().flatten(), grads.next().flatten()))
    }
}
