//! From tensors and a plan to encoded launches.
//!
//! Everything that can fail comes before the first launch is encoded: after an error no tensor has changed. Inputs that are
//! not contiguous are copied first; offsets are given to the kernels.

use std::collections::BTreeMap;

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{DType, Layout, MetalDevice, MetalStorage, Shape, Storage, Tensor};
use candle_metal_kernels::metal::{ComputeCommandEncoder, ComputePipeline};
use objc2_metal::MTLSize;

use super::pipelines::pipeline;
use super::plan::{Binding, Launch, Plan, Slot};
use crate::{Error, Result};

/// A tensor's storage, which holds its buffer, and where the tensor lies in it.
#[derive(Clone)]
pub(super) struct Operand {
    pub storage: MetalStorage,
    pub layout: Layout,
}

impl Operand {
    pub fn of(op: &'static str, name: &str, tensor: &Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match &*storage {
            Storage::Metal(storage) => Ok(Self { storage: storage.clone(), layout: layout.clone() }),
            _ => Err(Error::op(op, format!("{name} is on {:?}, not on a Metal device", tensor.device().location()))),
        }
    }

    /// A contiguous tensor, read or written.
    pub fn whole(op: &'static str, name: &str, tensor: &Tensor) -> Result<Self> {
        let whole = Self::of(op, name, tensor)?;
        if !whole.layout.is_contiguous() {
            return Err(Error::op(op, format!("{name} {:?} is not contiguous", tensor.dims())));
        }
        Ok(whole)
    }

    /// A tensor that is written in place.
    pub fn target(op: &'static str, name: &str, tensor: &Tensor) -> Result<Self> {
        let target = Self::of(op, name, tensor)?;
        if !target.layout.is_contiguous() {
            return Err(Error::op(op, format!("{name} {:?} must be contiguous to be added to", tensor.dims())));
        }
        Ok(target)
    }

    /// A tensor of its own, of this shape.
    pub fn tensor(self, shape: impl Into<Shape>) -> Tensor {
        tensor(self.storage, shape)
    }

    pub fn device(&self) -> &MetalDevice {
        self.storage.device()
    }

    /// Itself, or a contiguous copy.
    fn contiguous(self, op: &'static str) -> Result<Self> {
        if self.layout.is_contiguous() {
            return Ok(self);
        }
        let mut copy = allocate(op, self.device(), self.layout.shape().elem_count(), self.storage.dtype())?;
        self.storage.copy_strided_src(&mut copy.storage, 0, &self.layout)?;
        Ok(copy)
    }

    fn offset(&self) -> usize {
        self.layout.start_offset() * self.storage.dtype().size_in_bytes()
    }
}

/// A tensor of a storage that nothing else uses.
pub(super) fn tensor(storage: MetalStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Metal(storage), shape, BackpropOp::none(), false)
}

/// A buffer whose elements the kernels write before they read them.
pub(super) fn allocate(op: &str, device: &MetalDevice, elements: usize, dtype: DType) -> Result<Operand> {
    let buffer = device.new_buffer_builder().with_size_for(elements, dtype).with_label(op).build()?;
    let storage = MetalStorage::new(buffer, device.clone(), elements, dtype);
    Ok(Operand { storage, layout: Layout::contiguous(elements) })
}

/// The numbers of a plan's table.
fn upload(op: &str, device: &MetalDevice, numbers: &[u32]) -> Result<Operand> {
    let buffer = device.new_buffer_builder().with_data(numbers).with_label(op).build()?;
    let storage = MetalStorage::new(buffer, device.clone(), numbers.len(), DType::U32);
    Ok(Operand { storage, layout: Layout::contiguous(numbers.len()) })
}

/// Encodes the plan's launches on these tensors; those that no launch binds are left alone.
pub(super) fn run(
    op: &'static str,
    device: &MetalDevice,
    plan: Plan,
    tensors: impl IntoIterator<Item = (Slot, Operand)>,
) -> Result<()> {
    Launches::new(op, device, plan, tensors)?.encode()
}

/// Launches with their pipelines, and every tensor that they bind.
struct Launches {
    device: MetalDevice,
    launches: Vec<(Launch, ComputePipeline)>,
    tensors: BTreeMap<Slot, Operand>,
}

impl Launches {
    /// Makes pipelines, scratch tensors and tables, and copies of inputs that are not contiguous.
    fn new(
        op: &'static str,
        device: &MetalDevice,
        plan: Plan,
        tensors: impl IntoIterator<Item = (Slot, Operand)>,
    ) -> Result<Self> {
        let Plan { launches, scratch, tables } = plan;
        let launches = launches
            .into_iter()
            .map(|launch| pipeline(device, &launch).map(|pipeline| (launch, pipeline)))
            .collect::<Result<Vec<_>>>()?;
        let bound = |slot| {
            let mut bindings = launches.iter().flat_map(|(launch, _)| &launch.bindings);
            bindings.any(|binding| matches!(binding, Binding::Read(found) | Binding::Write(found) if *found == slot))
        };
        let mut all = BTreeMap::new();
        for (slot, tensor) in tensors {
            if bound(slot) {
                all.insert(slot, tensor.contiguous(op)?);
            }
        }
        for (slot, elements) in scratch {
            if bound(slot) {
                all.insert(slot, allocate(op, device, elements, DType::F32)?);
            }
        }
        for (slot, numbers) in tables {
            if bound(slot) {
                all.insert(slot, upload(op, device, &numbers)?);
            }
        }
        Ok(Self { device: device.clone(), launches, tensors: all })
    }

    /// Encodes all launches. Candle puts a barrier between two where the second binds what the first wrote.
    fn encode(&self) -> Result<()> {
        if self.launches.is_empty() {
            return Ok(());
        }
        let guard = self.device.command_encoder()?;
        let encoder: &ComputeCommandEncoder = guard.as_ref();
        for (launch, pipeline) in &self.launches {
            encoder.set_compute_pipeline_state(pipeline);
            for (index, binding) in launch.bindings.iter().enumerate() {
                match binding {
                    Binding::Read(slot) => {
                        let tensor = &self.tensors[slot];
                        encoder.set_input_buffer(index, Some(tensor.storage.buffer()), tensor.offset());
                    }
                    Binding::Write(slot) => {
                        let tensor = &self.tensors[slot];
                        encoder.set_output_buffer(index, Some(tensor.storage.buffer()), tensor.offset());
                    }
                    Binding::Params => {
                        encoder.set_bytes_directly(index, launch.params.len(), launch.params.as_ptr().cast());
                    }
                }
            }
            if launch.threadgroup_bytes > 0 {
                encoder.set_threadgroup_memory_length(0, launch.threadgroup_bytes);
            }
            let size = |[width, height, depth]: [usize; 3]| MTLSize { width, height, depth };
            encoder.dispatch_thread_groups(size(launch.grid), size([launch.threads, 1, 1]));
        }
        Ok(())
    }
}
