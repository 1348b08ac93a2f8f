//! The Metal kernels on an Apple GPU, called without a fallback: an error is the compiler's or the driver's own text.
#![cfg(all(target_vendor = "apple", feature = "custom-metal"))]
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::blocks::blocks;
use common::{FLOATS, assert_close, assert_within, f64s, offset, random, strided, tolerance, transposed};
use metal_candle::backend::custom_ops::adamw::{self, AdamW};
use metal_candle::backend::custom_ops::attention::{AttentionArgs, Sequence};
use metal_candle::backend::custom_ops::cross_entropy::{self, IGNORE};
use metal_candle::backend::custom_ops::{
    FusedLoRAOp, Sink, attention, dequantize, embedding, fused_lora_with_dropout, linear, rms_norm, rope, swiglu,
};
use metal_candle::backend::dropout::Dropout;
use metal_candle::backend::metal::fused_lora as kernels;
use metal_candle::backend::quantized::Kind;
use metal_candle::backend::reference::{
    self as judge,
    fused_lora::{self as reference, Problem},
};
use metal_candle::training::LoRALayer;

const MIXES: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F32),
    (DType::BF16, DType::F32),
];

fn metal() -> Option<Device> {
    let device = Device::new_metal(0).ok();
    if device.is_none() {
        println!("SKIPPED: this machine has no Metal device");
    }
    device
}

struct Case {
    x: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    s: f64,
    dropout: Option<Dropout>,
}

impl Case {
    fn new(leading: &[usize], [k, r, n]: [usize; 3], x: DType, adapter: DType, device: &Device) -> Self {
        let random = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(device).unwrap();
        let (a, b) = (random(&[k, r], adapter, 2), random(&[r, n], adapter, 3));
        let g = random(&[leading, &[n]].concat(), x, 4);
        Self { x: random(&[leading, &[k]].concat(), x, 1), a, b, g, s: 10.0 / r as f64, dropout: None }
    }

    fn check(&self, what: &str) {
        let Self { x, a, b, g, s, dropout } = self;
        let (k, r, n) = (a.dims()[0], a.dims()[1], b.dims()[1]);
        let mask = dropout
            .map(|dropout| (0..x.elem_count() as u64).map(|index| dropout.factor(index) as f64).collect::<Vec<_>>());
        let size = [x.elem_count() / k, k, r, n];
        let problem = Problem { size, x: f64s(x), a: f64s(a), b: f64s(b), s: *s, mask };
        let (delta, h) = reference::forward(&problem);
        let (dx, da, db) = reference::backward(&problem, &f64s(g));
        let plus_one = |values: &[f64]| values.iter().map(|value| value + 1.0).collect::<Vec<_>>();
        let ones = |like: &Tensor, dtype| Tensor::ones(like.shape(), dtype, like.device()).unwrap();

        let y = kernels::delta(x, a, b, *s, *dropout).unwrap();
        assert_eq!((y.dims(), y.dtype()), (g.dims(), x.dtype()), "{what}");
        assert_close(&format!("{what}: delta"), &y, &delta);
        for dtype in [x.dtype(), DType::F32] {
            let y = ones(g, dtype);
            let got = kernels::add_into(&y, x, a, b, *s, *dropout).unwrap();
            assert_close(&format!("{what}: h"), &got, &h);
            assert_close(&format!("{what}: y += delta"), &y, &plus_one(&delta));
            let (dx_sink, da_sink, db_sink) = (ones(x, dtype), ones(a, DType::F32), ones(b, DType::F32));
            let sink = Sink { dx: Some(&dx_sink), da: Some(&da_sink), db: Some(&db_sink) };
            kernels::backward(x, a, b, Some(&got), g, *s, *dropout, &sink).unwrap();
            assert_close(&format!("{what}: dx"), &dx_sink, &plus_one(&dx));
            assert_close(&format!("{what}: dA"), &da_sink, &plus_one(&da));
            assert_close(&format!("{what}: dB"), &db_sink, &plus_one(&db));
        }

        let [x, a, b] = [x, a, b].map(|tensor| Var::from_tensor(tensor).unwrap());
        kernels::ready(&x, &a, &b).unwrap();
        let y = fused_lora_with_dropout(&x, &a, &b, *s, *dropout).unwrap();
        let gradients = y.mul(g).unwrap().sum_all().unwrap().backward().unwrap();
        for (name, variable, want) in [("dx", &x, &dx), ("dA", &a, &da), ("dB", &b, &db)] {
            let got = gradients.get(variable).unwrap();
            let limit = tolerance(x.dtype()).max(tolerance(got.dtype()));
            assert_within(&format!("{what}: tape's {name}"), got, want, limit);
        }
    }
}

