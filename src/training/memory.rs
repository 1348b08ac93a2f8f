//! How much memory a training step takes, from sizes alone, and how many blocks must be computed again for it to fit.
//!
//! What counts: the weights; the trained values with gradients and two moments, f32; what backward keeps of each block
//! (`models::block`); and the most that is alive beside those, in the loss or in the backward of a block. A program's own memory
//! comes on top on the CPU, and the driver's on a GPU.

use candle_core::{DType, Device};

use super::options::{FineTuneType, GradCheckpoint, TrainerOptions};
use super::setup;
use crate::Result;
use crate::backend::cpu::attention::WAVE;
use crate::backend::custom_ops::cross_entropy::chunk_rows;
use crate::models::block::LINEAR_NAMES;
use crate::models::decoder::Checkpointing;
use crate::models::{Holding, ModelConfig};

/// The share of the free memory that `auto` fills: sizes of passes differ, and so do allocators.
const FILLED: f64 = 0.9;

/// On the CPU freed memory is kept for the next allocation and doesn't always fit it: about so small a share of a step lies
/// unused (measured: tests/memory.rs and SmolLM2-135M at 512 and 2048 tokens).
const CPU_UNUSED: usize = 20;
/// Of the program's code and of the threads' own heaps, what is first used in a step.
const CPU_PROGRAM: usize = 12 << 20;

/// The largest pass of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Its tokens.
    pub tokens: usize,
    /// Those of its longest row.
    pub longest: usize,
    /// Those that are counted in the loss.
    pub counted: usize,
}

/// Bytes that a run takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// The model's weights.
    pub weights: u64,
    /// Trained values, gradients, moments.
    pub trained: u64,
    /// What backward keeps of the blocks.
    pub kept: u64,
    /// The most beside these.
    pub working: u64,
}

impl Plan {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.trained + self.step()
    }

    /// What a step takes beside weights and trained values.
    pub fn step(&self) -> u64 {
        self.kept + self.working
    }
}

/// The sizes that a plan is made from.
#[derive(Debug, Clone)]
pub struct Sizes {
    config: ModelConfig,
    /// Bytes of an element of weights and activations.
    element: usize,
    cpu: bool,
    weights: usize,
    /// Of quantized weights, dense for one product.
    widened: usize,
    trained: usize,
    /// Blocks from the lowest trained one on.
    blocks: usize,
    /// Σ r over the adapters of a block.
    ranks: usize,
    /// Bytes of a logit and its gradient on a GPU.
    logit: usize,
    /// What DoRA's linears of a block make for a token: all of them, and the most that share an input.
    dora: (usize, usize),
}

impl Sizes {
    /// Of a run with these options.
    ///
    /// # Errors
    /// A target that the model does not have.
    pub fn new(config: &ModelConfig, options: &TrainerOptions, holding: &Holding, device: &Device) -> Result<Self> {
        let dtype = holding.dtype;
        let shapes = config.weight_shapes();
        let elements: usize = shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        let element = dtype.size_in_bytes();
        let (weights, trained, blocks, ranks, dora) = match options.fine_tune_type {
            FineTuneType::Full => (0, elements, config.num_layers, 0, (0, 0)),
            kind => {
                let targets = setup::targets(config, options)?;
                let shape = |path: &String| shapes.iter().find(|(name, _)| name.strip_suffix(".weight") == Some(path));
                let sides = targets.iter().filter_map(shape).map(|(_, shape)| shape.iter().sum::<usize>());
                let mut trained = options.rank * sides.sum::<usize>();
                let lowest = targets.iter().filter_map(|path| layer_of(path)).min().unwrap_or(config.num_layers);
                let blocks = config.num_layers - lowest;
                let mut dora = (0, 0);
                if kind == FineTuneType::Dora {
                    let outputs = |ends: &[&str]| {
                        let of = targets.iter().filter(|path| ends.iter().any(|end| path.ends_with(end)));
                        of.filter_map(shape).map(|(_, shape)| shape[0]).sum::<usize>()
                    };
                    trained += outputs(&LINEAR_NAMES);
                    let [q, k, v, o, gate, up, down] = LINEAR_NAMES;
                    let shared = [outputs(&[q, k, v]), outputs(&[o]), outputs(&[gate, up]), outputs(&[down])];
                    let a_block = |all: usize| all.div_ceil(blocks.max(1));
                    dora = (a_block(outputs(&LINEAR_NAMES)), a_block(shared.into_iter().fold(0, usize::max)));
                }
                (holding.bytes(config), trained, blocks, options.rank * targets.len().div_ceil(blocks.max(1)), dora)
            }
        };
        let (config, cpu) = (config.clone(), device.is_cpu());
        let logit = if halves_logits(dtype, device) { 2 } else { 4 + element };
        let widened = holding.widened(&config, device);
        Ok(Self { config, element, cpu, weights, widened, trained, blocks, ranks, logit, dora })
    }

