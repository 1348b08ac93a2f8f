//! The decoder's linear: `x Wᵀ + bias + s · (x A) B`, forward and backward on plain tensors.
//!
//! Gradients go straight into the buffers that the parameters carry; a parameter without a buffer is frozen and its
//! gradient is never computed.

use candle_core::Tensor;

use crate::Result;
use crate::backend::custom_ops::lora_linear::Part;
use crate::backend::custom_ops::{Weight, linear, lora_linear};
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
        self.a.grad.is_some() || self.b.grad.is_some()
    }
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
        Part { w: self.weight.value(), bias: self.bias.as_ref().map(|bias| &bias.value), adapter }
    }
}

/// `(y, h)` of each of the linears of one input: the output `[T, n]` and, with an adapter, `h = x A` `[T, r]`, which backward takes again.
pub fn forward<const N: usize>(
    linears: [&Linear; N],
    x: &Tensor,
    round: Option<DropoutRound>,
) -> Result<[(Tensor, Option<Tensor>); N]> {
    let all = lora_linear::forward_shared(x, &linears.map(|linear| linear.part(round)))?;
    let Ok(all) = all.try_into() else { unreachable!("one output for each linear") };
    Ok(all)
}

/// [`forward`] of one linear, with a residual of the output's shape added to it.
pub fn forward_add(
    linear: &Linear,
    x: &Tensor,
    residual: &Tensor,
    round: Option<DropoutRound>,
) -> Result<(Tensor, Option<Tensor>)> {
    lora_linear::forward_add(x, &linear.part(round), residual)
}

/// Adds the gradients of the trained parameters to their buffers and, with `input_gradient`, returns the input's.
pub fn backward<const N: usize>(
    linears: [&Linear; N],
    x: &Tensor,
    h: [Option<&Tensor>; N],
    g: [&Tensor; N],
    round: Option<DropoutRound>,
    input_gradient: bool,
) -> Result<Option<Tensor>> {
    let sinks = linears.map(|linear| match &linear.adapter {
        Some(adapter) => (adapter.a.grad.as_ref(), adapter.b.grad.as_ref()),
        None => (None, None),
    });
    let parts = linears.map(|linear| linear.part(round));
    let dx = lora_linear::backward_shared(x, &parts, &h, &g, &sinks, input_gradient)?;
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
    h: Option<&Tensor>,
    g: &Tensor,
    round: Option<DropoutRound>,
) -> Result<Tensor> {
    let dx = lora_linear::backward_shared(like, &[linear.part(round)], &[h], &[g], &[(None, None)], true)?;
    let Some(dx) = dx else { unreachable!("the input's gradient was asked for") };
    Ok(dx)
}
