//! A GPU's kernels and limits, found once a process, and the launch.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CString, c_void};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, sys};
use candle_core::cuda_backend::{CudaDevice, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Device, Layout, Shape, Storage, Tensor};

use super::linear::Products;
use crate::{Error, Result};

/// The compiled sources, in the order of [`Module`].
const IMAGES: [&[u8]; 7] = [
    include_bytes!(concat!(env!("OUT_DIR"), "/fused_lora.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/fused_lora_backward.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/linear.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/decoder.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/attention.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/dequantize.fatbin")),
    include_bytes!(concat!(env!("OUT_DIR"), "/attention_hopper.fatbin")),
];
const MAX_GPUS: usize = 64;

/// Numbers and their copy on the GPU.
type Upload = (Vec<u32>, Arc<CudaSlice<u32>>);

/// One GPU.
pub(super) struct Gpu {
    /// Keeps the primary context, and with it the modules, to the end of the process.
    context: Arc<CudaContext>,
    modules: [sys::CUmodule; IMAGES.len()],
    functions: RwLock<HashMap<Kernel, sys::CUfunction>>,
    /// Multiprocessors.
    pub sms: usize,
    /// Shared memory that a block may have.
    pub shared: usize,
    /// Whether a kernel may start before the one ahead of it has ended.
    dependent_launch: bool,
    /// Whether the modules for compute capability 9.0 are there: their instructions are those of that one alone.
    pub hopper: bool,
    products: Mutex<Products>,
    uploads: Mutex<VecDeque<Upload>>,
}

// SAFETY: the handles belong to the context, not to a thread, and are only read; `products` is behind a mutex.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// A source file of kernels, as `build.rs` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Module {
    FusedLora,
    FusedLoraBackward,
    /// For compute capability 9.0 only; see [`Gpu::hopper`].
    Linear,
    /// The decoder's small ops.
    Decoder,
    Attention,
    Dequantize,
    /// For compute capability 9.0 only.
    AttentionHopper,
}

/// The kernel `<op>_<dtype>` of a module.
macro_rules! typed {
    ($module:ident, $op:literal, $dtype:expr) => {
        $crate::backend::cuda::device::Kernel::Named(
            $crate::backend::cuda::device::Module::$module,
            match $dtype {
                candle_core::DType::BF16 => concat!($op, "_bf16"),
                candle_core::DType::F16 => concat!($op, "_f16"),
                _ => concat!($op, "_f32"),
            },
        )
    };
}
/// The kernel `<op>_<dtype>_<8 or 1 elements an access>` of the module `Decoder`.
macro_rules! wide {
    ($op:literal, $dtype:expr, $wide:expr) => {
        $crate::backend::cuda::device::Kernel::Named(
            $crate::backend::cuda::device::Module::Decoder,
            match ($dtype, $wide) {
                (candle_core::DType::BF16, true) => concat!($op, "_bf16_8"),
                (candle_core::DType::BF16, false) => concat!($op, "_bf16_1"),
                (candle_core::DType::F16, true) => concat!($op, "_f16_8"),
                (candle_core::DType::F16, false) => concat!($op, "_f16_1"),
                (_, true) => concat!($op, "_f32_8"),
                (_, false) => concat!($op, "_f32_1"),
            },
        )
    };
}
pub(super) use {typed, wide};

/// A kernel's name, as an instance's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Forward {
        types: &'static str,
        ranks: usize,
        tiles: usize,
        vector: bool,
    },
    Short {
        types: &'static str,
        ranks: usize,
    },
    Output {
        types: &'static str,
        ranks: usize,
        vector: bool,
    },
    Input {
        types: &'static str,
        ranks: usize,
        vector: bool,
    },
    Reduce,
    /// A kernel by its name. It may use the device's whole shared memory.
    Named(Module, &'static str),
}

impl Kernel {
    /// Whether an early start of the next kernel pays: not where its blocks would take the room of some of this one's, and so
    /// leave multiprocessors unevenly loaded. A kernel that may start early must wait for the one before it (`wait_for_previous`,
    /// `take_turn`); of the named ones those of the linear do.
    fn depends(self) -> bool {
        match self {
            Self::Forward { tiles, .. } => tiles > 2,
            Self::Named(module, _) => module == Module::Linear,
            _ => true,
        }
    }

