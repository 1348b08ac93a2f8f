//! The CPU kernels, one file an op, and what they share: typed views of tensors, in-place access, splitting over cores.
//!
//! Kernels take slices and sizes; the checks of shapes, dtypes and devices are the ops' (`backend::custom_ops`).
//! Loops over the last dimension are plain iterator code that runs inside [`simd`], where the compiler may use the widest
//! vectors that the processor has. Sums are f32. Every kernel gives the same bits whatever the number of threads: work is
//! split by the shape, never by the machine.

pub mod adamw;
pub mod attention;
pub mod bf16_product;
pub mod blocks;
pub mod blocks_dot;
pub mod cross_entropy;
pub mod dora;
pub mod embedding;
pub mod exp;
pub mod floats;
pub mod fused_lora;
pub mod gemm;
pub mod linear;
pub mod memory;
pub mod rms_norm;
pub mod rope;
pub mod skinny;
pub mod swiglu;

use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::sync::Mutex;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor, WithDType};
use half::{bf16, f16};

use crate::{Error, Result};

/// An element type of the CPU kernels: f32, f16 or bf16. Arithmetic is done in f32.
pub trait Element: WithDType + Send + Sync {
    /// Exact.
    fn widen(self) -> f32;
    /// Rounded to nearest, ties to even.
    fn narrow(value: f32) -> Self;
    /// The elements, when the storage is of this type.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
    #[inline]
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::F32(elements) => Some(elements),
            _ => None,
        }
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        f16::from_f32(value)
    }
    #[inline]
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::F16(elements) => Some(elements),
            _ => None,
        }
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }
    #[inline]
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
        match storage {
            CpuStorage::BF16(elements) => Some(elements),
            _ => None,
        }
    }
}

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

/// Runs `f` with the widest vector instructions of this processor. `f` and what it calls must be `#[inline(always)]`
/// to be compiled for them.
#[inline(always)]
pub fn simd<R>(f: impl FnOnce() -> R) -> R {
    struct Call<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Call<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    arch().dispatch(Call(f))
}

/// Runs `f` on a thread of rayon's pool. From any other thread each loop over the cores would wake the pool and wait for it, which
/// takes longer than many of the loops do.
pub fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// The vector instructions of this processor, for kernels that are written with `pulp`'s vectors.
#[inline(always)]
fn arch() -> pulp::Arch {
    static ARCH: std::sync::LazyLock<pulp::Arch> = std::sync::LazyLock::new(pulp::Arch::new);
    *ARCH
}

/// A CPU tensor from the elements that a kernel wrote.
pub(crate) fn tensor<T: WithDType>(elements: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(elements, shape.into(), &Device::Cpu)?)
}

/// The elements of a contiguous CPU tensor, read-locked.
pub struct View<'a, T> {
    storage: StorageRef<'a>,
    range: Range<usize>,
    element: PhantomData<T>,
}

impl<T: WithDType> Deref for View<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match &*self.storage {
            Storage::Cpu(storage) => match storage.as_slice::<T>() {
                Ok(all) => &all[self.range.clone()],
                Err(_) => unreachable!("view() checked the dtype"),
            },
            _ => unreachable!("view() checked the device"),
        }
    }
}

/// Reads a contiguous CPU tensor of dtype `T` (offset honoured). Anything else is an error that names the op and the tensor.
pub fn view<'a, T: WithDType>(op: &'static str, name: &str, tensor: &'a Tensor) -> Result<View<'a, T>> {
    let (storage, layout) = tensor.storage_and_layout();
    let range = contiguous_range(op, name, layout)?;
    match &*storage {
        Storage::Cpu(cpu) => {
            check_dtype::<T>(op, name, cpu.dtype())?;
        }
        _ => return Err(Error::op(op, format!("{name} is not on the CPU but on {:?}", tensor.device()))),
    }
    Ok(View { storage, range, element: PhantomData })
}

/// Whether two tensors are views of the same memory.
pub(crate) fn same_storage(a: &Tensor, b: &Tensor) -> bool {
    let place = |tensor: &Tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0);
    place(a) == place(b)
}

/// Gives `f` the elements of a contiguous CPU tensor (offset honoured) to change in place. All views of the same storage
/// see the change. `f` must not read a tensor that shares `dst`'s storage.
pub fn update<T: Element, R>(
    op: &'static str,
    name: &str,
    dst: &Tensor,
    f: impl FnOnce(&mut [T]) -> Result<R>,
) -> Result<R> {
    // Candle takes the zero strides of an empty tensor for repeated elements and refuses it.
    if dst.elem_count() == 0 {
        return f(&mut []);
    }
    struct Update<F, R> {
        op: &'static str,
        name: String,
        f: Mutex<Option<F>>,
        result: Mutex<Option<Result<R>>>,
    }
    impl<F, R> Update<F, R> {
        fn run<T: Element>(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()>
        where
            F: FnOnce(&mut [T]) -> Result<R>,
        {
            let range = contiguous_range(self.op, &self.name, layout)?;
            check_dtype::<T>(self.op, &self.name, storage.dtype())?;
            let all = T::slice_mut(storage).ok_or_else(|| Error::op(self.op, "unexpected storage"))?;
            let f = self.f.lock().ok().and_then(|mut f| f.take());
            let f = f.ok_or_else(|| Error::op(self.op, "ran twice"))?;
            let result = f(&mut all[range]);
            if let Ok(mut slot) = self.result.lock() {
                *slot = Some(result);
            }
            Ok(())
        }
    }
    struct Typed<F, R, T>(Update<F, R>, PhantomData<T>);
    impl<T: Element, R, F: FnOnce(&mut [T]) -> Result<R>> InplaceOp1 for Typed<F, R, T> {
        fn name(&self) -> &'static str {
            self.0.op
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            Ok(self.0.run::<T>(storage, layout)?)
        }
    }
    let call = Typed(
        Update { op, name: name.to_string(), f: Mutex::new(Some(f)), result: Mutex::new(None) },
        PhantomData::<T>,
    );
    dst.inplace_op1(&call)?;
    let result = call.0.result.into_inner().ok().flatten();
    result.unwrap_or_else(|| Err(Error::op(op, format!("{name} is not on the CPU"))))
}

fn contiguous_range(op: &'static str, name: &str, layout: &Layout) -> Result<Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => Err(Error::op(op, format!("{name} {:?} is not contiguous", layout.shape()))),
    }
}

fn check_dtype<T: WithDType>(op: &'static str, name: &str, found: DType) -> Result<()> {
    if found == T::DTYPE {
        return Ok(());
    }
    Err(Error::op(op, format!("{name} has dtype {found:?}, but {:?} is needed", T::DTYPE)))
}
