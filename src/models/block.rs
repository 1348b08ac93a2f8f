//! One decoder block of the Llama family, forward and backward:
//! `m = x + o_proj(attention(rope(q), rope(k), v))`, `y = m + down(silu(gate) ∘ up)`, with an RMSNorm before each half and,
//! in Qwen3, one over each head of q and k.

use candle_core::Tensor;

use super::linear::{self, DropoutRound, Linear, Parameter, Products};
use crate::Result;
use crate::backend::custom_ops::attention::{AttentionArgs, Sequence};
use crate::backend::custom_ops::swiglu::Activation;
use crate::backend::custom_ops::{attention, rms_norm, rope, swiglu};

/// What all blocks of one pass share: where the sequences lie, the rotary tables and the dropout round.
pub struct Pass<'a> {
    /// The sequences, laid end to end.
    pub sequences: &'a [Sequence],
    /// The position of each token in its sequence.
    pub positions: &'a [u32],
    /// `[P, head_dim / 2]` f32.
    pub cos: &'a Tensor,
    /// `[P, head_dim / 2]` f32.
    pub sin: &'a Tensor,
    /// The dropout masks' round; `None` outside training.
    pub round: Option<DropoutRound>,
}

/// A decoder block.
#[derive(Debug, Clone)]
pub struct Block {
    pub(super) input_norm: Parameter,
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) q_norm: Option<Parameter>,
    pub(super) k_norm: Option<Parameter>,
    pub(super) o: Linear,
    pub(super) post_norm: Parameter,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
    pub(super) shape: BlockShape,
}

/// The sizes of a block that its weights do not tell.
#[derive(Debug, Clone, Copy)]
pub struct BlockShape {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) norm_eps: f64,
    pub(super) window: Option<usize>,
}

/// What backward needs of a block's forward pass. SwiGLU's output is computed again from gate and up, and what the two norms gave
/// from their inputs.
pub struct Saved {
    x: Tensor,
    q: Head,
    k: Head,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    m: Tensor,
    gate: Tensor,
    up: Tensor,
    products: BlockProducts,
}

/// Queries or keys after norm and rotation; with a head norm, also its input and rstd.
struct Head {
    rotated: Tensor,
    norm: Option<(Tensor, Tensor)>,
}

/// What each linear's backward needs beside its input.
struct BlockProducts {
    q: Products,
    k: Products,
    v: Products,
    o: Products,
    gate: Products,
    up: Products,
    down: Products,
}

impl Block {
    /// `y` `[T, hidden]` and what [`Block::backward`] takes. `extend` receives the new keys and values `[T, kv_heads, D]` and
    /// returns those to attend to: themselves, or a cache that they were appended to.
    pub fn forward(
        &self,
        x: &Tensor,
        pass: &Pass,
        extend: impl FnOnce(Tensor, Tensor) -> Result<(Tensor, Tensor)>,
    ) -> Result<(Tensor, Saved)> {
        let eps = self.shape.norm_eps;
        let (input, _) = rms_norm::forward(x, &self.input_norm.value, eps)?;
        let [(q, of_q), (k, of_k), (v, of_v)] = linear::forward([&self.q, &self.k, &self.v], &input, pass.round)?;
        drop(input);
        let q = self.head(q, self.shape.heads, self.q_norm.as_ref(), pass)?;
        let mut k = self.head(k, self.shape.kv_heads, self.k_norm.as_ref(), pass)?;
        let tokens = x.dim(0)?;
        let v = v.reshape((tokens, self.shape.kv_heads, self.shape.head_dim))?;
        let (keys, v) = extend(k.rotated, v)?;
        k.rotated = keys;

        let (o, lse) = attention::forward(&q.rotated, &k.rotated, &v, self.attention_args(pass))?;
        let flat = o.reshape((tokens, self.shape.heads * self.shape.head_dim))?;
        let (m, of_o) = linear::forward_add(&self.o, &flat, x, pass.round)?;
        let (post, _) = rms_norm::forward(&m, &self.post_norm.value, eps)?;

        let [(gate, of_gate), (up, of_up)] = linear::forward([&self.gate, &self.up], &post, pass.round)?;
        drop(post);
        let act = swiglu::forward(&gate, &up, Activation::Silu)?;
        let (y, of_down) = linear::forward_add(&self.down, &act, &m, pass.round)?;
        let products = BlockProducts { q: of_q, k: of_k, v: of_v, o: of_o, gate: of_gate, up: of_up, down: of_down };
        Ok((y, Saved { x: x.clone(), q, k, v, o, lse, m, gate, up, products }))
    }

