//! A run that is killed at any moment continues from its newest checkpoint, and its adapter is bit for bit that of a run that
//! was never stopped.

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Kills to survive; each hits a random moment of loading, training or writing.
const KILLS: usize = 30;

fn start(model: &Path, data: &Path, adapter: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_metal-candle"));
    command.arg("train").arg("--model").arg(model).arg("--data").arg(data).arg("--adapter-path").arg(adapter);
    let options = "--device cpu --iters 40 --save-every 1 --steps-per-eval 13 --batch-size 3 --grad-accumulation-steps 2 \
                   --rank 3 --alpha 5 --dropout 0.1 --seed 11 --learning-rate 1e-3";
    command.args(options.split_whitespace());
    // What a kill left half written has another name.
    let whole =
        |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().to_string_lossy().starts_with("step-");
    if adapter.join("checkpoints").read_dir().is_ok_and(|mut entries| entries.any(whole)) {
        command.arg("--resume");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(child: Child) {
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn adapter_bytes(adapter: &Path) -> Vec<u8> {
    fs::read(adapter.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn killed_runs_continue_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    common::tiny::write_model(&model, 3);
    let data = folder.path().join("data");
    fs::create_dir(&data).unwrap();
    let row = |i: usize| format!("{{\"prompt\": \"row {i} of\", \"completion\": \"value {}\"}}\n", i * i % 17);
    fs::write(data.join("train.jsonl"), (0..23).map(row).collect::<String>()).unwrap();
    fs::write(data.join("valid.jsonl"), (30..35).map(row).collect::<String>()).unwrap();

    let whole = folder.path().join("whole");
    let began = Instant::now();
    finish(start(&model, &data, &whole));
    let mut seconds = began.elapsed().as_secs_f64();
    let expected = adapter_bytes(&whole);

    let stopped = folder.path().join("stopped");
    let seed = std::process::id() as u64 ^ began.elapsed().as_nanos() as u64;
    println!("a whole run takes {seconds:.2} s; moments drawn from seed {seed}");
    let (mut kills, mut checked) = (0, 0);
    while kills < KILLS {
        let mut child = start(&model, &data, &stopped);
        let word =
            metal_candle::backend::dropout::philox([kills as u32, checked, 0, 0], [seed as u32, (seed >> 32) as u32])
                [0];
        std::thread::sleep(Duration::from_secs_f64(seconds * 0.6 * word as f64 / 4_294_967_296.0));
        let ended = child.try_wait().unwrap().is_some();
        if !ended {
            // SIGKILL: the program has no chance to tidy up.
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
        } else {
            finish(child);
            assert_eq!(adapter_bytes(&stopped), expected, "after {kills} kills");
            checked += 1;
            // The machine is less busy than it was: moments are drawn from a shorter time, or few would hit a run.
            seconds *= 0.8;
            fs::remove_dir_all(&stopped).unwrap();
        }
    }
    finish(start(&model, &data, &stopped));
    assert_eq!(adapter_bytes(&stopped), expected, "after {kills} kills (and {checked} runs that came to their end)");
}
