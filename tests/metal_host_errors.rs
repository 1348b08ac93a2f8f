//! The CPU host of the Metal kernels sees what it is there for: each error is planted once.
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
#[path = "metal_host/sensitive.rs"]
mod sensitive;

use std::ops::Range;

use candle_core::DType;
use common::{f64s, random, relative_error};
use harness::{Host, PLACES, Tensors, change};
use metal_candle::backend::metal::plan::{Binding, Launch, Plan, Slot, Source};
use run::{ORDERS, bytes, values};
use sensitive::Sensitive;

#[test]
fn unchanged_kernels_pass_the_cases_that_find_errors() {
    for source in Source::ALL {
        assert_eq!(Sensitive::of(source).seen(source.text()), None);
    }
}

/// Takes out each of the barriers `which` of `source` alone; there are `count`.
fn check_barriers(source: Source, count: usize, which: Range<usize>) {
    let (text, cases) = (source.text(), Sensitive::of(source));
    let places: Vec<usize> = text.match_indices("_barrier(mem_flags::mem_threadgroup);").map(|(at, _)| at).collect();
    assert_eq!(places.len(), count);
    let mut missed = Vec::new();
    for &at in &places[which] {
        let start = text[..at].rfind('\n').unwrap();
        let end = at + text[at..].find('\n').unwrap();
        let changed = format!("{}{}", &text[..start], &text[end..]);
        let line = text[..at].matches('\n').count() + 1;
        if cases.seen(&changed).is_none() {
            missed.push(line);
        }
    }
    assert!(missed.is_empty(), "{source:?}: nothing was seen of the missing barriers of lines {missed:?}");
}

#[test]
fn every_missing_barrier_is_seen() {
    check_barriers(Source::Lora, 15, 0..15);
}

#[test]
fn every_missing_barrier_of_the_decoder_is_seen() {
    // common.metal's: the decoder's kernels use the sum, those of training the maximum too.
    check_barriers(Source::Decoder, 2, 0..1);
    check_barriers(Source::Training, 2, 0..2);
}

#[test]
fn every_missing_barrier_of_attention_is_seen() {
    // Behind common.metal's, which attention does not use.
    check_barriers(Source::Attention, 28, 2..28);
}

#[test]
fn planted_errors_of_attention_are_seen() {
    check_planted(
        Source::Attention,
        &[
            // Who sees whom.
            ("uint end = before + from - sequence.q_start + 1;", "uint end = before + from - sequence.q_start;"),
            ("span.end = before + to - sequence.q_start;", "span.end = before + to - sequence.q_start + 1;"),
            ("span.first = end > window ? end - window : 0;", "span.first = 0;"),
            ("uint end = to - 1 - sequence.k_start + window;", "uint end = to - sequence.k_start + window;"),
            (
                "span.first = first > before ? first - before : 0;",
                "span.first = first > before ? first - before + 1 : 0;",
            ),
            ("min(end - before, sequence.q_len)", "end - before"),
            ("first < span.end && first + count > span.first", "first < span.end && first > span.first"),
            ("to = min(to, sequence.q_start + sequence.q_len);", "to = to + 0;"),
            ("from = max(from, sequence.k_start);", "from = from + 0;"),
            // Staging and products.
            ("(ulong(row + i) * heads + head) * size + d]) : 0.0f", "(ulong(row + i) * heads) * size + d]) : 0.0f"),
            ("row + i < end && d < size;", "row + i < end;"),
            (
                "block + 8 * j * SIZE + d, SIZE, ulong2(0, 0), true",
                "block + 8 * j * SIZE + d, SIZE, ulong2(0, 0), false",
            ),
            ("for (uint d = 0; d < SIZE; d += 8) {", "for (uint d = 8; d < SIZE; d += 8) {"),
            ("simdgroup_load(left, weights + i, BLOCK);", "simdgroup_load(left, weights, BLOCK);"),
            ("block + i * SIZE + 8 * j, SIZE", "block + i * SIZE, SIZE"),
            ("left, rows.sums[j], zero", "left, rows.sums[j], rows.sums[j]"),
            ("if (row + i < end && column + d < size) {", "if (row + i <= end && column + d < size) {"),
            // Forward.
            ("float kept = most < larger ? exp(most - larger) : 1.0f;", "float kept = 1.0f;"),
            ("inside(seen, key + j) && score > larger ?", "inside(seen, key + j) && score < larger ?"),
            ("inside(seen, key + j) ? exp(score - larger) : 0.0f", "exp(score - larger)"),
            ("sum *= kept;", ""),
            ("factors[9 * own] = kept;", "factors[8 * own] = kept;"),
            ("lse[at] = most + log(total);", "lse[at] = log(total);"),
            ("total == 0.0f ? 0.0f :", ""),
            // Backward.
            ("weight * (products[e] - mean)", "weight * products[e]"),
            ("inside(seen, key + j) ? weight", "inside(all, key + j) ? weight"),
            ("weight * (products[e] - delta[at])", "weight * (products[e] + delta[at])"),
            ("exp(params.scale * scores[e] - lse[at])", "exp(scores[e] - lse[at])"),
            ("if (inside(seeing, query + j)) {", "if (inside(all, query + j)) {"),
            (
                "uint head = group.y * heads; head < (group.y + 1) * heads",
                "uint head = group.y; head < group.y + heads",
            ),
            ("uint column = group.z * COLUMNS;", "uint column = 0;"),
            (
                "accumulate<SIZE, BLOCK>(value_sums, scores, block + column)",
                "accumulate<SIZE, BLOCK>(value_sums, scores, block)",
            ),
            (
                "accumulate<SIZE, BLOCK>(key_sums, products, block + column)",
                "accumulate<SIZE, BLOCK>(key_sums, scores, block + column)",
            ),
        ],
    );
}

