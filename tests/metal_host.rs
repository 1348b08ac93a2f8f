//! `kernels.metal` as it ships, run on the CPU: every kernel in every dtype agrees with the f64 reference, and errors that
//! only a GPU or Apple's compiler would show are seen here. `tests/metal_host/host.cpp` says how.
#![cfg(unix)]
#![allow(missing_docs)]

mod common;
#[path = "metal_host/harness.rs"]
mod harness;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{LazyLock, Mutex};

use candle_core::{DType, Device, Tensor};
use common::{f64s, random, relative_error, tolerance};
use harness::{Host, KERNELS, Tensors};
use metal_candle::backend::dropout::Dropout;
use metal_candle::backend::metal::plan::{Binding, Call, Launch, Params, Plan, Slot};
use metal_candle::backend::reference::fused_lora::{self, Problem};

/// Orders of threads that every case runs under.
const ORDERS: u32 = 3;

/// dtypes of x and of the adapter that are taken together.
const MIXES: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F32),
    (DType::BF16, DType::F32),
];

static HOST: LazyLock<Host> = LazyLock::new(|| Host::compile(KERNELS).unwrap_or_else(|error| panic!("{error}")));
/// Kernels that some test ran.
static RAN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Inputs of one call and what the reference makes of them.
struct Case {
    call: Call,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
}

impl Case {
    /// m rows, `[k, r, n]`; alpha is 10, which no rank here equals often.
    fn new(m: usize, [k, r, n]: [usize; 3], x: DType, adapter: DType) -> Self {
        let call = Call { batch: 1, seq: m, k, r, n, s: 10.0 / r as f64, dropout: None, x, adapter };
        let (a, b) = (random(&[k, r], adapter, 2), random(&[r, n], adapter, 3));
        Self { call, x: random(&[m, k], x, 1), a, b, g: random(&[m, n], x, 4) }
    }

    fn with_dropout(mut self) -> Self {
        self.call.dropout = Some(Dropout { p: 0.3, seed: 1 << 40 | 7, stream: 3 << 33 | 5 });
        self
    }

    fn problem(&self) -> Problem {
        let Call { k, r, n, s, dropout, .. } = self.call;
        let mask = dropout.map(|dropout| {
            (0..self.x.elem_count() as u64).map(|index| dropout.factor(index) as f64).collect::<Vec<_>>()
        });
        Problem { size: [self.call.rows(), k, r, n], x: f64s(&self.x), a: f64s(&self.a), b: f64s(&self.b), s, mask }
    }

    /// The inputs, and `others` with their values at the start.
    fn tensors(&self, others: &[(Slot, &Tensor)]) -> Tensors {
        let inputs = [(Slot::X, &self.x), (Slot::A, &self.a), (Slot::B, &self.b), (Slot::G, &self.g)];
        let given = inputs.iter().chain(others).map(|(slot, tensor)| (*slot, bytes(tensor))).collect();
        Tensors { given, made: BTreeMap::new() }
    }

    /// Every form, forward and backward, in every dtype that outputs may have.
    fn check(&self, host: &Host, what: &str) -> Result<(), String> {
        let Call { k, r, n, x, .. } = self.call;
        let m = self.call.rows();
        let (problem, g) = (self.problem(), f64s(&self.g));
        let (delta, h) = fused_lora::forward(&problem);
        let (dx, da, db) = fused_lora::backward(&problem, &g);
        let plus_one = |values: &[f64]| values.iter().map(|value| value + 1.0).collect::<Vec<_>>();
        let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
        let outputs = if x == DType::F32 { vec![x] } else { vec![x, DType::F32] };
        let run = |form: &str, plan: &Plan, tensors: &Tensors, written: &[(Slot, DType)]| {
            let names = plan.launches.iter().map(|launch| launch.kernel.clone());
            RAN.lock().unwrap().extend(names);
            let results = host.run(plan, tensors, ORDERS).map_err(|error| format!("{what}, {form}: {error}"))?;
            harness::save_case(&format!("{what}, {form}"), plan, tensors, &results, written);
            Ok::<_, String>(results)
        };
        let close = |form: &str, got: &[u8], dtype, want: &[f64]| {
            let error = relative_error(&values(got, dtype), want);
            let limit = tolerance(dtype);
            if error <= limit { Ok(()) } else { Err(format!("{what}, {form}: error {error:.2e} is over {limit:.1e}")) }
        };

        let mut tensors = self.tensors(&[]);
        tensors.made.insert(Slot::Y, m * n * x.size_in_bytes());
        let written = run("delta", &self.call.delta().unwrap(), &tensors, &[(Slot::Y, x)])?;
        close("delta", &written[&Slot::Y], x, &delta)?;

        let mut kept = None;
        for &y in &outputs {
            let mut tensors = self.tensors(&[(Slot::Y, &ones(&[m, n], y))]);
            tensors.made.insert(Slot::H, m * r * 4);
            let written = run(
                &format!("add_into {y:?}"),
                &self.call.add_into(y).unwrap(),
                &tensors,
                &[(Slot::Y, y), (Slot::H, DType::F32)],
            )?;
            close("y += delta", &written[&Slot::Y], y, &plus_one(&delta))?;
            close("h", &written[&Slot::H], DType::F32, &h)?;
            kept = Some(written[&Slot::H].clone());
        }

        for &dx_dtype in &outputs {
            for &g_dtype in &outputs {
                let g = self.g.to_dtype(g_dtype).unwrap();
                let sinks = [
                    (Slot::G, &g),
                    (Slot::Dx, &ones(&[m, k], dx_dtype)),
                    (Slot::Da, &ones(&[k, r], DType::F32)),
                    (Slot::Db, &ones(&[r, n], DType::F32)),
                ];
                // h from forward, or computed again.
                for h in [kept.as_ref().filter(|_| g_dtype == dx_dtype), None] {
                    let mut tensors = self.tensors(&sinks);
                    tensors.given.extend(h.map(|h| (Slot::H, h.clone())));
                    let plan = self.call.backward(g_dtype, Some(dx_dtype), true, true, h.is_some()).unwrap();
                    let form = format!("backward, g {g_dtype:?}, dx {dx_dtype:?}, h {}", h.is_some());
                    let written = run(
                        &form,
                        &plan,
                        &tensors,
                        &[(Slot::Dx, dx_dtype), (Slot::Da, DType::F32), (Slot::Db, DType::F32)],
                    )?;
                    close(&format!("{form}: dx"), &written[&Slot::Dx], dx_dtype, &plus_one(&dx))?;
                    close(&format!("{form}: dA"), &written[&Slot::Da], DType::F32, &plus_one(&da))?;
                    close(&format!("{form}: dB"), &written[&Slot::Db], DType::F32, &plus_one(&db))?;
                }
            }
        }
        Ok(())
    }
}

