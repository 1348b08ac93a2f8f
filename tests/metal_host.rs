//! `kernels.metal` as it ships, run on the CPU: every kernel in every dtype agrees with the f64 reference, and what the text
//! must keep to is kept. `tests/metal_host/host.cpp` says how it is run, `tests/metal_host_errors.rs` shows that errors are seen.
#![cfg(unix)]
#![allow(missing_docs)]

#[path = "metal_host/case.rs"]
mod case;
mod common;
#[path = "metal_host/harness.rs"]
mod harness;

use std::sync::LazyLock;

use candle_core::DType;
use case::{Case, Cases, MIXES, RAN};
use harness::{Host, KERNELS, PLACES, change};
use metal_candle::backend::metal::plan::{Params, Slot};

static HOST: LazyLock<Host> = LazyLock::new(|| Host::compile(KERNELS).unwrap_or_else(|error| panic!("{error}")));

#[track_caller]
fn check(case: &Case, what: &str) {
    case.check(&HOST, what).unwrap_or_else(|error| panic!("{error}"));
}

fn every_shape_in_every_dtype() -> Cases {
    let mut cases = Cases::new();
    // One row to several tiles; columns that fill no block; ranks beyond a block of 32 and of one.
    let shapes = [(15, [123, 5, 77]), (70, [33, 8, 65]), (6, [1, 1, 1]), (1, [123, 6, 77]), (3, [40, 33, 24])];
    for (x, adapter) in MIXES {
        for (m, size) in shapes {
            cases.push((format!("{x:?} with {adapter:?}, m {m}, {size:?}"), Case::new(m, size, x, adapter)));
        }
        cases.push((format!("tall, {x:?} with {adapter:?}"), Case::new(2051, [19, 9, 37], x, adapter)));
    }
    cases
}

fn dropout() -> Cases {
    let mut cases = Cases::new();
    for (x, adapter) in [MIXES[0], MIXES[4]] {
        for (m, size) in [(45, [123, 5, 77]), (2, [64, 8, 32]), (2050, [18, 3, 20])] {
            cases.push((format!("dropout, {x:?}, m {m}, {size:?}"), Case::new(m, size, x, adapter).with_dropout()));
        }
    }
    cases
}

fn the_shapes_of_the_benches() -> Cases {
    let f32s = |m, size| (format!("m {m}, {size:?}"), Case::new(m, size, DType::F32, DType::F32));
    vec![f32s(128, [512, 8, 512]), f32s(128, [1024, 16, 1024]), f32s(1, [2048, 16, 2048])]
}

fn every_rank_to_256() -> Cases {
    let f32s = |m, size| (format!("m {m}, {size:?}"), Case::new(m, size, DType::F32, DType::F32));
    let mut cases: Cases = (1..=256).step_by(5).map(|rank| f32s(5, [23, rank, 19])).collect();
    cases.extend([1, 16, 17, 100, 256].map(|rank| f32s(37, [64, rank, 48])));
    cases.extend([32, 64].map(|rank| f32s(2048, [20, rank, 24])));
    cases.extend([2, 8, 255, 256].map(|rank| f32s(4, [70, rank, 40])));
    cases
}

fn no_rows() -> Cases {
    [DType::F32, DType::BF16].map(|x| (format!("no rows, {x:?}"), Case::new(0, [12, 4, 9], x, DType::F32))).into()
}

#[test]
fn every_kernel_agrees_with_the_reference() {
    let groups = [every_shape_in_every_dtype(), dropout(), the_shapes_of_the_benches(), every_rank_to_256(), no_rows()];
    let cases: Vec<(String, Case)> = groups.into_iter().flatten().collect();
    let (even, odd): (Vec<_>, Vec<_>) = cases.iter().enumerate().partition(|(index, _)| index % 2 == 0);
    std::thread::scope(|scope| {
        for half in [even, odd] {
            scope.spawn(move || half.iter().for_each(|(_, (what, case))| check(case, what)));
        }
    });
    let unused: Vec<String> = HOST.kernels().difference(&RAN.lock().unwrap()).cloned().collect();
    assert!(unused.is_empty(), "no case ran {unused:?}");
}

