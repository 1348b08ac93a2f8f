//! Prints the logits of a sequence of tokens as JSON, to compare a model or an adapter with another library's.
//!
//! `cargo run --release --example logits -- MODEL [--adapter FOLDER] TOKEN...` takes a model folder, GGUF file or hub name and token
//! numbers. The row of each token has the logits of the token after it, in f32.

use candle_core::{DType, Device};
use metal_candle::models::ModelFiles;
use metal_candle::models::decoder::{Batch, Decoder};
use metal_candle::training::adapter::AdapterFile;

const USAGE: &str = "usage: logits MODEL [--adapter FOLDER] TOKEN...";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).peekable();
    let model = ModelFiles::open(&args.next().ok_or(USAGE)?)?;
    let mut decoder = Decoder::new(&model.config, model.weights(DType::F32, &Device::Cpu)?, &Device::Cpu)?;
    if args.next_if(|arg| arg == "--adapter").is_some() {
        AdapterFile::load(args.next().ok_or(USAGE)?.as_ref())?.attach(&mut decoder, &Device::Cpu)?;
    }
    let vocab = model.config.vocab_size as u32;
    let token = |text: String| match text.parse() {
        Ok(token) if token < vocab => Ok(token),
        _ => Err(format!("{text} is not a token from 0 to {}", vocab - 1)),
    };
    let tokens = args.map(token).collect::<Result<Vec<u32>, String>>()?;
    if tokens.is_empty() {
        return Err(USAGE.into());
    }
    let batch = Batch { targets: tokens.clone(), lengths: vec![tokens.len()], tokens };
    let logits: Vec<Vec<f32>> = decoder.logits(&batch)?.to_vec2()?;
    println!("{}", serde_json::json!({ "tokens": batch.tokens, "logits": logits }));
    Ok(())
}
