//! The LoRA delta and its gradients on Apple GPUs: tensors to launches. Shapes and dtypes have been checked by the caller.
//!
//! Everything that can fail comes before the first launch is encoded: after an error no tensor has changed. Inputs that are
//! not contiguous are copied first; offsets are given to the kernels.

use std::collections::BTreeMap;

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{D, DType, Layout, MetalDevice, MetalStorage, Shape, Storage, Tensor};
use candle_metal_kernels::metal::{ComputeCommandEncoder, ComputePipeline};
use objc2_metal::MTLSize;

use super::pipelines::pipeline;
use super::plan::{Binding, Call, Launch, Plan, Slot};
use crate::backend::custom_ops::Sink;
use crate::backend::dropout::Dropout;
use crate::{Error, Result};

const OP: &str = "fused_lora";

/// Whether [`delta_op`] and [`backward`] can run on these tensors: makes all of their pipelines.
///
/// # Errors
/// Why not.
pub fn ready(x: &Tensor, a: &Tensor, b: &Tensor) -> Result<()> {
    let x = Operand::of("x", x)?;
    let call = call([&x, &Operand::of("a", a)?, &Operand::of("b", b)?], 1.0, None)?;
    let plans = [call.delta()?, call.backward(call.x, Some(call.x), true, true, false)?];
    plans.iter().flat_map(|plan| &plan.launches).try_for_each(|launch| pipeline(x.device(), launch).map(drop))
}

/// `s · (drop(x) A) B`, of x's dtype.
///
/// # Errors
/// Kernels that do not compile, sizes beyond them, no memory.
pub fn delta(x: &Tensor, a: &Tensor, b: &Tensor, s: f64, dropout: Option<Dropout>) -> Result<Tensor> {
    let (storage, shape) = delta_of([Operand::of("x", x)?, Operand::of("a", a)?, Operand::of("b", b)?], s, dropout)?;
    Ok(Tensor::from_storage(Storage::Metal(storage), shape, BackpropOp::none(), false))
}

/// [`delta`] of x, A and B as Candle gives them to an op.
///
/// # Errors
/// As [`delta`].
pub fn delta_op(
    inputs: [(&MetalStorage, &Layout); 3],
    s: f64,
    dropout: Option<Dropout>,
) -> Result<(MetalStorage, Shape)> {
    delta_of(inputs.map(|(storage, layout)| Operand { storage: storage.clone(), layout: layout.clone() }), s, dropout)
}

/// [`delta_op`] where A and B are tensors.
///
/// # Errors
/// As [`delta`].
pub fn delta_op1(x: &MetalStorage, layout: &Layout, a: &Tensor, b: &Tensor, s: f64) -> Result<(MetalStorage, Shape)> {
    let x = Operand { storage: x.clone(), layout: layout.clone() };
    delta_of([x, Operand::of("a", a)?, Operand::of("b", b)?], s, None)
}

fn delta_of(inputs: [Operand; 3], s: f64, dropout: Option<Dropout>) -> Result<(MetalStorage, Shape)> {
    let [x, a, b] = &inputs;
    let call = call([x, a, b], s, dropout)?;
    let device = x.device().clone();
    let y = allocate(&device, call.rows() * call.n, call.x)?;
    let mut shape = x.layout.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = call.n;
    }
    let [x, a, b] = inputs;
    let tensors = [(Slot::X, x), (Slot::A, a), (Slot::B, b), (Slot::Y, y.clone())];
    Launches::new(&device, call.delta()?, tensors)?.encode()?;
    Ok((y.storage, shape.into()))
}

/// `y += s · (drop(x) A) B`; returns h = drop(x) A, `[m, r]` f32.
///
/// # Errors
/// As [`delta`]; y is then as it was.
pub fn add_into(y: &Tensor, x: &Tensor, a: &Tensor, b: &Tensor, s: f64, dropout: Option<Dropout>) -> Result<Tensor> {
    let [x, a, b] = [Operand::of("x", x)?, Operand::of("a", a)?, Operand::of("b", b)?];
    let call = call([&x, &a, &b], s, dropout)?;
    let device = x.device().clone();
    let h = allocate(&device, call.rows() * call.r, DType::F32)?;
    let plan = call.add_into(y.dtype())?;
    let y = Operand::target("y", y)?;
    let tensors = [(Slot::X, x), (Slot::A, a), (Slot::B, b), (Slot::Y, y), (Slot::H, h.clone())];
    Launches::new(&device, plan, tensors)?.encode()?;
    let shape = (call.rows(), call.r);
    Ok(Tensor::from_storage(Storage::Metal(h.storage), shape, BackpropOp::none(), false))
}