    /// Module and name, as `fused_lora.cu` and `fused_lora_backward.cu` have them.
    fn name(self) -> (Module, String) {
        let way = |vector| if vector { "v" } else { "s" };
        match self {
            Self::Forward { types, ranks, tiles, vector } => {
                (Module::FusedLora, format!("lora_forward_{types}_{}_{tiles}_{}", ranks / 8, way(vector)))
            }
            Self::Short { types, ranks } => (Module::FusedLora, format!("lora_short_{types}_{ranks}")),
            Self::Output { types, ranks, vector } => {
                (Module::FusedLoraBackward, format!("lora_output_{types}_{}_{}", ranks / 8, way(vector)))
            }
            Self::Input { types, ranks, vector } => {
                (Module::FusedLoraBackward, format!("lora_input_{types}_{}_{}", ranks / 8, way(vector)))
            }
            Self::Reduce => (Module::FusedLoraBackward, "lora_reduce".to_string()),
            Self::Named(module, name) => (module, name.to_string()),
        }
    }
}

/// See [`super::check`].
pub(super) fn check(ordinal: usize) -> Result<()> {
    let missing = missing_libraries();
    if !missing.is_empty() {
        let names = missing.join(", ");
        return Err(failed(format!(
            "cannot be loaded: {names}; is the driver there, and are they on LD_LIBRARY_PATH?"
        )));
    }
    let device =
        CudaDevice::new(ordinal).map_err(|error| failed(format!("GPU {ordinal} cannot be opened: {error}")))?;
    Gpu::of(&device).map(|_| ())
}

/// What cudarc would panic for the lack of.
#[cfg(feature = "dynamic-loading")]
fn missing_libraries() -> Vec<&'static str> {
    use candle_core::cuda_backend::cudarc;
    // SAFETY: opening a system library runs its initialisers, which any use of the GPU would do.
    let present = unsafe {
        [
            ("libcuda", cudarc::driver::sys::is_culib_present()),
            ("libcublas", cudarc::cublas::sys::is_culib_present()),
            ("libcublasLt", cudarc::cublaslt::sys::is_culib_present()),
            ("libcurand", cudarc::curand::sys::is_culib_present()),
        ]
    };
    present.into_iter().filter(|(_, there)| !there).map(|(name, _)| name).collect()
}

/// None: the program is linked to them, and does not start without them.
#[cfg(not(feature = "dynamic-loading"))]
fn missing_libraries() -> Vec<&'static str> {
    Vec::new()
}