#[test]
fn planted_errors_of_the_decoder_are_seen() {
    let decoder = [
        // Norm.
        ("float(width) + params.eps", "float(width - 1) + params.eps"),
        ("ulong start = ulong(row) * width;", "ulong start = ulong(row) * (width + 1);"),
        (
            "float(gradient[start + i]) * float(weight[i]) * float(x[start + i])",
            "float(gradient[start + i]) * float(x[start + i])",
        ),
        ("- float(x[start + i]) * scale * mean", "- float(x[start + i]) * mean"),
        ("T(float(input_gradient[start + i]) + scale * value)", "T(scale * value)"),
        ("min((group.y + 1) * params.rows_per_part, params.rows)", "(group.y + 1) * params.rows_per_part"),
        (
            "uint row = group.y * params.rows_per_part; row < end",
            "uint row = group.y * params.rows_per_part + 1; row < end",
        ),
        ("parts[ulong(group.y) * params.width + column] = sum;", "parts[column] = sum;"),
        ("uint part = 0; part < params.parts", "uint part = 1; part < params.parts"),
        ("sum[start + i] = rounded;", "sum[start + i] = x[start + i];"),
        // SwiGLU.
        ("(1.0f + z * (1.0f - sigmoid))", "(1.0f + z * sigmoid)"),
        ("up_gradient[at] = T(g * A::value(z));", "up_gradient[at] = T(g * z);"),
        ("(group * ELEMENTS + i) * threads(place)", "(group + i * ELEMENTS) * threads(place)"),
        // Rope.
        ("x[at] = T(first * c - second * s);", "x[at] = T(first * c + second * s);"),
        ("positions[head / params.heads]", "positions[head % params.heads]"),
        ("ulong(head) * 2 * params.half_size + column", "ulong(head) * params.half_size + column"),
        ("params.sign * sines[angle]", "sines[angle]"),
        ("if (pair < params.pairs)", "if (pair <= params.pairs)"),
        // Embedding.
        ("ulong read = ulong(ids[group.x]) * params.width;", "ulong read = ulong(group.x) * params.width;"),
        ("ulong read = ulong(group.x) * params.width;", "ulong read = ulong(ids[group.x]) * params.width;"),
        ("t < starts[group.x + 1]", "t <= starts[group.x]"),
        ("ulong(tokens[t]) * params.width", "ulong(t) * params.width"),
        ("float sum = table_gradient[write + i];", "float sum = 0.0f;"),
    ];
    check_planted(Source::Decoder, &decoder);
    check_planted(
        Source::Training,
        &[
            ("first + params.count;", "first + params.count - 1;"),
            ("gradients[at] * params.gradient_scale", "gradients[at]"),
            ("params.decay * block[at]", "block[at]"),
            ("sqrt(v) / params.root_correction2", "sqrt(v)"),
            ("params.one_minus_beta2 * g * g", "params.one_minus_beta2 * g"),
            ("i += params.parts * threads(place)", "i += (params.parts - 1) * threads(place)"),
            ("sum += shared[simdgroup];", "sum += shared[0];"),
            ("shared[simdgroup] > most ?", "shared[simdgroup] < most ?"),
            ("sum *= exp(most - value);", "sum *= exp(value - most);"),
            ("most < largest ? sum * exp(most - largest) : sum", "sum"),
            ("shared + simdgroups, place)", "shared, place)"),
            ("float log_sum = largest + log(sum);", "float log_sum = log(sum);"),
            ("if (i == target) {", "if (index == 0) {"),
            ("params.scale * (exp(value - log_sum)", "(exp(value - log_sum)"),
            ("ulong(group.x) * params.vocabulary", "group.x"),
        ],
    );
}

