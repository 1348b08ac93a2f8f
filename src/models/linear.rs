//! The decoder's linear: `x Wᵀ + bias + s · (x A) B`, forward and backward on plain tensors.
//!
//! Gradients go straight into the buffers that the parameters carry; a parameter without a buffer is frozen and its
//! gradient is never computed.

use candle_core::Tensor;

use crate::Result;
use crate::backend::custom_ops::fused_lora::Sink;
use crate::backend::custom_ops::{linear, lora_linear};
use crate::backend::dropout::Dropout;

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
    pub weight: Parameter,
    /// `[n]`.
    pub bias: Option<Parameter>,
    /// The adapter, if one is attached.
    pub adapter: Option<Adapter>,
}

impl Linear {
    /// `(y, h)`: the output `[T, n]` and, with an adapter, `h = x A` `[T, r]`, which backward takes again.
    pub fn forward(&self, x: &Tensor, round: Option<DropoutRound>) -> Result<(Tensor, Option<Tensor>)> {
        let bias = self.bias.as_ref().map(|bias| &bias.value);
        let Some(adapter) = &self.adapter else {
            return Ok((linear::forward(x, &self.weight.value, bias)?, None));
        };
        let (a, b) = (&adapter.a.value, &adapter.b.value);
        let dropout = adapter.dropout(round);
        let (y, h) = lora_linear::forward(x, &self.weight.value, bias, a, b, adapter.scaling, dropout)?;
        Ok((y, Some(h)))
    }

    /// Adds the gradients of the trained parameters to their buffers and, when `dx` is given, the input's to it.
    pub fn backward(
        &self,
        x: &Tensor,
        h: Option<&Tensor>,
        g: &Tensor,
        round: Option<DropoutRound>,
        dx: Option<&Tensor>,
    ) -> Result<()> {
        let weight = &self.weight;
        if let Some(adapter) = &self.adapter {
            let sink = Sink { dx, da: adapter.a.grad.as_ref(), db: adapter.b.grad.as_ref() };
            let (a, b) = (&adapter.a.value, &adapter.b.value);
            lora_linear::backward(x, &weight.value, a, b, h, g, adapter.scaling, adapter.dropout(round), sink)?;
            return self.backward_base(x, g, None);
        }
        self.backward_base(x, g, dx)
    }

    /// `(k, n)`: the sizes of its input and output.
    pub fn sizes(&self) -> (usize, usize) {
        let dims = self.weight.value.dims();
        (dims[1], dims[0])
    }

    /// Whether any of its parameters is trained.
    pub fn trained(&self) -> bool {
        let bias = self.bias.as_ref().is_some_and(|bias| bias.grad.is_some());
        bias || self.weight.grad.is_some() || self.adapter.as_ref().is_some_and(Adapter::trained)
    }

    fn backward_base(&self, x: &Tensor, g: &Tensor, dx: Option<&Tensor>) -> Result<()> {
        let dw = self.weight.grad.as_ref();
        let dbias = self.bias.as_ref().and_then(|bias| bias.grad.as_ref());
        if dx.is_none() && dw.is_none() && dbias.is_none() {
            return Ok(());
        }
        linear::backward(x, &self.weight.value, g, dx, dw, dbias)
    }
}
