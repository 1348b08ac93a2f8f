//! The Metal kernels as they ship, run on the CPU: every kernel in every dtype agrees with the f64 reference, and what the
//! texts must keep to is kept. `tests/metal_host/host.cpp` says how it is run, `tests/metal_host_errors.rs` shows that errors are seen.
#![cfg(unix)]
#![allow(missing_docs)]

#[path = "metal_host/attention.rs"]
mod attention;
mod common;
#[path = "metal_host/decoder.rs"]
mod decoder;
#[path = "metal_host/dequantize.rs"]
mod dequantize;
#[path = "metal_host/harness.rs"]
mod harness;
#[path = "metal_host/lora.rs"]
mod lora;
#[path = "metal_host/run.rs"]
mod run;

use attention::Heads;
use candle_core::DType;
use common::FLOATS;
use harness::{Host, PLACES, change};
use lora::{Case, Cases, MIXES};
use metal_candle::backend::custom_ops::attention::Sequence;
use metal_candle::backend::custom_ops::swiglu::Activation;
use metal_candle::backend::metal::plan::{
    self as plans, Slot, Source, adamw, cross_entropy, embedding, fused_lora, rms_norm, rope, swiglu,
};
use metal_candle::backend::quantized::Kind;
use run::{RAN, Run};

fn compile(source: Source) -> Host {
    Host::compile(source.text()).unwrap_or_else(|error| panic!("{error}"))
}

/// Halves the cases between two threads; then every kernel of the text must have run.
fn run_all<T: Sync>(source: Source, cases: &[T], check: impl Fn(&Host, &T) -> Result<(), String> + Sync) {
    let host = compile(source);
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (host, check) = (&host, &check);
            scope.spawn(move || {
                for case in cases.iter().skip(half).step_by(2) {
                    check(host, case).unwrap_or_else(|error| panic!("{error}"));
                }
            });
        }
    });
    let unused: Vec<String> = host.kernels().difference(&RAN.lock().unwrap()).cloned().collect();
    assert!(unused.is_empty(), "no case ran {unused:?}");
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
    run_all(Source::Lora, &cases, |host, (what, case)| case.check(host, what));
}

#[test]
fn every_decoder_kernel_agrees_with_the_reference() {
    let mut runs = Vec::new();
    for (x, weight) in MIXES {
        // Less than a simdgroup, one that is not full, several, more than a threadgroup's threads; parts of one row and more.
        for (m, n) in [(1, 1), (3, 40), (70, 129), (2, 2500), (0, 8)] {
            runs.extend(decoder::rms_norm(m, n, x, weight));
        }
    }
    for dtype in FLOATS {
        for count in [0, 1, 255, 1025, 5000] {
            runs.extend(decoder::swiglu(count, dtype, Activation::Silu));
            runs.extend(decoder::swiglu(count, dtype, Activation::GeluTanh));
        }
        for (tokens, heads, size) in [(1, 1, 2), (7, 3, 10), (33, 4, 64), (0, 2, 8)] {
            runs.extend(decoder::rope(tokens, heads, size, dtype));
        }
        for (tokens, width) in [(1, 1), (13, 33), (40, 300), (0, 8)] {
            runs.extend(decoder::embedding(tokens, width, dtype));
        }
    }
    run_all(Source::Decoder, &runs, |host, run: &Run| run.check(host));
}

#[test]
fn every_training_kernel_agrees_with_the_reference() {
    let mut runs = Vec::new();
    for n in [0, 1, 300, 5001, 70_000] {
        runs.extend(decoder::adamw(n));
    }
    for (rows, vocab) in [(0, 5), (1, 1), (3, 7), (5, 200), (2, 5001)] {
        runs.extend(decoder::cross_entropy(rows, vocab));
    }
    runs.push(decoder::cross_entropy_of_no_numbers());
    run_all(Source::Training, &runs, |host, run: &Run| run.check(host));
}

