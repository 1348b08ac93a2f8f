//! `metal-candle fuse`: a model with adapters in its weights.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use metal_candle::models::ModelFiles;
use metal_candle::models::gguf::export::FileType;
use metal_candle::training::adapter::{AdapterFile, sum};
use metal_candle::training::files;
use metal_candle::training::fuse::{self, Fused, Rounding};

use super::Outcome;

const EXAMPLES: &str = "\
Examples:
  metal-candle fuse --model base --adapter adapters --output fused
  metal-candle fuse --model base --adapter manners=0.7 --adapter facts=0.3 --output fused
  metal-candle fuse --model base-4bit --adapter adapters --dequantize --output fused
  metal-candle fuse --model base --adapter adapters --export-gguf q8_0 --output fused.gguf
  metal-candle fuse --model model.Q4_1.gguf --adapter adapters --export-gguf f16 --output fused.gguf
  metal-candle fuse --model base --export-gguf q4_k --output base.gguf";

/// Add adapters to a model's weights and write it as a model of its own: a folder, or a GGUF file for llama.cpp
///
/// In a folder shards, dtypes, tokenizer and all other files stay as they are. A GGUF file has the tokenizer and the chat template in it;
/// norms and biases stay f32. The sum is in f32; before the output gets its name, the model in it is loaded and its logits are held
/// against those of the model with the adapter on it. Where the output is quantized, it is said how much of the adapter rounding changes.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Fuse {
    /// A folder with safetensors, the name of a model on the hub, or with --export-gguf a GGUF file
    #[arg(long)]
    model: String,
    /// The folder of an adapter in PEFT's or MLX's form, with =WEIGHT to multiply it; may be given several times, and left out with
    /// --export-gguf and --dequantize
    #[arg(long = "adapter", visible_alias = "adapter-path", value_name = "FOLDER[=WEIGHT]", value_parser = weighted,
        required_unless_present_any = ["export_gguf", "dequantize"])]
    adapters: Vec<(PathBuf, f64)>,
    /// The folder to write, or the file with --export-gguf
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
    /// Write a folder in floats from one with quantized weights (NF4, MLX's groups): what was quantized becomes what config.json
    /// names, else bf16
    #[arg(long)]
    dequantize: bool,
    /// Write a GGUF file with its matrices in this type
    #[arg(long, value_name = "TYPE", conflicts_with = "dequantize")]
    export_gguf: Option<FileTypeKind>,
    /// Replace the output, a folder with all that is in it, if it is there
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum FileTypeKind {
    F16,
    Bf16,
    /// 8 bits; rows that are no multiple of 32 are f16
    #[value(name = "q8_0")]
    Q8_0,
    /// 4 bits, the output projection 6; rows that are no multiple of 256 are q8_0
    #[value(name = "q4_k")]
    Q4K,
}

impl FileTypeKind {
    fn library(self) -> FileType {
        match self {
            Self::F16 => FileType::F16,
            Self::Bf16 => FileType::Bf16,
            Self::Q8_0 => FileType::Q8_0,
            Self::Q4K => FileType::Q4K,
        }
    }
}

impl Fuse {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        let model = ModelFiles::open(&self.model)?;
        let sources = self.adapters.iter().map(|(path, _)| path.as_path()).chain([model.path()]);
        let sources: Vec<&Path> = sources.collect();
        match self.export_gguf {
            None => files::check_output(&self.output, self.force, &sources)?,
            Some(_) => files::check_output_file(&self.output, self.force, &sources)?,
        }
        if self.export_gguf.is_none() && !self.dequantize {
            fuse::check_base(&model)?;
        }
        let adapter = self.adapter(&model)?;
        let fused = match (self.export_gguf, &adapter) {
            (Some(to), adapter) => fuse::export_gguf(&model, adapter.as_ref(), to.library(), &self.output)?,
            (None, Some(adapter)) if !self.dequantize => fuse::fuse(&model, adapter, &self.output)?,
            (None, adapter) => fuse::dequantize(&model, adapter.as_ref(), &self.output)?,
        };
        self.report(&fused, adapter.as_ref().map_or(0, |adapter| adapter.modules.len()));
        Ok(())
    }

    /// The weighted sum of the adapters.
    fn adapter(&self, model: &ModelFiles) -> metal_candle::Result<Option<AdapterFile>> {
        let mut adapters = Vec::with_capacity(self.adapters.len());
        for (path, weight) in &self.adapters {
            let adapter = AdapterFile::load(path)?;
            adapter.check_fits(&model.config)?;
            adapters.push((adapter, *weight));
        }
        Ok(if adapters.is_empty() { None } else { Some(sum(&adapters)?) })
    }

    fn report(&self, fused: &Fused, linears: usize) {
        for note in &fused.notes {
            eprintln!("note: {note}");
        }
        if !fused.left_out.is_empty() {
            eprintln!("note: not carried over: {}", fused.left_out.join(", "));
        }
        if let Some(Rounding { error, worst: (worst, most) }) = &fused.rounding {
            eprintln!(
                "warning: rounding to {} changes the adapter's delta by {:.1} % of its size, most in {worst} ({:.1} %); an adapter kept \
                 apart loses nothing: --adapter-path with generate and chat, `convert --to gguf` and --lora for llama.cpp",
                self.export_gguf.map_or("", |to| to.library().name()),
                100.0 * error,
                100.0 * most
            );
        }
        let output = self.output.display();
        match linears {
            0 => println!("written to {output}"),
            _ => println!("{linears} linears fused into {output}"),
        }
        println!("largest difference of a logit: {:.1e} of the largest logit", fused.difference);
    }
}

/// A folder, or a folder and its weight. A folder whose own name has such an end is taken as it is.
fn weighted(text: &str) -> Result<(PathBuf, f64), String> {
    let Some((folder, weight)) = text.rsplit_once('=').filter(|_| !Path::new(text).exists()) else {
        return Ok((text.into(), 1.0));
    };
    match weight.parse::<f64>() {
        Ok(weight) if weight.is_finite() && weight != 0.0 => Ok((folder.into(), weight)),
        _ => Err(format!("the weight {weight} is not a number other than 0")),
    }
}
