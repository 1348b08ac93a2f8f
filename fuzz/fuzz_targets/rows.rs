//! Rows of a dataset, with a chat template and without one.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use metal_candle::models::TextTokenizer;
use metal_candle::training::dataset::{Dataset, DatasetOptions};
use metal_candle_fuzz::{bounded, file, folder, write};

static PLACE: LazyLock<(PathBuf, [TextTokenizer; 2])> = LazyLock::new(|| {
    let tokenizer = |with_template: bool| {
        let folder = folder();
        write(&folder, "tokenizer.json", &file("tokenizer.json"));
        write(&folder, "tokenizer_config.json", br#"{"eos_token": "<|end|>"}"#);
        if with_template {
            write(&folder, "chat_template.jinja", &file("chat_template.jinja"));
        }
        TextTokenizer::from_folder(&folder, &[]).expect("the tokenizer is good")
    };
    (folder(), [tokenizer(false), tokenizer(true)])
});

fuzz_target!(|input: &[u8]| {
    let (folder, tokenizers) = &*PLACE;
    write(folder, "train.jsonl", input);
    bounded(input, 1 << 20, 1024, || {
        for (tokenizer, mask_prompt) in [(&tokenizers[0], true), (&tokenizers[1], true), (&tokenizers[1], false)] {
            let options = DatasetOptions { max_seq_length: 64, mask_prompt };
            let Ok(data) = Dataset::load(&[folder.join("train.jsonl")], tokenizer, &options) else { continue };
            for row in &data.rows {
                assert_eq!(row.tokens.len(), row.targets.len());
                assert!(row.tokens.len() <= 64 && row.counted() > 0);
            }
        }
    });
});
