//! Generation: a prompt's tokens in, text out as it comes, to a function or from an iterator.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use candle_core::DType;

use super::cache::KvCache;
use super::sampling::Sampling;
use crate::models::TextTokenizer;
use crate::models::decoder::Decoder;
use crate::models::tokenizer::DecodeStream;
use crate::{Error, Result};

/// How a text is generated.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// The most tokens to generate.
    pub max_tokens: usize,
    /// How each token is chosen.
    pub sampling: Sampling,
    /// Texts that end the generation; they are not part of it.
    pub stop: Vec<String>,
}

impl Default for GenerateOptions {
    /// 100 tokens, greedy.
    fn default() -> Self {
        Self { max_tokens: 100, sampling: Sampling::default(), stop: Vec::new() }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model wrote a token that ends a text.
    StopToken,
    /// One of the stop texts came.
    StopText,
    /// `max_tokens` were generated.
    MaxTokens,
    /// The model's context is full.
    Context,
    /// The caller broke it off.
    Caller,
}

/// What was generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// The text, without special tokens.
    pub text: String,
    /// Its tokens, the one that ended it left out.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub end: End,
    /// Tokens of the prompt that were run; those that the cache still held are not counted.
    pub prompt_tokens: usize,
    /// Time for the prompt, up to the first token.
    pub prompt_time: Duration,
    /// Time for all tokens after the first.
    pub time: Duration,
}

/// Generates text with a model, keeping keys and values of what it has run: a prompt that begins as the last text did is only
/// run from where it differs, which makes the turns of a conversation cheap.
pub struct Generator<'a> {
    decoder: &'a Decoder,
    tokenizer: &'a TextTokenizer,
    cache: KvCache,
    /// What the cache holds.
    held: Vec<u32>,
}

impl<'a> Generator<'a> {
    /// A generator with an empty cache, on the decoder's device and in its dtype.
    ///
    /// # Errors
    /// When the device cannot make the cache.
    pub fn new(decoder: &'a Decoder, tokenizer: &'a TextTokenizer) -> Result<Self> {
        let cache = KvCache::new(&decoder.config, decoder.dtype(), decoder.device())?;
        Ok(Self { decoder, tokenizer, cache, held: Vec::new() })
    }

    /// Generates after the prompt. `text` gets each piece as soon as it is known not to belong to a stop text, and may break
    /// the generation off.
    ///
    /// # Errors
    /// An empty prompt, one that fills the model's context, options without meaning, logits that are not finite.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Generation> {
        let mut stream = self.stream(prompt, options);
        for piece in stream.by_ref() {
            if text(&piece?).is_break() {
                break;
            }
        }
        Ok(stream.finish())
    }

    /// [`Generator::generate`] as an iterator of the pieces of text. The prompt is run when the first piece is asked for;
    /// after an error there are no more. A stream that is dropped early leaves the generator as a broken-off generation does.
    pub fn stream<'s>(&'s mut self, prompt: &'s [u32], options: &'s GenerateOptions) -> TextStream<'s, 'a> {
        TextStream {
            pieces: self.tokenizer.decode_stream(),
            out: StopTexts::new(&options.stop),
            generator: self,
            prompt,
            options,
            failed: false,
            tokens: Vec::new(),
            end: None,
            prompt_tokens: 0,
            started: Instant::now(),
            first: None,
        }
    }

    /// Forgets what was run; the memory stays.
    pub fn clear(&mut self) {
        self.cache.clear();
        self.held.clear();
    }

    /// The prompt's last logits and the tokens that had to be run for them.
    fn run_prompt(&mut self, prompt: &[u32]) -> Result<(Vec<f32>, usize)> {
        let common = self.held.iter().zip(prompt).take_while(|(held, token)| held == token).count();
        // The last token is run in any case: its logits are what is wanted.
        let keep = common.min(prompt.len() - 1);
        self.cache.truncate(keep);
        self.held.truncate(keep);
        /// Tokens of a prompt run at once: bounds the memory that a long prompt takes.
        const CHUNK: usize = 512;
        let mut logits = Vec::new();
        for chunk in prompt[keep..].chunks(CHUNK) {
            logits = self.run(chunk)?;
        }
        Ok((logits, prompt.len() - keep))
    }

    fn run(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let logits = self.decoder.forward_cached(tokens, &mut self.cache);
        let logits = match logits.and_then(|logits| Ok(logits.to_dtype(DType::F32)?.to_vec1::<f32>()?)) {
            Ok(logits) => logits,
            Err(error) => {
                // A pass that failed half-way leaves the layers at odds.
                self.cache.truncate(self.held.len());
                return Err(error);
            }
        };
        self.held.extend_from_slice(tokens);
        Ok(logits)
    }
}

/// The pieces of a text that is being generated; see [`Generator::stream`].
pub struct TextStream<'s, 'a> {
    generator: &'s mut Generator<'a>,
    prompt: &'s [u32],
    options: &'s GenerateOptions,
    pieces: DecodeStream<'a>,
    out: StopTexts<'s>,
    failed: bool,
    tokens: Vec<u32>,
    end: Option<End>,
    prompt_tokens: usize,
    started: Instant,
    first: Option<Instant>,
}

