//! The CUDA kernels' source text, run on the CPU (`tests/cuda_host`), agrees with plain f64 loops. Needs a C++ compiler.
#![allow(missing_docs)]

use std::path::Path;
use std::process::Command;

#[test]
fn the_kernels_text_is_right() {
    compile_and_run("main");
}

#[test]
fn the_text_of_the_decoders_kernels_is_right() {
    compile_and_run("decoder");
}

/// The program `tests/cuda_host/{name}.cpp` ends well.
fn compile_and_run(name: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_host");
    let source = folder.join(format!("{name}.cpp"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cuda_host_{name}"));
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_string());
    let compiled = Command::new(&compiler)
        .args(["-std=c++20", "-O1", "-w"])
        .arg("-I")
        .arg(folder.join("types"))
        .arg(source)
        .arg("-o")
        .arg(&program)
        .status()
        .unwrap_or_else(|error| panic!("{compiler} cannot be started: {error}"));
    assert!(compiled.success(), "{compiler} does not compile tests/cuda_host/{name}.cpp");
    let run = Command::new(program).output().unwrap();
    let output = String::from_utf8_lossy(&run.stdout);
    println!("{output}");
    assert!(run.status.success(), "{output}{}", String::from_utf8_lossy(&run.stderr));
}
