//! The decoder of the Llama family: embedding, blocks, final norm, output projection. `ModelConfig` says which parts a
//! family has; there is one decoder for all.
//!
//! Rows of a batch are laid end to end without padding: activations are `[T, ...]` with T the tokens of all rows.

mod fitted;

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Tensor};

use super::ModelConfig;
use super::block::{Block, BlockShape, LINEAR_NAMES, Pass, Saved};
pub use fitted::Fitted;

use super::linear::{BaseWeight, DropoutRound, Linear, Parameter};
use crate::backend::cpu::on_pool;
use crate::backend::custom_ops::attention::Sequence;
use crate::backend::custom_ops::cross_entropy::{self, Loss};
use crate::backend::custom_ops::{embedding, linear, rms_norm};
use crate::inference::KvCache;
use crate::{Error, Result};

/// Rows of tokens laid end to end.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// The tokens of all rows.
    pub tokens: Vec<u32>,
    /// For each token the one to predict after it, or [`cross_entropy::IGNORE`].
    pub targets: Vec<u32>,
    /// The length of each row; they sum to `tokens.len()`.
    pub lengths: Vec<usize>,
}

impl Batch {
    /// The number of tokens that are predicted and counted in the loss.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != cross_entropy::IGNORE).count()
    }
}

/// What backward keeps of the forward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// Everything that backward needs.
    #[default]
    None,
    /// Each block's input; backward computes the block again. The same gradients bit for bit.
    EveryBlock,
    /// The input alone of so many of the lowest trained blocks, everything of the others. Those are gone by the time that the
    /// lowest are computed again, so what they need comes on top of nothing.
    Lowest(usize),
}

impl Checkpointing {
    /// Whether backward computes the block again that is the `index`th of the trained ones, from the lowest.
    pub fn again(self, index: usize) -> bool {
        match self {
            Self::None => false,
            Self::EveryBlock => true,
            Self::Lowest(count) => index < count,
        }
    }
}

/// How a training pass is done.
#[derive(Debug, Clone, Copy)]
pub struct TrainPass {
    /// What is kept for backward.
    pub checkpointing: Checkpointing,
    /// The round of dropout masks.
    pub round: DropoutRound,
    /// Multiplies the gradient of the summed loss: 1 / the tokens counted in an optimizer step.
    pub scale: f32,
}

/// A decoder with its weights.
pub struct Decoder {
    /// The model's sizes and variants.
    pub config: ModelConfig,
    embedding: BaseWeight,
    blocks: Vec<Block>,
    norm: Parameter,
    /// `None`: tied to the embedding.
    head: Option<BaseWeight>,
    rope: RopeTables,
    stamp: u64,
    /// What stood in the places of an adapter's whole tensors, in the order that they were put there; `None`: a tied head.
    replaced: Vec<(String, Option<BaseWeight>)>,
}

/// A number that no decoder of this process has had.
fn next_stamp() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

enum Kept {
    All(Box<Saved>),
    Input(Tensor),
}

