//! Exact match: the share of rows whose answer the model writes to the letter.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::generator::{GenerateOptions, Generator};
use super::sampling::Sampling;
use crate::backend::custom_ops::cross_entropy::IGNORE;
use crate::models::TextTokenizer;
use crate::models::decoder::Decoder;
use crate::training::dataset::Row;
use crate::{Error, Result};

/// A row's answer as it should be and as the model wrote it.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// What the model was given, special tokens included.
    pub prompt: String,
    /// What the row says.
    pub expected: String,
    /// What the model wrote.
    pub written: String,
}

impl Answer {
    /// Whether the two are equal but for white space around them.
    pub fn matches(&self) -> bool {
        self.expected.trim() == self.written.trim()
    }
}

/// The model's greedy answers to the rows, in their order. A row is asked up to its last stretch of trained tokens, which is
/// the answer expected; rows read with `mask_prompt` therefore ask for the last answer. A wrong answer is broken off some
/// tokens after it has grown longer than the right one. Rows run side by side on all cores; `done` gets the number finished.
///
/// # Errors
/// A row that is trained on as a whole and so leaves nothing to ask.
pub fn answers(
    decoder: &Decoder,
    tokenizer: &TextTokenizer,
    rows: &[Row],
    done: &(dyn Fn(usize) + Sync),
) -> Result<Vec<Answer>> {
    let finished = AtomicUsize::new(0);
    let answer = |row: &Row| {
        let (prompt, expected) = split(row, tokenizer)?;
        /// Tokens that a wrong answer may be longer than the right one.
        const MORE: usize = 16;
        let options =
            GenerateOptions { max_tokens: expected.len() + MORE, sampling: Sampling::default(), stop: Vec::new() };
        let mut generator = Generator::new(decoder, tokenizer)?;
        let written = generator.generate(prompt, &options, &mut |_| ControlFlow::Continue(()))?.text;
        done(finished.fetch_add(1, Ordering::Relaxed) + 1);
        Ok(Answer { prompt: tokenizer.decode(prompt, false)?, expected: tokenizer.decode(&expected, true)?, written })
    };
    rows.par_iter().map(answer).collect()
}

/// The tokens before the last stretch of trained ones, and that stretch without the token that ends it.
fn split<'a>(row: &'a Row, tokenizer: &TextTokenizer) -> Result<(&'a [u32], Vec<u32>)> {
    let counted = |&target: &u32| target != IGNORE;
    let end = row.targets.iter().rposition(counted).map_or(0, |last| last + 1);
    let start = row.targets[..end].iter().rposition(|target| !counted(target)).map_or(0, |before| before + 1);
    if start == 0 {
        let problem = format!("{} is trained on as a whole; exact match needs rows with a masked prompt", row.place());
        return Err(Error::setting("exact match", problem));
    }
    let mut expected = row.targets[start..end].to_vec();
    if expected.last().is_some_and(|last| tokenizer.stop_tokens().contains(last)) {
        expected.pop();
    }
    Ok((&row.tokens[..=start], expected))
}