/// Rust's parameters and the shader's are the same bytes.
#[test]
fn parameters_have_one_layout() {
    macro_rules! offsets {
        ($($field:ident)*) => { [$((stringify!($field), std::mem::offset_of!(Params, $field))),*] };
    }
    let fields = offsets!(batch_size seq_len in_features rank out_features scaling dropout_threshold dropout_scale
        seed_low seed_high stream_low stream_high rows_per_chunk chunks elements);
    harness::check_layout(KERNELS, size_of::<Params>(), &fields).unwrap();
    let swapped = change(KERNELS, "uint seed_low;\n    uint seed_high;", "uint seed_high;\n    uint seed_low;");
    assert!(harness::check_layout(&swapped, size_of::<Params>(), &fields).unwrap_err().contains("seed_low"));
    let longer = change(KERNELS, "uint chunks; ", "uint another; uint chunks; ");
    assert!(harness::check_layout(&longer, size_of::<Params>(), &fields).unwrap_err().contains("size"));
}

/// `host.cpp` hands over arguments by their place, the GPU by their attributes: both must mean the same.
#[test]
fn attributes_are_in_order() {
    let signatures = harness::signatures(KERNELS);
    assert_eq!(signatures.len(), 8);
    for (kernel, attributes) in &signatures {
        let buffers = attributes.iter().take_while(|attribute| attribute.starts_with("buffer")).count();
        let mut want: Vec<String> = (0..buffers).map(|index| format!("buffer({index})")).collect();
        if attributes.iter().any(|attribute| attribute == "threadgroup(0)") {
            want.push("threadgroup(0)".to_string());
        }
        want.extend(PLACES.map(str::to_string));
        assert_eq!(attributes, &want, "{kernel}");
    }
    let forward = KERNELS.split("kernel void fused_lora_forward(").nth(1).unwrap();
    let names = ["input", "lora_a", "lora_b", "output", "params"];
    for (index, name) in names.iter().enumerate() {
        assert!(forward.contains(&format!("{name} [[buffer({index})]]")), "{name} must be buffer {index}");
    }
}

/// Apple's compiler wants an address space for every pointer and reference.
#[test]
fn every_pointer_has_an_address_space() {
    assert_eq!(harness::without_address_space(KERNELS), [""; 0]);
    let parameter = "device const L* left, device const R* right, uint row, uint,";
    let changed = change(KERNELS, parameter, &parameter.replacen("device ", "", 1));
    assert_eq!(harness::without_address_space(&changed), ["const L* left"]);
}

/// Clang knows where one address space is taken for another.
#[test]
fn address_spaces_agree() {
    let Some(result) = harness::check_address_spaces(KERNELS) else {
        println!("SKIPPED: Clang checks that address spaces agree, and there is no clang++ on this machine");
        return;
    };
    result.unwrap_or_else(|error| panic!("{error}"));
    for (from, to) in [
        ("threadgroup float* parts = shared", "thread float* parts = shared"),
        ("device float* out = partial", "threadgroup float* out = partial"),
        ("philox(ulong block, constant LoraParams&", "philox(ulong block, device LoraParams&"),
    ] {
        let error = harness::check_address_spaces(&change(KERNELS, from, to)).unwrap().unwrap_err();
        assert!(error.contains("threadgroup") || error.contains("address space"), "{from}: {error}");
    }
}

/// The plans of the real host give every kernel the memory that it uses; half of it would not do.
#[test]
fn threadgroup_memory_is_what_is_used() {
    for (m, r) in [(1, 6), (40, 5), (40, 40), (2048, 6)] {
        let case = Case::new(m, [48, r, 200], DType::F32, DType::F32);
        let mut plan = case.call.delta().unwrap();
        let mut tensors = case.tensors(&[]);
        tensors.made.insert(Slot::Y, m * 200 * 4);
        assert!(HOST.run(&plan, &tensors, 1).is_ok());
        plan.launches[0].threadgroup_bytes = plan.launches[0].threadgroup_bytes / 32 * 16;
        let error = HOST.run(&plan, &tensors, 2).map(|_| ()).unwrap_err();
        assert!(error.contains("threadgroup memory"), "m {m}, r {r}: {error}");
    }
}
