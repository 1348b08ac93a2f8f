//! Broken files are refused: no panic, and no allocation that only a number in the file asks for.
#![allow(missing_docs)]

mod common;
#[path = "common/watched.rs"]
mod watched;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use candle_core::{DType, Device};
use metal_candle::models::chat_template::ChatTemplate;
use metal_candle::models::{Holding, ModelConfig, ModelFiles, weights};
use proptest::prelude::*;
use watched::{LARGEST, Watched};

/// Far under what a broken count asks for; the largest request that was seen is 1 MiB.
const LIMIT: usize = 4 << 20;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// What happens to a file.
#[derive(Debug, Clone)]
enum Damage {
    /// Only the first part is left.
    Cut(usize),
    /// Other bytes at a place.
    Write(usize, Vec<u8>),
    /// Bytes taken out or put in: all behind them moves.
    Shift(usize, Vec<u8>),
}

/// Damage within the first `reach` bytes: where a file's header is.
fn damage(reach: usize) -> impl Strategy<Value = Vec<Damage>> {
    let bytes = prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..9),
        // Counts and sizes that are too large, in both widths.
        Just(vec![0xff; 8]),
        Just(vec![0xff; 4]),
        Just(vec![0, 0, 0, 0, 1, 0, 0, 0]),
        Just(vec![0xff, 0xff, 0xff, 0x7f]),
        Just(vec![0; 8]),
        Just(b"999999999999".to_vec()),
        Just(b"null".to_vec()),
        Just(b"[]".to_vec()),
        Just(b"-1e308".to_vec()),
    ];
    let one = prop_oneof![
        1 => (0..reach).prop_map(Damage::Cut),
        4 => (0..reach, bytes.clone()).prop_map(|(at, bytes)| Damage::Write(at, bytes)),
        1 => (0..reach, bytes).prop_map(|(at, bytes)| Damage::Shift(at, bytes)),
    ];
    proptest::collection::vec(one, 1..4)
}

fn damaged(mut file: Vec<u8>, damage: &[Damage]) -> Vec<u8> {
    for damage in damage {
        match damage {
            Damage::Cut(length) => file.truncate(*length),
            Damage::Write(at, bytes) => {
                for (byte, new) in file.iter_mut().skip(*at).zip(bytes) {
                    *byte = *new;
                }
            }
            Damage::Shift(at, bytes) => {
                let at = (*at).min(file.len());
                file.splice(at..(at + bytes.len() / 2).min(file.len()), bytes.iter().copied());
            }
        }
    }
    file
}

/// Opens a model and loads its weights; the answer does not matter, the way there does.
fn try_out(path: &Path) {
    if let Ok(model) = ModelFiles::open(path.to_str().unwrap()) {
        let _ = model.tokenizer.encode("a <s> \u{1f980}", true).map(|ids| model.tokenizer.decode(&ids, false));
        let _ = model.weights(DType::F32, &Device::Cpu);
    }
    let largest = LARGEST.load(Ordering::Relaxed);
    assert!(largest < LIMIT, "{largest} bytes were asked for at once");
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)).unwrap()
}

/// A good model's folder, written once.
fn good() -> &'static Path {
    static GOOD: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = GOOD.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        common::tiny::write_model(dir.path(), 1);
        dir
    });
    dir.path()
}

/// A copy of the good folder with one file damaged.
fn folder_with(name: &str, damage: &[Damage]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    for file in fs::read_dir(good()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), dir.path().join(file.file_name())).unwrap();
    }
    let path = dir.path().join(name);
    fs::write(&path, damaged(fs::read(&path).unwrap(), damage)).unwrap();
    let folder = dir.path().to_path_buf();
    (dir, folder)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn gguf_with_sentence_pieces(damage in damage(18_000)) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), damaged(fixture("tokenizer-spm.gguf"), &damage)).unwrap();
        try_out(file.path());
    }

    #[test]
    fn gguf_header(damage in damage(3_000)) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), damaged(fixture("quants.gguf"), &damage)).unwrap();
        try_out(file.path());
    }

    #[test]
    fn safetensors(damage in damage(2_500)) {
        let (_dir, folder) = folder_with("model.safetensors", &damage);
        try_out(&folder);
    }

    #[test]
    fn packed_weights(nf4: bool, header in damage(9_000), all in damage(190_000)) {
        let good = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized").join(if nf4 { "nf4" } else { "mlx4" });
        let config = ModelConfig::from_json(&good.join("config.json")).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for damage in [header, all] {
            let file = damaged(fs::read(good.join("model.safetensors")).unwrap(), &damage);
            fs::write(dir.path().join("model.safetensors"), file).unwrap();
            if let Ok(kinds) = weights::kinds(dir.path(), &config) {
                for kinds in [kinds, HashMap::new()] {
                    let _ = weights::load(dir.path(), &config, &Holding { dtype: DType::F32, kinds }, &Device::Cpu);
                }
            }
            let largest = LARGEST.load(Ordering::Relaxed);
            assert!(largest < LIMIT, "{largest} bytes were asked for at once");
        }
    }

    #[test]
    fn config_json(damage in damage(450)) {
        let (_dir, folder) = folder_with("config.json", &damage);
        try_out(&folder);
    }

    #[test]
    fn tokenizer_json(damage in damage(6_000)) {
        let (_dir, folder) = folder_with("tokenizer.json", &damage);
        try_out(&folder);
    }

    #[test]
    fn tokenizer_config_json(damage in damage(90)) {
        let (_dir, folder) = folder_with("tokenizer_config.json", &damage);
        try_out(&folder);
    }
}

/// Every length that a file can be cut to, where the header is short enough to try them all.
#[test]
fn every_cut_of_a_header_is_refused() {
    let whole = fixture("quants.gguf");
    let file = tempfile::NamedTempFile::new().unwrap();
    for length in (0..3_000).chain((3_000..whole.len()).step_by(1_009)) {
        fs::write(file.path(), &whole[..length]).unwrap();
        let opened = ModelFiles::open(file.path().to_str().unwrap());
        assert!(opened.is_err(), "a file of {} bytes opens with {length} of them", whole.len());
    }
    ModelFiles::open({
        fs::write(file.path(), &whole).unwrap();
        file.path().to_str().unwrap()
    })
    .unwrap();
}

/// A configuration asks for more layers than memory has room to name.
#[test]
fn a_count_is_not_believed() {
    let (_dir, folder) = folder_with("config.json", &[]);
    let path = folder.join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json["num_hidden_layers"] = (1 << 28).into();
    fs::write(path, json.to_string()).unwrap();
    try_out(&folder);
    let model = ModelFiles::open(folder.to_str().unwrap()).unwrap();
    let error = model.weights(DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("268435456 layers"), "{error}");
}

/// Templates that fuzzing found to panic. Those that would take much memory are in `tests/chat_templates.rs`.
#[test]
fn a_broken_template_is_refused() {
    for source in ["{%}", "{% if true {%}", "{%}%}"] {
        let error = ChatTemplate::new(source, "", "").unwrap_err().to_string();
        assert!(error.contains("cannot be parsed"), "{error}");
    }
}
