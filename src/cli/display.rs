//! What a training run shows: a live line on a terminal, plain lines elsewhere, metrics and a plot in the adapter's folder.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};
use metal_candle::training::dataset::DatasetReport;
use metal_candle::training::trainer::{Event, Report, Start, Summary, Validation};
use metal_candle::{Error, Result};

use super::metrics::Metrics;
use super::plot;
use super::tensorboard::TensorBoard;

/// The reports of one run.
pub struct Display {
    folder: PathBuf,
    metrics: Metrics,
    board: Option<TensorBoard>,
    bar: Option<ProgressBar>,
    validation: Option<Validation>,
    report: Option<Report>,
    failed: Option<Error>,
}

impl Display {
    /// Makes the adapter's folder.
    pub fn new(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{bar:20} {pos}/{len}  {msg}  {eta} left") {
                bar.set_style(style);
            }
            bar
        });
        let metrics = Metrics::new(&folder.join("metrics.jsonl"));
        Ok(Self {
            folder: folder.to_path_buf(),
            metrics,
            board: None,
            bar,
            validation: None,
            report: None,
            failed: None,
        })
    }

    /// Writes what is reported from now on into event files too.
    pub fn report_to(&mut self, board: TensorBoard) {
        self.board = Some(board);
    }

    /// What a dataset holds, and what of it the user should know.
    pub fn dataset(&self, path: &Path, report: &DatasetReport) {
        let DatasetReport { rows, tokens, trained_tokens, .. } = report;
        self.line(&format!("{}: {rows} rows, {tokens} tokens, {trained_tokens} trained on", path.display()));
        for warning in report.warnings() {
            self.line(&format!("  note: {warning}"));
        }
    }

    /// Shows an event of the trainer.
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Start(start) => self.start(start),
            Event::Step { step, loss, .. } => self.tick(*step, *loss),
            Event::Report(report) => self.report(report),
            Event::Validation(now) => self.validation(now),
            Event::Checkpoint { step, path } => self.line(&format!("step {step}: checkpoint in {}", path.display())),
            Event::Warning(text) => self.line(&format!("note: {text}")),
        }
    }

    /// The last words and the plot.
    ///
    /// # Errors
    /// When the metrics or the plot could not be written; the adapter stands all the same.
    pub fn finish(&mut self, summary: &Summary) -> Result<()> {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        let Summary { step, total, validation, seconds, peak_memory } = summary;
        let time = HumanDuration(Duration::from_secs_f64(*seconds));
        println!("{step} of {total} steps in {time}, peak memory {}", memory(*peak_memory));
        if let Some((first, last)) = validation.as_ref().filter(|(first, last)| first.step != last.step) {
            let (from, to) = (first.loss, last.loss);
            println!("validation loss {from:.4} before (step {}), {to:.4} after (step {})", first.step, last.step);
        }
        println!("adapter: {}", self.folder.display());
        if step < total {
            println!("continue with the same command and --resume");
        }
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        plot::write(&self.folder.join("loss.svg"), self.metrics.path())
    }

    fn start(&mut self, start: &Start) {
        let Start { step, total, trained, model, tensors, rows, again, work, memory: (needed, free) } = *start;
        let share = 100.0 * trained as f64 / model as f64;
        self.line(&format!("training {trained} values in {tensors} tensors, {share:.2} % of the model's {model}"));
        if again.0 > 0 {
            let free = free.map_or(String::new(), |free| format!(" of {} free", memory(Some(free))));
            let (blocks, tokens) = (format!("{} of {} blocks", again.0, again.1), work.tokens);
            let step = memory(Some(needed));
            self.line(&format!("backward computes {blocks} again: a step of {tokens} tokens takes {step}{free}"));
        }
        if step > 0 {
            self.line(&format!("continuing after step {step} of {total}"));
        } else {
            self.line(&format!("{total} steps over {rows} rows"));
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total as u64);
            bar.set_position(step as u64);
            bar.reset_eta();
        }
        let started = self.metrics.start(step);
        self.keep(started);
        self.tell_board(|board| board.start(step));
    }

    fn tick(&mut self, step: usize, loss: f64) {
        let Some(bar) = &self.bar else { return };
        bar.set_position(step as u64);
        let mut message = format!("loss {loss:.3}");
        if let Some(validation) = &self.validation {
            message += &format!("  val {:.3}", validation.loss);
        }
        if let Some(Report { learning_rate, tokens_per_second, peak_memory, .. }) = &self.report {
            message += &format!("  lr {learning_rate:.1e}  {tokens_per_second:.0} tok/s  {}", memory(*peak_memory));
        }
        bar.set_message(message);
    }

    fn report(&mut self, report: &Report) {
        let Report { step, total, loss, learning_rate, tokens_per_second, steps_per_second, trained_tokens, .. } =
            report;
        let left = Duration::from_secs_f64((total - step) as f64 / steps_per_second);
        if self.bar.is_none() {
            println!(
                "step {step}/{total}: loss {loss:.4}, lr {learning_rate:.2e}, {steps_per_second:.2} steps/s, \
                 {tokens_per_second:.0} tokens/s, {trained_tokens} tokens trained on, peak {}, {} left",
                memory(report.peak_memory),
                HumanDuration(left),
            );
        }
        let written = self.metrics.report(report);
        self.keep(written);
        self.tell_board(|board| board.report(report));
        self.report = Some(report.clone());
    }

    fn validation(&mut self, now: &Validation) {
        let Validation { step, loss, perplexity, tokens } = now;
        self.line(&format!("step {step}: validation loss {loss:.4}, perplexity {perplexity:.3} ({tokens} tokens)"));
        let written = self.metrics.validation(now);
        self.keep(written);
        self.tell_board(|board| board.validation(now));
        self.validation = Some(*now);
    }

    /// Metrics that cannot be written must not end a run; the first error is told at its end.
    fn keep(&mut self, written: Result<()>) {
        if let Err(error) = written
            && self.failed.is_none()
        {
            self.line(&format!("note: {error}"));
            self.failed = Some(error);
        }
    }

    /// After an event that failed, which may be cut off, the file takes no more; the run goes on.
    fn tell_board(&mut self, tell: impl FnOnce(&mut TensorBoard) -> Result<()>) {
        let Some(Err(error)) = self.board.as_mut().map(tell) else { return };
        self.line(&format!("note: {error}; nothing more is written for TensorBoard"));
        self.board = None;
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => println!("{text}"),
        }
    }
}

fn memory(bytes: Option<u64>) -> String {
    bytes.map_or("unknown".to_string(), |bytes| format!("{:.2} GB", bytes as f64 / 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_file_that_fails_late_costs_the_run_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut display = Display::new(folder.path()).unwrap();
        display.metrics.start(0).unwrap();
        display.report_to(TensorBoard::broken(&folder.path().join("events")));
        let validation = |step| Validation { step, loss: 1.0, perplexity: 2.7, tokens: 3 };
        display.show(&Event::Validation(validation(0)));
        assert!(display.board.is_none() && display.failed.is_none());
        display.show(&Event::Validation(validation(5)));
        assert_eq!(std::fs::read_to_string(display.metrics.path()).unwrap().lines().count(), 2);
    }
}
