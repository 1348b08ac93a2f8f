//! `metal-candle eval`: loss, perplexity and exact match on rows.

use std::path::PathBuf;

use clap::Args;
use metal_candle::Error;
use metal_candle::inference::score::answers;
use metal_candle::training::adapter::AdapterFile;
use metal_candle::training::dataset::{self, Dataset, DatasetOptions};
use metal_candle::training::trainer::evaluate;

use super::Outcome;
use super::model::ModelArgs;
use super::train::row_length;

/// Measure a model on data: loss, perplexity, exact match
#[derive(Args)]
pub struct Eval {
    /// A folder with train.jsonl, valid.jsonl or test.jsonl, or a JSONL file
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Which file of the folder [default: test, or valid where there is no test.jsonl]
    #[arg(long, value_name = "NAME", value_parser = ["train", "valid", "test"])]
    split: Option<String>,
    /// Count the assistant's turns or the completion alone
    #[arg(long)]
    mask_prompt: bool,
    /// Cut rows at this many tokens
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    max_seq_length: usize,
    /// Rows in a pass
    #[arg(long, value_name = "ROWS", default_value_t = 4)]
    batch_size: usize,
    /// Take the first N rows only
    #[arg(long, value_name = "N")]
    rows: Option<usize>,
    /// Let the model answer each row and count the answers that are right to the letter; needs --mask-prompt
    #[arg(long, requires = "mask_prompt")]
    exact_match: bool,
    /// Print the first N answers beside what they should be; needs --exact-match
    #[arg(long, value_name = "N", default_value_t = 0, requires = "exact_match")]
    show: usize,
    #[command(flatten)]
    model: ModelArgs,
    /// The folder of an adapter to put on the model
    #[arg(long, value_name = "FOLDER", help_heading = "Model")]
    adapter_path: Option<PathBuf>,
}

impl Eval {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        if self.batch_size == 0 || self.rows == Some(0) {
            return Err(Error::setting("--batch-size, --rows", "must be 1 or more").into());
        }
        let path = self.file()?;
        let adapter = self.adapter_path.as_deref().map(AdapterFile::load).transpose()?;
        let (files, mut decoder) = self.model.open(&adapter.iter().collect::<Vec<_>>())?;
        if let Some(adapter) = adapter {
            let device = decoder.device().clone();
            adapter.attach(&mut decoder, &device)?;
        }
        let options =
            DatasetOptions { max_seq_length: row_length(&files, self.max_seq_length), mask_prompt: self.mask_prompt };
        let data = Dataset::load(std::slice::from_ref(&path), &files.tokenizer, &options)?;
        for warning in data.report.warnings() {
            eprintln!("note: {warning}");
        }
        let rows = &data.rows[..self.rows.unwrap_or(usize::MAX).min(data.rows.len())];
        let loss = evaluate(&decoder, rows, self.batch_size, usize::MAX)?;
        let (mean, count) = (loss.mean(), loss.count);
        println!(
            "{}: {} rows, {count} tokens, loss {mean:.4}, perplexity {:.3}",
            path.display(),
            rows.len(),
            mean.exp()
        );
        if self.exact_match {
            let answers = answers(&decoder, &files.tokenizer, rows, &|_| {})?;
            for answer in answers.iter().take(self.show) {
                println!("\nprompt    {}\nexpected  {}\nwritten   {}", answer.prompt, answer.expected, answer.written);
            }
            let right = answers.iter().filter(|answer| answer.matches()).count();
            println!(
                "exact match: {right} of {} ({:.1} %)",
                answers.len(),
                100.0 * right as f64 / answers.len() as f64
            );
        }
        Ok(())
    }

    fn file(&self) -> Result<PathBuf, Error> {
        if self.data.is_file() {
            if self.split.is_some() {
                return Err(Error::setting("--split", "has no meaning where --data is a file"));
            }
            return Ok(self.data.clone());
        }
        let wanted = match &self.split {
            Some(name) => vec![name.as_str()],
            None => vec!["test", "valid"],
        };
        let found = wanted.iter().find_map(|name| dataset::split(&self.data, name));
        found.ok_or_else(|| Error::file(&self.data, format!("has no {}.jsonl", wanted.join(".jsonl and no "))))
    }
}
