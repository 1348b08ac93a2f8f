//! Linears that share an input, with their adapters, by the kernels for compute capability 9.0: each adapter is a segment of its base
//! product's inner dimension, and h of all adapters takes one pass over x.

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{CudaStorage, DType, Device, Layout, Shape, Tensor};

use super::device::{Gpu, Held, View, address, cuda_device, tensor, uninit};
use super::fused_lora::{self, Size, with_last};
use super::hopper::{AdapterFactors, Hopper, MOST, Matrix, Output, Projected, Segment, Terms, block};
use crate::Result;
use crate::backend::custom_ops::fused_lora::Sink;
use crate::backend::custom_ops::lora_linear::{Adapter, Part};
use crate::backend::dropout::Dropout;

const OP: &str = "lora_linear";
/// Ranks up to which u and dB come from one kernel that reads g once; above, its instructions bind it.
const ONE_PASS: usize = 16;
/// The kernels count rows in 32 bits.
const MOST_ROWS: usize = 1 << 30;

/// Whether GPU `ordinal` has the compute capability of these kernels.
///
/// # Errors
/// As [`super::check`].
pub fn available(ordinal: usize) -> Result<bool> {
    Ok(Gpu::of(&CudaDevice::new(ordinal)?)?.hopper)
}

/// A linear and its adapter as memory, without gaps. W is `[n, k]`, bias `[n]` bf16; without W it is the adapter alone.
#[derive(Clone, Copy)]
pub(super) struct PartViews {
    pub w: Option<View>,
    pub bias: Option<View>,
    pub n: usize,
    pub adapter: Option<AdapterViews>,
}

/// A is `[k, r]`, B `[r, n]`.
#[derive(Clone, Copy)]
pub(super) struct AdapterViews {
    pub a: View,
    pub b: View,
    pub r: usize,
    pub s: f64,
    pub dropout: Option<Dropout>,
}

/// What was found out about a call that these kernels take.
struct Call<'a> {
    device: &'a CudaDevice,
    gpu: &'static Gpu,
    m: usize,
    k: usize,
    /// Terms of an adapter's value: 3 for f32, 2 for bf16.
    blocks: usize,
    /// Σ r.
    ranks: usize,
    dropped: bool,
}

impl<'a> Call<'a> {
    /// Whether these kernels take the call, and if so the gradient of its input: bf16 on 16 bytes, all sizes multiples of 8, adapters of one
    /// dtype, and tiles for two thirds of the multiprocessors.
    fn of(device: &'a CudaDevice, x: View, m: usize, k: usize, parts: &[PartViews]) -> Result<Option<Self>> {
        let gpu = Gpu::of(device)?;
        let bf16 = |view: View| view.dtype == DType::BF16 && view.aligned();
        let pairs = m.div_ceil(256);
        let tiles = pairs * k.div_ceil(256).min(parts.iter().map(|part| part.n.div_ceil(256)).sum());
        let regular =
            k.is_multiple_of(8) && parts.iter().all(|part| part.w.is_none_or(bf16) && part.n.is_multiple_of(8));
        let dtype = parts.iter().find_map(|part| part.adapter).map_or(DType::F32, |adapter| adapter.a.dtype);
        let alike = |adapter: AdapterViews| adapter.a.dtype == dtype && adapter.b.dtype == dtype;
        let taken = gpu.hopper
            && bf16(x)
            && regular
            && parts.len() <= MOST
            && m <= MOST_ROWS
            && tiles * 3 >= gpu.sms
            && matches!(dtype, DType::F32 | DType::BF16)
            && parts.iter().filter_map(|part| part.adapter).all(alike);
        let adapters = || parts.iter().filter_map(|part| part.adapter);
        Ok(taken.then(|| Self {
            device,
            gpu,
            m,
            k,
            blocks: if dtype == DType::F32 { 3 } else { 2 },
            ranks: adapters().map(|adapter| adapter.r).sum(),
            dropped: adapters().any(|adapter| adapter.dropout.is_some()),
        }))
    }

