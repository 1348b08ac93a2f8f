//! The training loop: batches, gradients, clipping, AdamW, validation, checkpoints.
//!
//! It does not ride on Candle's tape: the decoder's blocks add gradients straight into the buffers of [`Params`]. It refuses
//! to train a lie: a loss or gradient that is not finite stops it, as does an adapter that receives no gradient.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use candle_core::{DType, Device};

use super::checkpoint::{self, Fingerprint, State};
use super::dataset::{Dataset, Row};
use super::events::Interval;
pub use super::events::{Event, Report, Start, Summary, Validation};
use super::memory::{Sizes, Work};
use super::options::{FineTuneType, TrainerOptions};
use super::params::Params;
use super::sampler::{Position, Sampler, collate};
use super::setup;
use super::watch::Watch;
use crate::backend::custom_ops::adamw::AdamW;
use crate::backend::custom_ops::cross_entropy::Loss;
use crate::backend::memory;
use crate::models::ModelFiles;
use crate::models::decoder::{Batch, Checkpointing, Decoder, TrainPass};
use crate::models::linear::{BaseWeight, DropoutRound, Parameter};
use crate::training::adapter::AdapterFile;
use crate::training::files;
use crate::{Error, Result};

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
    taken: setup::Taken,
    state: State,
    resumed_from: usize,
    warnings: Vec<String>,
    fitted: Fitted,
}