#[test]
fn every_tile_in_every_dtype() {
    let Some(device) = metal() else { return };
    for (x, adapter) in MIXES {
        for (leading, size) in [
            (&[1, 1][..], [512, 16, 512]),
            (&[1, 128], [512, 8, 512]),
            (&[5, 3], [123, 5, 77]),
            (&[2, 1025], [123, 9, 77]),
            (&[70], [64, 256, 48]),
        ] {
            Case::new(leading, size, x, adapter, &device)
                .check(&format!("{x:?} with {adapter:?}, {leading:?}, {size:?}"));
        }
    }
}

#[test]
fn dropout_views_and_no_rows() {
    let Some(device) = metal() else { return };
    let case = || Case::new(&[3, 7], [21, 4, 18], DType::F32, DType::F32, &device);
    let dropout = Some(Dropout { p: 0.3, seed: 1 << 40 | 7, stream: 3 << 33 | 5 });
    Case { dropout, ..case() }.check("dropout");
    let Case { x, a, b, g, s, .. } = case();
    let views = Case { x: transposed(&x), a: strided(&a), b: offset(&b), g: strided(&g), s, dropout };
    views.check("every input a view, with dropout");
    Case::new(&[0], [12, 4, 9], DType::F32, DType::F32, &device).check("no rows");
}

#[test]
fn equal_inputs_give_equal_bits() {
    let Some(device) = metal() else { return };
    let Case { x, a, b, g, s, .. } = Case::new(&[1000], [200, 16, 120], DType::F32, DType::F32, &device);
    let run = || {
        let zeros = |like: &Tensor| like.zeros_like().unwrap();
        let (dx, da, db) = (zeros(&x), zeros(&a), zeros(&b));
        let sink = Sink { dx: Some(&dx), da: Some(&da), db: Some(&db) };
        kernels::backward(&x, &a, &b, None, &g, s, None, &sink).unwrap();
        [f64s(&kernels::delta(&x, &a, &b, s, None).unwrap()), f64s(&dx), f64s(&da), f64s(&db)]
    };
    let first = run();
    for _ in 0..5 {
        assert_eq!(first, run());
    }
}

#[test]
fn layers_and_the_op_of_one_argument_take_the_kernels() {
    let Some(device) = metal() else { return };
    let Case { x, a, b, s, .. } = Case::new(&[2, 5], [40, 8, 24], DType::F32, DType::F32, &device);
    let want = f64s(&kernels::delta(&x, &a, &b, s, None).unwrap());
    let op = FusedLoRAOp::new(a.clone(), b.clone(), s as f32).unwrap();
    assert_close("FusedLoRAOp", &x.apply_op1(op).unwrap(), &want);
    assert_close("LoRALayer", &LoRALayer::from_tensors(a, b, s).unwrap().forward(&x).unwrap(), &want);
}

#[test]
fn a_gradient_buffer_with_gaps_is_refused() {
    let Some(device) = metal() else { return };
    let Case { x, a, b, g, s, .. } = Case::new(&[6], [10, 4, 8], DType::F32, DType::F32, &device);
    let da = strided(&a);
    let sink = Sink { da: Some(&da), ..Sink::default() };
    let error = kernels::backward(&x, &a, &b, None, &g, s, None, &sink).unwrap_err().to_string();
    assert!(error.contains("da") && error.contains("contiguous"), "{error}");
}

fn ones(shape: &[usize], dtype: DType, device: &Device) -> Tensor {
    Tensor::ones(shape, dtype, device).unwrap()
}

fn plus_one(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| value + 1.0).collect()
}