impl Decoder {
    /// A decoder from exactly the tensors that [`ModelConfig::weight_shapes`] names. Embedding, output projection and the
    /// linears' weights may be quantized.
    pub fn new<W: Into<BaseWeight>>(
        config: &ModelConfig,
        mut weights: HashMap<String, W>,
        device: &Device,
    ) -> Result<Self> {
        let mut take_weight = |name: String| match weights.remove(&name) {
            Some(weight) => Ok(weight.into()),
            None => Err(Error::setting("weights", format!("tensor '{name}' is missing"))),
        };
        let take = |weight: BaseWeight, name: &str| match weight {
            BaseWeight::Dense(parameter) => Ok(parameter),
            BaseWeight::Quantized(_) => Err(Error::setting("weights", format!("tensor '{name}' is quantized"))),
        };
        let embedding = take_weight("model.embed_tokens.weight".into())?;
        let mut blocks = Vec::with_capacity(config.num_layers);
        for layer in 0..config.num_layers {
            let mut linear = |name: &str, bias: bool| {
                let path = format!("model.layers.{layer}.{name}");
                let weight = take_weight(format!("{path}.weight"))?;
                let name = format!("{path}.bias");
                let bias = if bias { Some(take(take_weight(name.clone())?, &name)?) } else { None };
                Ok::<_, Error>(Linear { weight, bias, adapter: None })
            };
            let [q, k, v, o, gate, up, down] = LINEAR_NAMES;
            let (q, k, v) = (linear(q, config.qkv_bias)?, linear(k, config.qkv_bias)?, linear(v, config.qkv_bias)?);
            let o = linear(o, config.o_bias)?;
            let (gate, up, down) =
                (linear(gate, config.mlp_bias)?, linear(up, config.mlp_bias)?, linear(down, config.mlp_bias)?);
            let mut norm = |name: &str| {
                let name = format!("model.layers.{layer}.{name}.weight");
                take(take_weight(name.clone())?, &name)
            };
            let head_norms = config.qk_norm;
            let window = config.sliding_window.filter(|_| layer >= config.sliding_window_from_layer);
            blocks.push(Block {
                input_norm: norm("input_layernorm")?,
                q_norm: if head_norms { Some(norm("self_attn.q_norm")?) } else { None },
                k_norm: if head_norms { Some(norm("self_attn.k_norm")?) } else { None },
                post_norm: norm("post_attention_layernorm")?,
                q,
                k,
                v,
                o,
                gate,
                up,
                down,
                shape: BlockShape {
                    heads: config.num_heads,
                    kv_heads: config.num_kv_heads,
                    head_dim: config.head_dim,
                    norm_eps: config.rms_norm_eps,
                    window,
                },
            });
        }
        let norm = take(take_weight("model.norm.weight".into())?, "model.norm.weight")?;
        let head = if config.tie_word_embeddings { None } else { Some(take_weight("lm_head.weight".into())?) };
        let rope = RopeTables::new(config.inv_freq(), device.clone());
        Ok(Self {
            config: config.clone(),
            embedding,
            blocks,
            norm,
            head,
            rope,
            stamp: next_stamp(),
            replaced: Vec::new(),
        })
    }

    /// The summed loss of a batch, without gradients.
    pub fn loss(&self, batch: &Batch) -> Result<Loss> {
        let hidden = self.hidden(batch)?;
        cross_entropy::forward(&hidden, self.head().value(), &batch.targets)
    }

    /// The logits of every token, `[T, V]`. For tests and small inputs: the whole matrix is in memory.
    pub fn logits(&self, batch: &Batch) -> Result<Tensor> {
        linear::forward(&self.hidden(batch)?, self.head().value(), None)
    }

    /// The summed loss of a batch; the gradients of `pass.scale ·` loss are added to the buffers of the trained parameters.
    pub fn loss_and_gradients(&self, batch: &Batch, pass: TrainPass) -> Result<Loss> {
        let layout = Layout::of(batch);
        let (cos, sin) = self.rope.up_to(layout.longest)?;
        let shared = layout.pass(&cos, &sin, Some(pass.round));
        let embedding_trained = self.embedding.grad().is_some();
        // Blocks under the lowest trained one have no backward.
        let lowest = if embedding_trained {
            0
        } else {
            self.blocks.iter().position(Block::trained).unwrap_or(self.blocks.len())
        };

        let mut kept = Vec::with_capacity(self.blocks.len() - lowest);
        let mut x = self.embed(&batch.tokens)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(&x, &shared, |k, v| Ok((k, v)))?;
            if layer >= lowest {
                kept.push(match pass.checkpointing.again(layer - lowest) {
                    false => Kept::All(Box::new(saved)),
                    true => Kept::Input(x),
                });
            }
            x = y;
        }

