//! The training loop: batches, gradients, clipping, AdamW, validation, checkpoints.
//!
//! It does not ride on Candle's tape: the decoder's blocks add gradients straight into the buffers of [`Params`]. It refuses
//! to train a lie: a loss or gradient that is not finite stops it, as does an adapter that receives no gradient.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::checkpoint::{self, Fingerprint, State};
use super::dataset::{Dataset, Row};
use super::options::{FineTuneType, TrainerOptions};
use super::params::Params;
use super::sampler::{Position, Sampler, collate};
use super::setup;
use crate::backend::custom_ops::adamw::AdamW;
use crate::backend::custom_ops::cross_entropy::Loss;
use crate::models::ModelFiles;
use crate::models::decoder::{Batch, Checkpointing, Decoder, TrainPass};
use crate::models::linear::DropoutRound;
use crate::training::adapter::AdapterFile;
use crate::training::files;
use crate::{Error, Result};

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
}

/// Checkpoints kept: the newest and one to fall back on.
const KEPT_CHECKPOINTS: usize = 2;

/// A run of training.
pub struct Trainer<'a> {
    model: &'a ModelFiles,
    train: &'a Dataset,
    valid: Option<&'a Dataset>,
    options: TrainerOptions,
    adapter_path: PathBuf,
    decoder: Decoder,
    params: Params,
    state: State,
    resumed_from: usize,
    warnings: Vec<String>,
}

/// Where a run starts from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum From {
    /// New adapters, or the weights as they are.
    #[default]
    Scratch,
    /// The values of an adapter folder; a new optimizer and schedule.
    Adapter(PathBuf),
    /// The newest checkpoint of the adapter folder, to the bit.
    Checkpoint,
}

impl<'a> Trainer<'a> {
    /// Loads the model, puts the adapters in place and, to continue a run, reads its newest checkpoint.
    pub fn new(
        model: &'a ModelFiles,
        train: &'a Dataset,
        valid: Option<&'a Dataset>,
        options: TrainerOptions,
        adapter_path: &Path,
        from: From,
        device: &Device,
    ) -> Result<Self> {
        options.check()?;
        let existing = checkpoint::list(adapter_path)?;
        if from != From::Checkpoint && !existing.is_empty() {
            let advice = "continue it with --resume, or choose another --adapter-path";
            return Err(Error::file(adapter_path, format!("holds the checkpoints of an earlier run; {advice}")));
        }
        let weights = model.weights(options.weight_dtype(device, model.own_dtype()?), device)?;
        let fingerprint = model_fingerprint(&weights)?;
        let mut decoder = Decoder::new(&model.config, weights, device)?;
        let params = match options.fine_tune_type {
            FineTuneType::Lora => setup::lora(&mut decoder, &options, device)?,
            FineTuneType::Full => setup::full(&mut decoder, device)?,
        };
        let total = options.steps(train.rows.len());
        let mut trainer = Self {
            state: State {
                step: 0,
                round: 0,
                position: Position::default(),
                trained_tokens: 0,
                total,
                options: options.clone(),
                model: fingerprint,
                data: data_fingerprint(&train.rows),
            },
            model,
            train,
            valid,
            options,
            adapter_path: adapter_path.to_path_buf(),
            decoder,
            params,
            resumed_from: 0,
            warnings: Vec::new(),
        };
        match from {
            From::Scratch => {}
            From::Adapter(path) => setup::start_from(&trainer.params, &trainer.options, &AdapterFile::load(&path)?)?,
            From::Checkpoint => trainer.resume(existing, device)?,
        }
        Ok(trainer)
    }