    fn size(&self, r: usize, n: usize) -> Size {
        Size { m: self.m, k: self.k, r, n }
    }

    /// Room for the terms of h or u of `ranks` ranks, `[m, blocks block]`.
    fn columns(&self, ranks: usize) -> Result<Tensor> {
        let shape = (self.m, self.blocks * block(ranks));
        Ok(tensor(uninit(self.device, &Shape::from(shape), DType::BF16)?, shape))
    }

    /// Room for the terms of A or B of `ranks` ranks, `[blocks block, n]`; zero between the blocks.
    fn rows(&self, ranks: usize, n: usize) -> Result<Tensor> {
        let shape = (self.blocks * block(ranks), n);
        if block(ranks) > ranks {
            return Ok(Tensor::zeros(shape, DType::BF16, &Device::Cuda(self.device.clone()))?);
        }
        Ok(tensor(uninit(self.device, &Shape::from(shape), DType::BF16)?, shape))
    }
}

/// What forward gives: y as storage `[m, n]`, and h with an adapter.
type Made = Vec<(CudaStorage, Option<Tensor>)>;

/// `(y, h)` of each, or `None` where these kernels don't take the call.
pub(super) fn storage_forward(
    device: &CudaDevice,
    x: View,
    m: usize,
    k: usize,
    parts: &[PartViews],
) -> Result<Option<Made>> {
    storage_forward_into(device, x, m, k, parts, None, None)
}

/// [`storage_forward`] of one part, whose h goes to `h_to` where that is given, and to whose y `residual` `[m, n]` is added.
pub(super) fn storage_forward_into(
    device: &CudaDevice,
    x: View,
    m: usize,
    k: usize,
    parts: &[PartViews],
    h_to: Option<View>,
    residual: Option<View>,
) -> Result<Option<Made>> {
    if residual.is_some_and(|residual| residual.dtype != DType::BF16) {
        return Ok(None);
    }
    let Some(call) = Call::of(device, x, m, k, parts)? else { return Ok(None) };
    let stream = device.cuda_stream();
    let hopper = Hopper { gpu: call.gpu, stream: &stream };
    let (h, terms, b_terms) = project(&call, &hopper, x, parts, h_to)?;
    let mut outputs = Vec::with_capacity(parts.len());
    let mut all_y = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let y = uninit(device, &Shape::from((m, part.n)), DType::BF16)?;
        let base =
            part.w.map(|w| Segment { left: Matrix::of(x, m, k), right: Matrix::of(w, part.n, k), adapter: false });
        let mut segments: Vec<Segment> = base.into_iter().collect();
        if let (Some(terms), Some(b_terms)) = (&terms[i], &b_terms[i]) {
            segments.push(Segment { left: held(terms)?, right: held(b_terms)?, adapter: true });
        }
        let to = View::of(OP, "y", &y, &Layout::contiguous((m, part.n)))?;
        let bias = part.bias.map_or(0, |bias| bias.ptr);
        let added = residual.map_or(0, |residual| residual.ptr);
        outputs.push(Output { to: Matrix::of(to, m, part.n), half: false, added, bias, segments });
        all_y.push(y);
    }
    hopper.linear(false, m, &outputs)?;
    Ok(Some(all_y.into_iter().zip(h).collect()))
}

/// y of each part, and h with an adapter.
type Outputs = Vec<(Tensor, Option<Tensor>)>;

/// `(y, h)` of each, or `None` where these kernels don't take the call.
pub fn forward(x: &Tensor, parts: &[Part]) -> Result<Option<Outputs>> {
    forward_with(x, parts, None)
}

/// [`forward`] of one part, with a residual `[.., n]` added to its y before it is rounded.
pub fn forward_add(x: &Tensor, part: &Part, residual: &Tensor) -> Result<Option<(Tensor, Option<Tensor>)>> {
    Ok(forward_with(x, std::slice::from_ref(part), Some(residual))?.and_then(|mut all| all.pop()))
}

