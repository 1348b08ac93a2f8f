//! Training data: JSONL rows to tokens and targets.
//!
//! A row is `{"messages": [{role, content}, ..], "tools"?}`, `{"prompt", "completion"}` (texts or lists of messages) or `{"text"}`;
//! each row is told apart by itself. Conversations go through the model's chat template; a prompt and a completion become a
//! user's and an assistant's turn, as in mlx-lm, or, when the model has no template, are joined as they stand. A text, and a
//! joined pair, gets the end token. With `mask_prompt` only the assistant's turns (or the completion) are trained on.

pub mod rows;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::custom_ops::cross_entropy::IGNORE;
use crate::models::TextTokenizer;
use crate::{Error, Result};

/// A row, ready to train on.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// For each token the one to predict after it, or [`IGNORE`].
    pub targets: Vec<u32>,
    /// The file it was read from.
    pub file: Arc<str>,
    /// Its line there, from 1.
    pub line: usize,
}

impl Row {
    /// The tokens that are predicted and counted in the loss.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|&&target| target != IGNORE).count()
    }

    /// `file:line`, for messages.
    pub fn place(&self) -> String {
        format!("{}:{}", self.file, self.line)
    }
}

/// What became of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DatasetReport {
    /// Rows kept.
    pub rows: usize,
    /// Rows cut at the longest length.
    pub truncated: usize,
    /// Rows left out because nothing in them is trained on.
    pub skipped_empty: usize,
    /// Conversations of which only the last turn is trained on, since the template renders earlier ones differently later.
    pub last_turn_only: usize,
    /// Tokens of the kept rows.
    pub tokens: usize,
    /// Tokens that are predicted.
    pub trained_tokens: usize,
    /// Pairs joined without a template.
    pub joined_pairs: usize,
    /// Keys that rows have and nothing reads, with how often.
    pub unread_keys: BTreeMap<String, usize>,
}

impl DatasetReport {
    /// What the user should know, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let mut tell = |count: usize, text: &str| {
            if count > 0 {
                warnings.push(format!("{count} {text}"));
            }
        };
        tell(self.truncated, "rows were longer than max_seq_length and are cut");
        tell(self.skipped_empty, "rows are left out: nothing in them is trained on");
        tell(
            self.last_turn_only,
            "conversations are trained on their last turn only: the chat template changes earlier turns",
        );
        tell(self.joined_pairs, "prompts and completions are joined as they stand: the model has no chat template");
        if !self.unread_keys.is_empty() {
            let keys: Vec<String> = self.unread_keys.iter().map(|(key, count)| format!("{key} ({count})")).collect();
            warnings.push(format!("keys of rows that nothing reads: {}", keys.join(", ")));
        }
        warnings
    }
}

/// How rows become tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatasetOptions {
    /// Longer rows are cut to this many tokens.
    pub max_seq_length: usize,
    /// Train on the assistant's turns or the completion alone.
    pub mask_prompt: bool,
}

/// Rows of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// In the order of the files.
    pub rows: Vec<Row>,
    /// What became of the files' rows.
    pub report: DatasetReport,
}

/// Bad rows that an error shows; it tells the number of the others.
const SHOWN: usize = 20;

impl Dataset {
    /// Reads JSONL files.
    ///
    /// # Errors
    /// One error lists the bad rows with file, line and reason. No row to train on is an error too.
    pub fn load(paths: &[PathBuf], tokenizer: &TextTokenizer, options: &DatasetOptions) -> Result<Self> {
        if options.max_seq_length < 2 {
            let problem = format!("is {}; it must be 2 or more", options.max_seq_length);
            return Err(Error::setting("max_seq_length", problem));
        }
        let mut dataset = Self { rows: Vec::new(), report: DatasetReport::default() };
        let mut bad = Vec::new();
        for path in paths {
            dataset.read(path, tokenizer, options, &mut bad)?;
        }
        let named = paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        if !bad.is_empty() {
            let more = if bad.len() > SHOWN { format!("\n... and {} more", bad.len() - SHOWN) } else { String::new() };
            let (count, shown) = (bad.len(), bad[..bad.len().min(SHOWN)].join("\n"));
            return Err(Error::file(named, format!("{count} rows cannot be used:\n{shown}{more}")));
        }
        if dataset.rows.is_empty() {
            let why = match dataset.report.skipped_empty {
                0 => "there is no row".to_string(),
                skipped => format!(
                    "in none of its {skipped} rows is anything trained on; check mask_prompt and max_seq_length"
                ),
            };
            return Err(Error::file(named, why));
        }
        dataset.report.rows = dataset.rows.len();
        Ok(dataset)
    }

