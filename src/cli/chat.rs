//! `metal-candle chat`: a conversation on the terminal.

mod conversation;
mod lines;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use metal_candle::inference::{AdapterRegistry, End, GenerateOptions, Generator};
use metal_candle::models::{Message, TextTokenizer};
use metal_candle::{Error, Result};

use self::conversation::Conversation;
use self::lines::Lines;
use super::Outcome;
use super::adapters::{AdaptersArgs, NONE};
use super::generate::{print, speed};
use super::model::{ModelArgs, SamplingArgs};
use super::train::interrupt_flag;

/// Talk with a model
///
/// A line is a turn; Ctrl-C breaks an answer off. /clear begins anew, /history prints the conversation, /save FILE and
/// /load FILE keep it as a row of training data, /adapters lists the adapters, /adapter NAME (or none) changes the active one,
/// /exit or the end of the input ends.
#[derive(Args)]
pub struct Chat {
    /// Print tokens and speed after each answer
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    adapters: AdaptersArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// What a line asks for.
enum Command<'a> {
    Turn(&'a str),
    Clear,
    History,
    Save(&'a str),
    Load(&'a str),
    Adapters,
    Adapter(&'a str),
    Exit,
}

const COMMANDS: &str = "/clear, /history, /save FILE, /load FILE, /adapters, /adapter NAME, /exit";

impl<'a> Command<'a> {
    /// # Errors
    /// A command that is not known, or lacks what it takes.
    fn parse(line: &'a str) -> Result<Self> {
        if !line.starts_with('/') {
            return Ok(Self::Turn(line));
        }
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match (name, rest.trim()) {
            ("/clear", "") => Ok(Self::Clear),
            ("/history", "") => Ok(Self::History),
            ("/adapters", "") => Ok(Self::Adapters),
            ("/exit", "") => Ok(Self::Exit),
            ("/save", file) if !file.is_empty() => Ok(Self::Save(file)),
            ("/load", file) if !file.is_empty() => Ok(Self::Load(file)),
            ("/adapter", name) if !name.is_empty() => Ok(Self::Adapter(name)),
            ("/save" | "/load", _) => Err(Error::setting(name, "takes a file")),
            ("/adapter", _) => Err(Error::setting(name, "takes the name of an adapter, or none; /adapters lists them")),
            ("/clear" | "/history" | "/adapters" | "/exit", rest) => {
                Err(Error::setting(name, format!("takes nothing, not '{rest}'")))
            }
            _ => Err(Error::setting(name, format!("is not known; there are {COMMANDS}"))),
        }
    }
}

impl Chat {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        let options = self.sampling.options()?;
        let (files, mut registry) = self.adapters.open(&self.model)?;
        if !files.tokenizer.has_chat_template() {
            return Err(
                Error::setting("--model", "has no chat template, which a conversation needs; use generate").into()
            );
        }
        let system = self.sampling.system_prompt.iter().map(|system| Message::new("system", system.as_str()));
        let mut conversation = Conversation::new(system.collect());
        let mut lines = Lines::new()?;
        let talk =
            Talk { tokenizer: &files.tokenizer, options, verbose: self.verbose, interrupted: &interrupt_flag(None) };
        // A generator holds keys that the active adapter made, and so lasts as long as that adapter is active.
        while let Some(adapter) = talk.go_on(&registry, &mut conversation, &mut lines)? {
            registry.activate(Some(adapter.as_str()).filter(|name| *name != NONE))?;
            eprintln!("adapter {adapter} is active");
        }
        Ok(())
    }
}

/// What stays the same from turn to turn.
struct Talk<'a> {
    tokenizer: &'a TextTokenizer,
    options: GenerateOptions,
    verbose: bool,
    interrupted: &'a AtomicBool,
}

impl Talk<'_> {
    /// Takes lines until the adapter is to be changed, and returns the wanted one's name; `None` when the conversation ends.
    fn go_on(
        &self,
        registry: &AdapterRegistry,
        conversation: &mut Conversation,
        lines: &mut Lines,
    ) -> Result<Option<String>, Box<dyn std::error::Error>> {
        let mut generator = Generator::new(registry.decoder(), self.tokenizer)?;
        while let Some(line) = lines.next()? {
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let done = Command::parse(line).and_then(|command| {
                match command {
                    Command::Turn(text) => self.turn(text, conversation, &mut generator)?,
                    Command::Clear => conversation.clear(),
                    Command::History => print!("{conversation}"),
                    Command::Save(file) => eprintln!("{}", conversation.save(file.as_ref())?),
                    Command::Load(file) => eprintln!("{}", conversation.load(file.as_ref())?),
                    Command::Adapters => list(registry),
                    Command::Adapter(name) => return Ok(ControlFlow::Break(Some(known(registry, name)?))),
                    Command::Exit => return Ok(ControlFlow::Break(None)),
                }
                Ok(ControlFlow::Continue(()))
            });
            match done {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(wanted)) => return Ok(wanted),
                // The conversation stays as it was.
                Err(error) => eprintln!("error: {error}"),
            }
        }
        Ok(None)
    }

    fn turn(&self, text: &str, conversation: &mut Conversation, generator: &mut Generator) -> Result<()> {
        self.interrupted.store(false, Ordering::Relaxed);
        let prompt = self.tokenizer.encode(&conversation.asked(text, self.tokenizer)?, false)?;
        let generation = generator.generate(&prompt, &self.options, &mut |piece| match print(piece) {
            _ if self.interrupted.load(Ordering::Relaxed) => ControlFlow::Break(()),
            flow => flow,
        })?;
        println!();
        if generation.end == End::Context {
            eprintln!("note: the model's context is full; /clear begins anew");
        }
        if self.verbose {
            eprintln!("{}", speed(&generation));
        }
        conversation.add(text, generation.text);
        Ok(())
    }
}

/// The names of the adapters, the active one marked.
fn list(registry: &AdapterRegistry) {
    for name in registry.list().chain([NONE]) {
        let mark = if registry.active().unwrap_or(NONE) == name { '*' } else { ' ' };
        println!("{mark} {name}");
    }
}

/// The name, if there is such an adapter.
fn known(registry: &AdapterRegistry, name: &str) -> Result<String> {
    let names: Vec<&str> = registry.list().chain([NONE]).collect();
    if names.contains(&name) {
        return Ok(name.to_string());
    }
    Err(Error::setting(format!("/adapter {name}"), format!("is not there; there are {}", names.join(", "))))
}
