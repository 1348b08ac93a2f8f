//! `metal-candle chat`: a conversation on the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::sync::atomic::Ordering;

use clap::Args;
use metal_candle::Error;
use metal_candle::inference::{End, Generator};
use metal_candle::models::Message;

use super::Outcome;
use super::generate::{print, speed};
use super::model::{ModelArgs, SamplingArgs};
use super::train::interrupt_flag;

/// Talk with a model
///
/// A line is a turn. /clear begins anew, /exit or the end of the input ends; Ctrl-C breaks an answer off.
#[derive(Args)]
pub struct Chat {
    /// Print tokens and speed after each answer
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl Chat {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        let options = self.sampling.options()?;
        let (files, decoder) = self.model.open()?;
        let tokenizer = &files.tokenizer;
        if !tokenizer.has_chat_template() {
            return Err(
                Error::setting("--model", "has no chat template, which a conversation needs; use generate").into()
            );
        }
        let start: Vec<Message> =
            self.sampling.system_prompt.iter().map(|system| Message::new("system", system.as_str())).collect();
        let mut messages = start.clone();
        let mut generator = Generator::new(&decoder, tokenizer)?;
        let interrupted = interrupt_flag(None);
        let terminal = std::io::stdin().is_terminal();
        loop {
            if terminal {
                print!("> ");
                std::io::stdout().flush()?;
            }
            let mut line = String::new();
            if std::io::stdin().lock().read_line(&mut line)? == 0 {
                return Ok(());
            }
            match line.trim() {
                "" => continue,
                "/exit" => return Ok(()),
                "/clear" => {
                    messages = start.clone();
                    continue;
                }
                command if command.starts_with('/') => {
                    eprintln!("{command} is not known; /clear and /exit are");
                    continue;
                }
                text => messages.push(Message::new("user", text)),
            }
            interrupted.store(false, Ordering::Relaxed);
            let prompt = tokenizer.encode(&tokenizer.render_chat(&messages, None, true)?, false)?;
            let generation = generator.generate(&prompt, &options, &mut |piece| match print(piece) {
                _ if interrupted.load(Ordering::Relaxed) => std::ops::ControlFlow::Break(()),
                flow => flow,
            });
            let generation = match generation {
                Ok(generation) => generation,
                Err(error) => {
                    // The conversation stays; a shorter turn may fit.
                    messages.pop();
                    eprintln!("error: {error}");
                    continue;
                }
            };
            println!();
            if generation.end == End::Context {
                eprintln!("note: the model's context is full; /clear begins anew");
            }
            if self.verbose {
                eprintln!("{}", speed(&generation));
            }
            messages.push(Message::new("assistant", generation.text));
        }
    }
}
