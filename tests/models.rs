//! A model folder opens whole or not at all: configuration, weights and tokenizer, and one error that lists all that is wrong.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device};
use metal_candle::models::ModelFiles;
use metal_candle::models::decoder::{Batch, Decoder};

#[test]
fn a_folder_opens_and_runs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model");
    common::tiny::write_model(&path, 7);
    let model = ModelFiles::open(path.to_str().unwrap()).unwrap();
    let text = "row 3 of the data: naïve 猫 \u{1f980}\n";
    let tokens = model.tokenizer.encode(text, false).unwrap();
    assert_eq!(model.tokenizer.decode(&tokens, true).unwrap(), text);
    assert!(tokens.len() < text.len() - 5, "the tokenizer merges nothing");
    assert_eq!(model.tokenizer.eos_token().unwrap().1, common::tiny::EOS);
    let decoder = Decoder::new(&model.config, model.weights(DType::F32, &Device::Cpu).unwrap(), &Device::Cpu).unwrap();
    let count = tokens.len();
    let logits = decoder.logits(&Batch { tokens, targets: vec![0; count], lengths: vec![count] }).unwrap();
    let values = common::f64s(&logits);
    assert!(values.iter().all(|value| value.is_finite()) && values.iter().any(|value| value.abs() > 0.1));
}