#[test]
fn norms() {
    let Some(device) = metal() else { return };
    let random = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(&device).unwrap();
    for (dtype, weight_dtype) in MIXES {
        for (m, n) in [(1, 33), (70, 129), (5, 4096)] {
            let what = format!("rms_norm [{m}, {n}], {dtype:?} with {weight_dtype:?}");
            let (x, g, weight) = (random(&[m, n], dtype, 1), random(&[m, n], dtype, 2), random(&[n], weight_dtype, 3));
            let (want, want_rstd) = judge::rms_norm::forward(&f64s(&x), &f64s(&weight), 1e-5);
            let (dx, dweight) = judge::rms_norm::backward(&f64s(&x), &f64s(&weight), 1e-5, &f64s(&g));
            let (y, rstd) = rms_norm::forward(&offset(&x), &weight, 1e-5).unwrap();
            assert_close(&what, &y, &want);
            assert_close(&format!("{what}: rstd"), &rstd, &want_rstd);
            let (sum, y, _) = rms_norm::forward_add(&x, &g, &weight, 1e-5).unwrap();
            assert_close(&format!("{what}: sum"), &sum, &f64s(&(&x + &g).unwrap()));
            assert_close(&what, &y, &judge::rms_norm::forward(&f64s(&sum), &f64s(&weight), 1e-5).0);
            let (dx_sink, dweight_sink) = (ones(&[m, n], dtype, &device), ones(&[n], DType::F32, &device));
            rms_norm::backward(&x, &weight, &rstd, &offset(&g), &dx_sink, Some(&dweight_sink)).unwrap();
            assert_close(&format!("{what}: dx"), &dx_sink, &plus_one(&dx));
            assert_within(&format!("{what}: dweight"), &dweight_sink, &plus_one(&dweight), tolerance(dtype));
        }
    }
}

#[test]
fn elementwise_ops_and_rows() {
    let Some(device) = metal() else { return };
    let random = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(&device).unwrap();
    for dtype in FLOATS {
        let (gate, up, g) = (random(&[5003], dtype, 1), random(&[5003], dtype, 2), random(&[5003], dtype, 3));
        for activation in [swiglu::Activation::Silu, swiglu::Activation::GeluTanh] {
            let y = swiglu::forward(&offset(&gate), &up, activation).unwrap();
            assert_close("swiglu", &y, &judge::swiglu::forward(&f64s(&gate), &f64s(&up), activation));
            let (dgate, dup) = judge::swiglu::backward(&f64s(&gate), &f64s(&up), &f64s(&g), activation);
            let (got_dgate, got_dup) = swiglu::backward(&gate, &up, &offset(&g), activation).unwrap();
            assert_close("dgate", &got_dgate, &dgate);
            assert_close("dup", &got_dup, &dup);
            let [gate, up, g] = [&gate, &up, &g].map(|tensor| tensor.copy().unwrap());
            swiglu::backward_in_place(&gate, &up, &g, activation).unwrap();
            assert_close("dgate in place", &gate, &dgate);
            assert_close("dup in place", &up, &dup);
            assert_close("y in place", &g, &f64s(&y));
        }

        let angles = random(&[9, 5], DType::F32, 4);
        let (cos, sin, positions) = (angles.cos().unwrap(), angles.sin().unwrap(), [8, 0, 3, 3, 7]);
        for inverse in [false, true] {
            let x = random(&[5, 3, 10], dtype, 5);
            let want = judge::rope::rotate(&f64s(&x), &f64s(&cos), &f64s(&sin), &positions, 3, 10, inverse);
            let x = offset(&x);
            rope::rotate(&x, &cos, &sin, &positions, inverse).unwrap();
            assert_close("rope", &x, &want);
        }

        let (table, rows, ids) = (random(&[11, 70], dtype, 6), random(&[4, 70], dtype, 7), [10, 2, 2, 0]);
        let y = embedding::forward(&offset(&table), &ids).unwrap();
        assert_eq!(f64s(&y), judge::embedding::forward(&f64s(&table), &ids, 70));
        let dtable = ones(&[11, 70], DType::F32, &device);
        embedding::backward(&ids, &offset(&rows), &dtable).unwrap();
        assert_close("dtable", &dtable, &plus_one(&judge::embedding::backward(&ids, &f64s(&rows), 70, 11)));
    }
}

#[test]
fn quantized_weights() {
    let Some(device) = metal() else { return };
    for kind in Kind::ALL {
        let (w, values) = blocks(kind, (39, 512), 1);
        let w = w.to_device(&device).unwrap();
        for dtype in FLOATS {
            assert_close(&format!("{kind:?} as {dtype:?}"), &dequantize(&w, dtype).unwrap(), &values);
        }
        let random = |shape: &[usize], seed| random(shape, DType::F32, seed).to_device(&device).unwrap();
        let (x, g) = (random(&[5, 512], 2), random(&[5, 39], 3));
        let want = judge::linear::forward(&f64s(&x), &values, None, [5, 512, 39]);
        assert_close(&format!("{kind:?}: y"), &linear::forward(&x, &w, None).unwrap(), &want);
        let dx = ones(&[5, 512], DType::F32, &device);
        linear::backward(&x, &w, &g, Some(&dx), None, None).unwrap();
        let (want, _, _) = judge::linear::backward(&f64s(&x), &values, &f64s(&g), [5, 512, 39]);
        assert_close(&format!("{kind:?}: dx"), &dx, &plus_one(&want));
    }
}

