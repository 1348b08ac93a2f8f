//! The base linear's products on CUDA, by `shared_linear` where it takes them, else by cuBLASLt: f32 sums, f32 inputs in full f32 (no TF32).
//!
//! cuBLASLt is column-major: a row-major `[m, n]` is its `n × m`. So `y = x Wᵀ` is `W' (n × k) · x' (k × m)`.

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::time::Instant;

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::cublaslt::{result, sys};
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaStorage, DType, Layout, Shape, Tensor};

use super::device::{Gpu, Held, View, cuda_device, empty, failed, tensor, uninit};
use super::fused_lora::with_last;
use super::shared_linear::{self, PartViews};
use crate::Result;
use crate::backend::fallback;

const OP: &str = "linear";
/// Scratch that cuBLASLt may use.
const WORKSPACE: usize = 32 << 20;
/// Algorithms that cuBLASLt is asked for.
const PROPOSALS: usize = 8;
/// From so many multiplications on, a tenth of a millisecond on a large GPU, algorithms are timed.
const TIMED_FROM: f64 = 3e10;

/// `x Wᵀ + bias`; see `custom_ops::linear::forward`. `[m, k, n]`.
///
/// # Errors
/// When memory or the product is refused.
pub fn forward(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, [m, k, n]: [usize; 3]) -> Result<Tensor> {
    let (device, shape) = (cuda_device(OP, x)?, with_last(x, n));
    if m == 0 {
        return empty(device, shape, x.dtype());
    }
    if x.dtype() != w.dtype() {
        let y = forward(&x.to_dtype(DType::F32)?, &w.to_dtype(DType::F32)?, bias, [m, k, n])?;
        return Ok(y.to_dtype(x.dtype())?);
    }
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    let bias = bias.map(|bias| bias.to_dtype(x.dtype())?.contiguous()).transpose()?;
    let (x, w) = (Held::of(OP, "x", &x)?, Held::of(OP, "w", &w)?);
    let bias = Held::option(OP, "bias", bias.as_ref())?;
    let y = storage_forward(device, x.view, w.view, bias.map(|bias| bias.view), [m, k, n])?;
    Ok(tensor(y, shape))
}

/// `x Wᵀ + bias` as storage, `[m, n]`; x, W and bias share a dtype.
pub(super) fn storage_forward(
    device: &CudaDevice,
    x: View,
    w: View,
    bias: Option<View>,
    [m, k, n]: [usize; 3],
) -> Result<CudaStorage> {
    let part = PartViews { w: Some(w), bias, n, adapter: None };
    if let Some(mut all) = shared_linear::storage_forward(device, x, m, k, &[part])?
        && let Some((y, _)) = all.pop()
    {
        return Ok(y);
    }
    let storage = uninit(device, &Shape::from((m, n)), x.dtype)?;
    let y = View::of(OP, "y", &storage, &Layout::contiguous((m, n)))?;
    multiply_w(device, x, w, bias, y, false, [m, k, n])?;
    Ok(storage)
}

/// `y (+)= x Wᵀ + bias`.
pub(super) fn multiply_w(
    device: &CudaDevice,
    x: View,
    w: View,
    bias: Option<View>,
    y: View,
    add: bool,
    [m, k, n]: [usize; 3],
) -> Result<()> {
    let left = Factor { view: w, rows: k, columns: n, transposed: true };
    let right = Factor { view: x, rows: k, columns: m, transposed: false };
    product(device, left, right, Output { view: y, rows: n, columns: m, add, bias })
}

/// y for an op on Candle's tape, whose argument is a contiguous `(storage, layout)`. W and bias have x's dtype.
pub(crate) fn taped(
    x: (&CudaStorage, &Layout),
    w: &Tensor,
    bias: Option<&Tensor>,
    sizes: [usize; 3],
) -> Result<CudaStorage> {
    let view = View::of(OP, "x", x.0, x.1)?;
    if sizes[0] == 0 {
        return uninit(&x.0.device, &Shape::from((1, sizes[2])), x.0.dtype());
    }
    let (w, bias) = (Held::of(OP, "w", w)?, Held::option(OP, "bias", bias)?);
    storage_forward(&x.0.device, view, w.view, bias.as_ref().map(|bias| bias.view), sizes)
}

/// dx of x's dtype; nothing is zeroed first.
///
/// # Errors
/// When memory or the product is refused.
pub fn gradient(x: &Tensor, w: &Tensor, g: &Tensor, sizes: [usize; 3]) -> Result<Tensor> {
    if sizes[0] == 0 {
        return empty(cuda_device(OP, x)?, x.shape(), x.dtype());
    }
    let dx = tensor(uninit(cuda_device(OP, x)?, x.shape(), x.dtype())?, x.shape());
    input_gradient(w, g, &dx, false, sizes)?;
    Ok(dx)
}

