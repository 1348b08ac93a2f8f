//! The decoder's linear, forward and backward on plain tensors: `x Wᵀ + bias + s · (x A) B`, and with DoRA
//! `m / ‖W + s (A B)ᵀ‖ ∘ (x Wᵀ + s · (x A) B) + bias`.
//!
//! Gradients go straight into the buffers that the parameters carry; a parameter without a buffer is frozen and its
//! gradient is never computed.

use candle_core::{DType, Tensor};

use crate::Result;
use crate::backend::custom_ops::lora_linear::Part;
use crate::backend::custom_ops::{Weight, dora, linear, lora_linear};
use crate::backend::dropout::Dropout;
use crate::backend::quantized::QuantizedTensor;

/// A tensor of the model and, when it is trained, the f32 buffer of its shape that gradients are added to.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// The value.
    pub value: Tensor,
    /// The gradient's buffer; `None` when the parameter is frozen.
    pub grad: Option<Tensor>,
}

impl Parameter {
    /// A parameter that is not trained.
    pub fn frozen(value: Tensor) -> Self {
        Self { value, grad: None }
    }
}

/// A weight of the base.
#[derive(Debug, Clone)]
pub enum BaseWeight {
    /// A tensor, which full fine-tuning trains.
    Dense(Parameter),
    /// Blocks, frozen.
    Quantized(QuantizedTensor),
}

impl From<Tensor> for BaseWeight {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(Parameter::frozen(tensor))
    }
}

impl From<QuantizedTensor> for BaseWeight {
    fn from(tensor: QuantizedTensor) -> Self {
        Self::Quantized(tensor)
    }
}

impl BaseWeight {
    /// As the ops take it.
    pub fn value(&self) -> Weight<'_> {
        match self {
            Self::Dense(parameter) => Weight::Dense(&parameter.value),
            Self::Quantized(tensor) => Weight::Quantized(tensor),
        }
    }

    /// The gradient's buffer; `None` when it is frozen.
    pub fn grad(&self) -> Option<&Tensor> {
        self.dense().and_then(|parameter| parameter.grad.as_ref())
    }

    /// The parameter, where it is not quantized.
    pub fn dense(&self) -> Option<&Parameter> {
        match self {
            Self::Dense(parameter) => Some(parameter),
            Self::Quantized(_) => None,
        }
    }

    /// [`BaseWeight::dense`], to change.
    pub fn dense_mut(&mut self) -> Option<&mut Parameter> {
        match self {
            Self::Dense(parameter) => Some(parameter),
            Self::Quantized(_) => None,
        }
    }
}

/// A LoRA adapter on a linear.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// A `[k, r]`.
    pub a: Parameter,
    /// B `[r, n]`.
    pub b: Parameter,
    /// s = alpha / r.
    pub scaling: f64,
    /// Dropout on the adapter's input, in training only.
    pub dropout: f32,
    /// Tells this adapter's dropout masks from those of the others.
    pub number: u32,
    /// DoRA's lengths of the rows of `W + s (A B)ᵀ`; without them the rows stay as they are.
    pub magnitude: Option<Magnitude>,
}

/// DoRA's magnitudes on a linear. Dropout is on the adapter's input alone, as in mlx-lm; PEFT also drops from a part of the base's.
#[derive(Debug, Clone)]
pub struct Magnitude {
    /// m `[n]`, f32.
    pub m: Parameter,
    /// `‖W_j‖²` `[n]`, f32; of the frozen base.
    squares: Tensor,
    /// Where A, B and m are frozen.
    fixed: Option<Scale>,
}

/// What rows are multiplied by, `[n]` f32.
#[derive(Debug, Clone)]
pub struct Scale {
    /// `m / norm`.
    c: Tensor,
    /// `‖W_j + s (A B)_j‖`.
    norm: Tensor,
}