#[test]
fn planted_errors_of_dequantize_are_seen() {
    check_planted(
        Source::Dequantize,
        &[
            ("int(code ^ 128) - 128", "int(code)"),
            ("codes[j % 16] >> (j < 16 ? 0 : 4)", "codes[j % 16] >> (j < 16 ? 4 : 0)"),
            ("codes[j % 16]", "codes[j / 2]"),
            ("bits[j / 8] >> (j % 8)", "bits[j % 4] >> (j % 8)"),
            ("group < 4 ? packed[group] & 63", "group < 8 ? packed[group] & 63"),
            ("((packed[group - 4] >> 6) << 4)", "0"),
            ("group < 4 ? packed[group + 4] & 63", "group < 4 ? packed[group] & 63"),
            ("((packed[group] >> 6) << 4);", "0;"),
            ("half_at(block + 2) * float(minimum)", "half_at(block) * float(minimum)"),
            ("float(nibble(block + 2, i)) - 8.0f", "float(nibble(block + 2, i)) - 7.0f"),
            ("float(nibble(block + 4, i)) + half_at(block + 2)", "float(nibble(block + 4, i)) + half_at(block)"),
            ("fifth_bit(block + 2, i)", "fifth_bit(block + 4, i)"),
            ("fifth_bit(block + 4, i))", "fifth_bit(block + 4, 0))"),
            ("block[16 + group / 2 * 32 + i % 32]", "block[16 + group * 16 + i % 32]"),
            ("(block[16 + i % 32] >> group) & 1", "(block[16 + i % 32] >> (group / 2)) & 1"),
            ("(group % 2 * 4)) & 15;\n        uint high", "(group / 4 * 4)) & 15;\n        uint high"),
            ("i / 128 * 64 + part % 2 * 32", "i / 128 * 64 + part / 2 * 32"),
            ("block[128 + i / 128 * 32", "block[128"),
            ("block[192 + i / 16]", "block[192 + i / 32]"),
            ("values[nibble(block + 4 + i / 32 * 16, i % 32)]", "values[nibble(block + 4, i % 32)]"),
            ("0.2461123f", "0.2561123f"),
            ("float(nibble(block + 8, i)) + float_at(block + 4)", "float(nibble(block + 8, i)) - float_at(block + 4)"),
            ("float(block[8 + i])", "signed_byte(block[8 + i])"),
            ("if (eighth >= params.eighths)", "if (eighth > params.eighths)"),
            ("group.x * simdgroups * LANES + index", "group.x * LANES + index"),
            ("eighth % (K::LENGTH / 8) * 8", "eighth % 4 * 8"),
            ("ulong at = ulong(eighth) * 8;", "ulong at = ulong(index) * 8;"),
        ],
    );
}

fn check_planted(source: Source, errors: &[(&str, &str)]) {
    let cases = Sensitive::of(source);
    let seen = |from, to| cases.seen(&change(source.text(), from, to)).is_some();
    let missed: Vec<_> = errors.iter().filter(|(from, to)| !seen(from, to)).map(|(_, to)| to).collect();
    assert!(missed.is_empty(), "{source:?}: nothing was seen of {missed:?}");
}