fn forward_with(x: &Tensor, parts: &[Part], residual: Option<&Tensor>) -> Result<Option<Outputs>> {
    let (x, owned) = (x.contiguous()?, Owned::of(parts)?);
    let residual = residual.map(Tensor::contiguous).transpose()?;
    let residual = Held::option(OP, "residual", residual.as_ref())?.map(|residual| residual.view);
    let k = x.dims().last().copied().unwrap_or(1);
    let m = x.elem_count() / k.max(1);
    let view = Held::of(OP, "x", &x)?.view;
    let device = cuda_device(OP, &x)?;
    let Some(all) = storage_forward_into(device, view, m, k, &owned.views()?, None, residual)? else { return Ok(None) };
    let shaped = all.into_iter().zip(parts).map(|((y, h), part)| (tensor(y, with_last(&x, part.w.dims()[0])), h));
    Ok(Some(shaped.collect()))
}

/// A call's weights and adapters, contiguous.
struct Owned(Vec<OwnedPart>);

struct OwnedPart {
    w: Tensor,
    bias: Option<Tensor>,
    adapter: Option<(Tensor, Tensor, f64, Option<Dropout>)>,
}

impl Owned {
    fn of(parts: &[Part]) -> Result<Self> {
        let own = |part: &Part| {
            let adapter = match part.adapter {
                Some(Adapter { a, b, s, dropout }) => Some((a.contiguous()?, b.contiguous()?, s, dropout)),
                None => None,
            };
            let bias = part.bias.map(|bias| bias.to_dtype(DType::BF16)?.contiguous()).transpose()?;
            Ok(OwnedPart { w: part.w.to_dense(DType::BF16)?.contiguous()?, bias, adapter })
        };
        Ok(Self(parts.iter().map(own).collect::<Result<_>>()?))
    }

    fn views(&self) -> Result<Vec<PartViews>> {
        let view = |part: &OwnedPart| {
            let adapter = match &part.adapter {
                Some((a, b, s, dropout)) => Some(AdapterViews {
                    a: Held::of(OP, "a", a)?.view,
                    b: Held::of(OP, "b", b)?.view,
                    r: b.dims()[0],
                    s: *s,
                    dropout: *dropout,
                }),
                None => None,
            };
            let bias = Held::option(OP, "bias", part.bias.as_ref())?.map(|bias| bias.view);
            Ok(PartViews { w: Some(Held::of(OP, "w", &part.w)?.view), bias, n: part.w.dims()[0], adapter })
        };
        self.0.iter().map(view).collect()
    }
}

type Each = Vec<Option<Tensor>>;

/// For each part h `[m, r]` f32, the terms of s h, and those of B.
fn project(
    call: &Call,
    hopper: &Hopper,
    x: View,
    parts: &[PartViews],
    h_to: Option<View>,
) -> Result<(Each, Each, Each)> {
    let (m, k, blocks) = (call.m, call.k, call.blocks);
    let (mut h, mut terms, mut b_terms) = (Each::new(), Each::new(), Each::new());
    for part in parts {
        let Some(AdapterViews { r, .. }) = part.adapter else {
            h.push(None);
            terms.push(None);
            b_terms.push(None);
            continue;
        };
        h.push(match h_to {
            Some(_) => None,
            None => Some(tensor(uninit(call.device, &Shape::from((m, r)), DType::F32)?, (m, r))),
        });
        terms.push(Some(call.columns(r)?));
        b_terms.push(Some(call.rows(r, part.n)?));
    }
    if call.ranks == 0 {
        return Ok((h, terms, b_terms));
    }
    let a_terms = if call.dropped { None } else { Some(call.rows(call.ranks, k)?) };
    write_adapter_terms(call, hopper, parts, a_terms.as_ref(), &b_terms)?;
    let mut projected = Vec::new();
    for ((part, h), terms) in parts.iter().zip(&h).zip(&terms) {
        let (Some(adapter), Some(terms)) = (part.adapter, terms) else { continue };
        let AdapterViews { a, b, r, s, dropout } = adapter;
        let terms = Terms { all: held(terms)?, from: 0, r, ranks: r, blocks };
        let h = match (h, h_to) {
            (Some(h), _) => Held::of(OP, "h", h)?.view,
            (None, Some(h_to)) => h_to,
            (None, None) => continue,
        };
        if call.dropped {
            fused_lora::project_into(call.device, [x, a, b], dropout, call.size(r, part.n), h)?;
            hopper.part_terms(h.ptr, 1, s, terms)?;
        } else {
            projected.push(Projected { h: h.ptr, terms, s });
        }
    }
    if let Some(a_terms) = &a_terms {
        hopper.project(Matrix::of(x, m, k), held(a_terms)?.ptr, blocks, &projected)?;
    }
    Ok((h, terms, b_terms))
}

