//! Cross entropy fused with the output projection: `loss = Σ over counted rows of (logsumexp(z) - z[target])` with
//! `z = hidden · headᵀ`, without ever holding all logits.
//!
//! `hidden` `[T, H]` and `head` `[V, H]` f32, f16 or bf16, each of its own dtype, `head` also quantized; `targets` T ids, of which rows with
//! [`IGNORE`] are left out before any work. The counted rows are taken in chunks whose logits fit in a bounded buffer; in
//! backward the chunk's logits become `scale · (softmax(z) - onehot)` in place, which gives `dhidden = P · head` and
//! `dhead += Pᵀ · hidden` at once. On CUDA P is rounded to hidden's dtype. Logits are f32, the loss is summed in f64. The idea is Liger-Kernel's and Apple's
//! (Wijmans et al., "Cut your losses in large-vocabulary language models", 2024).

use candle_core::{DType, Tensor};

use super::check::{dims2, expect_dtype, on_cpu, shape};
use super::tape::record;
use super::weight::Weight;
use crate::backend::cpu::cross_entropy::Problem;
use crate::backend::cpu::floats::{Held, tensor_of};
use crate::backend::cpu::update;
#[cfg(feature = "cuda")]
use crate::backend::cuda;
#[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
use crate::backend::metal;
use crate::{Error, Result};

const OP: &str = "cross_entropy";

/// A row with this target is not counted and costs nothing.
pub const IGNORE: u32 = u32::MAX;

/// Rows whose logits exist at a time. On the CPU they take 32 MiB at most and chunks are even; on a GPU 256 MiB, and where there are as many, rows
/// are a multiple of 256.
pub(crate) fn chunk_rows(counted: usize, vocab: usize, cpu: bool) -> usize {
    const CPU_ELEMENTS: usize = 8 << 20;
    const GPU_ELEMENTS: usize = 64 << 20;
    let counted = counted.max(1);
    if cpu {
        let most = (CPU_ELEMENTS / vocab).clamp(1, counted);
        return counted.div_ceil(counted.div_ceil(most));
    }
    let most = (GPU_ELEMENTS / vocab).clamp(1, counted);
    if most > 256 { most / 256 * 256 } else { most }
}

/// A summed loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loss {
    /// Negative log likelihood, natural logarithm, summed over the counted rows.
    pub sum: f64,
    /// The counted rows.
    pub count: usize,
}

impl Loss {
    /// `sum / count`; 0 where nothing was counted.
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum / self.count as f64 }
    }
}

/// A loss that may still be under way on a GPU. Reading it waits for what was asked of the GPU until then, so it is best read after
/// the backward pass was asked for too.
#[derive(Debug)]
pub struct Pending {
    sum: Sum,
    count: usize,
}

#[derive(Debug)]
enum Sum {
    Ready(f64),
    /// Of each row, f32.
    #[cfg(any(feature = "cuda", all(target_vendor = "apple", feature = "custom-metal")))]
    Rows(Tensor),
}

impl Pending {
    pub(crate) fn ready(sum: f64, count: usize) -> Self {
        Self { sum: Sum::Ready(sum), count }
    }

    #[cfg(any(feature = "cuda", all(target_vendor = "apple", feature = "custom-metal")))]
    pub(crate) fn on_gpu(rows: Tensor, count: usize) -> Self {
        Self { sum: Sum::Rows(rows), count }
    }

    /// The loss.
    ///
    /// # Errors
    /// What went wrong on the GPU.
    #[cfg_attr(
        not(any(feature = "cuda", all(target_vendor = "apple", feature = "custom-metal"))),
        allow(clippy::infallible_destructuring_match)
    )]
    pub fn read(self) -> Result<Loss> {
        let sum = match self.sum {
            Sum::Ready(sum) => sum,
            #[cfg(any(feature = "cuda", all(target_vendor = "apple", feature = "custom-metal")))]
            Sum::Rows(rows) => sum_of(&rows)?,
        };
        Ok(Loss { sum, count: self.count })
    }
}

#[cfg(any(feature = "cuda", all(target_vendor = "apple", feature = "custom-metal")))]
fn sum_of(rows: &Tensor) -> Result<f64> {
    #[cfg(feature = "cuda")]
    if cuda::takes(rows.device()) {
        return cuda::cross_entropy::sum(rows);
    }
    Ok(rows.to_vec1::<f32>()?.into_iter().map(f64::from).sum())
}