impl Gpu {
    /// The GPU that `device` is on. The first call loads the kernels, makes the memory pool keep its memory, and stops
    /// Candle's allocations from creating events where the context has one stream, which needs none.
    pub fn of(device: &CudaDevice) -> Result<&'static Self> {
        static GPUS: [OnceLock<Result<Gpu, String>>; MAX_GPUS] = [const { OnceLock::new() }; MAX_GPUS];
        let stream = device.cuda_stream();
        let context = stream.context();
        let slot = GPUS.get(context.ordinal()).ok_or_else(|| failed(format!("more than {MAX_GPUS} GPUs")))?;
        match slot.get_or_init(|| Self::open(device, context).map_err(|error| error.to_string())) {
            Ok(gpu) => Ok(gpu),
            Err(problem) => Err(failed(problem.clone())),
        }
    }

    fn open(device: &CudaDevice, context: &Arc<CudaContext>) -> Result<Self> {
        use sys::CUdevice_attribute_enum as Attribute;
        let (major, minor) = context.compute_capability().map_err(driver)?;
        if major < 8 {
            return Err(failed(format!("its compute capability is {major}.{minor}, but the kernels need 8.0")));
        }
        context.bind_to_thread().map_err(driver)?;
        if !context.is_in_multi_stream_mode() {
            // SAFETY: one stream orders all uses of all memory; events only matter between streams.
            unsafe { device.disable_event_tracking() };
        }
        keep_pool(context)?;
        let hopper = (major, minor) == (9, 0);
        let attribute = |attribute| context.attribute(attribute).map(|value| value as usize).map_err(driver);
        Ok(Self {
            modules: load_all(hopper)?,
            functions: RwLock::default(),
            sms: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            dependent_launch: major >= 9,
            hopper,
            products: Mutex::new(Products::new()?),
            uploads: Mutex::default(),
            context: context.clone(),
        })
    }

    pub fn products(&self) -> Result<MutexGuard<'_, Products>> {
        self.products.lock().map_err(|_| failed("a thread panicked in cuBLASLt".to_string()))
    }

    /// `values` in the GPU's memory. What the layers of a pass share, as positions, is copied once: the last few arrays are kept.
    pub fn upload(&self, device: &CudaDevice, values: &[u32]) -> Result<Arc<CudaSlice<u32>>> {
        const KEPT: usize = 8;
        let mut uploads = self.uploads.lock().map_err(|_| failed("a thread panicked in a copy".to_string()))?;
        if let Some((_, there)) = uploads.iter().find(|(known, _)| known == values) {
            return Ok(there.clone());
        }
        // An empty slice has no memory; a kernel that gets none reads none.
        let padded = if values.is_empty() { &[0] } else { values };
        let there = Arc::new(device.clone_htod(padded)?);
        uploads.push_front((values.to_vec(), there.clone()));
        uploads.truncate(KEPT);
        Ok(there)
    }

    /// Blocks of 256 threads for `items` items, a few a multiprocessor at most.
    pub fn blocks(&self, items: usize) -> [usize; 2] {
        [items.div_ceil(256).clamp(1, 16 * self.sms), 1]
    }

    /// Makes the context current on this thread, as every driver call needs.
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(driver)
    }

    fn function(&self, kernel: Kernel) -> Result<sys::CUfunction> {
        if let Some(&function) = self.functions.read().ok().as_ref().and_then(|functions| functions.get(&kernel)) {
            return Ok(function);
        }
        let (module, name) = kernel.name();
        let c_name = CString::new(name.as_str()).map_err(|_| failed(format!("kernel name {name}")))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded; the name ends in zero; both pointers live through the call.
        unsafe { sys::cuModuleGetFunction(&mut function, self.modules[module as usize], c_name.as_ptr()) }
            .result()
            .map_err(|error| failed(format!("kernel {name}: {error}")))?;
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        if !matches!(kernel, Kernel::Short { .. } | Kernel::Reduce) {
            let mut fixed = 0;
            let fixed_attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found; the size is the device's own limit less what the kernel has without asking.
            unsafe {
                sys::cuFuncGetAttribute(&mut fixed, fixed_attribute, function).result().map_err(driver)?;
                sys::cuFuncSetAttribute(function, attribute, self.shared as i32 - fixed).result().map_err(driver)?;
            }
        }
        if let Ok(mut functions) = self.functions.write() {
            functions.insert(kernel, function);
        }
        Ok(function)
    }

    /// Puts a kernel on the stream. `args` is its one parameter.
    ///
    /// # Safety
    /// `Args` must be the kernel's parameter type, with pointers to device memory of the sizes it computes with, allocated on
    /// `stream`.
    pub unsafe fn launch<Args>(
        &self,
        kernel: Kernel,
        grid: [usize; 2],
        warps: usize,
        shared: usize,
        stream: &CudaStream,
        args: &Args,
    ) -> Result<()> {
        self.bind()?;
        let function = self.function(kernel)?;
        // SAFETY: an all-zero attribute is valid: plain data.
        let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        attribute.id = sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0] as u32,
            gridDimY: grid[1] as u32,
            gridDimZ: 1,
            blockDimX: 32 * warps as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: (self.dependent_launch && kernel.depends()) as u32,
        };
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the caller's; the driver copies the parameters before it returns.
        unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|error| failed(format!("kernel {}: {error}", kernel.name().1)))?;
        if stream.context().is_managing_stream_synchronization() {
            // Memory in use here is not marked by events; other streams of this context must not see it unfinished.
            stream.synchronize().map_err(driver)?;
        }
        Ok(())
    }
}

/// Figures of the pool that tensors come from, in bytes.
pub(super) struct Pool {
    pub used: u64,
    pub most: u64,
    pub reserved: u64,
    pub free: u64,
}

/// Reads the pool's figures; `reset` lets the most start again from what is used.
pub(super) fn pool(device: &CudaDevice, reset: bool) -> Result<Pool> {
    use sys::CUmemPool_attribute_enum::{
        CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_HIGH,
    };
    let gpu = Gpu::of(device)?;
    gpu.bind()?;
    let (mut pool, mut zero) = (std::ptr::null_mut(), 0_u64);
    let (mut free, mut total) = (0_usize, 0_usize);
    let mut figures = [
        (CU_MEMPOOL_ATTR_USED_MEM_CURRENT, 0_u64),
        (CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0),
        (CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, 0),
    ];
    // SAFETY: the device is valid, the attributes are of 64 bits, and the pointers live through the calls.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, gpu.context.cu_device()).result().map_err(driver)?;
        for (attribute, bytes) in &mut figures {
            sys::cuMemPoolGetAttribute(pool, *attribute, (&raw mut *bytes).cast()).result().map_err(driver)?;
        }
        if reset {
            let attribute = CU_MEMPOOL_ATTR_USED_MEM_HIGH;
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut zero).cast()).result().map_err(driver)?;
        }
        sys::cuMemGetInfo_v2(&mut free, &mut total).result().map_err(driver)?;
    }
    let [(_, used), (_, most), (_, reserved)] = figures;
    Ok(Pool { used, most, reserved, free: free as u64 })
}

/// Contiguous memory on a GPU, of one dtype.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    pub ptr: u64,
    pub dtype: DType,
}

