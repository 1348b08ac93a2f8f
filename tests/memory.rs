//! What `train --dry-run` says of memory is what the run takes, within a tenth; only Linux tells.
#![allow(missing_docs)]
#![cfg(target_os = "linux")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const TENTH: f64 = 0.1;

fn metal_candle(folder: &Path, args: &str) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metal-candle"));
    let output = command.args(args.split(' ')).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The figure in a line of the plan, in GB.
fn planned(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("#   {name} ")));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim().parse().unwrap()
}

#[test]
fn a_run_takes_what_the_dry_run_says() {
    let folder = tempfile::tempdir().unwrap();
    common::tiny::write_model_with(&folder.path().join("model"), 1, |config| {
        config["hidden_size"] = 256.into();
        config["intermediate_size"] = 1024.into();
        config["num_hidden_layers"] = 6.into();
        config["max_position_embeddings"] = 4096.into();
    });
    let row = |i: usize| format!("{{\"text\": \"{}\"}}\n", format!("row {i} of it ").repeat(40 + 3 * i));
    fs::write(folder.path().join("train.jsonl"), (0..8).map(row).collect::<String>()).unwrap();
    let run = "train --model model --data train.jsonl --batch-size 8 --iters 3 --steps-per-report 1 --device cpu";
    let mut taken = Vec::new();
    for (name, options) in [
        ("f32", "--grad-checkpoint none"),
        ("f32-again", "--grad-checkpoint every"),
        ("bf16", "--dtype bf16 --grad-checkpoint none"),
        ("dora", "--fine-tune-type dora --grad-checkpoint none"),
        ("dora-again", "--fine-tune-type dora --grad-checkpoint every"),
    ] {
        let run = format!("{run} --adapter-path {name} {options}");
        let plan = metal_candle(folder.path(), &format!("{run} --dry-run"));
        metal_candle(folder.path(), &run);
        let metrics = fs::read_to_string(folder.path().join(name).join("metrics.jsonl")).unwrap();
        let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
        let took = last["peak_memory_bytes"].as_f64().unwrap() / 1e9;
        let said = planned(&plan, "in all");
        println!("{name}: {said:.3} GB said, {took:.3} GB taken");
        // The tiny model's own share must not hide what is planned.
        assert!(planned(&plan, "program and data") < 0.3 * took, "{plan}");
        assert!((said / took - 1.0).abs() < TENTH, "{name}: {said:.3} GB said, {took:.3} GB taken\n{plan}");
        taken.push(took);
    }
    assert!(taken[1] < 0.8 * taken[0] && taken[2] < 0.8 * taken[0], "{taken:?}");
}