/// What [`backward`] is asked for beside the parts.
pub struct Wanted<'a> {
    /// `h` of each part, as forward returned it.
    pub h: &'a [Option<&'a Tensor>],
    /// The gradient of each y.
    pub g: &'a [&'a Tensor],
    /// Where x's goes, bf16, and whether it is added there.
    pub dx: Option<(&'a Tensor, bool)>,
    /// Where those of A and B go, f32.
    pub sinks: &'a [(Option<&'a Tensor>, Option<&'a Tensor>)],
    /// Whether those are added there.
    pub add: bool,
}

/// The gradients, or false where these kernels don't take the call.
pub fn backward(x: &Tensor, parts: &[Part], wanted: &Wanted) -> Result<bool> {
    let owned = Owned::of(parts)?;
    let views = owned.views()?;
    if !parts.iter().any(|part| part.adapter.is_some_and(|adapter| adapter.dropout.is_some())) {
        return backward_views(x, &views, wanted);
    }
    // dx's part of the adapters is dropped too, so that it is no segment of the base's product.
    let base: Vec<PartViews> = views.iter().map(|part| PartViews { adapter: None, ..*part }).collect();
    if !backward_views(x, &base, &Wanted { sinks: &vec![(None, None); parts.len()], ..*wanted })? {
        return Ok(false);
    }
    for (i, part) in parts.iter().enumerate() {
        let Some(Adapter { a, b, s, dropout }) = part.adapter else { continue };
        let k = a.dims()[0];
        let size = Size { m: x.elem_count() / k, k, r: b.dims()[0], n: b.dims()[1] };
        let (da, db) = wanted.sinks[i];
        // The sinks of A and B and that of x may differ in whether they are added to.
        let sink = Sink { dx: None, da, db };
        fused_lora::differentiate(x, a, b, wanted.h[i], wanted.g[i], s, dropout, size, &sink, wanted.add)?;
        if let Some((dx, _)) = wanted.dx {
            let sink = Sink { dx: Some(dx), da: None, db: None };
            fused_lora::differentiate(x, a, b, wanted.h[i], wanted.g[i], s, dropout, size, &sink, true)?;
        }
    }
    Ok(true)
}

