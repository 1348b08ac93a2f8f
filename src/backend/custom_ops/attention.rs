//! Causal attention with grouped heads over sequences of any length laid end to end, and an optional sliding window.
//!
//! `q` `[Tq, Hq, D]`, `k`, `v` `[Tk, Hkv, D]`, all of one dtype (f32, f16, bf16); Hq is a multiple of Hkv, and query head
//! `h` reads key head `h / (Hq / Hkv)`. Query `i` of a sequence has the position `p = k_len - q_len + i` and sees the keys
//! `0..=p`, with a window only `p - window + 1..=p`, as in transformers (Mistral).
//! `o = softmax(scale · q kᵀ) v`, `lse` = log of the softmax's denominator, natural, f32. Scores are never kept: a T × T
//! matrix is not made, and backward computes them again from `lse` (Dao et al., FlashAttention, 2022):
//! `P = exp(scale · q kᵀ - lse)`, `δ = rowsum(g ∘ o)`, `dS = P ∘ (g vᵀ - δ)`, `dv = Pᵀ g`, `dq = scale · dS k`,
//! `dk = scale · dSᵀ q`. Arithmetic is f32.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::check::{dims3, expect_dtype, on_cpu, shape};
use super::tape::record;
use crate::backend::cpu::attention::Sizes;
use crate::backend::cpu::floats::{Held, tensor_of};
use crate::backend::cpu::{self, view};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
use crate::backend::metal;
use crate::{Error, Result};

const OP: &str = "attention";

/// One sequence: its rows in `q` and in `k`, `v`. Rows of `q` that are in no sequence get a zero output. Query rows of two
/// sequences must not overlap; key rows may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// First row in `q`.
    pub q_start: usize,
    /// Number of queries, at most `k_len`.
    pub q_len: usize,
    /// First row in `k` and `v`.
    pub k_start: usize,
    /// Number of keys.
    pub k_len: usize,
}

impl Sequence {
    /// The sequence's keys that query `i` sees, counted from `k_start`.
    #[inline(always)]
    pub fn keys(&self, i: usize, window: Option<usize>) -> Range<usize> {
        let end = self.k_len - self.q_len + i + 1;
        end.saturating_sub(window.unwrap_or(end))..end
    }
}

/// What attention needs beside the tensors.
#[derive(Debug, Clone, Copy)]
pub struct AttentionArgs<'a> {
    /// The sequences of the batch.
    pub sequences: &'a [Sequence],
    /// Multiplies the scores, mostly `1 / sqrt(D)`.
    pub scale: f32,
    /// How many keys a query sees at most, itself included; `None`: all before it.
    pub window: Option<usize>,
}

/// `(o [Tq, Hq, D], lse [Tq, Hq] f32)` of contiguous `q`, `k`, `v`.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, args: AttentionArgs) -> Result<(Tensor, Tensor)> {
    let sizes = check(q, k, v, args)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(q.device()) {
        return cuda::attention::forward(q, k, v, args);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if q.device().is_metal() {
        return metal::attention::forward(q, k, v, args);
    }
    on_cpu(OP, &[q, k, v])?;
    let (held_q, k, v) = (Held::of(OP, "q", q)?, Held::of(OP, "k", k)?, Held::of(OP, "v", v)?);
    let (o, lse) = cpu::attention::forward(held_q.floats(), k.floats(), v.floats(), sizes, args);
    Ok((tensor_of(o, q.shape(), q.dtype())?, tensor_of(lse, &q.dims()[..2], DType::F32)?))
}

