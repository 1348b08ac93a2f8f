//! Names the commit for `bench`, and compiles the CUDA kernels when the feature `cuda` is on.
//!
//! nvcc is taken from `NVCC`, `CUDA_HOME/bin`, `CUDA_PATH/bin` or `PATH`. One file a source goes to `OUT_DIR`: machine code for
//! compute capability 8.0 (runs on all of 8.x) and 9.0, and PTX of 9.0 for what comes later. `CUDA_COMPUTE_CAP=86`, which
//! candle's own kernels read too, makes it that one and its PTX.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

const SOURCES: [&str; 7] =
    ["fused_lora", "fused_lora_backward", "linear", "decoder", "attention", "dequantize", "attention_hopper"];
/// Of these, those whose instructions only compute capability 9.0 has. Other GPUs take other ways.
const HOPPER: [&str; 2] = ["linear", "attention_hopper"];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    name_commit();
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed=src/backend/cuda");
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let children: Vec<(&str, Child)> = SOURCES.iter().map(|source| (*source, start(source))).collect();
    for (source, mut child) in children {
        let status = child.wait().expect("nvcc can be waited for");
        assert!(status.success(), "nvcc could not compile src/backend/cuda/{source}.cu: {status}");
    }
}

/// `METAL_CANDLE_COMMIT`: the commit of a checkout, with `-dirty` where files were changed when this ran last; "unknown" of a package.
fn name_commit() {
    // In a worktree `.git` is a file, and HEAD and refs lie in two other folders.
    for name in ["HEAD", "index", "refs/heads"] {
        let output = Command::new("git").args(["rev-parse", "--git-path", name]).output();
        let path = output.ok().filter(|output| output.status.success()).map(|output| output.stdout).unwrap_or_default();
        let path = String::from_utf8_lossy(&path).trim().to_string();
        if Path::new(&path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let output = Command::new("git").args(["describe", "--always", "--dirty", "--exclude=*"]).output();
    let text = output.ok().filter(|output| output.status.success()).map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).trim().to_string();
    println!("cargo::rustc-env=METAL_CANDLE_COMMIT={}", if text.is_empty() { "unknown" } else { &text });
}

fn start(source: &str) -> Child {
    let nvcc = nvcc();
    let out = Path::new(&env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(format!("{source}.fatbin"));
    let mut command = Command::new(&nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17", "-w"]);
    match env::var("CUDA_COMPUTE_CAP") {
        _ if HOPPER.contains(&source) => command.arg("-gencode=arch=compute_90a,code=sm_90a"),
        Ok(cap) => command.arg(format!("-gencode=arch=compute_{cap},code=[sm_{cap},compute_{cap}]")),
        Err(_) => command
            .args(["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"])
            .args(["--threads", "2"]),
    };
    command.arg(format!("src/backend/cuda/{source}.cu")).arg("-o").arg(out);
    command.spawn().unwrap_or_else(|error| {
        panic!(
            "the feature `cuda` needs nvcc, but {} cannot be started: {error}. Install a CUDA toolkit, or see docs/cuda.md",
            nvcc.display()
        )
    })
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(env::var_os);
    homes.map(|home| Path::new(&home).join("bin/nvcc")).find(|nvcc| nvcc.exists()).unwrap_or_else(|| "nvcc".into())
}