/// How a run fits into the memory that there is.
#[derive(Clone, Copy)]
struct Fitted {
    checkpointing: Checkpointing,
    again: (usize, usize),
    work: Work,
    step: u64,
    available: Option<u64>,
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
        let holding = options.holding(model, device)?;
        let weights = model.base(&holding, device)?;
        let fingerprint = model_fingerprint(&weights)?;
        let mut decoder = Decoder::new(&model.config, weights, device)?;
        let lengths = lengths(&train.rows);
        let total = options.steps(&lengths);
        let state = State {
            step: 0,
            round: 0,
            position: Position::default(),
            trained_tokens: 0,
            total,
            options: options.clone(),
            model: fingerprint,
            data: data_fingerprint(&train.rows),
        };
        let (stored, mut warnings) = match from {
            From::Checkpoint => {
                let (stored, warnings) = checkpoint::newest(existing, adapter_path, device)?;
                stored.state.check_continues(&state, &stored.path)?;
                (Some(stored), warnings)
            }
            _ => (None, Vec::new()),
        };
        let (params, taken) = match options.fine_tune_type {
            FineTuneType::Full => (setup::full(&mut decoder, device)?, setup::Taken::new()),
            _ => {
                let stored = stored.as_ref().filter(|_| options.init_lora_weights.changes_base());
                let earlier = stored.map(|stored| AdapterFile::load(&stored.path)).transpose()?;
                setup::adapters(&mut decoder, &options, earlier.as_ref(), device)?
            }
        };
        let sizes = Sizes::new(&model.config, &options, &holding, device)?;
        let work = largest_pass(&options, &train.rows);
        let available = memory::available(device)?;
        let (checkpointing, plan) = sizes.choose(options.grad_checkpoint, work, available);
        let fitted = Fitted { checkpointing, again: sizes.again(checkpointing), work, step: plan.step(), available };
        let (state, resumed_from) = match stored {
            None => (state, 0),
            Some(stored) => {
                params.restore(&stored.blocks)?;
                let step = stored.state.step;
                (State { options: options.clone(), ..stored.state }, step)
            }
        };
        if let From::Adapter(path) = &from {
            setup::start_from(&params, &options, &AdapterFile::load(path)?)?;
        }
        let adapter_path = adapter_path.to_path_buf();
        let mut trainer = Self {
            state,
            model,
            train,
            valid,
            options,
            adapter_path,
            decoder,
            params,
            taken,
            resumed_from,
            warnings: Vec::new(),
            fitted,
        };
        if let Some(available) = available.filter(|&available| plan.step() > available) {
            let (needed, free) = (plan.step() as f64 / 1e9, available as f64 / 1e9);
            let advice = trainer.less_memory();
            warnings.push(format!("a step takes about {needed:.1} GB and {free:.1} GB are free; {advice}"));
        }
        trainer.warnings = warnings;
        Ok(trainer)
    }

    /// Trains to the end, or until `report` breaks; then the step is finished and a checkpoint written. The batches of the next step
    /// are put together on another thread meanwhile.
    pub fn run(&mut self, report: &mut dyn FnMut(Event) -> ControlFlow<()>) -> Result<Summary> {
        let (rows, options) = (&self.train.rows, self.options.clone());
        let mut sampler = Sampler::new(lengths(rows), options.batching(), options.seed, self.state.position);
        let steps = self.state.total.saturating_sub(self.state.step);
        std::thread::scope(|scope| {
            let (give, take) = std::sync::mpsc::sync_channel(1);
            scope.spawn(move || {
                let next = || Passes::next(&mut sampler, rows, options.grad_accumulation_steps);
                // A run that ends early takes no more.
                std::iter::repeat_with(next).take(steps).try_for_each(|passes| give.send(passes))
            });
            self.run_steps(&take, report)
        })
    }

    fn run_steps(
        &mut self,
        passes: &Receiver<Passes>,
        report: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Summary> {
        let started = Instant::now();
        let total = self.state.total;
        let mut stop = false;
        let mut tell = |event: Event, stop: &mut bool| *stop |= report(event).is_break();
        tell(Event::Start(self.start_event()), &mut stop);
        for warning in std::mem::take(&mut self.warnings) {
            tell(Event::Warning(warning), &mut stop);
        }
        let mut validation: Option<(Validation, Validation)> = None;
        let schedule = self.options.schedule(total);
        let mut watch = Watch::new(&self.params)?;
        let mut interval = Interval::new();
        if self.state.step == 0
            && let Some(first) = self.validate()?
        {
            validation = Some((first, first));
            tell(Event::Validation(first), &mut stop);
            interval = Interval::new();
        }
        // A kill can come between the last checkpoint and the adapter beside it: a run that is at its end writes both again.
        let mut saved = if self.state.step < total { self.state.step } else { 0 };
        while self.state.step < total && !stop {
            let step = self.state.step + 1;
            let learning_rate = schedule.at(step);
            let Ok(passes) = passes.recv() else { unreachable!("as many passes are made as there are steps") };
            let done = self.step(passes, learning_rate, &mut watch);
            let (loss, tokens, grad_norm) = done.map_err(|error| self.explained(step, error))?;
            interval.add(loss, tokens);
            tell(Event::Step { step, total, loss: loss.mean() }, &mut stop);
            let last = step == total;
            if last || step.is_multiple_of(self.options.steps_per_report) {
                let device = self.decoder.device();
                let report = interval.report(&self.state, device, self.epoch(), learning_rate, grad_norm)?;
                tell(Event::Report(report), &mut stop);
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
        let (seconds, peak_memory) = (started.elapsed().as_secs_f64(), memory::peak(self.decoder.device(), false)?);
        Ok(Summary { step: self.state.step, total, validation, seconds, peak_memory })
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
    fn step(&mut self, passes: Passes, learning_rate: f64, watch: &mut Watch) -> Result<(Loss, usize, f64)> {
        let step = self.state.step + 1;
        let Passes { batches, rows, position } = passes;
        let counted: usize = batches.iter().map(Batch::counted).sum();
        let checkpointing = self.fitted.checkpointing;

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
        self.state.position = position;
        self.state.trained_tokens += total.count as u64;
        Ok((total, batches.iter().map(|batch| batch.tokens.len()).sum(), norm))
    }

    fn not_finite(&self, step: usize, what: String) -> Error {
        let kept = self.kept_checkpoint();
        Error::Training { step, problem: format!("{what}; {kept}. A lower learning rate often helps") }
    }

    fn kept_checkpoint(&self) -> String {
        match checkpoint::list(&self.adapter_path).unwrap_or_default().first() {
            Some((good, path)) => format!("the checkpoint of step {good} is kept in {}", path.display()),
            None => "no checkpoint was written yet".to_string(),
        }
    }

    /// A GPU without memory left is told in words that help.
    fn explained(&self, step: usize, error: Error) -> Error {
        if !out_of_memory(&error) {
            return error;
        }
        let (advice, kept) = (self.less_memory(), self.kept_checkpoint());
        Error::Training { step, problem: format!("the GPU is out of memory; {advice}; {kept}") }
    }

    /// What makes a step smaller, with what it is now.
    fn less_memory(&self) -> String {
        let TrainerOptions { batch_size, max_seq_length, grad_accumulation_steps, .. } = self.options;
        let Work { tokens, longest, .. } = self.fitted.work;
        let (again, blocks) = self.fitted.again;
        let mut advice = vec![];
        if batch_size > 1 {
            let more = format!(
                "with a larger grad_accumulation_steps (now {grad_accumulation_steps}) the step stays the same"
            );
            advice.push(format!("lower batch_size (now {batch_size}, the largest pass has {tokens} tokens; {more})"));
        }
        if longest > 1 {
            advice.push(format!("lower max_seq_length (now {max_seq_length}, the longest row has {longest} tokens)"));
        }
        if again < blocks {
            advice.push("give --grad-checkpoint every".to_string());
        }
        advice.join(", or ")
    }

    /// Writes the checkpoint, then the adapter (or the model) itself.
    fn save(&self) -> Result<Event> {
        let step = self.state.step;
        let path = checkpoint::folder(&self.adapter_path, step);
        let adapter = match self.options.fine_tune_type {
            FineTuneType::Full => None,
            _ => Some(setup::adapter_file(&self.params, &self.options, &self.taken, self.model)?),
        };
        files::replace_folder(&path, |folder| {
            checkpoint::write(folder, &self.state, &self.params.blocks())?;
            adapter.as_ref().map_or(Ok(()), |adapter| adapter.save(folder))
        })?;
        match adapter {
            Some(adapter) => adapter.save(&self.adapter_path)?,
            None => setup::save_model(&self.params, self.model, &self.adapter_path)?,
        }
        checkpoint::prune(&self.adapter_path, KEPT_CHECKPOINTS)?;
        Ok(Event::Checkpoint { step, path })
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
            again: self.fitted.again,
            work: self.fitted.work,
            memory: (self.fitted.step, self.fitted.available),
        }
    }

    fn epoch(&self) -> f64 {
        let Position { epoch, row } = self.state.position;
        epoch as f64 + row as f64 / self.train.rows.len() as f64
    }
}

/// The passes of an optimizer step.
struct Passes {
    batches: Vec<Batch>,
    /// The rows of each.
    rows: Vec<Vec<usize>>,
    /// Where the next step starts.
    position: Position,
}

impl Passes {
    fn next(sampler: &mut Sampler, from: &[Row], count: usize) -> Self {
        let rows: Vec<Vec<usize>> = (0..count).map(|_| sampler.next_pass()).collect();
        let batches = rows.iter().map(|rows| collate(rows.iter().map(|&row| &from[row]))).collect();
        Self { batches, rows, position: sampler.position() }
    }
}

/// The tokens of each row.
fn lengths(rows: &[Row]) -> Vec<usize> {
    rows.iter().map(|row| row.tokens.len()).collect()
}

/// The largest pass that a run on these rows comes to, by the order that its seed gives.
pub fn largest_pass(options: &TrainerOptions, rows: &[Row]) -> Work {
    /// After so many epochs it is not worth the time to look on.
    const EPOCHS: u64 = 16;
    let lengths = lengths(rows);
    let passes = options.steps(&lengths) * options.grad_accumulation_steps;
    let mut sampler = Sampler::new(lengths, options.batching(), options.seed, Position::default());
    let mut work = Work { tokens: 0, longest: 0, counted: 0 };
    for _ in 0..passes {
        let pass = sampler.next_pass();
        let of_pass = |count: &dyn Fn(&Row) -> usize| pass.iter().map(|&row| count(&rows[row])).sum::<usize>();
        let longest = pass.iter().map(|&row| rows[row].tokens.len()).max().unwrap_or(0);
        work.tokens = work.tokens.max(of_pass(&|row| row.tokens.len()));
        work.counted = work.counted.max(of_pass(&Row::counted));
        work.longest = work.longest.max(longest);
        if sampler.position().epoch >= EPOCHS {
            break;
        }
    }
    work
}

/// Whether a GPU had no memory for what was asked of it; the driver's word for it is all that Candle hands on.
fn out_of_memory(error: &Error) -> bool {
    let text = error.to_string().to_lowercase();
    text.contains("out_of_memory") || text.contains("out of memory")
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

/// Of each weight's first values: enough to tell one checkpoint of a model from another.
fn model_fingerprint(weights: &HashMap<String, BaseWeight>) -> Result<Fingerprint> {
    let mut names: Vec<&String> = weights.keys().collect();
    names.sort_unstable();
    let mut fingerprint = Fingerprint::default();
    for name in names {
        let first: Vec<u8> = match &weights[name] {
            BaseWeight::Dense(Parameter { value, .. }) => {
                let flat = value.flatten_all()?;
                let first = flat.narrow(0, 0, flat.elem_count().min(64))?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                first.into_iter().flat_map(f32::to_le_bytes).collect()
            }
            BaseWeight::Quantized(blocks) => {
                let flat = blocks.bytes().flatten_all()?;
                flat.narrow(0, 0, flat.elem_count().min(64))?.to_vec1()?
            }
        };
        fingerprint.add(name.bytes().chain(first));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_gpu_is_told_from_other_faults() {
        let driver = candle_core::Error::Msg("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")".to_string());
        assert!(out_of_memory(&Error::Candle(driver.bt())));
        assert!(!out_of_memory(&Error::op("linear", "w [3, 4] does not fit x [2, 5]")));
    }
}