/// Wrong indices, swapped dimensions, wrong constants: each shows as a wrong value, NaN, or an access out of bounds.
#[test]
fn planted_errors_are_seen() {
    let errors = [
        // Wrong indices.
        ("float(matrix[index + e])", "float(matrix[index + e + 1])"),
        ("right_stage[i * width + j] = ", "right_stage[i * DEPTH + j] = "),
        (
            "hidden[ulong(row + i) * rank + j] = shared[i * padded(rank) + j]",
            "hidden[ulong(row + i) * rank + j] = shared[i * rank + j]",
        ),
        ("partial + ulong(group.y) * columns * rank", "partial + ulong(group.y) * columns"),
        ("sum += parts[simdgroup * rank + j];", "sum += parts[simdgroup * rank];"),
        ("stage + 8 * i, COLUMNS, ulong2(0, 0), true", "stage + 8 * i, COLUMNS, ulong2(0, 0), false"),
        // Swapped dimensions.
        (
            "(first + j) * depth + d + i : (d + i) * rank + first + j",
            "(d + i) * rank + first + j : (d + i) * rank + first + j",
        ),
        ("(c + j) * rank + d + i : (d + i) * columns + c + j", "(d + i) * columns + c + j : (d + i) * columns + c + j"),
        ("TRANSPOSED ? c * rank + j : j * columns + c", "TRANSPOSED ? j * columns + c : j * columns + c"),
        (
            "partial_gradient<true, false>(gradient, hidden, partial, params.out_features",
            "partial_gradient<true, false>(gradient, hidden, partial, params.in_features",
        ),
        // Bounds that are off by one.
        ("if (row + i < end && column + j < columns) {", "if (row + i <= end && column + j < columns) {"),
        ("for (uint d = 0; d < rank; d += 8) {", "for (uint d = 8; d < rank; d += 8) {"),
        ("uint chunk = 1; chunk < params.chunks", "uint chunk = 2; chunk < params.chunks"),
        // Dropout.
        ("counter.w ^ key.y", "counter.w ^ key.x"),
        ("if (i > 0 && word == 0) {", "if (i > 4 && word == 0) {"),
        // Added where it must be set, set where it must be added.
        ("expand<false, false, false>(shared, lora_b", "expand<false, true, false>(shared, lora_b"),
        ("gradient[element] += sum;", "gradient[element] = sum;"),
        // Threadgroup memory that overlaps.
        ("return max(DEPTH * (ROWS + block_width(rank, 0)), ROWS * COLUMNS);", "return DEPTH * ROWS;"),
    ];
    check_planted(Source::Lora, &errors);
}

/// A kernel `probe_NAME` for each body, which has x, y of 64 floats, 64 floats of threadgroup memory and two simdgroups.
fn probes(bodies: &[(&str, &str)]) -> String {
    let mut text = "#include <metal_stdlib>\nusing namespace metal;\n".to_string();
    for (name, body) in bodies {
        let places = PLACES.map(|place| format!("uint {place} [[{place}]]")).join(", ");
        let places = places.replacen("uint ", "uint3 ", 1).replace("uint thread_index_in_threadgroup", "uint i");
        let places = places.replace("uint thread_index_in_simdgroup", "uint lane");
        text += &format!(
            "template <typename T> kernel void probe_{name}(device const T* x [[buffer(0)]], device T* y [[buffer(1)]], \
             threadgroup T* shared [[threadgroup(0)]], {places}) {{\n{body}\n}}\n\
             INSTANTIATE(\"{name}\", probe_{name}, float)\n"
        );
    }
    text
}

fn run_probe(host: &Host, name: &str, change: impl Fn(&mut Launch)) -> Result<Vec<f64>, String> {
    let mut launch = Launch {
        source: Source::Lora,
        kernel: name.to_string(),
        bindings: vec![Binding::Read(Slot::X), Binding::Write(Slot::Y)],
        params: Vec::new(),
        grid: [1, 1, 1],
        threads: 64,
        threadgroup_bytes: 256,
    };
    change(&mut launch);
    let x = random(&[64], DType::F32, 1);
    let tensors = Tensors { given: [(Slot::X, bytes(&x))].into(), made: [(Slot::Y, 256)].into() };
    let plan = Plan { launches: vec![launch], ..Plan::default() };
    Ok(values(&host.run(&plan, &tensors, ORDERS)?[&Slot::Y], DType::F32))
}