#[track_caller]
fn check(case: &Case, what: &str) {
    case.check(&HOST, what).unwrap_or_else(|error| panic!("{error}"));
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F16 => flat.to_vec1::<half::f16>().unwrap().iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::BF16 => flat.to_vec1::<half::bf16>().unwrap().iter().flat_map(|value| value.to_le_bytes()).collect(),
        _ => flat.to_vec1::<f32>().unwrap().iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

fn values(bytes: &[u8], dtype: DType) -> Vec<f64> {
    match dtype {
        DType::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
        DType::BF16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f64).collect(),
    }
}

/// A test's cases: what each is called, and the case.
type Cases = Vec<(String, Case)>;

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

const PLACES: [&str; 5] = [
    "threadgroup_position_in_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
];

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

/// `text` with `from`, which it has exactly once, replaced.
fn change(text: &str, from: &str, to: &str) -> String {
    assert_eq!(text.matches(from).count(), 1, "{from}");
    text.replace(from, to)
}

/// The kernels for f32 alone: a planted error in a template shows there too, and they compile in a fraction of the time.
fn f32_only(text: &str) -> String {
    text.split("ADAPTER(f16, f32").next().unwrap().to_string()
}

/// Cases in which every loop of every kernel runs more than once, in few steps: k and n beyond what the simdgroups of a
/// threadgroup cover at once, ranks of more than one block, several tiles and chunks of rows.
fn sensitive_cases() -> Cases {
    let f32s = |m, size| (format!("m {m}, {size:?}"), Case::new(m, size, DType::F32, DType::F32).with_dropout());
    vec![f32s(2, [70, 9, 150]), f32s(130, [100, 35, 110]), f32s(2049, [75, 6, 70])]
}

/// Why `text` is not right; `None` if nothing was seen.
fn seen(text: &str) -> Option<String> {
    let host = Host::compile(&f32_only(text)).unwrap();
    sensitive_cases().iter().find_map(|(what, case)| case.check(&host, what).err())
}

#[test]
fn unchanged_kernels_pass_the_cases_that_find_errors() {
    assert_eq!(seen(KERNELS), None);
}

/// Each barrier alone, taken out.
#[test]
fn every_missing_barrier_is_seen() {
    let places: Vec<usize> = KERNELS.match_indices("_barrier(mem_flags::mem_threadgroup);").map(|(at, _)| at).collect();
    assert_eq!(places.len(), 15);
    let mut missed = Vec::new();
    for at in places {
        let start = KERNELS[..at].rfind('\n').unwrap();
        let end = at + KERNELS[at..].find('\n').unwrap();
        let text = format!("{}{}", &KERNELS[..start], &KERNELS[end..]);
        let line = KERNELS[..at].matches('\n').count() + 1;
        if seen(&text).is_none() {
            missed.push(line);
        }
    }
    assert!(missed.is_empty(), "nothing was seen of the missing barriers of lines {missed:?}");
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
    for (from, to) in errors {
        assert!(seen(&change(KERNELS, from, to)).is_some(), "nothing was seen of {to}");
    }
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
        kernel: name.to_string(),
        bindings: vec![Binding::Read(Slot::X), Binding::Write(Slot::Y)],
        params: Params::default(),
        grid: [1, 1, 1],
        threads: 64,
        threadgroup_bytes: 256,
    };
    change(&mut launch);
    let x = random(&[64], DType::F32, 1);
    let tensors = Tensors { given: [(Slot::X, bytes(&x))].into(), made: [(Slot::Y, 256)].into() };
    let plan = Plan { launches: vec![launch], scratch: Vec::new() };
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
    let bodies = [
        ("right", through_memory.as_str(), ""),
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
    let error = |change: fn(&mut Launch)| run_probe(&host, "right", change).unwrap_err();
    assert!(error(|launch| launch.threads = 2048).contains("2048 threads"));
    assert!(error(|launch| launch.threads = 48).contains("whole simdgroups"));
    assert!(error(|launch| launch.threadgroup_bytes = 40_000).contains("40000 bytes of threadgroup memory"));
    assert!(error(|launch| launch.threadgroup_bytes = 128).contains("threadgroup memory, which has 128"));
    assert!(error(|launch| launch.bindings.truncate(1)).contains("does not bind"));
    assert!(error(|launch| launch.kernel = "wrong".to_string()).contains("no such kernel"));
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