/// The loss alone.
pub fn forward<'a>(hidden: &Tensor, head: impl Into<Weight<'a>>, targets: &[u32]) -> Result<Loss> {
    let head = head.into();
    let counted = check(hidden, head, targets)?;
    #[cfg(feature = "cuda")]
    if cuda::takes(hidden.device()) {
        return cuda::cross_entropy::run(hidden, &head.to_dense(hidden.dtype())?, targets, &counted, None, None)?
            .0
            .read();
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if hidden.device().is_metal() {
        return metal::cross_entropy::loss(hidden, &head.to_dense(hidden.dtype())?, targets, &counted, None, None)?
            .0
            .read();
    }
    on_cpu(OP, &[hidden])?;
    let (held, held_head) = (Held::of(OP, "hidden", hidden)?, Held::weight(OP, "head", head)?);
    let sum = problem(&held, &held_head, targets, &counted, head.dims()[1]).loss();
    Ok(Loss { sum, count: counted.len() })
}

/// The loss and `dhidden = scale · ∂sum/∂hidden`, in hidden's dtype and zero in rows that are not counted;
/// `dhead` `[V, H]` f32 += `scale · ∂sum/∂head`. For the mean's gradient give `scale = 1 / count`.
pub fn forward_backward<'a>(
    hidden: &Tensor,
    head: impl Into<Weight<'a>>,
    targets: &[u32],
    scale: f32,
    dhead: Option<&Tensor>,
) -> Result<(Pending, Tensor)> {
    let head = head.into();
    let counted = check(hidden, head, targets)?;
    if let Some(dhead) = dhead {
        shape(OP, "dhead", dhead, head.dims())?;
        if matches!(head, Weight::Quantized(_)) {
            return Err(Error::op(OP, "dhead is wanted of a quantized head, which is frozen"));
        }
        expect_dtype(OP, "dhead", dhead, DType::F32)?;
    }
    #[cfg(feature = "cuda")]
    if cuda::takes(hidden.device())
        && let (loss, Some(dhidden)) =
            cuda::cross_entropy::run(hidden, &head.to_dense(hidden.dtype())?, targets, &counted, Some(scale), dhead)?
    {
        return Ok((loss, dhidden));
    }
    #[cfg(all(target_vendor = "apple", feature = "custom-metal"))]
    if hidden.device().is_metal()
        && let (loss, Some(dhidden)) =
            metal::cross_entropy::loss(hidden, &head.to_dense(hidden.dtype())?, targets, &counted, Some(scale), dhead)?
    {
        return Ok((loss, dhidden));
    }
    on_cpu(OP, &[hidden])?;
    let (held, held_head) = (Held::of(OP, "hidden", hidden)?, Held::weight(OP, "head", head)?);
    let problem = problem(&held, &held_head, targets, &counted, head.dims()[1]);
    let (sum, dhidden) = match dhead {
        None => problem.loss_and_gradients(scale, None),
        Some(dhead) => {
            update::<f32, _>(OP, "dhead", dhead, |dhead| Ok(problem.loss_and_gradients(scale, Some(dhead))))?
        }
    };
    Ok((Pending::ready(sum, counted.len()), tensor_of(dhidden, hidden.shape(), hidden.dtype())?))
}

/// The mean over the counted rows, f32 `[]`, on Candle's tape, with the gradient for `hidden` only. Any layout.
/// The gradient is computed together with the loss where `hidden` is tracked.
pub fn cross_entropy<'a>(hidden: &Tensor, head: impl Into<Weight<'a>>, targets: &[u32]) -> Result<Tensor> {
    let (hidden, head) = (hidden.contiguous()?, head.into().contiguous()?);
    let head = head.borrow();
    let mean = |loss: Loss| Tensor::new(loss.mean() as f32, hidden.device());
    if !hidden.track_op() {
        return Ok(mean(forward(&hidden, head, targets)?)?);
    }
    let count = targets.iter().filter(|&&target| target != IGNORE).count();
    let scale = 1.0 / count.max(1) as f32;
    let (loss, dhidden) = forward_backward(&hidden.detach(), head, targets, scale, None)?;
    record(OP, [&hidden], mean(loss.read()?)?, move |g| {
        Ok([Some(dhidden.broadcast_mul(&g.to_dtype(dhidden.dtype())?)?)])
    })
}

fn problem<'a>(hidden: &'a Held, head: &'a Held, targets: &'a [u32], counted: &'a [usize], n: usize) -> Problem<'a> {
    Problem { hidden: hidden.floats(), head: head.floats(), n, targets, counted }
}

/// The counted rows.
fn check(hidden: &Tensor, head: Weight, targets: &[u32]) -> Result<Vec<usize>> {
    let (tokens, n) = dims2(OP, "hidden", hidden, "[tokens, hidden]")?;
    let vocab = match *head.dims() {
        [vocab, columns] if columns == n => vocab,
        ref other => return Err(Error::op(OP, format!("head has shape {other:?}, but [vocabulary, {n}] is needed"))),
    };
    head.check(OP, "head", hidden)?;
    if targets.len() != tokens {
        return Err(Error::op(OP, format!("{} targets for {tokens} rows; one each is needed", targets.len())));
    }
    let counted: Vec<usize> = (0..tokens).filter(|&row| targets[row] != IGNORE).collect();
    let mut bad = counted.iter().filter(|&&row| targets[row] as usize >= vocab);
    if let Some(&row) = bad.next() {
        let problem = format!("target {} of row {row} is outside the vocabulary of {vocab}", targets[row]);
        return Err(Error::op(OP, format!("{problem} ({} such rows)", 1 + bad.count())));
    }
    if n == 0 {
        return Err(Error::op(OP, format!("hidden has shape {:?}; rows of length 0 have no logits", hidden.dims())));
    }
    Ok(counted)
}