/// The rules of Metal, each broken once in a kernel of one line.
#[test]
fn every_broken_rule_is_an_error() {
    const BARRIER: &str = "threadgroup_barrier(mem_flags::mem_threadgroup);";
    let through_memory = format!("shared[i] = x[i]; {BARRIER} y[i] = shared[63 - i];");
    let half_a_barrier = format!("if (i < 32) {{ {BARRIER} }} y[i] = x[i];");
    let two_barriers = format!("if (i < 32) {{ {BARRIER} }} else {{\n{BARRIER} }} y[i] = x[i];");
    let divergent_load = format!(
        "shared[i] = 0; {BARRIER} simdgroup_float8x8 m; if (lane == 3) simdgroup_load(m, shared, 8); \
        {BARRIER} y[i] = 0;"
    );
    let product = |condition: &str| {
        format!(
            "shared[i] = x[i]; {BARRIER} simdgroup_float8x8 zero = make_filled_simdgroup_matrix<float, 8>(0.0f), m, p; \
             simdgroup_load(m, shared, 8); simdgroup_multiply_accumulate(p, m, m, zero); \
             {condition} simdgroup_multiply_accumulate(p, m, p, zero); {BARRIER} \
             if (i < 32) simdgroup_store(p, shared, 8); {BARRIER} y[i] = shared[i];"
        )
    };
    let (cube, divergent_cube) = (product(""), product("if (lane < 9)"));
    let bodies = [
        ("right", through_memory.as_str(), ""),
        ("cube", &cube, ""),
        ("divergent_cube", &divergent_cube, "operation"),
        ("sum", "y[i] = simd_sum(x[i]);", ""),
        ("no_barrier", "shared[i] = x[i]; y[i] = shared[63 - i];", "differs between orders"),
        ("no_simdgroup_barrier", "shared[i] = x[i]; y[i] = shared[i ^ 1];", "differs between orders"),
        ("half_a_barrier", &half_a_barrier, "a barrier that not all threads"),
        ("two_barriers", &two_barriers, "a barrier that not all threads"),
        ("flags", "threadgroup_barrier(mem_flags::mem_none); y[i] = x[i];", "does not order threadgroup memory"),
        (
            "divergent_sum",
            "y[i] = 0; if (lane < 16) y[i] = simd_sum(x[i]);",
            "a simdgroup operation that not all lanes reach",
        ),
        ("divergent_load", &divergent_load, "different simdgroup operations"),
        ("beyond", "y[i] = x[i + 1];", "out of bounds: byte 256 of X"),
        ("before", "y[i] = x[i - 1];", "out of bounds"),
        ("far_beyond", "y[i] = x[4000000000u + i];", "out of bounds"),
        ("write_beyond", "y[i + 1] = x[i]; y[0] = 0;", "of Y, which has 256"),
        ("threadgroup_beyond", "shared[i + 1] = x[i]; y[i] = 0;", "of threadgroup memory, which has 256"),
        ("write_to_input", "((device T*)x)[i] = 0; y[i] = 0;", "a write to X"),
        ("vector", "float4 v = float4(0.0f); y[i] = v[i];", "a vector of four"),
    ];
    let text = probes(&bodies.map(|(name, body, _)| (name, body)));
    let nothing = [("unset", "y[i] = shared[i];"), ("unwritten", "if (i > 9) y[i] = x[i];")];
    let host = Host::compile(&(text + &probes(&nothing))).unwrap();
    for (name, _, want) in bodies {
        match run_probe(&host, name, |_| {}) {
            Ok(y) => assert!(want.is_empty() && y.iter().all(|y| y.is_finite()), "{name} passed"),
            Err(error) => assert!(!want.is_empty() && error.contains(want), "{name}: {error}"),
        }
    }
    for (name, _) in nothing {
        assert!(run_probe(&host, name, |_| {}).unwrap().iter().any(|y| y.is_nan()), "{name}");
    }
    let x = random(&[8, 8], DType::F32, 1);
    let want = f64s(&x.matmul(&x).unwrap().matmul(&x).unwrap());
    assert!(relative_error(&run_probe(&host, "cube", |_| {}).unwrap(), &want) < 1e-6);
    let error = |change: fn(&mut Launch)| run_probe(&host, "right", change).unwrap_err();
    assert!(error(|launch| launch.threads = 2048).contains("2048 threads"));
    assert!(error(|launch| launch.threads = 48).contains("whole simdgroups"));
    assert!(error(|launch| launch.threadgroup_bytes = 40_000).contains("40000 bytes of threadgroup memory"));
    assert!(error(|launch| launch.threadgroup_bytes = 128).contains("threadgroup memory, which has 128"));
    assert!(error(|launch| launch.bindings.truncate(1)).contains("does not bind"));
    assert!(error(|launch| launch.kernel = "wrong".to_string()).contains("no such kernel"));
}
