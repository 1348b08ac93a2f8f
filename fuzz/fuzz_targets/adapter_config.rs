//! An adapter's configuration beside tensors that are good.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use metal_candle::training::adapter::AdapterFile;
use metal_candle_fuzz::{bounded, file, folder, write};

static PLACE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = folder();
    write(&folder, "adapter_model.safetensors", &file("adapter_model.safetensors"));
    folder
});

fuzz_target!(|input: &[u8]| {
    write(&PLACE, "adapter_config.json", input);
    bounded(input, 1 << 20, 256, || {
        let Ok(adapter) = AdapterFile::load(&PLACE) else { return };
        adapter.save(&PLACE.join("saved")).expect("what was read can be written");
        AdapterFile::load(&PLACE.join("saved")).expect("what was written can be read");
    });
});