impl View {
    /// The memory behind `layout`, which must be contiguous.
    pub fn of(op: &'static str, name: &str, storage: &CudaStorage, layout: &Layout) -> Result<Self> {
        if !layout.is_contiguous() {
            return Err(Error::op(
                op,
                format!("{name} {:?} is not contiguous; call contiguous() on it first", layout.dims()),
            ));
        }
        let stream = storage.device.cuda_stream();
        let start = match &storage.slice {
            CudaStorageSlice::F32(slice) => address(slice, &stream),
            CudaStorageSlice::F16(slice) => address(slice, &stream),
            CudaStorageSlice::BF16(slice) => address(slice, &stream),
            _ => {
                return Err(Error::op(
                    op,
                    format!("{name} has dtype {:?}; f32, f16 and bf16 are taken", storage.dtype()),
                ));
            }
        };
        let dtype = storage.dtype();
        Ok(Self { ptr: start + (layout.start_offset() * dtype.size_in_bytes()) as u64, dtype })
    }

    /// On 16 bytes.
    pub fn aligned(&self) -> bool {
        self.ptr.is_multiple_of(16)
    }

    pub fn is_f32(&self) -> bool {
        self.dtype == DType::F32
    }
}

/// Where a slice's memory starts.
pub(super) fn address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

/// A tensor's memory. The tensor outlives it, so that the memory is freed on its stream after what is launched with it.
pub(super) struct Held<'a> {
    pub view: View,
    _tensor: PhantomData<&'a Tensor>,
}

impl<'a> Held<'a> {
    pub fn of(op: &'static str, name: &str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let view = match &*storage {
            Storage::Cuda(storage) => View::of(op, name, storage, layout)?,
            _ => return Err(Error::op(op, format!("{name} is not on a CUDA device"))),
        };
        Ok(Self { view, _tensor: PhantomData })
    }

    /// The memory of a tensor of u8.
    pub fn bytes(op: &'static str, name: &str, tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match &*storage {
            Storage::Cuda(CudaStorage { slice: CudaStorageSlice::U8(slice), device }) if layout.is_contiguous() => {
                let ptr = address(slice, &device.cuda_stream()) + layout.start_offset() as u64;
                Ok(Self { view: View { ptr, dtype: DType::U8 }, _tensor: PhantomData })
            }
            _ => Err(Error::op(op, format!("{name} is no contiguous tensor of u8 on a CUDA device"))),
        }
    }

    pub fn option(op: &'static str, name: &str, tensor: Option<&'a Tensor>) -> Result<Option<Self>> {
        tensor.map(|tensor| Self::of(op, name, tensor)).transpose()
    }
}

/// The device of a tensor that was found to be on one.
pub(super) fn cuda_device<'a>(op: &'static str, tensor: &'a Tensor) -> Result<&'a CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device),
        _ => Err(Error::op(op, "x is not on a CUDA device")),
    }
}

/// Memory for an output, with whatever lies in it; every element must be written. The shape is not empty.
pub(super) fn uninit(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<CudaStorage> {
    // SAFETY: the caller writes every element.
    Ok(unsafe { device.alloc_uninit(shape, dtype) }?)
}

/// f32 scratch.
pub(super) fn scratch(device: &CudaDevice, len: usize) -> Result<CudaSlice<f32>> {
    // SAFETY: kernels write what they read.
    Ok(unsafe { device.alloc::<f32>(len) }?)
}

/// A tensor of an output, off the tape.
pub(super) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// A tensor of no elements, which Candle itself does not make on a CUDA device.
pub(super) fn empty(device: &CudaDevice, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let one = Tensor::zeros(1, dtype, &Device::Cuda(device.clone()))?;
    Ok(one.narrow(0, 0, 0)?.reshape(shape)?)
}

fn load_all(hopper: bool) -> Result<[sys::CUmodule; IMAGES.len()]> {
    let mut modules = [std::ptr::null_mut(); IMAGES.len()];
    for (i, image) in IMAGES.into_iter().enumerate() {
        if hopper || ![Module::Linear as usize, Module::AttentionHopper as usize].contains(&i) {
            modules[i] = load(image)?;
        }
    }
    Ok(modules)
}

fn load(image: &'static [u8]) -> Result<sys::CUmodule> {
    let mut module = std::ptr::null_mut();
    // SAFETY: nvcc made the image; it is static and says its own length.
    unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) }
        .result()
        .map_err(|error| failed(format!("the kernels cannot be loaded: {error}; were they built for another GPU?")))?;
    Ok(module)
}

/// By default the pool gives freed memory back at every synchronisation.
fn keep_pool(context: &CudaContext) -> Result<()> {
    let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    // SAFETY: the device is valid, and both pointers live through the calls.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result().map_err(driver)?;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()).result().map_err(driver)
    }
}

/// [`Error::Device`].
pub(super) fn failed(problem: String) -> Error {
    Error::Device { device: "cuda".to_string(), problem }
}

fn driver(error: impl std::fmt::Display) -> Error {
    failed(error.to_string())
}
