//! What a training run can be told.

use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};

use super::schedule::{Schedule, ScheduleKind};
use crate::models::WeightDtype;
use crate::{Error, Result};

/// What is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FineTuneType {
    /// Low-rank adapters on frozen weights.
    #[default]
    Lora,
    /// Every weight of the model.
    Full,
}

/// The options of a training run. `Default` gives the program's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainerOptions {
    /// Adapters or all weights.
    pub fine_tune_type: FineTuneType,
    /// What the frozen weights are held in; adapters and the optimizer are f32.
    pub dtype: WeightDtype,
    /// r of the adapters.
    pub rank: usize,
    /// The adapters' scaling is alpha / rank.
    pub alpha: f64,
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
    /// Keep only each block's input for backward and compute the block again.
    pub grad_checkpoint: bool,
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
            rank: 8,
            alpha: 16.0,
            dropout: 0.0,
            target_modules: vec!["all-linear".to_string()],
            num_layers: -1,
            batch_size: 4,
            grad_accumulation_steps: 1,
            iters: 1000,
            epochs: None,
            learning_rate: 2e-4,
            lr_schedule: ScheduleKind::Cosine,
            warmup: 10,
            min_lr_ratio: 0.1,
            weight_decay: 0.01,
            max_grad_norm: 1.0,
            grad_checkpoint: false,
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
            ("grad_accumulation_steps", self.grad_accumulation_steps),
            ("iters", self.iters),
            ("steps_per_report", self.steps_per_report),
            ("steps_per_eval", self.steps_per_eval),
            ("save_every", self.save_every),
        ];
        for (name, value) in at_least_one {
            refuse(value == 0, format!("{name} is 0; it must be 1 or more"));
        }
        let positive = [("alpha", self.alpha), ("learning_rate", self.learning_rate)];
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
        refuse(full && half, "dtype is a 16-bit one; all weights are trained in f32".to_string());
        refuse(self.target_modules.is_empty(), "target_modules is empty; name at least one linear".to_string());
        if wrong.is_empty() { Ok(()) } else { Err(Error::setting("training options", wrong.join("; "))) }
    }

    /// What weights that are `own` in their file are held in on a device.
    pub fn weight_dtype(&self, device: &Device, own: DType) -> DType {
        match self.fine_tune_type {
            FineTuneType::Lora => self.dtype.on(device, own),
            FineTuneType::Full => DType::F32,
        }
    }

    /// The number of optimizer steps over a dataset of `rows` rows.
    pub fn steps(&self, rows: usize) -> usize {
        let Some(epochs) = self.epochs else { return self.iters };
        let passes = (rows.div_ceil(self.batch_size) as f64 * epochs).ceil() as usize;
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
