//! What a training run can be told.

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::sampler::{Batching, passes};
use super::schedule::{Schedule, ScheduleKind};
use crate::backend::quantized::Quantize;
use crate::models::{Holding, ModelFiles, WeightDtype};
use crate::{Error, Result};

/// What is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FineTuneType {
    /// Low-rank adapters on frozen weights.
    #[default]
    Lora,
    /// The same with a learned length for each row of the adapted weight (DoRA; Liu et al., 2024).
    Dora,
    /// Every weight of the model.
    Full,
}

impl FineTuneType {
    /// Whether adapters are trained.
    pub fn adapters(self) -> bool {
        self != Self::Full
    }
}

/// How a new adapter begins, by PEFT's names; see [`mod@super::initial`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitLoraWeights {
    /// A uniform within ±1/√k (Kaiming with a = √5), B zero.
    #[default]
    Default,
    /// A normal with deviation 1/r, B zero.
    Gaussian,
    /// The largest singular values of W, which keeps the rest.
    Pissa,
    /// The first columns of Q and rows of R of W, which keeps the rest.
    Olora,
}

impl InitLoraWeights {
    /// Whether the base's weights change, so that the adapter fits those of the file only with what was taken from them.
    pub fn changes_base(self) -> bool {
        matches!(self, Self::Pissa | Self::Olora)
    }
}

/// Of which blocks only the input is kept for backward, which then computes them again: less memory for more work, the same
/// gradients to the bit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "Value")]
pub enum GradCheckpoint {
    /// Of none.
    None,
    /// Of all.
    Every,
    /// Of as few as the free memory asks for, counted before the first step.
    #[default]
    Auto,
}

/// As a configuration file may say it; a truth value is mlx-lm's way.
impl TryFrom<Value> for GradCheckpoint {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Self, String> {
        match &value {
            Value::Bool(true) => Ok(Self::Every),
            Value::Bool(false) => Ok(Self::None),
            Value::String(name) if name == "none" => Ok(Self::None),
            Value::String(name) if name == "every" => Ok(Self::Every),
            Value::String(name) if name == "auto" => Ok(Self::Auto),
            _ => Err("it must be none, every or auto".to_string()),
        }
    }
}

/// The options of a training run. `Default` gives the program's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainerOptions {
    /// Adapters or all weights.
    pub fine_tune_type: FineTuneType,
    /// What the frozen weights are held in; adapters and the optimizer are f32.
    pub dtype: WeightDtype,
    /// Which of the frozen weights are quantized.
    pub quantize: Quantize,
    /// r of the adapters.
    pub rank: usize,
    /// The adapters' scaling is alpha / rank, or with `use_rslora` alpha / √rank.
    pub alpha: f64,
    /// The scaling of rank-stabilized LoRA (Kalajdzievski, 2023).
    pub use_rslora: bool,
    /// How A and B begin.
    pub init_lora_weights: InitLoraWeights,
    /// The probability to drop an element of an adapter's input, in training.
    pub dropout: f32,
    /// The linears that get adapters: names such as `q_proj` or whole paths; `all-linear` stands for all of a block's.
    pub target_modules: Vec<String>,
    /// How many blocks, counted from the last, get adapters; -1 for all.
    pub num_layers: i64,
    /// Rows in a forward and backward pass.
    pub batch_size: usize,
    /// Passes whose gradients make one optimizer step, weighted by their tokens.
    pub grad_accumulation_steps: usize,
    /// Optimizer steps, unless `epochs` is given.
    pub iters: usize,
    /// Passes over the data; overrides `iters`.
    pub epochs: Option<f64>,
    /// The full learning rate.
    pub learning_rate: f64,
    /// LoRA+ (Hayou et al., 2024): the learning rate of B, and of DoRA's magnitudes, is so many times that of A.
    pub loraplus_ratio: f64,
    /// The schedule after the warm-up.
    pub lr_schedule: ScheduleKind,
    /// Steps of linear warm-up.
    pub warmup: usize,
    /// The last learning rate as a share of the full one.
    pub min_lr_ratio: f64,
    /// AdamW's decoupled weight decay.
    pub weight_decay: f64,
    /// The gradient's global norm is clipped to this; 0 for no clipping.
    pub max_grad_norm: f64,
    /// What is computed again for less memory.
    pub grad_checkpoint: GradCheckpoint,
    /// Fill a pass with as many whole rows as `batch_size · max_seq_length` tokens hold, in place of `batch_size` rows.
    pub pack: bool,
    /// Rows are cut at this many tokens, and with `pack` a pass is measured by it.
    pub max_seq_length: usize,
    /// Steps between reports.
    pub steps_per_report: usize,
    /// Steps between validations; the first comes before training, the last after it.
    pub steps_per_eval: usize,
    /// Batches of a validation; -1 for all.
    pub val_batches: i64,
    /// Steps between checkpoints; one is always written at the end.
    pub save_every: usize,
    /// Seeds the initial adapters, the order of rows and dropout.
    pub seed: u64,
}

