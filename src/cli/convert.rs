//! `metal-candle convert`: an adapter from one form into another.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use metal_candle::Error;
use metal_candle::models::ModelFiles;
use metal_candle::training::adapter::{AdapterFile, Form, gguf};
use metal_candle::training::files;

use super::Outcome;

const EXAMPLES: &str = "\
Examples:
  metal-candle convert adapters --to mlx --output adapters-mlx
  metal-candle convert mlx-adapters --to peft --output adapters --model Qwen/Qwen2.5-0.5B-Instruct
  metal-candle convert adapters --to gguf --output adapter.gguf --model model.gguf   # llama-cli --lora adapter.gguf";

/// Write an adapter in the form of PEFT, of mlx-lm or of llama.cpp
///
/// PEFT's and mlx-lm's forms are read. MLX has one rank and one scale for all linears: where they differ, B takes the difference up and
/// narrower ranks get zeros, so that the delta stays the same. What a form cannot hold is refused by name.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Convert {
    /// The folder of the adapter
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// The form to write
    #[arg(long, value_name = "FORM", value_enum)]
    to: FormKind,
    /// The folder to write, or the file where it is GGUF
    #[arg(long, value_name = "FOLDER")]
    output: PathBuf,
    /// The model that the adapter is for, to hold the adapter against and to name in what is written: a folder, a GGUF file, or
    /// a name on the hub
    #[arg(long)]
    model: Option<String>,
    /// Replace the output, a folder with all that is in it, if it is there
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum FormKind {
    /// adapter_model.safetensors, for PEFT and what reads its files
    Peft,
    /// adapters.safetensors, for mlx-lm
    Mlx,
    /// One file that llama.cpp applies at load; needs --model where the adapter does not name its own
    Gguf,
}

impl Convert {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        let form = match self.to {
            FormKind::Peft => Form::Peft,
            FormKind::Mlx => Form::Mlx,
            FormKind::Gguf => return self.write_gguf(),
        };
        files::check_output(&self.output, self.force, &[&self.adapter])?;
        let mut adapter = AdapterFile::load(&self.adapter)?;
        if let Some(name) = &self.model {
            let model = ModelFiles::open(name)?;
            adapter.check_fits(&model.config)?;
            adapter.base_model = Some(name.clone());
            adapter.blocks = Some(model.config.num_layers);
        }
        files::replace_folder(&self.output, |folder| adapter.save_as(form, folder))?;
        if form == Form::Mlx {
            note_what_differs(&adapter);
        }
        println!("{} linears in {}", adapter.modules.len(), self.output.display());
        Ok(())
    }
}

impl Convert {
    fn write_gguf(self) -> Outcome {
        if self.output.exists() && (!self.force || self.output.is_dir()) {
            let advice = "is already there; choose another --output, or replace a file with --force";
            return Err(Error::file(&self.output, advice).into());
        }
        let adapter = AdapterFile::load(&self.adapter)?;
        let Some(name) = self.model.as_ref().or(adapter.base_model.as_ref()) else {
            return Err(
                Error::setting("--model", "is needed: the adapter does not say which model it was made for").into()
            );
        };
        gguf::save(&adapter, &ModelFiles::open(name)?.config, &self.output)?;
        println!("{} linears in {}", adapter.modules.len(), self.output.display());
        Ok(())
    }
}

/// Says what MLX's one rank and one scale changed in the tensors.
fn note_what_differs(adapter: &AdapterFile) {
    let ranks: BTreeSet<usize> = adapter.modules.values().map(|module| module.rank()).collect();
    if let (Some(least), Some(most)) = (ranks.first(), ranks.last().filter(|_| ranks.len() > 1)) {
        eprintln!("note: ranks from {least} to {most} were filled with zeros to {most}");
    }
    let scalings: BTreeSet<u64> = adapter.modules.values().map(|module| module.scaling.to_bits()).collect();
    if scalings.len() > 1 {
        eprintln!("note: {} scalings became one; B takes up the difference", scalings.len());
    }
}