#[test]
fn every_attention_kernel_agrees_with_the_reference() {
    let mut runs = Vec::new();
    for dtype in FLOATS {
        // Every padded size, full and not; then all that a sequence may be.
        for size in [10, 64, 80, 96, 128, 200, 256] {
            let small = [Sequence { q_start: 1, q_len: 20, k_start: 2, k_len: 23 }];
            runs.extend(attention::attention(&small, Heads { query: 2, key: 1, size }, Some(18), dtype));
        }
        for window in [None, Some(1), Some(6), Some(33)] {
            runs.extend(attention::attention(&attention::mixed(), Heads { query: 6, key: 2, size: 12 }, window, dtype));
        }
        runs.extend(attention::attention(&[], Heads { query: 2, key: 1, size: 4 }, None, dtype));
    }
    let one = [Sequence { q_start: 0, q_len: 100, k_start: 0, k_len: 133 }];
    for (size, window) in [(64, None), (256, Some(40))] {
        runs.extend(attention::attention(&one, Heads { query: 2, key: 2, size }, window, DType::F32));
    }
    // Keys that two sequences share.
    let shared = [
        Sequence { q_start: 0, q_len: 17, k_start: 0, k_len: 17 },
        Sequence { q_start: 17, q_len: 5, k_start: 3, k_len: 20 },
    ];
    runs.extend(attention::attention(&shared, Heads { query: 2, key: 1, size: 8 }, None, DType::F32));
    runs.push(attention::large_scores());
    run_all(Source::Attention, &runs, |host, run: &Run| run.check(host));
}

#[test]
fn every_dequantize_kernel_agrees_with_the_reference() {
    let mut runs = Vec::new();
    for (kind, dtype) in Kind::ALL.into_iter().flat_map(|kind| FLOATS.map(|dtype| (kind, dtype))) {
        // One block, odd numbers of them, more than a threadgroup's, none.
        for (rows, blocks) in [(1, 1), (3, 5), (7, 13), (0, 1)] {
            runs.push(dequantize::dequantized(kind, rows, blocks, dtype));
        }
    }
    run_all(Source::Dequantize, &runs, |host, run: &Run| run.check(host));
}

/// Rust's parameters and the shader's are the same bytes.
#[test]
fn parameters_have_one_layout() {
    macro_rules! check {
        ($($source:ident $name:literal $params:ty;)*) => { $({
            let text = Source::$source.text();
            harness::check_layout(text, $name, size_of::<$params>(), <$params>::LAYOUT).unwrap();
        })* };
    }
    check! {
        Lora "LoraParams" fused_lora::Params;
        Decoder "RmsNormParams" rms_norm::Params;
        Decoder "ElementParams" swiglu::Params;
        Decoder "RopeParams" rope::Params;
        Decoder "EmbeddingParams" embedding::Params;
        Training "AdamWParams" adamw::Params;
        Training "SquaresParams" adamw::SquaresParams;
        Training "CrossEntropyParams" cross_entropy::Params;
        Attention "AttentionParams" plans::attention::Params;
        Dequantize "DequantizeParams" plans::dequantize::Params;
    }
    let (text, layout) = (Source::Lora.text(), fused_lora::Params::LAYOUT);
    let check = |text: &str| harness::check_layout(text, "LoraParams", size_of::<fused_lora::Params>(), layout);
    let swapped = change(text, "uint seed_low;\n    uint seed_high;", "uint seed_high;\n    uint seed_low;");
    assert!(check(&swapped).unwrap_err().contains("seed_low"));
    let longer = change(text, "uint chunks; ", "uint another; uint chunks; ");
    assert!(check(&longer).unwrap_err().contains("size"));
}

/// `host.cpp` hands over arguments by their place, the GPU by their attributes: both must mean the same.
#[test]
fn attributes_are_in_order() {
    for (source, kernels) in [
        (Source::Lora, 8),
        (Source::Decoder, 11),
        (Source::Training, 3),
        (Source::Attention, 3),
        (Source::Dequantize, 1),
    ] {
        let signatures = harness::signatures(source.text());
        assert_eq!(signatures.len(), kernels, "{source:?}");
        for (kernel, attributes) in &signatures {
            let buffers = attributes.iter().take_while(|attribute| attribute.starts_with("buffer")).count();
            let mut want: Vec<String> = (0..buffers).map(|index| format!("buffer({index})")).collect();
            if attributes.iter().any(|attribute| attribute == "threadgroup(0)") {
                want.push("threadgroup(0)".to_string());
            }
            want.extend(PLACES.map(str::to_string));
            assert_eq!(attributes, &want, "{kernel}");
        }
    }
    let forward = Source::Lora.text().split("kernel void fused_lora_forward(").nth(1).unwrap();
    let names = ["input", "lora_a", "lora_b", "output", "params"];
    for (index, name) in names.iter().enumerate() {
        assert!(forward.contains(&format!("{name} [[buffer({index})]]")), "{name} must be buffer {index}");
    }
}