impl Default for TrainerOptions {
    fn default() -> Self {
        Self {
            fine_tune_type: FineTuneType::Lora,
            dtype: WeightDtype::Auto,
            quantize: Quantize::Auto,
            rank: 8,
            alpha: 16.0,
            use_rslora: false,
            init_lora_weights: InitLoraWeights::Default,
            dropout: 0.0,
            target_modules: vec!["all-linear".to_string()],
            num_layers: -1,
            batch_size: 4,
            grad_accumulation_steps: 1,
            iters: 1000,
            epochs: None,
            learning_rate: 2e-4,
            loraplus_ratio: 1.0,
            lr_schedule: ScheduleKind::Cosine,
            warmup: 10,
            min_lr_ratio: 0.1,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            grad_checkpoint: GradCheckpoint::Auto,
            pack: false,
            max_seq_length: 2048,
            steps_per_report: 10,
            steps_per_eval: 200,
            val_batches: 25,
            save_every: 100,
            seed: 0,
        }
    }
}

impl TrainerOptions {
    /// Refuses values that cannot be trained with; one error lists all of them.
    pub fn check(&self) -> Result<()> {
        let mut wrong = Vec::new();
        let mut refuse = |bad: bool, message: String| {
            if bad {
                wrong.push(message);
            }
        };
        let at_least_one = [
            ("rank", self.rank),
            ("batch_size", self.batch_size),
            ("max_seq_length", self.max_seq_length),
            ("grad_accumulation_steps", self.grad_accumulation_steps),
            ("iters", self.iters),
            ("steps_per_report", self.steps_per_report),
            ("steps_per_eval", self.steps_per_eval),
            ("save_every", self.save_every),
        ];
        for (name, value) in at_least_one {
            refuse(value == 0, format!("{name} is 0; it must be 1 or more"));
        }
        let positive =
            [("alpha", self.alpha), ("learning_rate", self.learning_rate), ("loraplus_ratio", self.loraplus_ratio)];
        for (name, value) in positive.into_iter().chain(self.epochs.map(|epochs| ("epochs", epochs))) {
            refuse(!(value > 0.0 && value.is_finite()), format!("{name} is {value}; it must be over 0"));
        }
        for (name, value) in [("weight_decay", self.weight_decay), ("max_grad_norm", self.max_grad_norm)] {
            refuse(!(value >= 0.0 && value.is_finite()), format!("{name} is {value}; it must be 0 or more"));
        }
        refuse(!(0.0..1.0).contains(&self.dropout), format!("dropout is {}; it must be in [0, 1)", self.dropout));
        let ratio = self.min_lr_ratio;
        refuse(!(0.0..=1.0).contains(&ratio), format!("min_lr_ratio is {ratio}; it must be in [0, 1]"));
        for (name, value) in [("num_layers", self.num_layers), ("val_batches", self.val_batches)] {
            refuse(value < -1 || value == 0, format!("{name} is {value}; it must be 1 or more, or -1 for all"));
        }
        let half = matches!(self.dtype, WeightDtype::Bf16 | WeightDtype::F16);
        let full = self.fine_tune_type == FineTuneType::Full;
        let quantized = !matches!(self.quantize, Quantize::Auto | Quantize::None);
        refuse(
            full && quantized,
            "quantize is given; full trains every weight, and quantized ones are frozen".to_string(),
        );
        refuse(full && half, "dtype is a 16-bit one; all weights are trained in f32".to_string());
        let changed = [
            (self.loraplus_ratio != 1.0, "loraplus_ratio"),
            (self.use_rslora, "use_rslora"),
            (self.init_lora_weights != InitLoraWeights::Default, "init_lora_weights"),
            (self.dropout != 0.0, "dropout"),
        ];
        for (changed, name) in changed {
            refuse(full && changed, format!("{name} is given; it is for adapters, and full trains every weight"));
        }
        let taken = self.init_lora_weights.changes_base();
        refuse(
            taken && quantized,
            "quantize is given; pissa and olora take a part of the base's weights, and quantized ones are frozen"
                .to_string(),
        );
        refuse(self.target_modules.is_empty(), "target_modules is empty; name at least one linear".to_string());
        if wrong.is_empty() { Ok(()) } else { Err(Error::setting("training options", wrong.join("; "))) }
    }

    /// s of the adapters.
    pub fn scaling(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    /// What a model's weights are held in on a device. Full fine-tuning has them in f32, whatever the file has.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn holding(&self, model: &ModelFiles, device: &Device) -> Result<Holding> {
        match self.fine_tune_type {
            FineTuneType::Lora | FineTuneType::Dora => {
                model.holding(self.quantize, self.dtype.on(device, model.own_dtype()?), device)
            }
            FineTuneType::Full => Ok(Holding::dense(DType::F32)),
        }
    }

    /// How rows are put together in passes.
    pub fn batching(&self) -> Batching {
        match self.pack {
            false => Batching::Rows(self.batch_size),
            true => Batching::Tokens(self.batch_size * self.max_seq_length),
        }
    }

    /// The number of optimizer steps over rows of these lengths.
    pub fn steps(&self, lengths: &[usize]) -> usize {
        let Some(epochs) = self.epochs else { return self.iters };
        let passes = match self.batching() {
            Batching::Rows(rows) => (lengths.len().div_ceil(rows) as f64 * epochs).ceil() as usize,
            batching => passes(lengths, batching, self.seed, epochs),
        };
        passes.div_ceil(self.grad_accumulation_steps).max(1)
    }

    /// The learning rates of a run of `total` steps.
    pub fn schedule(&self, total: usize) -> Schedule {
        let Self { lr_schedule, learning_rate, warmup, min_lr_ratio, .. } = *self;
        // A run shorter than its warm-up would never reach the full rate.
        let warmup = warmup.min(total / 2);
        Schedule { kind: lr_schedule, rate: learning_rate, warmup, total, min_ratio: min_lr_ratio }
    }
}