        let (hidden, rstd) = rms_norm::forward(&x, &self.norm.value, self.config.rms_norm_eps)?;
        let head = self.head();
        let (loss, d_hidden) =
            cross_entropy::forward_backward(&hidden, head.value(), &batch.targets, pass.scale, head.grad())?;
        let mut g = x.zeros_like()?;
        rms_norm::backward(&x, &self.norm.value, &rstd, &d_hidden, &g, self.norm.grad.as_ref())?;
        drop((x, hidden, d_hidden));
        for (layer, block) in self.blocks.iter().enumerate().skip(lowest).rev() {
            let Some(kept) = kept.pop() else { unreachable!("one was kept for each block from the lowest trained") };
            let saved = match kept {
                Kept::All(saved) => *saved,
                Kept::Input(x) => block.forward(&x, &shared, |k, v| Ok((k, v)))?.1,
            };
            g = block.backward(saved, g, &shared, layer > lowest || embedding_trained)?;
        }
        if let Some(grad) = self.embedding.grad() {
            embedding::backward(&batch.tokens, &g, grad)?;
        }
        loss.read()
    }

    /// Runs `tokens` after those in the cache, appends their keys and values to it, and returns the logits of the last
    /// token, `[V]` f32.
    ///
    /// # Errors
    /// A cache that holds keys made by another decoder, or by this one with other adapters; see [`KvCache::clear`].
    pub fn forward_cached(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Tensor> {
        match self.device().is_cpu() {
            true => on_pool(|| self.append(tokens, cache)),
            false => self.append(tokens, cache),
        }
    }

    fn append(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Tensor> {
        if tokens.is_empty() {
            return Err(Error::op("forward_cached", "there are no tokens to run"));
        }
        cache.claim(self.stamp)?;
        let (start, count) = (cache.len(), tokens.len());
        let (cos, sin) = self.rope.up_to(start + count)?;
        let positions: Vec<u32> = (start as u32..(start + count) as u32).collect();
        let sequences = [Sequence { q_start: 0, q_len: count, k_start: 0, k_len: start + count }];
        let pass = Pass { sequences: &sequences, positions: &positions, cos: &cos, sin: &sin, round: None };
        let mut x = self.embed(tokens)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &pass, |k, v| cache.append(layer, &k, &v))?.0;
        }
        let last = x.narrow(0, count - 1, 1)?;
        let (hidden, _) = rms_norm::forward(&last, &self.norm.value, self.config.rms_norm_eps)?;
        let logits = linear::forward(&hidden, self.head().value(), None)?;
        Ok(logits.flatten_all()?.to_dtype(candle_core::DType::F32)?)
    }

    /// The dtype of the activations: the norms'.
    pub fn dtype(&self) -> candle_core::DType {
        self.norm.value.dtype()
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        self.norm.value.device()
    }

    /// The linears that can carry an adapter, by module path (`model.layers.0.self_attn.q_proj`).
    pub fn linears(&self) -> impl Iterator<Item = (String, &Linear)> {
        self.blocks.iter().enumerate().flat_map(|(layer, block)| {
            block.linears().into_iter().map(move |(name, linear)| (format!("model.layers.{layer}.{name}"), linear))
        })
    }

    /// Names what the decoder computes: another number after every change of adapters or weights through this type, and in
    /// every other decoder. Keys and values belong to the number that they were made under.
    pub fn stamp(&self) -> u64 {
        self.stamp
    }

    fn changed(&mut self) {
        self.stamp = next_stamp();
    }

    /// The names of the weights that are quantized.
    pub fn quantized(&self) -> Vec<String> {
        let linears = self.linears().map(|(path, linear)| (path, &linear.weight));
        let ends = [("model.embed_tokens".to_string(), Some(&self.embedding)), ("lm_head".into(), self.head.as_ref())];
        let all = ends.into_iter().filter_map(|(name, weight)| Some((name, weight?))).chain(linears);
        let quantized = all.filter(|(_, weight)| matches!(weight, BaseWeight::Quantized(_)));
        quantized.map(|(name, _)| format!("{name}.weight")).collect()
    }

    /// Every weight of the model that is not quantized, by its Hugging Face name, to read or to train.
    pub fn parameters_mut(&mut self) -> Vec<(String, &mut Parameter)> {
        self.changed();
        let mut all: Vec<(String, &mut Parameter)> = Vec::new();
        all.extend(self.embedding.dense_mut().map(|weight| ("model.embed_tokens.weight".to_string(), weight)));
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            let name = |rest: &str| format!("model.layers.{layer}.{rest}");
            let Block { input_norm, post_norm, q_norm, k_norm, q, k, v, o, gate, up, down, .. } = block;
            all.push((name("input_layernorm.weight"), input_norm));
            all.push((name("post_attention_layernorm.weight"), post_norm));
            all.extend(q_norm.as_mut().map(|norm| (name("self_attn.q_norm.weight"), norm)));
            all.extend(k_norm.as_mut().map(|norm| (name("self_attn.k_norm.weight"), norm)));
            for (linear_name, linear) in LINEAR_NAMES.into_iter().zip([q, k, v, o, gate, up, down]) {
                let weight = linear.weight.dense_mut();
                all.extend(weight.map(|weight| (name(&format!("{linear_name}.weight")), weight)));
                let bias = linear.bias.as_mut();
                all.extend(bias.map(|bias| (name(&format!("{linear_name}.bias")), bias)));
            }
        }
        all.push(("model.norm.weight".to_string(), &mut self.norm));
        let head = self.head.as_mut().and_then(BaseWeight::dense_mut);
        all.extend(head.map(|head| ("lm_head.weight".to_string(), head)));
        all
    }

    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        match &self.embedding {
            BaseWeight::Dense(table) => embedding::forward(&table.value, tokens),
            BaseWeight::Quantized(table) => embedding::forward_quantized(table, tokens, self.dtype()),
        }
    }

    fn head(&self) -> &BaseWeight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The final norm's output, `[T, hidden]`.
    fn hidden(&self, batch: &Batch) -> Result<Tensor> {
        let layout = Layout::of(batch);
        let (cos, sin) = self.rope.up_to(layout.longest)?;
        let pass = layout.pass(&cos, &sin, None);
        let mut x = self.embed(&batch.tokens)?;
        for block in &self.blocks {
            x = block.forward(&x, &pass, |k, v| Ok((k, v)))?.0;
        }
        Ok(rms_norm::forward(&x, &self.norm.value, self.config.rms_norm_eps)?.0)
    }
}