/// [`backward`] without dropout.
pub(super) fn backward_views(x: &Tensor, views: &[PartViews], wanted: &Wanted) -> Result<bool> {
    let x = x.contiguous()?;
    let k = x.dims().last().copied().unwrap_or(1);
    let m = x.elem_count() / k.max(1);
    let x_view = Held::of(OP, "x", &x)?.view;
    let Some(call) = Call::of(cuda_device(OP, &x)?, x_view, m, k, views)? else { return Ok(false) };
    let g: Vec<Tensor> = wanted.g.iter().map(|g| g.contiguous()).collect::<candle_core::Result<_>>()?;
    let g_views: Vec<View> = g.iter().map(|g| Ok(Held::of(OP, "g", g)?.view)).collect::<Result<_>>()?;
    let dx = match wanted.dx {
        Some((dx, add)) => Some((Held::of(OP, "dx", dx)?.view, add)),
        None => None,
    };
    let bf16 = |view: &View| view.dtype == DType::BF16 && view.aligned();
    if !g_views.iter().all(bf16) || dx.is_some_and(|(dx, _)| !bf16(&dx)) {
        return Ok(false);
    }
    let stream = call.device.cuda_stream();
    let hopper = Hopper { gpu: call.gpu, stream: &stream };
    let base = views.iter().zip(&g_views).filter_map(|(part, g)| {
        let (left, right) = (Matrix::of(*g, m, part.n), Matrix::of(part.w?, part.n, k));
        Some(Segment { left, right, adapter: false })
    });
    let mut segments: Vec<Segment> = base.collect();
    let any_a = wanted.sinks.iter().any(|(da, _)| da.is_some());
    let terms = if call.ranks > 0 && (dx.is_some() || any_a) {
        let u_terms = call.columns(call.ranks)?;
        Some((u_terms, call.rows(call.ranks, k)?))
    } else {
        None
    };
    output_side(&call, &hopper, x_view, views, wanted, &g_views, terms.as_ref())?;
    if let (Some((u_terms, _)), true) = (&terms, any_a) {
        let mut from = 0;
        let mut sinks = Vec::new();
        for (part, (da, _)) in views.iter().zip(wanted.sinks) {
            let Some(AdapterViews { r, .. }) = part.adapter else { continue };
            sinks.push((from, r, Held::option(OP, "da", *da)?.map(|da| da.view.ptr)));
            from += r;
        }
        let x = Matrix::of(x_view, m, k);
        hopper.outer(call.device, held(u_terms)?, call.ranks, x, &sinks, true, wanted.add)?;
    }
    if let Some((dx, add)) = dx {
        if let Some((u_terms, a_terms)) = &terms {
            segments.push(Segment { left: held(u_terms)?, right: held(a_terms)?, adapter: true });
        }
        let (to, added) = (Matrix::of(dx, m, k), if add { dx.ptr } else { 0 });
        hopper.linear(true, m, &[Output { to, half: false, added, bias: 0, segments }])?;
    }
    Ok(true)
}

/// `dx (+)= g W` of one linear without an adapter, or false where these kernels don't take it.
pub(super) fn input_gradient(
    device: &CudaDevice,
    g: View,
    w: View,
    dx: View,
    add: bool,
    [m, k, n]: [usize; 3],
) -> Result<bool> {
    // x itself is not read: dx stands for it.
    let part = PartViews { w: Some(w), bias: None, n, adapter: None };
    let Some(call) = Call::of(device, dx, m, k, &[part])?.filter(|_| g.dtype == DType::BF16 && g.aligned()) else {
        return Ok(false);
    };
    let hopper = Hopper { gpu: call.gpu, stream: &device.cuda_stream() };
    let segments = vec![Segment { left: Matrix::of(g, m, n), right: Matrix::of(w, n, k), adapter: false }];
    let (to, added) = (Matrix::of(dx, m, k), if add { dx.ptr } else { 0 });
    hopper.linear(true, m, &[Output { to, half: false, added, bias: 0, segments }])?;
    Ok(true)
}

/// `to = x Wᵀ` in f16, or false where these kernels don't take it.
pub(super) fn logits(device: &CudaDevice, x: View, w: View, to: u64, [m, k, n]: [usize; 3]) -> Result<bool> {
    let gpu = Gpu::of(device)?;
    let bf16 = |view: View| view.dtype == DType::BF16 && view.aligned();
    let tiles = m.div_ceil(256) * n.div_ceil(256);
    let regular = k.is_multiple_of(8) && n.is_multiple_of(8) && m <= MOST_ROWS && to.is_multiple_of(16);
    if !(gpu.hopper && bf16(x) && bf16(w) && regular && tiles * 3 >= gpu.sms) {
        return Ok(false);
    }
    let hopper = Hopper { gpu, stream: &device.cuda_stream() };
    let segments = vec![Segment { left: Matrix::of(x, m, k), right: Matrix::of(w, n, k), adapter: false }];
    let to = Matrix { ptr: to, rows: m, columns: n };
    hopper.linear(false, m, &[Output { to, half: true, added: 0, bias: 0, segments }])?;
    Ok(true)
}