    /// Takes the output's gradient `g` `[T, hidden]`, turns it in place into the input's, and adds the gradients of the
    /// trained parameters to their buffers. With `input_gradient` false the lowest products that only `dx` needs are left
    /// out and `g` is of no further use.
    pub fn backward(&self, saved: Saved, g: Tensor, pass: &Pass, input_gradient: bool) -> Result<Tensor> {
        let Saved { x, q, k, v, o, lse, m, gate, up, products: of } = saved;
        let eps = self.shape.norm_eps;
        let round = pass.round;
        let tokens = x.dim(0)?;

        // The gradient of SwiGLU's output takes the place of that output, which comes back in it, and those of gate and up take theirs.
        let act = linear::input_gradient(&self.down, &gate, &of.down, &g, round)?;
        let (d_gate, d_up) = (gate, up);
        swiglu::backward_in_place(&d_gate, &d_up, &act, Activation::Silu)?;
        linear::backward([&self.down], &act, [&of.down], [&g], round, false)?;
        drop(act);
        let norm = &self.post_norm;
        let (post, rstd) = rms_norm::forward(&m, &norm.value, eps)?;
        let (linears, products) = ([&self.gate, &self.up], [&of.gate, &of.up]);
        let d_post = input_gradient_of(linears, &post, products, [&d_gate, &d_up], round)?;
        drop((d_gate, d_up, post));
        rms_norm::backward(&m, &norm.value, &rstd, &d_post, &g, norm.grad.as_ref())?;
        drop((m, d_post));

        let flat = o.reshape((tokens, self.shape.heads * self.shape.head_dim))?;
        let d_o = input_gradient_of([&self.o], &flat, [&of.o], [&g], round)?.reshape(o.shape())?;
        let (dq, dk, dv) = attention::backward(&q.rotated, &k.rotated, &v, &o, &lse, &d_o, self.attention_args(pass))?;
        let dq = self.head_backward(dq, q.norm, self.q_norm.as_ref(), pass)?;
        let dk = self.head_backward(dk, k.norm, self.k_norm.as_ref(), pass)?;
        let dv = dv.reshape((tokens, self.shape.kv_heads * self.shape.head_dim))?;

        let norm = &self.input_norm;
        let (input, rstd) = rms_norm::forward(&x, &norm.value, eps)?;
        let (linears, products) = ([&self.q, &self.k, &self.v], [&of.q, &of.k, &of.v]);
        let wanted = input_gradient || norm.grad.is_some();
        let d_input = linear::backward(linears, &input, products, [&dq, &dk, &dv], round, wanted)?;
        if let Some(d_input) = d_input {
            rms_norm::backward(&x, &norm.value, &rstd, &d_input, &g, norm.grad.as_ref())?;
        }
        Ok(g)
    }

    /// Whether any of its parameters is trained.
    pub fn trained(&self) -> bool {
        let norms = [Some(&self.input_norm), Some(&self.post_norm), self.q_norm.as_ref(), self.k_norm.as_ref()];
        norms.into_iter().flatten().any(|norm| norm.grad.is_some()) || self.linears().iter().any(|(_, l)| l.trained())
    }

    /// The linears with their names below `model.layers.{i}.`, in the order of the forward pass.
    pub fn linears(&self) -> [(&'static str, &Linear); 7] {
        let Self { q, k, v, o, gate, up, down, .. } = self;
        let [nq, nk, nv, no, ng, nu, nd] = LINEAR_NAMES;
        [(nq, q), (nk, k), (nv, v), (no, o), (ng, gate), (nu, up), (nd, down)]
    }

    /// [`Block::linears`], to change.
    pub fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        let Self { q, k, v, o, gate, up, down, .. } = self;
        let [nq, nk, nv, no, ng, nu, nd] = LINEAR_NAMES;
        [(nq, q), (nk, k), (nv, v), (no, o), (ng, gate), (nu, up), (nd, down)]
    }

    fn head(&self, x: Tensor, heads: usize, norm: Option<&Parameter>, pass: &Pass) -> Result<Head> {
        let x = x.reshape((x.dim(0)?, heads, self.shape.head_dim))?;
        let (rotated, norm) = match norm {
            None => (x, None),
            Some(norm) => {
                let (y, rstd) = rms_norm::forward(&x, &norm.value, self.shape.norm_eps)?;
                (y, Some((x, rstd)))
            }
        };
        rope::rotate(&rotated, pass.cos, pass.sin, pass.positions, false)?;
        Ok(Head { rotated, norm })
    }

    /// From the gradient of rotated heads `[T, heads, D]` to that of the projection's output `[T, heads · D]`.
    fn head_backward(
        &self,
        g: Tensor,
        saved: Option<(Tensor, Tensor)>,
        norm: Option<&Parameter>,
        pass: &Pass,
    ) -> Result<Tensor> {
        rope::rotate(&g, pass.cos, pass.sin, pass.positions, true)?;
        let g = match (norm, saved) {
            (Some(norm), Some((x, rstd))) => {
                let dx = x.zeros_like()?;
                rms_norm::backward(&x, &norm.value, &rstd, &g, &dx, norm.grad.as_ref())?;
                dx
            }
            _ => g,
        };
        Ok(g.flatten_from(1)?)
    }

    fn attention_args<'a>(&self, pass: &Pass<'a>) -> AttentionArgs<'a> {
        let scale = 1.0 / (self.shape.head_dim as f32).sqrt();
        AttentionArgs { sequences: pass.sequences, scale, window: self.shape.window }
    }
}

/// [`linear::backward`] with the input's gradient.
fn input_gradient_of<const N: usize>(
    linears: [&Linear; N],
    x: &Tensor,
    products: [&Products; N],
    g: [&Tensor; N],
    round: Option<DropoutRound>,
) -> Result<Tensor> {
    let dx = linear::backward(linears, x, products, g, round, true)?;
    let Some(dx) = dx else { unreachable!("the input's gradient was asked for") };
    Ok(dx)
}

/// The names of a block's linears, as Hugging Face checkpoints have them.
pub const LINEAR_NAMES: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];