/// Adds the gradients that have somewhere to go.
///
/// # Errors
/// As [`delta`]; every buffer is then as it was.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    h: Option<&Tensor>,
    g: &Tensor,
    s: f64,
    dropout: Option<Dropout>,
    sink: &Sink,
) -> Result<()> {
    let [x, a, b] = [Operand::of("x", x)?, Operand::of("a", a)?, Operand::of("b", b)?];
    let call = call([&x, &a, &b], s, dropout)?;
    let device = x.device().clone();
    let dx = sink.dx.map(Tensor::dtype);
    let plan = call.backward(g.dtype(), dx, sink.da.is_some(), sink.db.is_some(), h.is_some())?;
    let mut tensors = vec![(Slot::X, x), (Slot::A, a), (Slot::B, b), (Slot::G, Operand::of("g", g)?)];
    if let Some(h) = h {
        tensors.push((Slot::H, Operand::of("h", h)?));
    }
    for (slot, name, target) in [(Slot::Dx, "dx", sink.dx), (Slot::Da, "da", sink.da), (Slot::Db, "db", sink.db)] {
        if let Some(target) = target {
            tensors.push((slot, Operand::target(name, target)?));
        }
    }
    Launches::new(&device, plan, tensors)?.encode()
}

/// A tensor's storage, which holds its buffer, and where the tensor lies in it.
#[derive(Clone)]
struct Operand {
    storage: MetalStorage,
    layout: Layout,
}

impl Operand {
    fn of(name: &str, tensor: &Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        match &*storage {
            Storage::Metal(storage) => Ok(Self { storage: storage.clone(), layout: layout.clone() }),
            _ => Err(Error::op(OP, format!("{name} is on {:?}, not on a Metal device", tensor.device().location()))),
        }
    }

    /// A tensor that is written in place.
    fn target(name: &str, tensor: &Tensor) -> Result<Self> {
        let target = Self::of(name, tensor)?;
        if !target.layout.is_contiguous() {
            return Err(Error::op(OP, format!("{name} {:?} must be contiguous to be added to", tensor.dims())));
        }
        Ok(target)
    }

    fn device(&self) -> &MetalDevice {
        self.storage.device()
    }

    /// Itself, or a contiguous copy.
    fn contiguous(self) -> Result<Self> {
        if self.layout.is_contiguous() {
            return Ok(self);
        }
        let mut copy = allocate(self.device(), self.layout.shape().elem_count(), self.storage.dtype())?;
        self.storage.copy_strided_src(&mut copy.storage, 0, &self.layout)?;
        Ok(copy)
    }

    fn offset(&self) -> usize {
        self.layout.start_offset() * self.storage.dtype().size_in_bytes()
    }
}

/// A buffer whose elements the kernels write before they read them.
fn allocate(device: &MetalDevice, elements: usize, dtype: DType) -> Result<Operand> {
    let buffer = device.new_buffer_builder().with_size_for(elements, dtype).with_label(OP).build()?;
    let storage = MetalStorage::new(buffer, device.clone(), elements, dtype);
    Ok(Operand { storage, layout: Layout::contiguous(elements) })
}

fn call([x, a, b]: [&Operand; 3], s: f64, dropout: Option<Dropout>) -> Result<Call> {
    let dims = x.layout.dims();
    let seq = if dims.len() > 1 { x.layout.shape().dim(D::Minus2)? } else { 1 };
    let batch = dims.iter().rev().skip(2).product();
    let ((k, r), (_, n)) = (a.layout.shape().dims2()?, b.layout.shape().dims2()?);
    Ok(Call { batch, seq, k, r, n, s, dropout, x: x.storage.dtype(), adapter: a.storage.dtype() })
}

/// Launches with their pipelines, and every tensor that they bind.
struct Launches {
    device: MetalDevice,
    launches: Vec<(Launch, ComputePipeline)>,
    tensors: BTreeMap<Slot, Operand>,
}

impl Launches {
    /// Makes pipelines and scratch tensors, and copies of inputs that are not contiguous.
    fn new(device: &MetalDevice, plan: Plan, tensors: impl IntoIterator<Item = (Slot, Operand)>) -> Result<Self> {
        let Plan { launches, scratch } = plan;
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
                all.insert(slot, tensor.contiguous()?);
            }
        }
        for (slot, elements) in scratch {
            if bound(slot) {
                all.insert(slot, allocate(device, elements, DType::F32)?);
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
                    Binding::Params => encoder.set_bytes(index, &launch.params),
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