/// dB where it is wanted, and into `terms` u of each adapter side by side and A.
fn output_side(
    call: &Call,
    hopper: &Hopper,
    x: View,
    parts: &[PartViews],
    wanted: &Wanted,
    g: &[View],
    terms: Option<&(Tensor, Tensor)>,
) -> Result<()> {
    let (m, blocks, device) = (call.m, call.blocks, call.device);
    let mut b_terms = Each::new();
    for part in parts {
        let wide = part.adapter.filter(|adapter| terms.is_some() && adapter.r > ONE_PASS);
        b_terms.push(match wide {
            Some(AdapterViews { r, .. }) => Some(call.rows(r, part.n)?),
            None => None,
        });
    }
    if let Some((_, a_terms)) = terms {
        write_adapter_terms(call, hopper, parts, Some(a_terms), &b_terms)?;
    }
    let mut from = 0;
    for (i, part) in parts.iter().enumerate() {
        let Some(AdapterViews { a, b, r, s, .. }) = part.adapter else { continue };
        let size = call.size(r, part.n);
        let u = match terms {
            Some((u_terms, _)) => Some(Terms { all: held(u_terms)?, from, r, ranks: call.ranks, blocks }),
            None => None,
        };
        from += r;
        let db = Held::option(OP, "db", wanted.sinks[i].1)?.map(|db| db.view);
        let h = match (db, wanted.h[i]) {
            (None, _) => None,
            (Some(_), Some(h)) => Some(h.contiguous()?),
            (Some(_), None) => {
                let h = tensor(uninit(device, &Shape::from((m, r)), DType::F32)?, (m, r));
                fused_lora::project_into(device, [x, a, b], None, size, Held::of(OP, "h", &h)?.view)?;
                Some(h)
            }
        };
        let h = Held::option(OP, "h", h.as_ref())?.map(|h| h.view.ptr);
        if r <= ONE_PASS {
            let u_parts = fused_lora::output_side(device, g[i], b, h, s, size, u.is_some(), db, wanted.add)?;
            if let (Some(u), Some((u_parts, count))) = (u, &u_parts) {
                hopper.part_terms(address(u_parts, hopper.stream), *count, 1.0, u)?;
            }
            continue;
        }
        let g = Matrix::of(g[i], m, part.n);
        if let (Some(u), Some(b_terms)) = (u, &b_terms[i]) {
            hopper.project(g, held(b_terms)?.ptr, blocks, &[Projected { h: 0, terms: u, s }])?;
        }
        if let (Some(db), Some(h)) = (db, h) {
            let h_terms = call.columns(r)?;
            hopper.part_terms(h, 1, s, Terms { all: held(&h_terms)?, from: 0, r, ranks: r, blocks })?;
            hopper.outer(device, held(&h_terms)?, r, g, &[(0, r, Some(db.ptr))], false, wanted.add)?;
        }
    }
    Ok(())
}

/// The terms of all A, one after the other, and of each B that has a place.
fn write_adapter_terms(
    call: &Call,
    hopper: &Hopper,
    parts: &[PartViews],
    a_terms: Option<&Tensor>,
    b_terms: &[Option<Tensor>],
) -> Result<()> {
    let ptr = |terms: Option<&Tensor>| terms.map_or(Ok(0), |terms| held(terms).map(|matrix| matrix.ptr));
    let mut factors = Vec::new();
    for (part, b_terms) in parts.iter().zip(b_terms) {
        let Some(AdapterViews { a, b, r, .. }) = part.adapter else { continue };
        factors.push(AdapterFactors { a: a.ptr, b: b.ptr, r, n: part.n, b_terms: ptr(b_terms.as_ref())? });
    }
    hopper.adapter_terms(&factors, call.k, call.blocks, call.blocks == 3, ptr(a_terms)?)
}

/// A two-dimensional tensor as the kernels take it.
fn held(tensor: &Tensor) -> Result<Matrix> {
    let dims = tensor.dims();
    Ok(Matrix::of(Held::of(OP, "terms", tensor)?.view, dims[0], dims[1]))
}