/// Apple's compiler wants an address space for every pointer and reference.
#[test]
fn every_pointer_has_an_address_space() {
    for source in Source::ALL {
        assert_eq!(harness::without_address_space(source.text()), [""; 0], "{source:?}");
    }
    let parameter = "device const L* left, device const R* right, uint row, uint,";
    let changed = change(Source::Lora.text(), parameter, &parameter.replacen("device ", "", 1));
    assert_eq!(harness::without_address_space(&changed), ["const L* left"]);
}

/// Clang knows where one address space is taken for another.
#[test]
fn address_spaces_agree() {
    let Some(result) = harness::check_address_spaces(Source::Lora.text()) else {
        println!("SKIPPED: Clang checks that address spaces agree, and there is no clang++ on this machine");
        return;
    };
    result.unwrap_or_else(|error| panic!("{error}"));
    for source in Source::ALL {
        harness::check_address_spaces(source.text()).unwrap().unwrap_or_else(|error| panic!("{source:?}: {error}"));
    }
    for (from, to) in [
        ("threadgroup float* parts = shared", "thread float* parts = shared"),
        ("device float* out = partial", "threadgroup float* out = partial"),
        ("philox(ulong block, constant LoraParams&", "philox(ulong block, device LoraParams&"),
    ] {
        let error = harness::check_address_spaces(&change(Source::Lora.text(), from, to)).unwrap().unwrap_err();
        assert!(error.contains("threadgroup") || error.contains("address space"), "{from}: {error}");
    }
}

/// The plans of the real host give every kernel the memory that it uses; half of it would not do.
#[test]
fn threadgroup_memory_is_what_is_used() {
    let host = compile(Source::Lora);
    for (m, r) in [(1, 6), (40, 5), (40, 40), (2048, 6)] {
        let case = Case::new(m, [48, r, 200], DType::F32, DType::F32);
        let mut plan = case.call.delta().unwrap();
        let mut tensors = case.tensors(&[]);
        tensors.made.insert(Slot::Y, m * 200 * 4);
        assert!(host.run(&plan, &tensors, 1).is_ok());
        plan.launches[0].threadgroup_bytes = plan.launches[0].threadgroup_bytes / 32 * 16;
        let error = host.run(&plan, &tensors, 2).map(|_| ()).unwrap_err();
        assert!(error.contains("threadgroup memory"), "m {m}, r {r}: {error}");
    }
}

/// The same of the other ops' launches.
#[test]
fn threadgroup_memory_of_every_op_is_what_is_used() {
    let one = [Sequence { q_start: 0, q_len: 40, k_start: 0, k_len: 40 }];
    let heads = Heads { query: 1, key: 1, size: 64 };
    for (source, runs) in [
        (Source::Decoder, decoder::rms_norm(2, 4096, DType::F32, DType::F32)),
        (Source::Training, [decoder::adamw(5000), decoder::cross_entropy(2, 4096)].concat()),
        (Source::Attention, attention::attention(&one, heads, None, DType::F32)),
    ] {
        let host = compile(source);
        for run in runs {
            for index in 0..run.plan.launches.len() {
                let mut plan = run.plan.clone();
                let bytes = &mut plan.launches[index].threadgroup_bytes;
                if *bytes > 0 {
                    *bytes = *bytes / 32 * 16;
                    let error = host.run(&plan, &run.tensors, 2).err().unwrap_or_default();
                    let kernel = &plan.launches[index].kernel;
                    assert!(error.contains("threadgroup memory"), "{kernel}, {}: '{error}'", run.what);
                }
            }
        }
    }
}
