//! The command line: one file a subcommand.

mod adapters;
mod bench;
mod chat;
mod convert;
mod demo;
mod device;
mod display;
mod eval;
mod fuse;
mod generate;
mod info;
mod metrics;
mod model;
mod plan;
mod plot;
mod settings;
mod tensorboard;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Fine-tune language models with LoRA on Metal, CUDA and CPU, and run them.
///
/// `metal-candle train` without arguments fine-tunes a small model that ships with the program.
#[derive(Parser)]
#[command(name = "metal-candle", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

// Each is described by its own struct.
#[derive(Subcommand)]
enum Command {
    Train(Box<train::Train>),
    Generate(Box<generate::Generate>),
    Chat(Box<chat::Chat>),
    Eval(Box<eval::Eval>),
    Convert(convert::Convert),
    Fuse(fuse::Fuse),
    Info(info::Info),
    Bench(bench::Bench),
}

/// What a subcommand returns; the error is printed once by [`run`].
type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Parses the arguments and runs the subcommand. Usage errors end with 2, failures with 1.
pub fn run() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .init();
    let outcome = match Cli::parse().command {
        Command::Train(args) => args.run(),
        Command::Generate(args) => args.run(),
        Command::Chat(args) => args.run(),
        Command::Eval(args) => args.run(),
        Command::Convert(args) => args.run(),
        Command::Fuse(args) => args.run(),
        Command::Info(args) => args.run(),
        Command::Bench(args) => args.run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