#[test]
fn attention_of_every_padded_size() {
    let Some(device) = metal() else { return };
    let random = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(&device).unwrap();
    let sequences = [
        Sequence { q_start: 0, q_len: 70, k_start: 0, k_len: 75 },
        Sequence { q_start: 71, q_len: 1, k_start: 75, k_len: 20 },
    ];
    for dtype in FLOATS {
        for (dim, window) in [(10, None), (64, Some(9)), (80, None), (128, Some(40)), (256, None)] {
            let what = format!("attention, {dtype:?}, heads of {dim}, window {window:?}");
            let (q, g) = (random(&[80, 4, dim], dtype, 1), random(&[80, 4, dim], dtype, 2));
            let (k, v) = (random(&[97, 2, dim], dtype, 3), random(&[97, 2, dim], dtype, 4));
            let scale = 3.0 / (dim as f32).sqrt();
            let args = AttentionArgs { sequences: &sequences, scale, window };
            let (sequences, scale) = (sequences.to_vec(), scale as f64);
            let problem = judge::attention::Problem { q_heads: 4, kv_heads: 2, dim, sequences, scale, window };
            let [q64, k64, v64, g64] = [&q, &k, &v, &g].map(f64s);
            let (want, _) = judge::attention::forward(&q64, &k64, &v64, &problem);
            let gradients = judge::attention::backward(&q64, &k64, &v64, &g64, &problem);
            let (o, lse) = attention::forward(&offset(&q), &offset(&k), &v, args).unwrap();
            assert_close(&what, &o, &want);
            let (dq, dk, dv) = attention::backward(&q, &k, &v, &o, &lse, &offset(&g), args).unwrap();
            // One rounding more, of o, than the table counts.
            let limit = 3.0 * tolerance(dtype);
            assert_within(&format!("{what}: dq"), &dq, &gradients.0, limit);
            assert_within(&format!("{what}: dk"), &dk, &gradients.1, limit);
            assert_within(&format!("{what}: dv"), &dv, &gradients.2, limit);
        }
    }
}

#[test]
fn the_loss_and_the_optimizer() {
    let Some(device) = metal() else { return };
    let random = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(&device).unwrap();
    let targets = [6, IGNORE, 0, 499];
    for dtype in FLOATS {
        let (hidden, head) = (random(&[4, 24], dtype, 1), random(&[500, 24], dtype, 2));
        let [hidden64, head64] = [&hidden, &head].map(f64s);
        let (sum, count) = judge::cross_entropy::forward(&hidden64, &head64, 24, &targets);
        let (dhidden, dhead) = judge::cross_entropy::backward(&hidden64, &head64, 24, &targets, 0.5);
        let sink = ones(&[500, 24], DType::F32, &device);
        let (loss, got) = cross_entropy::forward_backward(&hidden, &head, &targets, 0.5, Some(&sink)).unwrap();
        let loss = loss.read().unwrap();
        assert!((loss.sum - sum).abs() <= 1e-5 * sum && loss.count == count, "{loss:?}, not {sum}");
        assert_close("dhidden", &got, &dhidden);
        assert_close("dhead", &sink, &plus_one(&dhead));
    }
    let adamw = AdamW { learning_rate: 3e-2, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
    let (block, grads) = (random(&[3, 5003], DType::F32, 1).abs().unwrap(), random(&[5003], DType::F32, 2));
    let mut want = f64s(&block);
    let (values, moments) = want.split_at_mut(5003);
    let (first, second) = moments.split_at_mut(5003);
    let scaled: Vec<f64> = f64s(&grads).iter().map(|g| 0.5 * g).collect();
    judge::adamw::step(values, first, second, &scaled, 2, &adamw);
    adamw::step(&block, &offset(&grads), 0.5, 2, &adamw).unwrap();
    assert_close("the block", &block, &want);
    let norm: f64 = f64s(&grads).iter().map(|g| g * g).sum();
    assert!((adamw::squared_norm(&offset(&grads)).unwrap() - norm).abs() <= 1e-6 * norm);
}
