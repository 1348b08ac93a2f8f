//! The program: fine-tunes language models with LoRA and runs them.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    metal_candle::backend::cpu::memory::keep_freed();
    cli::run()
}