/// Memory of x's shape and dtype; every element must be written.
pub(crate) fn uninit_like(x: &Tensor) -> Result<Tensor> {
    Ok(tensor(uninit(cuda_device(OP, x)?, x.shape(), x.dtype())?, x.shape()))
}

/// Adds to the gradients that have somewhere to go; see `custom_ops::linear::backward`. `[m, k, n]`.
///
/// # Errors
/// When memory or a product is refused, or a sink is not contiguous.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    x: &Tensor,
    w: &Tensor,
    g: &Tensor,
    dx: Option<&Tensor>,
    dw: Option<&Tensor>,
    dbias: Option<&Tensor>,
    [m, k, n]: [usize; 3],
) -> Result<()> {
    if m == 0 {
        return Ok(());
    }
    if let Some(dx) = dx {
        input_gradient(w, g, dx, true, [m, k, n])?;
    }
    if let Some(dw) = dw {
        let dtype = if x.dtype() == g.dtype() { g.dtype() } else { DType::F32 };
        let (x, g) = (x.to_dtype(dtype)?.contiguous()?, g.to_dtype(dtype)?.contiguous()?);
        let (x, g, dw) = (Held::of(OP, "x", &x)?, Held::of(OP, "g", &g)?, Held::of(OP, "dw", dw)?);
        let left = Factor { view: x.view, rows: k, columns: m, transposed: false };
        let right = Factor { view: g.view, rows: n, columns: m, transposed: true };
        let to = Output { view: dw.view, rows: k, columns: n, add: true, bias: None };
        product(cuda_device(OP, w)?, left, right, to)?;
    }
    if let Some(dbias) = dbias {
        fallback::accumulate(dbias, &g.to_dtype(DType::F32)?.reshape((m, n))?.sum(0)?)?;
    }
    Ok(())
}

/// `to = x Wᵀ` in f32, whatever the dtypes of x `[m, k]` and W `[n, k]`.
pub(super) fn logits(x: &Tensor, w: &Tensor, to: View, sizes: [usize; 3]) -> Result<()> {
    let dtype = if x.dtype() == w.dtype() { x.dtype() } else { DType::F32 };
    let (x, w) = (x.to_dtype(dtype)?.contiguous()?, w.to_dtype(dtype)?.contiguous()?);
    let device = cuda_device(OP, &x)?;
    multiply_w(device, Held::of(OP, "x", &x)?.view, Held::of(OP, "w", &w)?.view, None, to, false, sizes)
}

/// `dx (+)= g W`.
pub(super) fn input_gradient(w: &Tensor, g: &Tensor, dx: &Tensor, add: bool, [m, k, n]: [usize; 3]) -> Result<()> {
    let dtype = if w.dtype() == g.dtype() { g.dtype() } else { DType::F32 };
    let (w, g) = (w.to_dtype(dtype)?.contiguous()?, g.to_dtype(dtype)?.contiguous()?);
    if dx.dtype() != dtype && dx.dtype() != DType::F32 {
        // f32 factors, half-precision sink.
        let sum = Tensor::zeros(dx.shape(), DType::F32, dx.device())?;
        input_gradient(&w, &g, &sum, false, [m, k, n])?;
        return match add {
            true => fallback::accumulate(dx, &sum),
            false => Ok(dx.detach().slice_set(&sum.to_dtype(dx.dtype())?, 0, 0)?),
        };
    }
    let device = cuda_device(OP, &w)?;
    let (w, g, dx) = (Held::of(OP, "w", &w)?, Held::of(OP, "g", &g)?, Held::of(OP, "dx", dx)?);
    if shared_linear::input_gradient(device, g.view, w.view, dx.view, add, [m, k, n])? {
        return Ok(());
    }
    let left = Factor { view: w.view, rows: k, columns: n, transposed: false };
    let right = Factor { view: g.view, rows: n, columns: m, transposed: false };
    product(device, left, right, Output { view: dx.view, rows: k, columns: m, add, bias: None })
}

/// A factor as it lies, column-major and without gaps.
#[derive(Clone, Copy)]
struct Factor {
    view: View,
    rows: usize,
    columns: usize,
    transposed: bool,
}

#[derive(Clone, Copy)]
struct Output {
    view: View,
    rows: usize,
    columns: usize,
    add: bool,
    bias: Option<View>,
}

