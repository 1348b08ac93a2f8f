//! `metal-candle generate`: one prompt, one answer.

use std::io::{Read, Write};
use std::ops::ControlFlow;

use clap::Args;
use metal_candle::inference::{End, Generation, Generator};
use metal_candle::models::{Message, ModelFiles};
use metal_candle::{Error, Result};

use super::Outcome;
use super::adapters::AdaptersArgs;
use super::model::{ModelArgs, SamplingArgs};

/// Answer a prompt
///
/// The prompt goes through the model's chat template where it has one. The answer goes to standard output as it comes.
#[derive(Args)]
pub struct Generate {
    /// What to answer; - reads it from standard input
    #[arg(short, long, value_name = "TEXT")]
    prompt: String,
    /// Give the model the prompt as it stands
    #[arg(long)]
    ignore_chat_template: bool,
    /// Print tokens and speed to standard error
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    adapters: AdaptersArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl Generate {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        let options = self.sampling.options()?;
        let text = match self.prompt.as_str() {
            "-" => {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text)?;
                text.trim_end_matches('\n').to_string()
            }
            text => text.to_string(),
        };
        let (files, registry) = self.adapters.open(&self.model)?;
        let prompt = self.prompt_tokens(&files, text)?;
        let mut generator = Generator::new(registry.decoder(), &files.tokenizer)?;
        let generation = generator.generate(&prompt, &options, &mut print)?;
        println!();
        if self.verbose {
            eprintln!("{}", speed(&generation));
        }
        Ok(())
    }

    fn prompt_tokens(&self, files: &ModelFiles, text: String) -> Result<Vec<u32>> {
        let tokenizer = &files.tokenizer;
        let system = self.sampling.system_prompt.as_ref();
        if self.ignore_chat_template || !tokenizer.has_chat_template() {
            if system.is_some() {
                return Err(Error::setting("--system-prompt", "needs a chat template, and none is used here"));
            }
            return tokenizer.encode(&text, true);
        }
        let system = system.map(|system| Message::new("system", system));
        let messages: Vec<Message> = system.into_iter().chain([Message::new("user", text)]).collect();
        tokenizer.encode(&tokenizer.render_chat(&messages, None, true)?, false)
    }
}

/// Writes a piece of an answer; a reader that has gone ends the generation.
pub fn print(piece: &str) -> ControlFlow<()> {
    let mut out = std::io::stdout();
    match out.write_all(piece.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ControlFlow::Continue(()),
        Err(_) => ControlFlow::Break(()),
    }
}

/// Tokens, speed and why it ended.
pub fn speed(generation: &Generation) -> String {
    let Generation { tokens, end, prompt_tokens, prompt_time, time, .. } = generation;
    let rate = |tokens: usize, seconds: f64| if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 };
    let end = match end {
        End::StopToken => "the model ended it",
        End::StopText => "ended by a stop text",
        End::MaxTokens => "ended by --max-tokens",
        End::Context => "ended by the model's context",
        End::Caller => "broken off",
    };
    format!(
        "prompt {prompt_tokens} tokens, {:.1} tokens/s; answer {} tokens, {:.1} tokens/s; {end}",
        rate(*prompt_tokens, prompt_time.as_secs_f64()),
        tokens.len(),
        rate(tokens.len().saturating_sub(1), time.as_secs_f64()),
    )
}
