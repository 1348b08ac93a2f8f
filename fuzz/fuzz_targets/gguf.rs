//! GGUF files: the container, the configuration, the tokenizer in it, and the tensors.
#![no_main]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::LazyLock;

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use metal_candle::models::{Holding, gguf};
use metal_candle_fuzz::{bounded, folder, write};

static PLACE: LazyLock<PathBuf> = LazyLock::new(folder);

fuzz_target!(|input: &[u8]| {
    write(&PLACE, "model.gguf", input);
    let path = PLACE.join("model.gguf");
    bounded(input, 4 << 20, 256, || {
        let Ok((config, tokenizer)) = gguf::open(&path) else { return };
        let _ = tokenizer.encode("a <s> \u{1f980}", true).map(|ids| tokenizer.decode(&ids, false));
        let Ok(kinds) = gguf::kinds(&path, &config) else { return };
        for kinds in [kinds, HashMap::new()] {
            let _ = gguf::load(&path, &config, &Holding { dtype: DType::F32, kinds }, &Device::Cpu);
        }
    });
});