    /// What a run takes whose largest pass is `work`.
    pub fn plan(&self, work: Work, checkpointing: Checkpointing) -> Plan {
        let again = (0..self.blocks).filter(|&index| checkpointing.again(index)).count();
        let (input, whole) = (work.tokens * self.config.hidden_size * self.element, work.tokens * self.kept_a_token());
        // Beside what the other blocks keep; a block that is computed again has its own back by then, but no other's.
        let upper = (self.blocks - again) * whole;
        let block = if again == self.blocks { whole } else { 0 } + self.backward(work) + self.widened;
        let kept = again * input + upper;
        let working = block.max(self.loss(work));
        let unused = if self.cpu { CPU_PROGRAM + (kept + working) / CPU_UNUSED } else { 0 };
        Plan {
            weights: self.weights as u64,
            // Values, two moments and gradients.
            trained: (16 * self.trained) as u64,
            kept: kept as u64,
            working: (working + unused) as u64,
        }
    }

    /// The fewest blocks to compute again for a step to fit into `available` bytes, and its plan; every block where nothing
    /// is enough.
    pub fn fit(&self, work: Work, available: u64) -> (Checkpointing, Plan) {
        let room = (available as f64 * FILLED) as u64;
        let fewest = (0..self.blocks).map(|again| (Self::lowest(again), self.plan(work, Self::lowest(again))));
        let mut fitting = fewest.filter(|(_, plan)| plan.step() <= room);
        let every = Checkpointing::EveryBlock;
        fitting.next().unwrap_or_else(|| (every, self.plan(work, every)))
    }

    /// What an option means for a run, with so many bytes free for its steps.
    pub fn choose(&self, option: GradCheckpoint, work: Work, available: Option<u64>) -> (Checkpointing, Plan) {
        match (option, available) {
            (GradCheckpoint::Auto, Some(available)) => self.fit(work, available),
            (GradCheckpoint::Every, _) => (Checkpointing::EveryBlock, self.plan(work, Checkpointing::EveryBlock)),
            _ => (Checkpointing::None, self.plan(work, Checkpointing::None)),
        }
    }

    /// How many blocks a checkpointing computes again, of how many that are trained.
    pub fn again(&self, checkpointing: Checkpointing) -> (usize, usize) {
        ((0..self.blocks).filter(|&index| checkpointing.again(index)).count(), self.blocks)
    }

    fn lowest(again: usize) -> Checkpointing {
        if again == 0 { Checkpointing::None } else { Checkpointing::Lowest(again) }
    }

    /// `models::block::Saved`: x, q, k, v, o, m, gate and up, lse, h of the adapters, u of those with DoRA, and with norms over heads
    /// their inputs.
    fn kept_a_token(&self) -> usize {
        let ModelConfig { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, qk_norm, .. } =
            self.config;
        let (q, kv) = (num_heads * head_dim, num_kv_heads * head_dim);
        let norms = if qk_norm { (q + kv) * self.element + 4 * (num_heads + num_kv_heads) } else { 0 };
        (2 * hidden_size + 2 * q + 2 * kv + 2 * intermediate_size) * self.element
            + 4 * num_heads
            + 4 * self.ranks
            + self.dora.0 * self.element
            + norms
    }