impl Magnitude {
    /// Of an adapter that is about to be trained: m is the length of each row as it is with the adapter.
    pub fn of(weight: &BaseWeight, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Self> {
        let squares = dora::squared_norms(weight.value())?;
        let m = dora::norms(weight.value(), &squares, a, b, scaling)?;
        Ok(Self { m: Parameter::frozen(m), squares, fixed: None })
    }

    /// Of a frozen adapter on a weight: what rows are multiplied by is made here, once.
    pub fn fixed(m: &Tensor, weight: &BaseWeight, a: &Tensor, b: &Tensor, scaling: f64) -> Result<Self> {
        let squares = dora::squared_norms(weight.value())?;
        let norm = dora::norms(weight.value(), &squares, a, b, scaling)?;
        let fixed = Some(Scale { c: (m.to_dtype(DType::F32)? / &norm)?, norm });
        Ok(Self { m: Parameter::frozen(m.clone()), squares, fixed })
    }

    /// The same with m in a buffer that trains it.
    pub fn trained(self, m: Parameter) -> Self {
        Self { m, fixed: None, ..self }
    }
}

/// The seed and the round of the dropout masks of one pass through the model. Each micro-batch is a round of its own.
#[derive(Debug, Clone, Copy)]
pub struct DropoutRound {
    /// The run's seed.
    pub seed: u64,
    /// The number of the micro-batch since the start of the run.
    pub round: u32,
}

impl Adapter {
    fn dropout(&self, round: Option<DropoutRound>) -> Option<Dropout> {
        let DropoutRound { seed, round } = round.filter(|_| self.dropout > 0.0)?;
        Some(Dropout { p: self.dropout, seed, stream: (round as u64) << 32 | self.number as u64 })
    }

    fn trained(&self) -> bool {
        let magnitude = self.magnitude.as_ref().is_some_and(|magnitude| magnitude.m.grad.is_some());
        magnitude || self.a.grad.is_some() || self.b.grad.is_some()
    }
}

/// What backward needs of a linear's forward pass.
#[derive(Debug, Default)]
pub struct Products {
    /// `h = x A` `[T, r]`, of an adapter.
    h: Option<Tensor>,
    /// With DoRA `u = x Wᵀ + s · h B` `[T, n]` and its scale.
    dora: Option<(Tensor, Scale)>,
}

/// A linear of the decoder with its optional adapter.
#[derive(Debug, Clone)]
pub struct Linear {
    /// W `[n, k]`.
    pub weight: BaseWeight,
    /// `[n]`.
    pub bias: Option<Parameter>,
    /// The adapter, if one is attached.
    pub adapter: Option<Adapter>,
}

impl Linear {
    /// `(k, n)`: the sizes of its input and output.
    pub fn sizes(&self) -> (usize, usize) {
        let dims = self.weight.value().dims();
        (dims[1], dims[0])
    }

    /// Whether any of its parameters is trained.
    pub fn trained(&self) -> bool {
        let bias = self.bias.as_ref().is_some_and(|bias| bias.grad.is_some());
        bias || self.weight.grad().is_some() || self.adapter.as_ref().is_some_and(Adapter::trained)
    }

    fn part(&self, round: Option<DropoutRound>) -> Part<'_> {
        let adapter = self.adapter.as_ref().map(|adapter| lora_linear::Adapter {
            a: &adapter.a.value,
            b: &adapter.b.value,
            s: adapter.scaling,
            dropout: adapter.dropout(round),
        });
        // DoRA scales what the bias is not part of.
        let bias = self.bias().filter(|_| self.magnitude().is_none());
        Part { w: self.weight.value(), bias, adapter }
    }

    fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref().map(|bias| &bias.value)
    }

    fn magnitude(&self) -> Option<&Magnitude> {
        self.adapter.as_ref().and_then(|adapter| adapter.magnitude.as_ref())
    }

    /// DoRA's scale as A, B and m are now.
    fn scale(&self) -> Result<Option<Scale>> {
        let Some(Adapter { a, b, scaling, magnitude: Some(magnitude), .. }) = &self.adapter else { return Ok(None) };
        if let Some(fixed) = &magnitude.fixed {
            return Ok(Some(fixed.clone()));
        }
        let norm = dora::norms(self.weight.value(), &magnitude.squares, &a.value, &b.value, *scaling)?;
        Ok(Some(Scale { c: (magnitude.m.value.detach() / &norm)?, norm }))
    }

    /// The output and what backward needs, from what the products gave: y, or with DoRA u.
    fn finish(&self, made: (Tensor, Option<Tensor>), residual: Option<&Tensor>) -> Result<(Tensor, Products)> {
        let (u, h) = made;
        let Some(scale) = self.scale()? else { return Ok((u, Products { h, dora: None })) };
        let y = dora::forward(&u, &scale.c, self.bias(), residual)?;
        Ok((y, Products { h, dora: Some((u, scale)) }))
    }
}

