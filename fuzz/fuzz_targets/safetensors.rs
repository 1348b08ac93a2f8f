//! An adapter's tensors and a model's weights: the header, and what is made of it.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use candle_core::{DType, Device};
use libfuzzer_sys::fuzz_target;
use metal_candle::models::{Holding, ModelConfig, weights};
use metal_candle::training::adapter::AdapterFile;
use metal_candle_fuzz::{bounded, file, folder, write};

static PLACE: LazyLock<(PathBuf, ModelConfig)> = LazyLock::new(|| {
    let folder = folder();
    write(&folder, "adapter_config.json", &file("adapter_config.json"));
    let json = serde_json::from_slice(&file("config.json")).expect("the configuration is JSON");
    let config = ModelConfig::from_value("config.json".as_ref(), &json).expect("the configuration is good");
    (folder, config)
});

fuzz_target!(|input: &[u8]| {
    let (folder, config) = &*PLACE;
    write(folder, "adapter_model.safetensors", input);
    write(folder, "model.safetensors", input);
    bounded(input, 1 << 20, 64, || {
        let _ = AdapterFile::load(folder);
        let _ = weights::load(folder, config, &Holding::dense(DType::F32), &Device::Cpu);
    });
});
