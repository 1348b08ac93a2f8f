//! The model that a subcommand runs, and how it draws.

use std::collections::BTreeSet;

use clap::Args;
use metal_candle::inference::Sampling;
use metal_candle::models::ModelFiles;
use metal_candle::models::decoder::Decoder;
use metal_candle::training::adapter::AdapterFile;
use metal_candle::{Error, Result};

use super::device::{DeviceKind, DtypeKind, QuantizeKind};

/// Which model, and where.
#[derive(Args)]
pub struct ModelArgs {
    /// A folder, a GGUF file, or the name of a model on the hub [default: the one that the adapter was made for]
    #[arg(long, help_heading = "Model")]
    pub model: Option<String>,
    /// Where to compute
    #[arg(long, value_name = "DEVICE", default_value = "auto", help_heading = "Model")]
    pub device: DeviceKind,
    /// What the weights are held in; auto: f32 on the CPU; on a GPU f32 where the file has that, else bf16
    #[arg(long, value_name = "DTYPE", default_value = "auto", help_heading = "Model")]
    pub dtype: DtypeKind,
    /// Which weights are quantized
    #[arg(long, value_name = "KIND", default_value = "auto", help_heading = "Model")]
    pub quantize: QuantizeKind,
}

impl ModelArgs {
    /// Opens the model: the one that is named, or else the one that the adapters were made for.
    pub fn open(&self, adapters: &[&AdapterFile]) -> Result<(ModelFiles, Decoder)> {
        let device = self.device.open()?;
        let files = ModelFiles::open(&self.name(adapters)?)?;
        let dtype = self.dtype.weights().on(&device, files.own_dtype()?);
        let holding = files.holding(self.quantize.library(), dtype, &device)?;
        let decoder = Decoder::new(&files.config, files.base(&holding, &device)?, &device)?;
        Ok((files, decoder))
    }

    fn name(&self, adapters: &[&AdapterFile]) -> Result<String> {
        if let Some(model) = &self.model {
            return Ok(model.clone());
        }
        let bases: BTreeSet<&str> = adapters.iter().filter_map(|adapter| adapter.base_model.as_deref()).collect();
        match bases.len() {
            0 if adapters.is_empty() => {
                Err(Error::setting("--model", "is needed where there is no --adapter-path to tell it"))
            }
            0 => Err(Error::setting("--model", "is needed: the adapter does not say which model it was made for")),
            1 => Ok(bases.into_iter().collect()),
            _ => {
                let named = bases.into_iter().collect::<Vec<_>>().join(", ");
                Err(Error::setting("--model", format!("is needed: the adapters were made for {named}")))
            }
        }
    }
}

/// How tokens are chosen.
#[derive(Args)]
pub struct SamplingArgs {
    /// The most tokens to generate
    #[arg(short, long, value_name = "N", default_value_t = 100, help_heading = "Generation")]
    pub max_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, value_name = "T", allow_negative_numbers = true, default_value_t = 0.0, help_heading = "Generation")]
    temp: f64,
    /// Draw from the likeliest tokens that together reach this probability
    #[arg(long, value_name = "P", allow_negative_numbers = true, default_value_t = 1.0, help_heading = "Generation")]
    top_p: f64,
    /// Draw from this many of the likeliest tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Generation")]
    top_k: usize,
    /// Leave out tokens under this share of the likeliest one's probability
    #[arg(long, value_name = "P", allow_negative_numbers = true, default_value_t = 0.0, help_heading = "Generation")]
    min_p: f64,
    /// Divides the logits of tokens that were seen; 1 for no penalty
    #[arg(long, value_name = "X", allow_negative_numbers = true, default_value_t = 1.0, help_heading = "Generation")]
    repetition_penalty: f64,
    /// Seeds the draws
    #[arg(long, default_value_t = 0, help_heading = "Generation")]
    seed: u64,
    /// A text that ends the generation; may be given several times
    #[arg(long, value_name = "TEXT", help_heading = "Generation")]
    stop: Vec<String>,
    /// What the model is told before everything else
    #[arg(long, value_name = "TEXT", help_heading = "Generation")]
    pub system_prompt: Option<String>,
}

impl SamplingArgs {
    /// The library's form of it.
    ///
    /// # Errors
    /// Values without meaning, and draws asked for where the likeliest token is taken.
    pub fn options(&self) -> Result<metal_candle::inference::GenerateOptions> {
        let Self { temp, top_p, top_k, min_p, repetition_penalty, seed, .. } = *self;
        let sampling = Sampling { temperature: temp, top_k, top_p, min_p, repetition_penalty, seed };
        sampling.check()?;
        if temp == 0.0 && (top_p != 1.0 || top_k != 0 || min_p != 0.0 || seed != 0) {
            let problem = "is 0, so the likeliest token is taken and --top-p, --top-k, --min-p and --seed change nothing; \
                           give a temperature or leave them out";
            return Err(Error::setting("--temp", problem));
        }
        Ok(metal_candle::inference::GenerateOptions { max_tokens: self.max_tokens, sampling, stop: self.stop.clone() })
    }
}