    /// Trains to the end, or until `report` breaks; then the step is finished and a checkpoint written.
    pub fn run(&mut self, report: &mut dyn FnMut(Event) -> ControlFlow<()>) -> Result<Summary> {
        let started = Instant::now();
        let total = self.state.total;
        let mut stop = false;
        let mut tell = |event: Event, stop: &mut bool| *stop |= report(event).is_break();
        tell(Event::Start(self.start_event()), &mut stop);
        for warning in std::mem::take(&mut self.warnings) {
            tell(Event::Warning(warning), &mut stop);
        }
        let mut validation: Option<(Validation, Validation)> = None;
        let mut sampler = Sampler::new(self.train.rows.len(), self.options.seed, self.state.position);
        let schedule = self.options.schedule(total);
        let watch = Watch::new(self)?;
        let mut interval = Interval::new();
        if self.state.step == 0
            && let Some(first) = self.validate()?
        {
            validation = Some((first, first));
            tell(Event::Validation(first), &mut stop);
            interval = Interval::new();
        }
        let mut saved = self.state.step;
        while self.state.step < total && !stop {
            let step = self.state.step + 1;
            let learning_rate = schedule.at(step);
            let (loss, tokens, grad_norm) = self.step(&mut sampler, learning_rate, &watch)?;
            interval.add(loss, tokens);
            tell(Event::Step { step, total, loss: loss.mean() }, &mut stop);
            let last = step == total;
            if last || step.is_multiple_of(self.options.steps_per_report) {
                tell(Event::Report(interval.report(&self.state, self.epoch(), learning_rate, grad_norm)), &mut stop);
                interval = Interval::new();
            }
            let pause = Instant::now();
            if (last || step.is_multiple_of(self.options.steps_per_eval))
                && let Some(now) = self.validate()?
            {
                validation = Some((validation.map_or(now, |(first, _)| first), now));
                tell(Event::Validation(now), &mut stop);
            }
            if last || step.is_multiple_of(self.options.save_every) {
                tell(self.save()?, &mut stop);
                saved = step;
            }
            interval.started += pause.elapsed();
        }
        if saved != self.state.step {
            tell(self.save()?, &mut stop);
        }
        Ok(Summary { step: self.state.step, total, validation, seconds: started.elapsed().as_secs_f64() })
    }

    /// The model with the adapters as they are now.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Mean loss over the validation rows, or the first `val_batches` batches of them. `None` without such rows.
    pub fn validate(&self) -> Result<Option<Validation>> {
        let Some(valid) = self.valid else { return Ok(None) };
        let batches = usize::try_from(self.options.val_batches).unwrap_or(usize::MAX);
        let loss = evaluate(&self.decoder, &valid.rows, self.options.batch_size, batches)?;
        let mean = loss.mean();
        Ok(Some(Validation { step: self.state.step, loss: mean, perplexity: mean.exp(), tokens: loss.count }))
    }