/// `(dq, dk, dv)` from the gradient `g` of `o`; `o` and `lse` as [`forward`] returned them.
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    g: &Tensor,
    args: AttentionArgs,
) -> Result<(Tensor, Tensor, Tensor)> {
    let sizes = check(q, k, v, args)?;
    shape(OP, "o", o, q.dims())?;
    shape(OP, "g", g, q.dims())?;
    shape(OP, "lse", lse, &q.dims()[..2])?;
    #[cfg(feature = "cuda")]
    if cuda::takes(q.device()) {
        expect_dtype(OP, "o", o, q.dtype())?;
        expect_dtype(OP, "g", g, q.dtype())?;
        return cuda::attention::backward(q, k, v, o, lse, g, args);
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if q.device().is_metal() {
        expect_dtype(OP, "o", o, q.dtype())?;
        expect_dtype(OP, "g", g, q.dtype())?;
        return metal::attention::backward(q, k, v, o, lse, g, args);
    }
    on_cpu(OP, &[q, k, v, o, lse, g])?;
    let [q_held, k_held, v_held, o, g] = [
        Held::of(OP, "q", q)?,
        Held::of(OP, "k", k)?,
        Held::of(OP, "v", v)?,
        Held::of(OP, "o", o)?,
        Held::of(OP, "g", g)?,
    ];
    let lse = view(OP, "lse", lse)?;
    let (dq, dk, dv) = cpu::attention::backward(
        q_held.floats(),
        k_held.floats(),
        v_held.floats(),
        o.floats(),
        &lse,
        g.floats(),
        sizes,
        args,
    );
    let dtype = q.dtype();
    Ok((tensor_of(dq, q.shape(), dtype)?, tensor_of(dk, k.shape(), dtype)?, tensor_of(dv, v.shape(), dtype)?))
}

/// Attention on Candle's tape, with gradients for `q`, `k` and `v`. Any layout.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, args: AttentionArgs) -> Result<Tensor> {
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let (saved_q, saved_k, saved_v) = (q.detach(), k.detach(), v.detach());
    let (o, lse) = forward(&saved_q, &saved_k, &saved_v, args)?;
    let (sequences, scale, window, saved_o) = (args.sequences.to_vec(), args.scale, args.window, o.clone());
    record(OP, [&q, &k, &v], o, move |g| {
        let args = AttentionArgs { sequences: &sequences, scale, window };
        let (dq, dk, dv) = backward(&saved_q, &saved_k, &saved_v, &saved_o, &lse, g, args)?;
        Ok([Some(dq), Some(dk), Some(dv)])
    })
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, args: AttentionArgs) -> Result<Sizes> {
    let (queries, q_heads, dim) = dims3(OP, "q", q, "[queries, heads, head size]")?;
    let (keys, kv_heads, _) = dims3(OP, "k", k, "[keys, key heads, head size]")?;
    shape(OP, "k", k, &[keys, kv_heads, dim])?;
    shape(OP, "v", v, &[keys, kv_heads, dim])?;
    expect_dtype(OP, "k", k, q.dtype())?;
    expect_dtype(OP, "v", v, q.dtype())?;
    if kv_heads == 0 || q_heads == 0 || dim == 0 || q_heads % kv_heads != 0 {
        let problem = format!("{q_heads} query heads of size {dim} cannot share {kv_heads} key heads");
        return Err(Error::op(OP, format!("{problem}; a multiple is needed, and none may be 0")));
    }
    if args.window == Some(0) {
        return Err(Error::op(OP, "window 0 sees no key; use at least 1, or None for no window"));
    }
    if !args.scale.is_finite() {
        return Err(Error::op(OP, format!("scale is {}", args.scale)));
    }
    let mut problems = Vec::new();
    for (index, s) in args.sequences.iter().enumerate() {
        let within = |start: usize, len: usize, all: usize| start.checked_add(len).is_some_and(|end| end <= all);
        if !within(s.q_start, s.q_len, queries) || !within(s.k_start, s.k_len, keys) {
            problems.push(format!("sequence {index} {s:?} leaves the {queries} queries or {keys} keys"));
        } else if s.q_len > s.k_len {
            problems.push(format!("sequence {index} has {} queries but only {} keys", s.q_len, s.k_len));
        }
    }
    let mut starts: Vec<_> = args.sequences.iter().map(|s| (s.q_start, s.q_len)).filter(|s| s.1 > 0).collect();
    starts.sort_unstable();
    for pair in starts.windows(2).filter(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
        problems.push(format!("the queries from {} ({}) and {} overlap", pair[0].0, pair[0].1, pair[1].0));
    }
    if !problems.is_empty() {
        return Err(Error::op(OP, problems.join("; ")));
    }
    Ok(Sizes { q_heads, kv_heads, dim })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_a_query() {
        let decode = Sequence { q_start: 0, q_len: 1, k_start: 0, k_len: 5 };
        assert_eq!(decode.keys(0, None), 0..5);
        assert_eq!(decode.keys(0, Some(2)), 3..5);
        let prompt = Sequence { q_start: 0, q_len: 4, k_start: 0, k_len: 4 };
        assert_eq!(prompt.keys(1, None), 0..2);
        assert_eq!(prompt.keys(3, Some(3)), 1..4);
        assert_eq!(prompt.keys(1, Some(3)), 0..2);
    }

    #[test]
    fn bad_input_is_an_error_with_numbers() {
        let device = candle_core::Device::Cpu;
        let q = Tensor::zeros((4, 3, 8), DType::F32, &device).unwrap();
        let k = Tensor::zeros((4, 2, 8), DType::F32, &device).unwrap();
        let args = AttentionArgs { sequences: &[], scale: 1.0, window: None };
        assert!(forward(&q, &k, &k, args).unwrap_err().to_string().contains("3 query heads"));
        let overlapping = [
            Sequence { q_start: 0, q_len: 3, k_start: 0, k_len: 3 },
            Sequence { q_start: 2, q_len: 2, k_start: 0, k_len: 4 },
            Sequence { q_start: 2, q_len: 2, k_start: 3, k_len: 2 },
        ];
        let args = AttentionArgs { sequences: &overlapping, scale: 1.0, window: None };
        let text = forward(&q, &q, &q, args).unwrap_err().to_string();
        assert!(text.contains("overlap") && text.contains("leaves the 4"), "{text}");
    }
}
