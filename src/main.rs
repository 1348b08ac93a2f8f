//! The program: fine-tunes language models with LoRA and runs them.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