    /// The most that the backward of a block has beside what was kept: at the gradient of SwiGLU's output, or in attention, when
    /// gate and up are gone.
    fn backward(&self, Work { tokens, longest, .. }: Work) -> usize {
        let ModelConfig { hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, .. } = self.config;
        let (q, kv, e) = (num_heads * head_dim, num_kv_heads * head_dim, self.element);
        // On the CPU sums are f32 and rounded afterwards, where that is another dtype.
        let sum = if self.cpu && e < 4 { 4 + e } else { e };
        let mlp = tokens * intermediate_size * sum;
        let shares = if self.cpu { 4 * WAVE * longest * q } else { 0 };
        let gradients = tokens * (q * e + (q + 2 * kv) * sum + 4 * num_heads) + shares;
        // The gradients of DoRA's u, beside those of the outputs.
        let scaled = tokens * self.dora.1 * e;
        tokens * hidden_size * e + scaled + mlp.max(gradients.saturating_sub(2 * tokens * intermediate_size * e))
    }

    /// The most that the loss has: hidden state and gradient, those of the counted rows, and a chunk of logits.
    fn loss(&self, Work { tokens, counted, .. }: Work) -> usize {
        let ModelConfig { hidden_size, vocab_size, .. } = self.config;
        let row = hidden_size * self.element;
        let chunk = chunk_rows(counted, vocab_size, self.cpu);
        if self.cpu {
            let narrow = if self.element < 4 { 2 } else { 0 };
            return tokens * (2 * row + 4 * hidden_size) + chunk * (vocab_size * (4 + narrow) + 8 * hidden_size);
        }
        let gathered = if counted == tokens { 0 } else { 2 * counted * row };
        3 * tokens * row + gathered + chunk * vocab_size * self.logit
    }
}

/// Whether the loss keeps logits in 16 bits and their gradient in the same place.
fn halves_logits(dtype: DType, device: &Device) -> bool {
    #[cfg(feature = "cuda")]
    if device.is_cuda() && dtype == DType::BF16 {
        return crate::backend::cuda::shared_linear::available(0).unwrap_or(false);
    }
    let _ = (dtype, device);
    false
}

fn layer_of(path: &str) -> Option<usize> {
    path.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(options: &TrainerOptions) -> Sizes {
        let json = serde_json::json!({
            "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": true
        });
        let config = ModelConfig::from_value("test".as_ref(), &json).unwrap();
        Sizes::new(&config, options, &Holding::dense(DType::F32), &Device::Cpu).unwrap()
    }

    #[test]
    fn as_few_blocks_again_as_fit() {
        let sizes = sizes(&TrainerOptions::default());
        let work = Work { tokens: 4096, longest: 512, counted: 4000 };
        let (none, every) = (sizes.plan(work, Checkpointing::None), sizes.plan(work, Checkpointing::EveryBlock));
        assert!(every.step() < none.step());
        let mut last = usize::MAX;
        for step in 0..=20 {
            let available = (every.step() + (none.step() - every.step()) * step / 20) * 10 / 9 + 10;
            let (checkpointing, plan) = sizes.fit(work, available);
            let (again, of) = sizes.again(checkpointing);
            assert!(plan.step() * 10 <= available * 9 || again == of, "{checkpointing:?} of {plan:?} in {available}");
            assert!(again <= last, "more memory, more work");
            if again > 0 {
                let fewer = sizes.plan(work, Sizes::lowest(again - 1));
                assert!(fewer.step() * 10 > available * 9, "{again} blocks where {} are enough", again - 1);
            }
            last = again;
        }
        assert_eq!(last, 0);
        assert_eq!(sizes.choose(GradCheckpoint::Auto, work, None).0, Checkpointing::None);
    }

    #[test]
    fn trained_values_and_blocks() {
        let one =
            TrainerOptions { target_modules: vec!["q_proj".into()], num_layers: 2, rank: 3, ..Default::default() };
        let sizes = sizes(&one);
        assert_eq!((sizes.trained, sizes.blocks, sizes.ranks), (2 * 3 * (64 + 64), 2, 3));
    }
}
