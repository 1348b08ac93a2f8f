//! Prints the tokens of texts as JSON, to compare a model's tokenizer with another library's.
//!
//! `cargo run --release --example tokens -- MODEL [--save FILE] [TEXTS]` takes a model folder, GGUF file or hub name and a JSON file with a
//! list of texts; tokens around a text are added. `--save` writes the tokenizer as a `tokenizer.json`.

use metal_candle::models::ModelFiles;

const USAGE: &str = "usage: tokens MODEL [--save FILE] [TEXTS]";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).peekable();
    let model = ModelFiles::open(&args.next().ok_or(USAGE)?)?;
    if args.next_if(|arg| arg == "--save").is_some() {
        std::fs::write(args.next().ok_or(USAGE)?, model.tokenizer.to_json()?)?;
    }
    let Some(texts) = args.next() else { return Ok(()) };
    let texts: Vec<String> = serde_json::from_slice(&std::fs::read(texts)?)?;
    let tokens = texts.iter().map(|text| model.tokenizer.encode(text, true));
    println!("{}", serde_json::json!(tokens.collect::<Result<Vec<_>, _>>()?));
    Ok(())
}
