//! Puts a result that was computed off Candle's tape onto it, with a backward of our own.

use std::sync::Mutex;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Shape, Storage, Tensor,
};

use crate::{Error, Result};

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