impl Iterator for TextStream<'_, '_> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.end.is_none() && !self.failed {
            match self.step() {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => return Some(Ok(piece)),
                Err(error) => {
                    self.failed = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

impl TextStream<'_, '_> {
    /// What was generated up to here. It counts as broken off by the caller where pieces are left.
    pub fn finish(self) -> Generation {
        let first = self.first.unwrap_or(self.started);
        Generation {
            text: self.out.text,
            tokens: self.tokens,
            end: self.end.unwrap_or(End::Caller),
            prompt_tokens: self.prompt_tokens,
            prompt_time: first - self.started,
            time: first.elapsed(),
        }
    }

    /// Chooses a token and returns the text that it sets free, which may be none.
    fn step(&mut self) -> Result<String> {
        let limit = self.generator.cache.limit();
        let mut logits = match self.tokens.last() {
            Some(&last) => self.generator.run(&[last])?,
            None => self.begin()?,
        };
        if self.options.max_tokens == 0 {
            return Ok(self.ended(End::MaxTokens));
        }
        let number = self.tokens.len() as u64;
        let token = self.options.sampling.choose(&mut logits, &self.generator.held, number)?;
        self.first.get_or_insert_with(Instant::now);
        if self.generator.tokenizer.stop_tokens().contains(&token) {
            return Ok(self.ended(End::StopToken));
        }
        self.tokens.push(token);
        let (mut ready, stopped) =
            self.pieces.push(token)?.map_or_else(Default::default, |piece| self.out.push(&piece));
        if stopped {
            self.end = Some(End::StopText);
        } else if self.generator.held.len() == limit {
            ready.push_str(&self.ended(End::Context));
        } else if self.tokens.len() == self.options.max_tokens {
            ready.push_str(&self.ended(End::MaxTokens));
        }
        Ok(ready)
    }

    /// Checks the request and runs the prompt.
    fn begin(&mut self) -> Result<Vec<f32>> {
        self.options.sampling.check()?;
        if self.options.stop.iter().any(String::is_empty) {
            return Err(Error::setting("stop", "a stop text is empty, which would end every generation at once"));
        }
        let limit = self.generator.cache.limit();
        if self.prompt.is_empty() || self.prompt.len() >= limit {
            let problem = format!("has {} tokens; the model takes 1 to {}", self.prompt.len(), limit - 1);
            return Err(Error::setting("prompt", problem));
        }
        self.started = Instant::now();
        let (logits, prompt_tokens) = self.generator.run_prompt(self.prompt)?;
        self.prompt_tokens = prompt_tokens;
        Ok(logits)
    }

    /// Notes the end and returns what was held back.
    fn ended(&mut self, end: End) -> String {
        self.end = Some(end);
        self.out.finish()
    }
}

/// Holds back what may be the beginning of a stop text.
struct StopTexts<'a> {
    stop: &'a [String],
    text: String,
    given: usize,
}

impl<'a> StopTexts<'a> {
    fn new(stop: &'a [String]) -> Self {
        Self { stop, text: String::new(), given: 0 }
    }

    /// The text that is safe to give out, and whether a stop text has come.
    fn push(&mut self, piece: &str) -> (String, bool) {
        self.text.push_str(piece);
        let hit =
            self.stop.iter().filter_map(|stop| Some(self.given + self.text[self.given..].find(stop.as_str())?)).min();
        if let Some(start) = hit {
            self.text.truncate(start);
            return (self.give(start), true);
        }
        let held_back = self.stop.iter().map(|stop| overlap(&self.text[self.given..], stop)).max().unwrap_or(0);
        (self.give(self.text.len() - held_back), false)
    }

    /// What was held back, where no stop text has come.
    fn finish(&mut self) -> String {
        self.give(self.text.len())
    }

    fn give(&mut self, end: usize) -> String {
        let ready = self.text[self.given..end].to_string();
        self.given = end;
        ready
    }
}

/// The length of the longest end of `text` that begins `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    (1..stop.len())
        .rev()
        .filter(|&len| stop.is_char_boundary(len))
        .find(|&len| text.ends_with(&stop[..len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_texts_are_held_back_and_cut() {
        let stop = ["END".to_string(), "é!".to_string()];
        let mut out = StopTexts::new(&stop);
        assert_eq!(out.push("aE"), ("a".to_string(), false));
        assert_eq!(out.push("N"), (String::new(), false));
        assert_eq!(out.push("x"), ("ENx".to_string(), false));
        assert_eq!(out.push("yé"), ("y".to_string(), false));
        assert_eq!(out.push("!z"), (String::new(), true));
        assert_eq!(out.text, "aENxy");
        let mut out = StopTexts::new(&stop);
        assert_eq!(out.push("bEN"), ("b".to_string(), false));
        assert_eq!((out.finish(), out.text.as_str()), ("EN".to_string(), "bEN"));
    }
}