/// The output `[T, n]` of each of the linears of one input, and what backward needs of it.
pub fn forward<const N: usize>(
    linears: [&Linear; N],
    x: &Tensor,
    round: Option<DropoutRound>,
) -> Result<[(Tensor, Products); N]> {
    let all = lora_linear::forward_shared(x, &linears.map(|linear| linear.part(round)))?;
    let all = linears.iter().zip(all).map(|(linear, made)| linear.finish(made, None)).collect::<Result<Vec<_>>>()?;
    let Ok(all) = all.try_into() else { unreachable!("one output for each linear") };
    Ok(all)
}

/// [`forward`] of one linear, with a residual of the output's shape added to it.
pub fn forward_add(
    linear: &Linear,
    x: &Tensor,
    residual: &Tensor,
    round: Option<DropoutRound>,
) -> Result<(Tensor, Products)> {
    let part = linear.part(round);
    if linear.magnitude().is_none() {
        let (y, h) = lora_linear::forward_add(x, &part, residual)?;
        return Ok((y, Products { h, dora: None }));
    }
    let Some(made) = lora_linear::forward_shared(x, &[part])?.pop() else { unreachable!("one output for each linear") };
    linear.finish(made, Some(residual))
}

/// Adds the gradients of the trained parameters to their buffers and, with `input_gradient`, returns the input's.
pub fn backward<const N: usize>(
    linears: [&Linear; N],
    x: &Tensor,
    products: [&Products; N],
    g: [&Tensor; N],
    round: Option<DropoutRound>,
    input_gradient: bool,
) -> Result<Option<Tensor>> {
    let sinks = linears.map(|linear| match &linear.adapter {
        Some(adapter) => (adapter.a.grad.as_ref(), adapter.b.grad.as_ref()),
        None => (None, None),
    });
    let of_magnitude = |linear: &Linear| linear.magnitude().and_then(|magnitude| magnitude.m.grad.clone());
    let scaled = scaled(linears, products, g, of_magnitude)?;
    let inner: [&Tensor; N] = std::array::from_fn(|i| scaled[i].as_ref().unwrap_or(g[i]));
    let parts = linears.map(|linear| linear.part(round));
    let h = products.map(|products| products.h.as_ref());
    let dx = lora_linear::backward_shared(x, &parts, &h, &inner, &sinks, input_gradient)?;
    for (linear, g) in linears.iter().zip(g) {
        let dw = linear.weight.grad();
        let dbias = linear.bias.as_ref().and_then(|bias| bias.grad.as_ref());
        if dw.is_some() || dbias.is_some() {
            linear::backward(x, linear.weight.value(), g, None, dw, dbias)?;
        }
    }
    Ok(dx)
}

/// The input's gradient alone, without the input: `like` is any tensor of its shape and dtype. For inputs that are made again
/// from this gradient's neighbours; [`backward`] then adds the gradients of the parameters.
pub fn input_gradient(
    linear: &Linear,
    like: &Tensor,
    products: &Products,
    g: &Tensor,
    round: Option<DropoutRound>,
) -> Result<Tensor> {
    let [scaled] = scaled([linear], [products], [g], |_| None)?;
    let (g, h) = (scaled.as_ref().unwrap_or(g), products.h.as_ref());
    let dx = lora_linear::backward_shared(like, &[linear.part(round)], &[h], &[g], &[(None, None)], true)?;
    let Some(dx) = dx else { unreachable!("the input's gradient was asked for") };
    Ok(dx)
}

/// The gradients of DoRA's u, where a linear has it; those of its magnitudes go to the buffers that `sink` gives.
fn scaled<const N: usize>(
    linears: [&Linear; N],
    products: [&Products; N],
    g: [&Tensor; N],
    sink: impl Fn(&Linear) -> Option<Tensor>,
) -> Result<[Option<Tensor>; N]> {
    let mut all = [const { None }; N];
    for i in 0..N {
        if let Some((u, Scale { c, norm })) = &products[i].dora {
            all[i] = Some(dora::backward(u, g[i], c, norm, sink(linears[i]).as_ref())?);
        }
    }
    Ok(all)
}