    /// One optimizer step: the loss, the tokens run and the gradient's norm before clipping.
    fn step(&mut self, sampler: &mut Sampler, learning_rate: f64, watch: &Watch) -> Result<(Loss, usize, f64)> {
        let step = self.state.step + 1;
        let rows: Vec<Vec<usize>> =
            (0..self.options.grad_accumulation_steps).map(|_| sampler.next(self.options.batch_size)).collect();
        let batches: Vec<Batch> =
            rows.iter().map(|rows| collate(rows.iter().map(|&row| &self.train.rows[row]))).collect();
        let counted: usize = batches.iter().map(Batch::counted).sum();
        let checkpointing = if self.options.grad_checkpoint { Checkpointing::EveryBlock } else { Checkpointing::None };

        self.params.zero_gradients()?;
        let mut total = Loss { sum: 0.0, count: 0 };
        for (batch, rows) in batches.iter().zip(&rows) {
            let round = DropoutRound { seed: self.options.seed, round: self.state.round };
            let pass = TrainPass { checkpointing, round, scale: 1.0 / counted as f32 };
            let loss = self.decoder.loss_and_gradients(batch, pass)?;
            if !loss.sum.is_finite() {
                let places: Vec<String> = rows.iter().map(|&row| self.train.rows[row].place()).collect();
                return Err(self.not_finite(step, format!("the loss is {} on {}", loss.sum, places.join(", "))));
            }
            total.sum += loss.sum;
            total.count += loss.count;
            self.state.round = self.state.round.wrapping_add(1);
        }
        let norm = self.params.gradient_norm()?;
        if !norm.is_finite() {
            return Err(self.not_finite(step, format!("the gradient's norm is {norm}")));
        }
        let done = step - self.resumed_from;
        watch.check_gradients(&self.params, step, done)?;
        let limit = self.options.max_grad_norm;
        // torch.nn.utils.clip_grad_norm_'s factor.
        let scale = if limit > 0.0 { (limit / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let optimizer =
            AdamW { learning_rate, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: self.options.weight_decay };
        self.params.step(&optimizer, scale as f32, step)?;
        watch.check_movement(&self.params, step, done)?;
        self.state.step = step;
        self.state.position = sampler.position();
        self.state.trained_tokens += total.count as u64;
        Ok((total, batches.iter().map(|batch| batch.tokens.len()).sum(), norm))
    }

    fn not_finite(&self, step: usize, what: String) -> Error {
        let kept = match checkpoint::list(&self.adapter_path).unwrap_or_default().first() {
            Some((good, path)) => format!("the checkpoint of step {good} is kept in {}", path.display()),
            None => "no checkpoint was written yet".to_string(),
        };
        Error::Training { step, problem: format!("{what}; {kept}. A lower learning rate often helps") }
    }

    /// Writes the checkpoint, then the adapter (or the model) itself.
    fn save(&self) -> Result<Event> {
        let step = self.state.step;
        let path = checkpoint::folder(&self.adapter_path, step);
        let adapter = match self.options.fine_tune_type {
            FineTuneType::Lora => Some(setup::adapter_file(&self.params, &self.options, &self.model.name)?),
            FineTuneType::Full => None,
        };
        files::replace_folder(&path, |folder| {
            checkpoint::write(folder, &self.state, self.params.block())?;
            adapter.as_ref().map_or(Ok(()), |adapter| adapter.save(folder))
        })?;
        match adapter {
            Some(adapter) => adapter.save(&self.adapter_path)?,
            None => setup::save_model(&self.params, self.model, &self.adapter_path)?,
        }
        checkpoint::prune(&self.adapter_path, KEPT_CHECKPOINTS)?;
        Ok(Event::Checkpoint { step, path })
    }

    /// Goes back to the newest checkpoint that can be read.
    fn resume(&mut self, existing: Vec<(usize, PathBuf)>, device: &Device) -> Result<()> {
        let mut unreadable = Vec::new();
        for (_, path) in existing {
            match checkpoint::read(&path, device) {
                Ok((state, block)) => {
                    state.check_continues(&self.state, &path)?;
                    self.params.restore(&block)?;
                    self.resumed_from = state.step;
                    self.state = State { options: self.options.clone(), ..state };
                    self.warnings.extend(unreadable);
                    return Ok(());
                }
                Err(error) => unreadable.push(format!("a checkpoint cannot be read, an older one is taken: {error}")),
            }
        }
        let problem = if unreadable.is_empty() {
            "holds no checkpoint to resume from; leave --resume out to start a run".to_string()
        } else {
            format!("none of its checkpoints can be read: {}", unreadable.join("; "))
        };
        Err(Error::file(&self.adapter_path, problem))
    }

    fn start_event(&self) -> Start {
        let shapes = self.model.config.weight_shapes();
        Start {
            step: self.state.step,
            total: self.state.total,
            trained: self.params.len(),
            model: shapes.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum(),
            tensors: self.params.count(),
            rows: self.train.rows.len(),
        }
    }

    fn epoch(&self) -> f64 {
        let Position { epoch, row } = self.state.position;
        epoch as f64 + row as f64 / self.train.rows.len() as f64
    }
}

/// The summed loss over rows in their order, at most `batches` batches of `batch_size`.
pub fn evaluate(decoder: &Decoder, rows: &[Row], batch_size: usize, batches: usize) -> Result<Loss> {
    let mut total = Loss { sum: 0.0, count: 0 };
    for rows in rows.chunks(batch_size).take(batches) {
        let loss = decoder.loss(&collate(rows))?;
        total.sum += loss.sum;
        total.count += loss.count;
    }
    Ok(total)
}

/// Sums since the last report.
struct Interval {
    started: Instant,
    loss: Loss,
    tokens: usize,
    steps: usize,
}

impl Interval {
    fn new() -> Self {
        Self { started: Instant::now(), loss: Loss { sum: 0.0, count: 0 }, tokens: 0, steps: 0 }
    }

    fn add(&mut self, loss: Loss, tokens: usize) {
        self.loss.sum += loss.sum;
        self.loss.count += loss.count;
        self.tokens += tokens;
        self.steps += 1;
    }

    fn report(&self, state: &State, epoch: f64, learning_rate: f64, grad_norm: f64) -> Report {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        Report {
            step: state.step,
            total: state.total,
            loss: self.loss.mean(),
            learning_rate,
            grad_norm,
            tokens_per_second: self.tokens as f64 / seconds,
            steps_per_second: self.steps as f64 / seconds,
            trained_tokens: state.trained_tokens,
            epoch,
        }
    }
}

/// Looks at the first two steps of a process: every B must get a gradient in the first, and with B no longer zero every A must
/// get one and move in the second. Weights of full fine-tuning must get one at once; biases may not (softmax cancels that
/// of keys).
struct Watch {
    initial: HashMap<String, Tensor>,
}

impl Watch {
    fn new(trainer: &Trainer) -> Result<Self> {
        // A copy of the values alone: `copy` would take the whole buffer that they are a view of.
        let named = trainer.params.named()?;
        let a = named.into_iter().filter(|(name, _)| name.ends_with(setup::A));
        let initial = a.map(|(name, parameter)| Ok((name.to_string(), parameter.value.force_contiguous()?)));
        Ok(Self { initial: initial.collect::<Result<_>>()? })
    }

    fn check_gradients(&self, params: &Params, step: usize, done: usize) -> Result<()> {
        if done > 2 {
            return Ok(());
        }
        let mut without = Vec::new();
        for (name, parameter) in params.named()? {
            let expected = if name.ends_with(setup::A) { done == 2 } else { !name.ends_with(".bias") };
            let Some(grad) = parameter.grad.filter(|_| expected) else { continue };
            if grad.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()? == 0.0 {
                without.push(name.to_string());
            }
        }
        stop_with(step, "no gradient reaches", without)
    }

    fn check_movement(&self, params: &Params, step: usize, done: usize) -> Result<()> {
        if done != 2 {
            return Ok(());
        }
        let mut still = Vec::new();
        for (name, parameter) in params.named()? {
            let Some(initial) = self.initial.get(name) else { continue };
            let moved = parameter.value.sub(initial)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            if moved == 0.0 {
                still.push(name.to_string());
            }
        }
        stop_with(step, "the optimizer did not move", still)
    }
}

fn stop_with(step: usize, what: &str, names: Vec<String>) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    Err(Error::Training {
        step,
        problem: format!("{what} {} of the trained tensors: {}", names.len(), names.join(", ")),
    })
}

/// Of each weight's first values: enough to tell one checkpoint of a model from another.
fn model_fingerprint(weights: &HashMap<String, Tensor>) -> Result<Fingerprint> {
    let mut names: Vec<&String> = weights.keys().collect();
    names.sort_unstable();
    let mut fingerprint = Fingerprint::default();
    for name in names {
        let flat = weights[name].flatten_all()?;
        let first = flat.narrow(0, 0, flat.elem_count().min(64))?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        fingerprint.add(name.bytes().chain(first.into_iter().flat_map(f32::to_le_bytes)));
    }
    Ok(fingerprint)
}

fn data_fingerprint(rows: &[Row]) -> Fingerprint {
    let mut fingerprint = Fingerprint::default();
    for row in rows {
        let words = row.tokens.iter().chain(&row.targets).chain([&u32::MAX]);
        fingerprint.add(words.flat_map(|word| word.to_le_bytes()));
    }
    fingerprint
}
