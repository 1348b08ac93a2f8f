//! `metal-candle fuse`: a model with adapters in its weights.

use std::path::{Path, PathBuf};

use clap::Args;
use metal_candle::models::ModelFiles;
use metal_candle::training::adapter::{AdapterFile, sum};
use metal_candle::training::{files, fuse};

use super::Outcome;

const EXAMPLES: &str = "\
Examples:
  metal-candle fuse --model base --adapter adapters --output fused
  metal-candle fuse --model base --adapter manners=0.7 --adapter facts=0.3 --output fused";

/// Add adapters to a model's weights and write it as a folder of its own
///
/// Shards, dtypes, tokenizer and all other files stay as they are. The sum is in f32; before the folder gets its name, the
/// model in it is loaded and its logits are held against those of the model with the adapter on it.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Fuse {
    /// A folder with safetensors, or the name of a model on the hub
    #[arg(long)]
    model: String,
    /// The folder of an adapter in PEFT's or MLX's form, with =WEIGHT to multiply it; may be given several times
    #[arg(long = "adapter", visible_alias = "adapter-path", value_name = "FOLDER[=WEIGHT]", required = true, value_parser = weighted)]
    adapters: Vec<(PathBuf, f64)>,
    /// The folder to write
    #[arg(long, value_name = "FOLDER")]
    output: PathBuf,
    /// Replace the output folder, with all that is in it, if it is there
    #[arg(long)]
    force: bool,
}

impl Fuse {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        let model = ModelFiles::open(&self.model)?;
        let sources = self.adapters.iter().map(|(path, _)| path.as_path()).chain([model.folder()?]);
        files::check_output(&self.output, self.force, &sources.collect::<Vec<_>>())?;
        let mut adapters = Vec::with_capacity(self.adapters.len());
        for (path, weight) in &self.adapters {
            let adapter = AdapterFile::load(path)?;
            adapter.check_fits(&model.config)?;
            adapters.push((adapter, *weight));
        }
        let adapter = sum(&adapters)?;
        let fused = fuse::fuse(&model, &adapter, &self.output)?;
        if !fused.left_out.is_empty() {
            eprintln!("note: not carried over: {}", fused.left_out.join(", "));
        }
        println!("{} linears fused into {}", adapter.modules.len(), self.output.display());
        println!("largest difference of a logit: {:.1e} of the largest logit", fused.difference);
        Ok(())
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