/// `to (+)= left · right + bias`.
fn product(device: &CudaDevice, left: Factor, right: Factor, to: Output) -> Result<()> {
    let gpu = Gpu::of(device)?;
    gpu.bind()?;
    let stream = device.cuda_stream();
    let mut products = gpu.products()?;
    let handle = products.handle;
    let plan = products.plan(device, &left, &right, &to)?;
    if let Some(bias) = to.bias {
        // SAFETY: the attribute takes a pointer.
        unsafe {
            set_desc(plan.desc, sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.ptr)?
        };
    }
    let workspace = match plan.workspace {
        0 => None,
        // SAFETY: scratch, which cuBLASLt writes before it reads.
        size => Some(unsafe { device.alloc::<u8>(size) }?),
    };
    let workspace_ptr = workspace.as_ref().map_or(0, |workspace| super::device::address(workspace, &stream));
    // SAFETY: descriptors live in `products`; pointers are of this stream, with the sizes that the layouts say.
    unsafe {
        plan.run(handle, &plan.algorithm, &left, &right, to.view.ptr, to.add, (workspace_ptr, plan.workspace), &stream)
    }
}

/// What decides cuBLASLt's choice of algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    sizes: [usize; 3],
    dtypes: [DType; 2],
    transposed: [bool; 2],
    add: bool,
    bias: bool,
    alignments: [u32; 3],
}

struct Plan {
    desc: sys::cublasLtMatmulDesc_t,
    left: sys::cublasLtMatrixLayout_t,
    right: sys::cublasLtMatrixLayout_t,
    to: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace: usize,
}

impl Plan {
    /// Puts the product on the stream; `workspace` is address and size.
    ///
    /// # Safety
    /// The pointers must be of `stream`, with the sizes that the layouts say.
    #[allow(clippy::too_many_arguments)]
    unsafe fn run(
        &self,
        handle: sys::cublasLtHandle_t,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        left: &Factor,
        right: &Factor,
        to: u64,
        add: bool,
        workspace: (u64, usize),
        stream: &CudaStream,
    ) -> Result<()> {
        let (one, beta) = (1.0_f32, if add { 1.0_f32 } else { 0.0 });
        // SAFETY: the caller's; alpha and beta are f32, the scale type, and are read before the call returns.
        unsafe {
            result::matmul(
                handle,
                self.desc,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                left.view.ptr as *const c_void,
                self.left,
                right.view.ptr as *const c_void,
                self.right,
                to as *const c_void,
                self.to,
                to as *mut c_void,
                self.to,
                algorithm,
                workspace.0 as *mut c_void,
                workspace.1,
                stream.cu_stream().cast(),
            )
        }
        .map_err(cublas)
    }

    /// Of the algorithms that cuBLASLt proposes, takes the one that is fastest here, on scratch: a large product is timed once a
    /// shape, and its first call waits for that.
    fn choose(
        &mut self,
        handle: sys::cublasLtHandle_t,
        device: &CudaDevice,
        proposed: &[sys::cublasLtMatmulHeuristicResult_t],
        left: &Factor,
        right: &Factor,
        to: &Output,
    ) -> Result<()> {
        const CALLS: usize = 3;
        let stream = device.cuda_stream();
        let scratch = device.alloc_zeros::<u8>(to.rows * to.columns * to.view.dtype.size_in_bytes())?;
        // SAFETY: scratch.
        let workspace = unsafe { device.alloc::<u8>(WORKSPACE) }?;
        let (to_ptr, workspace) =
            (super::device::address(&scratch, &stream), super::device::address(&workspace, &stream));
        let mut fastest = f64::INFINITY;
        for found in proposed {
            let run = || {
                // SAFETY: the output and the workspace are scratch of the sizes that the layouts and the proposal say.
                unsafe {
                    self.run(
                        handle,
                        &found.algo,
                        left,
                        right,
                        to_ptr,
                        to.add,
                        (workspace, found.workspaceSize),
                        &stream,
                    )
                }
            };
            if run().is_err() {
                continue;
            }
            device.synchronize()?;
            let start = Instant::now();
            (0..CALLS).try_for_each(|_| run())?;
            device.synchronize()?;
            let seconds = start.elapsed().as_secs_f64();
            if seconds < fastest {
                (fastest, self.algorithm, self.workspace) = (seconds, found.algo, found.workspaceSize);
            }
        }
        Ok(())
    }
}

/// cuBLASLt on one GPU, with the algorithms that it chose.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Key, Plan>,
}

impl Products {
    pub fn new() -> Result<Self> {
        Ok(Self { handle: result::create_handle().map_err(cublas)?, plans: HashMap::new() })
    }