/// Where the rows of a batch lie.
struct Layout {
    sequences: Vec<Sequence>,
    positions: Vec<u32>,
    longest: usize,
}

impl Layout {
    fn of(batch: &Batch) -> Self {
        let mut start = 0;
        let sequences = batch.lengths.iter().map(|&length| {
            let sequence = Sequence { q_start: start, q_len: length, k_start: start, k_len: length };
            start += length;
            sequence
        });
        let sequences = sequences.collect();
        let positions = batch.lengths.iter().flat_map(|&length| 0..length as u32).collect();
        Self { sequences, positions, longest: batch.lengths.iter().copied().max().unwrap_or(0) }
    }

    fn pass<'a>(&'a self, cos: &'a Tensor, sin: &'a Tensor, round: Option<DropoutRound>) -> Pass<'a> {
        Pass { sequences: &self.sequences, positions: &self.positions, cos, sin, round }
    }
}

/// cos and sin of position · frequency, made as far as positions have been seen and doubled when one is beyond.
struct RopeTables {
    inv_freq: Vec<f32>,
    device: Device,
    tables: Mutex<Option<(Tensor, Tensor)>>,
}

impl RopeTables {
    fn new(inv_freq: Vec<f32>, device: Device) -> Self {
        Self { inv_freq, device, tables: Mutex::new(None) }
    }

    /// Tables `[P, D/2]` with P ≥ `positions`.
    fn up_to(&self, positions: usize) -> Result<(Tensor, Tensor)> {
        let mut tables = self.tables.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((cos, sin)) = tables.as_ref().filter(|(cos, _)| cos.dims()[0] >= positions) {
            return Ok((cos.clone(), sin.clone()));
        }
        let (count, width) = (positions.next_power_of_two().max(64), self.inv_freq.len());
        // The angle is rounded to f32 before cos and sin, as transformers does it.
        let angles = (0..count).flat_map(|p| self.inv_freq.iter().map(move |frequency| p as f32 * frequency));
        let (cos, sin): (Vec<f32>, Vec<f32>) =
            angles.map(|angle| ((angle as f64).cos() as f32, (angle as f64).sin() as f32)).unzip();
        let cos = Tensor::from_vec(cos, (count, width), &self.device)?;
        let sin = Tensor::from_vec(sin, (count, width), &self.device)?;
        *tables = Some((cos.clone(), sin.clone()));
        Ok((cos, sin))
    }
}