    fn read(
        &mut self,
        path: &Path,
        tokenizer: &TextTokenizer,
        options: &DatasetOptions,
        bad: &mut Vec<String>,
    ) -> Result<()> {
        let bytes = fs::read(path).map_err(Error::io(path))?;
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        let file: Arc<str> = path.display().to_string().into();
        let lines: Vec<(usize, &[u8])> = bytes
            .split(|&byte| byte == b'\n')
            .map(|line| line.trim_ascii())
            .enumerate()
            .filter(|(_, line)| !line.is_empty())
            .collect();
        let encoded: Vec<_> = lines.par_iter().map(|(_, line)| encode(line, tokenizer, options)).collect();
        for ((index, _), encoded) in lines.into_iter().zip(encoded) {
            let line = index + 1;
            match encoded {
                Err(reason) => bad.push(format!("{file}:{line}: {reason}")),
                Ok(Encoded { tokens, targets, truncated, joined, last_turn_only, unread }) => {
                    let report = &mut self.report;
                    report.truncated += usize::from(truncated);
                    report.joined_pairs += usize::from(joined);
                    report.last_turn_only += usize::from(last_turn_only);
                    for key in unread {
                        *report.unread_keys.entry(key).or_default() += 1;
                    }
                    let row = Row { tokens, targets, file: file.clone(), line };
                    let trained = row.counted();
                    if trained == 0 {
                        report.skipped_empty += 1;
                        continue;
                    }
                    report.tokens += row.tokens.len();
                    report.trained_tokens += trained;
                    self.rows.push(row);
                }
            }
        }
        Ok(())
    }
}

/// The file of a split: `data/train.jsonl` in a folder; a file stands for its `train` split alone.
pub fn split(data: &Path, name: &str) -> Option<PathBuf> {
    if data.is_file() {
        return (name == "train").then(|| data.to_path_buf());
    }
    Some(data.join(format!("{name}.jsonl"))).filter(|path| path.is_file())
}

struct Encoded {
    tokens: Vec<u32>,
    targets: Vec<u32>,
    truncated: bool,
    joined: bool,
    last_turn_only: bool,
    unread: Vec<String>,
}

fn encode(line: &[u8], tokenizer: &TextTokenizer, options: &DatasetOptions) -> Result<Encoded, String> {
    let (row, unread) = rows::parse(line)?;
    let text = rows::render(&row, tokenizer, options.mask_prompt)?;
    let (mut tokens, offsets) =
        tokenizer.encode_with_offsets(&text.text, text.add_special).map_err(|error| error.to_string())?;
    // A token that holds any byte of what is trained on is trained on.
    let mut trained: Vec<bool> = offsets
        .iter()
        .map(|&(start, end)| match &text.trained {
            None => true,
            Some(spans) => spans.iter().any(|span| end > span.start && start < span.end),
        })
        .collect();
    if text.end {
        let (eos, _) = tokenizer.eos_token().ok_or("the model's tokenizer has no end token to put after a text")?;
        if tokens.last() != Some(&eos) {
            tokens.push(eos);
            trained.push(true);
        }
    }
    let truncated = tokens.len() > options.max_seq_length;
    tokens.truncate(options.max_seq_length);
    let next = tokens.iter().zip(&trained).skip(1).map(|(&token, &trained)| if trained { token } else { IGNORE });
    let targets = next.chain([IGNORE]).take(tokens.len()).collect();
    let (joined, last_turn_only) = (text.joined, text.last_turn_only);
    Ok(Encoded { tokens, targets, truncated, joined, last_turn_only, unread })
}
