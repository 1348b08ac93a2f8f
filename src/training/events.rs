//! What a run tells while it goes: events, and the sums that reports are made of.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Device;

use super::checkpoint::State;
use super::memory::Work;
use crate::Result;
use crate::backend::custom_ops::cross_entropy::Loss;
use crate::backend::memory;

/// What a run reports as it goes.
#[derive(Debug, Clone)]
pub enum Event {
    /// Before the first step.
    Start(Start),
    /// A step is done.
    Step {
        /// Steps done.
        step: usize,
        /// Steps of the whole run.
        total: usize,
        /// Nats per counted token of this step.
        loss: f64,
    },
    /// After `steps_per_report` steps, and after the last one.
    Report(Report),
    /// A validation is done.
    Validation(Validation),
    /// A checkpoint stands on the disk.
    Checkpoint {
        /// The step it holds.
        step: usize,
        /// Its folder.
        path: PathBuf,
    },
    /// Something that the user should know; training goes on.
    Warning(String),
}

/// What a run is about to do.
#[derive(Debug, Clone)]
pub struct Start {
    /// Steps already done by the run that is continued; 0 for a new one.
    pub step: usize,
    /// Steps of the whole run.
    pub total: usize,
    /// Trained values.
    pub trained: usize,
    /// Values of the model, adapters not counted.
    pub model: usize,
    /// Adapters, or weights in full fine-tuning.
    pub tensors: usize,
    /// Rows of the training data.
    pub rows: usize,
    /// Blocks that backward computes again, and those that are trained.
    pub again: (usize, usize),
    /// The largest pass.
    pub work: Work,
    /// What a step of it takes beside weights and trained values, and what is free for it, in bytes.
    pub memory: (u64, Option<u64>),
}

/// Means over the steps since the last report.
#[derive(Debug, Clone)]
pub struct Report {
    /// The last step done.
    pub step: usize,
    /// Steps of the whole run.
    pub total: usize,
    /// Nats per counted token.
    pub loss: f64,
    /// Of the last step.
    pub learning_rate: f64,
    /// The gradient's global norm before clipping, of the last step.
    pub grad_norm: f64,
    /// Tokens run through the model per second.
    pub tokens_per_second: f64,
    /// Steps per second.
    pub steps_per_second: f64,
    /// Tokens counted in the loss since the start of the run.
    pub trained_tokens: u64,
    /// Passes over the data since the start of the run.
    pub epoch: f64,
    /// Bytes in use now, where the system tells: of tensors on a GPU, of the process on the CPU.
    pub memory: Option<u64>,
    /// The most of them so far.
    pub peak_memory: Option<u64>,
}

/// A validation's outcome.
#[derive(Debug, Clone, Copy)]
pub struct Validation {
    /// Steps done.
    pub step: usize,
    /// Nats per counted token.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Tokens counted.
    pub tokens: usize,
}

/// What a run came to.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Steps done; under `total` when it was asked to stop.
    pub step: usize,
    /// Steps of the whole run.
    pub total: usize,
    /// The first and the last validation of this process.
    pub validation: Option<(Validation, Validation)>,
    /// Seconds spent.
    pub seconds: f64,
    /// The most bytes in use at a time, where the system tells: of tensors on a GPU, of the process on the CPU.
    pub peak_memory: Option<u64>,
}

/// Sums since the last report.
pub(super) struct Interval {
    /// When it began; moved on over pauses.
    pub started: Instant,
    loss: Loss,
    tokens: usize,
    steps: usize,
}

impl Interval {
    pub fn new() -> Self {
        Self { started: Instant::now(), loss: Loss { sum: 0.0, count: 0 }, tokens: 0, steps: 0 }
    }

    pub fn add(&mut self, loss: Loss, tokens: usize) {
        self.loss.sum += loss.sum;
        self.loss.count += loss.count;
        self.tokens += tokens;
        self.steps += 1;
    }

    pub fn report(
        &self,
        state: &State,
        device: &Device,
        epoch: f64,
        learning_rate: f64,
        grad_norm: f64,
    ) -> Result<Report> {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        Ok(Report {
            step: state.step,
            total: state.total,
            loss: self.loss.mean(),
            learning_rate,
            grad_norm,
            tokens_per_second: self.tokens as f64 / seconds,
            steps_per_second: self.steps as f64 / seconds,
            trained_tokens: state.trained_tokens,
            epoch,
            memory: memory::used(device)?,
            peak_memory: memory::peak(device, false)?,
        })
    }
}