    fn plan(&mut self, device: &CudaDevice, left: &Factor, right: &Factor, to: &Output) -> Result<&Plan> {
        let alignment = |ptr: u64| 1 << ptr.trailing_zeros().min(8);
        let key = Key {
            sizes: [to.rows, to.columns, if left.transposed { left.rows } else { left.columns }],
            dtypes: [left.view.dtype, to.view.dtype],
            transposed: [left.transposed, right.transposed],
            add: to.add,
            bias: to.bias.is_some(),
            alignments: [alignment(left.view.ptr), alignment(right.view.ptr), alignment(to.view.ptr)],
        };
        if !self.plans.contains_key(&key) {
            let plan = make_plan(self.handle, device, &key, left, right, to)?;
            self.plans.insert(key, plan);
        }
        Ok(&self.plans[&key])
    }
}

fn make_plan(
    handle: sys::cublasLtHandle_t,
    device: &CudaDevice,
    key: &Key,
    left: &Factor,
    right: &Factor,
    to: &Output,
) -> Result<Plan> {
    use sys::cublasLtMatmulDescAttributes_t as Desc;
    use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
    let layout = |dtype, rows: usize, columns: usize| {
        result::create_matrix_layout(data_type(dtype), rows as u64, columns as u64, rows as i64).map_err(cublas)
    };
    let operation = |transposed| i32::from(transposed);
    let desc =
        result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType_t::CUDA_R_32F)
            .map_err(cublas)?;
    let left_layout = layout(left.view.dtype, left.rows, left.columns)?;
    let right_layout = layout(right.view.dtype, right.rows, right.columns)?;
    let to_layout = layout(to.view.dtype, to.rows, to.columns)?;
    let preference = result::create_matmul_pref().map_err(cublas)?;
    // SAFETY: the descriptors were just made; every attribute gets a value of its documented type.
    let found = unsafe {
        set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSA, operation(left.transposed))?;
        set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_TRANSB, operation(right.transposed))?;
        if key.bias {
            set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
        }
        let set = |attribute, value: &dyn Bytes| {
            result::set_matmul_pref_attribute(preference, attribute, value.pointer(), value.size()).map_err(cublas)
        };
        set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE)?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &key.alignments[0])?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &key.alignments[1])?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &key.alignments[2])?;
        set(Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &key.alignments[2])?;
        let mut found = [MaybeUninit::<sys::cublasLtMatmulHeuristicResult_t>::uninit(); PROPOSALS];
        let mut count = 0;
        let status = sys::cublasLtMatmulAlgoGetHeuristic(
            handle,
            desc,
            left_layout,
            right_layout,
            to_layout,
            to_layout,
            preference,
            PROPOSALS as i32,
            found.as_mut_ptr().cast(),
            &mut count,
        );
        result::destroy_matmul_pref(preference).map_err(cublas)?;
        status.result().map_err(cublas)?;
        found[..count as usize].iter().map(|found| found.assume_init()).collect::<Vec<_>>()
    };
    let first = found.first().ok_or_else(|| failed(format!("cuBLASLt has no algorithm for {key:?}")))?;
    let (algorithm, workspace) = (first.algo, first.workspaceSize);
    let mut plan = Plan { desc, left: left_layout, right: right_layout, to: to_layout, algorithm, workspace };
    if key.sizes.iter().map(|&size| size as f64).product::<f64>() >= TIMED_FROM {
        if let Some(bias) = to.bias {
            // SAFETY: the attribute takes a pointer.
            unsafe { set_desc(desc, Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.ptr)? };
        }
        plan.choose(handle, device, &found, left, right, to)?;
    }
    Ok(plan)
}

/// A value as cuBLASLt's attributes take it.
trait Bytes {
    fn pointer(&self) -> *const c_void;
    fn size(&self) -> usize;
}

impl<T: Copy> Bytes for T {
    fn pointer(&self) -> *const c_void {
        std::ptr::from_ref(self).cast()
    }

    fn size(&self) -> usize {
        size_of::<T>()
    }
}

/// # Safety
/// `value` must have the attribute's type.
unsafe fn set_desc<T: Copy>(
    desc: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<()> {
    // SAFETY: the caller's.
    unsafe { result::set_matmul_desc_attribute(desc, attribute, value.pointer(), value.size()) }.map_err(cublas)
}

fn data_type(dtype: DType) -> sys::cudaDataType_t {
    match dtype {
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    }
}

fn cublas(error: result::CublasError) -> crate::Error {
    failed(format!("cuBLASLt: {error}"))
}
