//! The decoder's ops agree with the f64 references: forward and backward, every dtype, odd shapes, views, tape and plain form.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Tensor, Var};
use common::{
    FLOATS, assert_close, assert_within, f64s, offset, relative_error, strided, test_device, tolerance, transposed,
};
use metal_candle::backend::custom_ops::adamw::{self, AdamW};
use metal_candle::backend::custom_ops::attention::{AttentionArgs, Sequence};
use metal_candle::backend::custom_ops::cross_entropy::IGNORE;
use metal_candle::backend::custom_ops::swiglu::Activation;
use metal_candle::backend::custom_ops::{
    attention, cross_entropy, dora, embedding, geglu, linear, linear::linear as linear_on_tape, rms_norm, rope, swiglu,
};
use metal_candle::backend::reference;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Candle makes no tensor without elements on a GPU, so that those cases are for the CPU.
fn no_elements(shape: &[usize]) -> bool {
    !test_device().is_cpu() && shape.contains(&0)
}

/// [`common::random`] on [`common::test_device`].
fn random(shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    common::random(shape, dtype, seed).to_device(&test_device()).unwrap()
}

/// [`cross_entropy::forward_backward`] with the loss read.
fn loss_and_gradient(
    hidden: &Tensor,
    head: &Tensor,
    targets: &[u32],
    scale: f32,
    dhead: Option<&Tensor>,
) -> metal_candle::Result<(cross_entropy::Loss, Tensor)> {
    let (loss, dhidden) = cross_entropy::forward_backward(hidden, head, targets, scale, dhead)?;
    Ok((loss.read()?, dhidden))
}

/// Zeros off the tape, contiguous.
fn zeros(like: &Tensor, dtype: DType) -> Tensor {
    Tensor::zeros(like.shape(), dtype, like.device()).unwrap()
}

fn ones(like: &Tensor, dtype: DType) -> Tensor {
    Tensor::ones(like.shape(), dtype, like.device()).unwrap()
}

fn plus_one(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| value + 1.0).collect()
}

fn var(tensor: &Tensor) -> Var {
    Var::from_tensor(tensor).unwrap()
}

/// The gradients that the tape gives to `variables` for the gradient `g` of `y`.
fn tape_gradients<const N: usize>(y: &Tensor, g: &Tensor, variables: [&Var; N]) -> [Tensor; N] {
    let store = y.mul(g).unwrap().sum_all().unwrap().backward().unwrap();
    variables.map(|variable| store.get(variable).unwrap().clone())
}

#[track_caller]
fn assert_same(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!((got.dims(), got.dtype()), (want.dims(), want.dtype()), "{what}");
    if !got.device().is_cpu() {
        // A GPU takes aligned memory in larger pieces, and sums them in another order.
        return assert_close(what, got, &f64s(want));
    }
    assert_eq!(f64s(got), f64s(want), "{what}: the tape's form and the plain form differ");
}

/// What the plain form of an op says to a tensor that is not contiguous.
#[track_caller]
fn assert_refused<T>(result: metal_candle::Result<T>, op: &str, name: &str) {
    let text = result.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(text.contains(op) && text.contains(name) && text.contains("not contiguous"), "'{text}'");
}

/// The norms of W + s (A B)ᵀ, and y, du and dm; `bias`: of another dtype than x.
fn check_dora(leading: &[usize], sizes: reference::dora::Sizes, dtype: DType, bias: Option<DType>) {
    let reference::dora::Sizes { k, r, n } = sizes;
    let what = format!("dora {leading:?} + [{n}], k {k}, r {r}, {dtype:?}");
    let shape = [leading, &[n]].concat();
    let (w, s) = (random(&[n, k], dtype, 1), 5.0 / 3.0);
    let (a, b) = (random(&[k, r], DType::F32, 2), random(&[r, n], DType::F32, 3));
    let adapted = reference::dora::adapted(&f64s(&w), &f64s(&a), &f64s(&b), s, sizes);
    let want_norms = reference::dora::norms(&adapted, k);
    let squares = dora::squared_norms(&w).unwrap();
    assert_within(
        &format!("{what}: squares"),
        &squares,
        &reference::dora::norms(&f64s(&w), k).iter().map(|v| v * v).collect::<Vec<_>>(),
        1e-5,
    );
    let norm = dora::norms(&w, &squares, &a, &b, s).unwrap();
    // On a GPU the part that W and the adapter share has W's dtype.
    let limit = if w.device().is_cpu() { 1e-5 } else { tolerance(dtype) };
    assert_within(&format!("{what}: norms"), &norm, &want_norms, limit);

    let (u, g, residual) = (random(&shape, dtype, 4), random(&shape, dtype, 5), random(&shape, dtype, 6));
    let m = (random(&[n], DType::F32, 7) + 2.0).unwrap();
    let c = (&m / &norm).unwrap();
    let bias = bias.map(|dtype| random(&[n], dtype, 8));
    let (cs, bs) = (f64s(&c), bias.as_ref().map_or(vec![0.0; n], f64s));
    let plain: Vec<f64> = f64s(&u).iter().enumerate().map(|(at, u)| cs[at % n] * u + bs[at % n]).collect();
    let y = dora::forward(&offset(&u), &offset(&c), bias.as_ref(), None).unwrap();
    assert_close(&format!("{what}: y"), &y, &plain);
    let y = dora::forward(&u, &c, bias.as_ref(), Some(&offset(&residual))).unwrap();
    let with_residual: Vec<f64> = plain.iter().zip(f64s(&residual)).map(|(y, residual)| y + residual).collect();
    assert_close(&format!("{what}: y with a residual"), &y, &with_residual);

    let (want_du, want_dm) = reference::dora::backward(&f64s(&u), &f64s(&m), &f64s(&norm), &f64s(&g));
    let dm = ones(&m, DType::F32);
    let du = dora::backward(&offset(&u), &offset(&g), &c, &norm, Some(&dm)).unwrap();
    assert_close(&format!("{what}: du"), &du, &want_du);
    assert_within(&format!("{what}: dm"), &dm, &plus_one(&want_dm), 1e-5);
    assert_same(&what, &dora::backward(&u, &g, &c, &norm, None).unwrap(), &du);

    let (u, m) = (var(&u), var(&m));
    let y = dora::dora(&u, &m, &norm).unwrap();
    let [of_u, of_m] = tape_gradients(&y, &g, [&u, &m]);
    assert_close(&format!("{what}: the tape's du"), &of_u, &want_du);
    assert_within(&format!("{what}: the tape's dm"), &of_m, &want_dm, 1e-5);
}

#[test]
fn dora_agrees_with_the_reference() {
    let sizes = |k, r, n| reference::dora::Sizes { k, r, n };
    for dtype in FLOATS {
        check_dora(&[7], sizes(24, 3, 16), dtype, None);
        check_dora(&[2, 70], sizes(33, 1, 21), dtype, Some(DType::F32));
        check_dora(&[1], sizes(5, 8, 1), dtype, Some(dtype));
        check_dora(&[130], sizes(64, 16, 200), dtype, Some(dtype));
    }
}

#[test]
fn dora_refuses_what_does_not_fit() {
    let u = random(&[3, 8], DType::F32, 1);
    let short = random(&[7], DType::F32, 2);
    let c = random(&[8], DType::F32, 3);
    for (result, name) in [
        (dora::forward(&u, &short, None, None).map(drop), "c"),
        (dora::forward(&u, &c, Some(&short), None).map(drop), "bias"),
        (dora::forward(&u, &c, None, Some(&c)).map(drop), "residual"),
        (dora::backward(&u, &u, &c, &short, None).map(drop), "norm"),
        (dora::backward(&u, &u, &c, &c, Some(&short)).map(drop), "dm"),
        (dora::norms(&u, &c, &c, &c, 1.0).map(drop), "a"),
    ] {
        let text = result.unwrap_err().to_string();
        assert!(text.contains("dora") && text.contains(name), "{text}");
    }
    assert_refused(dora::forward(&transposed(&u), &c, None, None), "dora", "u");
}

fn check_rms_norm(leading: &[usize], n: usize, dtype: DType, weight_dtype: DType) {
    if no_elements(&[leading, &[n]].concat()) {
        return;
    }
    let (what, eps) = (format!("rms_norm {leading:?} + [{n}], {dtype:?} with {weight_dtype:?}"), 1e-5);
    let shape = [leading, &[n]].concat();
    let (x, residual, g) = (random(&shape, dtype, 1), random(&shape, dtype, 2), random(&shape, dtype, 3));
    let weight = random(&[n], weight_dtype, 4);
    let (want, want_rstd) = reference::rms_norm::forward(&f64s(&x), &f64s(&weight), eps);
    let (dx, dweight) = reference::rms_norm::backward(&f64s(&x), &f64s(&weight), eps, &f64s(&g));

    let (y, rstd) = rms_norm::forward(&offset(&x), &offset(&weight), eps).unwrap();
    assert_close(&format!("{what}: y"), &y, &want);
    assert_close(&format!("{what}: rstd"), &rstd, &want_rstd);
    let (dx_sink, dweight_sink) = (ones(&x, dtype), ones(&weight, DType::F32));
    rms_norm::backward(&x, &weight, &rstd, &offset(&g), &dx_sink, Some(&dweight_sink)).unwrap();
    assert_close(&format!("{what}: dx"), &dx_sink, &plus_one(&dx));
    // x · rstd was rounded to x's dtype on its way to the weight.
    assert_within(&format!("{what}: dweight"), &dweight_sink, &plus_one(&dweight), tolerance(dtype));
    let from_zero = zeros(&x, dtype);
    rms_norm::backward(&x, &weight, &rstd, &g, &from_zero, None).unwrap();

    let (sum, y_of_sum, rstd) = rms_norm::forward_add(&x, &residual, &weight, eps).unwrap();
    assert_same(&format!("{what}: x + residual"), &sum, &(&x + &residual).unwrap());
    let (want_of_sum, _) = reference::rms_norm::forward(&f64s(&sum), &f64s(&weight), eps);
    assert_close(&format!("{what}: of the sum"), &y_of_sum, &want_of_sum);
    assert_same(&what, &rstd, &rms_norm::forward(&sum, &weight, eps).unwrap().1);

    let (x_var, weight_var) = (var(&x), var(&weight));
    let on_tape = rms_norm(&strided(&x_var), &strided(&weight_var), eps).unwrap();
    assert_same(&what, &on_tape, &y);
    let [got_dx, got_dweight] = tape_gradients(&on_tape, &strided(&g), [&x_var, &weight_var]);
    assert_same(&what, &got_dx, &from_zero);
    assert_within(&format!("{what}: tape's dweight"), &got_dweight, &dweight, tolerance(dtype));
}

#[test]
fn rms_norm_agrees() {
    for dtype in FLOATS {
        for weight in [dtype, DType::F32] {
            check_rms_norm(&[5, 3], 123, dtype, weight);
            check_rms_norm(&[70], 64, dtype, weight);
        }
    }
    check_rms_norm(&[], 7, DType::F32, DType::F32);
    check_rms_norm(&[2, 1, 3], 1, DType::F32, DType::F32);
    check_rms_norm(&[0], 8, DType::F32, DType::F32);
    let (x, weight) = (random(&[4, 6], DType::F32, 1), random(&[6], DType::F32, 2));
    assert_refused(rms_norm::forward(&strided(&x), &weight, 1e-5), "rms_norm", "x");
    let error = rms_norm::forward(&x, &random(&[5], DType::F32, 1), 1e-5).unwrap_err().to_string();
    assert!(error.contains("weight") && error.contains("[5]") && error.contains("[6]"), "{error}");
}

fn check_rope(tokens: usize, heads: usize, dim: usize, dtype: DType) {
    if no_elements(&[tokens, heads, dim]) {
        return;
    }
    let what = format!("rope [{tokens}, {heads}, {dim}], {dtype:?}");
    let (x, g) = (random(&[tokens, heads, dim], dtype, 1), random(&[tokens, heads, dim], dtype, 2));
    let angles: Vec<f32> = common::uniform(40 * dim / 2, 3).iter().map(|angle| 3.0 * angle).collect();
    let table = |f: fn(f32) -> f32| {
        let values: Vec<f32> = angles.iter().map(|&angle| f(angle)).collect();
        Tensor::from_vec(values, (40, dim / 2), &test_device()).unwrap()
    };
    let (cos, sin) = (table(f32::cos), table(f32::sin));
    let positions: Vec<u32> = (0..tokens as u32).map(|token| token * 7 % 40).collect();
    let want = |x: &Tensor, inverse| {
        reference::rope::rotate(&f64s(x), &f64s(&cos), &f64s(&sin), &positions, heads, dim, inverse)
    };
    let y = offset(&x);
    rope::rotate(&y, &offset(&cos), &sin, &positions, false).unwrap();
    assert_close(&what, &y, &want(&x, false));
    rope::rotate(&y, &cos, &sin, &positions, true).unwrap();
    // Rounded twice.
    assert_within(&format!("{what}: there and back"), &y, &f64s(&x), 2.0 * tolerance(dtype));

    let x_var = var(&x);
    let on_tape = rope(&strided(&x_var), &strided(&cos), &sin, &positions).unwrap();
    assert_close(&format!("{what}: tape"), &on_tape, &want(&x, false));
    let [dx] = tape_gradients(&on_tape, &transposed(&g), [&x_var]);
    assert_close(&format!("{what}: tape's dx"), &dx, &want(&g, true));
    assert_same("x is left as it was", &x_var, &x);
}

#[test]
fn rope_agrees() {
    for dtype in FLOATS {
        check_rope(5, 3, 10, dtype);
        check_rope(40, 9, 64, dtype);
    }
    check_rope(0, 2, 4, DType::F32);
    let (x, table) = (random(&[2, 1, 4], DType::F32, 1), random(&[3, 2], DType::F32, 2));
    let error = rope::rotate(&x, &table, &table, &[0, 3], false).unwrap_err().to_string();
    assert!(error.contains("position 3 of token 1") && error.contains("3 positions"), "{error}");
    assert_refused(rope::rotate(&strided(&x), &table, &table, &[0, 1], false), "rope", "x");
}

fn check_swiglu(shape: &[usize], dtype: DType, activation: Activation) {
    if no_elements(shape) {
        return;
    }
    let what = format!("swiglu {shape:?}, {dtype:?}, {activation:?}");
    let [gate, up, g] = [1, 2, 3].map(|seed| random(shape, dtype, seed));
    let gate = (gate * 6.0).unwrap();
    let want = reference::swiglu::forward(&f64s(&gate), &f64s(&up), activation);
    let (dgate, dup) = reference::swiglu::backward(&f64s(&gate), &f64s(&up), &f64s(&g), activation);
    let y = swiglu::forward(&offset(&gate), &offset(&up), activation).unwrap();
    assert_close(&format!("{what}: y"), &y, &want);
    let (got_dgate, got_dup) = swiglu::backward(&gate, &offset(&up), &offset(&g), activation).unwrap();
    assert_close(&format!("{what}: dgate"), &got_dgate, &dgate);
    assert_close(&format!("{what}: dup"), &got_dup, &dup);

    let (gate_var, up_var) = (var(&gate), var(&up));
    let on_tape = match activation {
        Activation::Silu => swiglu(&strided(&gate_var), &up_var).unwrap(),
        Activation::GeluTanh => geglu(&strided(&gate_var), &up_var).unwrap(),
    };
    assert_same(&what, &on_tape, &y);
    let [from_gate, from_up] = tape_gradients(&on_tape, &strided(&g), [&gate_var, &up_var]);
    assert_same(&what, &from_gate, &got_dgate);
    assert_same(&what, &from_up, &got_dup);

    let [gate, up, g] = [gate, up, offset(&g)];
    swiglu::backward_in_place(&gate, &up, &g, activation).unwrap();
    for (got, want) in [(&gate, &got_dgate), (&up, &got_dup), (&g, &y)] {
        assert_same(&format!("{what} in place"), got, want);
    }
}

#[test]
fn swiglu_agrees() {
    for dtype in FLOATS {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            check_swiglu(&[5, 123], dtype, activation);
            check_swiglu(&[300, 64], dtype, activation);
        }
    }
    check_swiglu(&[0, 4], DType::F32, Activation::Silu);
    // Where exp overflows and underflows.
    let gate = Tensor::new(&[-300.0_f32, -89.0, 0.0, 89.0, 300.0], &test_device()).unwrap();
    let up = Tensor::ones(5, DType::F32, &test_device()).unwrap();
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let y = swiglu::forward(&gate, &up, activation).unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(y[2..], [0.0, 89.0, 300.0]);
        assert!(y[..2].iter().all(|y| y.abs() < 1e-35));
    }
    assert_refused(swiglu::forward(&gate, &strided(&up), Activation::Silu), "swiglu", "up");
    let whole = random(&[2, 8], DType::F32, 1);
    let (first, second) = (whole.narrow(0, 0, 1).unwrap(), whole.narrow(0, 1, 1).unwrap());
    let g = random(&[1, 8], DType::F32, 2);
    let error = swiglu::backward_in_place(&first, &second, &g, Activation::Silu).unwrap_err().to_string();
    assert!(error.contains("share memory"), "{error}");
}

struct Heads {
    q_heads: usize,
    kv_heads: usize,
    dim: usize,
}

fn check_attention(sequences: &[Sequence], heads: Heads, window: Option<usize>, dtype: DType) {
    let Heads { q_heads, kv_heads, dim } = heads;
    let what = format!("attention {sequences:?}, {q_heads} / {kv_heads} heads of {dim}, window {window:?}, {dtype:?}");
    // One row more than any sequence uses.
    let queries = 1 + sequences.iter().map(|s| s.q_start + s.q_len).max().unwrap_or(0);
    let keys = 1 + sequences.iter().map(|s| s.k_start + s.k_len).max().unwrap_or(0);
    let (q, g) = (random(&[queries, q_heads, dim], dtype, 1), random(&[queries, q_heads, dim], dtype, 2));
    let (k, v) = (random(&[keys, kv_heads, dim], dtype, 3), random(&[keys, kv_heads, dim], dtype, 4));
    let scale = 3.0 / (dim as f32).sqrt();
    let args = AttentionArgs { sequences, scale, window };
    let (sequences, scale) = (sequences.to_vec(), scale as f64);
    let problem = reference::attention::Problem { q_heads, kv_heads, dim, sequences, scale, window };
    let [q64, k64, v64, g64] = [&q, &k, &v, &g].map(f64s);
    let (want, want_lse) = reference::attention::forward(&q64, &k64, &v64, &problem);
    let (dq, dk, dv) = reference::attention::backward(&q64, &k64, &v64, &g64, &problem);

    let (o, lse) = attention::forward(&offset(&q), &offset(&k), &offset(&v), args).unwrap();
    assert_close(&format!("{what}: o"), &o, &want);
    for (row, (got, want)) in f64s(&lse).into_iter().zip(&want_lse).enumerate() {
        assert!(want.is_finite() || got == *want, "{what}: lse of row {row}, in no sequence, is {got}");
    }
    let (lse_seen, want_seen): (Vec<f64>, Vec<f64>) =
        f64s(&lse).into_iter().zip(want_lse).filter(|(_, want)| want.is_finite()).unzip();
    let error = relative_error(&lse_seen, &want_seen);
    assert!(error <= 1e-5, "{what}: lse has a relative error of {error:.3e}");
    let (got_dq, got_dk, got_dv) = attention::backward(&q, &k, &v, &o, &lse, &offset(&g), args).unwrap();
    for (name, got, want) in [("dq", &got_dq, &dq), ("dk", &got_dk, &dk), ("dv", &got_dv, &dv)] {
        assert_eq!(got.dtype(), dtype);
        // A window of 1 makes dq and dk 0 but for rounding, and few keys make them small differences of δ, which comes from
        // the rounded o. So smaller values are judged as if they were this large.
        let floor = if dtype == DType::F32 { 0.05 } else { dv.iter().fold(0.05, |max: f64, dv| max.max(dv.abs())) };
        let with_floor = |values: &[f64]| [values, &[floor]].concat();
        let error = relative_error(&with_floor(&f64s(got)), &with_floor(want));
        // One rounding more than the table counts.
        let limit = 2.0 * tolerance(dtype);
        assert!(error <= limit, "{what}: {name} has a relative error of {error:.3e}, over {limit:.1e}");
    }

    let (q_var, k_var, v_var) = (var(&q), var(&k), var(&v));
    let on_tape = attention(&strided(&q_var), &transposed(&k_var), &v_var, args).unwrap();
    assert_same(&what, &on_tape, &o);
    let [from_q, from_k, from_v] = tape_gradients(&on_tape, &transposed(&g), [&q_var, &k_var, &v_var]);
    assert_same(&what, &from_q, &got_dq);
    assert_same(&what, &from_k, &got_dk);
    assert_same(&what, &from_v, &got_dv);
}

/// A prompt, a prompt of one token, a decoding step, a chunk that continues a cache, with a gap before the last.
fn sequences() -> Vec<Sequence> {
    vec![
        Sequence { q_start: 0, q_len: 37, k_start: 0, k_len: 37 },
        Sequence { q_start: 37, q_len: 1, k_start: 37, k_len: 1 },
        Sequence { q_start: 38, q_len: 1, k_start: 40, k_len: 21 },
        Sequence { q_start: 42, q_len: 9, k_start: 61, k_len: 70 },
    ]
}

#[test]
fn attention_agrees() {
    for dtype in FLOATS {
        for window in [None, Some(1), Some(6), Some(33)] {
            check_attention(&sequences(), Heads { q_heads: 6, kv_heads: 2, dim: 10 }, window, dtype);
        }
        // Longer than any block of a kernel.
        let long = [Sequence { q_start: 0, q_len: 150, k_start: 0, k_len: 213 }];
        check_attention(&long, Heads { q_heads: 2, kv_heads: 1, dim: 64 }, None, dtype);
        check_attention(&long, Heads { q_heads: 2, kv_heads: 2, dim: 16 }, Some(70), dtype);
    }
    // Every head size that a kernel pads to, and several sequences longer than a block of its rows.
    let several = [
        Sequence { q_start: 0, q_len: 150, k_start: 0, k_len: 213 },
        Sequence { q_start: 150, q_len: 1, k_start: 213, k_len: 1 },
        Sequence { q_start: 151, q_len: 70, k_start: 214, k_len: 70 },
    ];
    for (dim, window) in [(40, None), (64, Some(70)), (80, None), (104, Some(33)), (128, None)] {
        for dtype in [DType::BF16, DType::F16] {
            check_attention(&several, Heads { q_heads: 4, kv_heads: 2, dim }, window, dtype);
        }
    }
    for dim in [1, 7, 80, 128] {
        check_attention(&sequences()[..3], Heads { q_heads: 3, kv_heads: 3, dim }, None, DType::F32);
    }
    check_attention(&[], Heads { q_heads: 2, kv_heads: 1, dim: 4 }, None, DType::F32);
    let q = random(&[3, 2, 4], DType::F32, 1);
    let one = [Sequence { q_start: 0, q_len: 3, k_start: 0, k_len: 3 }];
    let args = AttentionArgs { sequences: &one, scale: 1.0, window: None };
    assert_refused(attention::forward(&q, &transposed(&q), &q, args), "attention", "k");
}

/// Keys that two sequences read get both gradients.
#[test]
fn attention_adds_up_over_shared_keys() {
    let shared = [
        Sequence { q_start: 0, q_len: 5, k_start: 0, k_len: 9 },
        Sequence { q_start: 5, q_len: 3, k_start: 2, k_len: 7 },
    ];
    check_attention(&shared, Heads { q_heads: 4, kv_heads: 2, dim: 8 }, None, DType::F32);
}

/// Scores far beyond the range of exp: the softmax is taken relative to each row's largest score.
#[test]
fn attention_does_not_overflow() {
    let [q, k, v] = [1, 2, 3].map(|seed| (random(&[9, 1, 4], DType::F32, seed) * 40.0).unwrap());
    let one = [Sequence { q_start: 0, q_len: 9, k_start: 0, k_len: 9 }];
    let args = AttentionArgs { sequences: &one, scale: 1.0, window: None };
    let problem = reference::attention::Problem {
        q_heads: 1,
        kv_heads: 1,
        dim: 4,
        sequences: one.to_vec(),
        scale: 1.0 / 16.0,
        window: None,
    };
    // The reference does not guard its exp: a tenth of the scores, reached by a smaller scale and a larger q.
    let (want, _) = reference::attention::forward(&f64s(&q), &f64s(&k), &f64s(&v), &problem);
    let small = attention::forward(&(&q / 16.0).unwrap(), &k, &v, args).unwrap().0;
    assert_within("scores to a few hundred", &small, &want, 1e-4);
    // The first key has by far the largest score, and several tiles of keys follow it.
    let q = Tensor::full(1.0_f32, (300, 1, 4), &test_device()).unwrap();
    let small = (random(&[299, 1, 4], DType::F32, 4) * 0.1).unwrap();
    let k = Tensor::cat(&[&Tensor::full(1e3_f32, (1, 1, 4), &test_device()).unwrap(), &small], 0).unwrap();
    let one = [Sequence { q_start: 0, q_len: 300, k_start: 0, k_len: 300 }];
    let args = AttentionArgs { sequences: &one, scale: 1.0, window: None };
    let (o, lse) = attention::forward(&q, &k, &k, args).unwrap();
    assert_eq!(f64s(&o), [1e3; 1200]);
    assert_eq!(f64s(&lse), [4e3; 300]);
}

fn check_cross_entropy(rows: usize, n: usize, vocab: usize, hidden_dtype: DType, head_dtype: DType) {
    let what = format!("cross_entropy [{rows}, {n}] with [{vocab}, {n}], {hidden_dtype:?} with {head_dtype:?}");
    let (hidden, head) = (random(&[rows, n], hidden_dtype, 1), random(&[vocab, n], head_dtype, 2));
    let targets: Vec<u32> =
        (0..rows as u32).map(|row| if row % 3 == 1 { IGNORE } else { row * 31 % vocab as u32 }).collect();
    let scale = 0.25;
    let (sum, count) = reference::cross_entropy::forward(&f64s(&hidden), &f64s(&head), n, &targets);
    let (dhidden, dhead) = reference::cross_entropy::backward(&f64s(&hidden), &f64s(&head), n, &targets, scale as f64);

    let loss = cross_entropy::forward(&offset(&hidden), &offset(&head), &targets).unwrap();
    assert_eq!(loss.count, count, "{what}");
    assert!((loss.sum - sum).abs() <= 1e-6 * sum.abs(), "{what}: {} is not {sum}", loss.sum);
    let dhead_sink = ones(&head, DType::F32);
    let (again, got) = loss_and_gradient(&hidden, &head, &targets, scale, Some(&dhead_sink)).unwrap();
    assert_eq!(again, loss, "{what}");
    assert_eq!(got.dtype(), hidden_dtype);
    assert_close(&format!("{what}: dhidden"), &got, &dhidden);
    // On a GPU P is rounded to hidden's dtype before its products.
    let limit = tolerance(if test_device().is_cpu() { DType::F32 } else { hidden_dtype });
    assert_within(&format!("{what}: dhead"), &dhead_sink, &plus_one(&dhead), limit);
    for row in (0..rows).filter(|&row| targets[row] == IGNORE) {
        assert!(f64s(&got)[row * n..][..n].iter().all(|&value| value == 0.0), "{what}: row {row} is ignored");
    }

    let hidden_var = var(&hidden);
    let on_tape = cross_entropy(&strided(&hidden_var), &transposed(&head), &targets).unwrap();
    let mean = on_tape.to_scalar::<f32>().unwrap() as f64;
    assert!((mean - loss.mean()).abs() <= 1e-6 * mean.abs(), "{what}: the tape's mean is {mean}");
    let untracked = cross_entropy(&hidden, &head, &targets).unwrap();
    assert_eq!(untracked.to_scalar::<f32>().unwrap() as f64, mean, "{what}");
    let store = on_tape.affine(2.0, 0.0).unwrap().backward().unwrap();
    let factor = 2.0 / (count.max(1) as f64 * scale as f64);
    let want: Vec<f64> = dhidden.iter().map(|value| value * factor).collect();
    // The factor 2 is applied after the rounding to hidden's dtype.
    assert_within(&format!("{what}: tape"), store.get(&hidden_var).unwrap(), &want, 2.0 * tolerance(hidden_dtype));
}

#[test]
fn cross_entropy_agrees() {
    for hidden in FLOATS {
        for head in [hidden, DType::F32, DType::BF16] {
            check_cross_entropy(11, 33, 101, hidden, head);
        }
    }
    check_cross_entropy(1, 1, 1, DType::F32, DType::F32);
    check_cross_entropy(2, 5, 1000, DType::F32, DType::F32);
    // Several chunks of rows and tiles of the vocabulary.
    check_cross_entropy(300, 4, 4099, DType::F32, DType::F32);
    // Enough tiles for the products of compute capability 9.0, the last ones not full, in two chunks of rows on a GPU.
    check_cross_entropy(300, 40, 8200, DType::BF16, DType::BF16);
    let (hidden, head) = (random(&[3, 4], DType::F32, 1), random(&[5, 4], DType::F32, 2));
    let none = loss_and_gradient(&hidden, &head, &[IGNORE; 3], 1.0, None).unwrap();
    assert_eq!((none.0.sum, none.0.count, none.0.mean()), (0.0, 0, 0.0));
    assert_eq!(f64s(&none.1), [0.0; 12]);
    let error = cross_entropy::forward(&hidden, &head, &[0, 5, 9]).unwrap_err().to_string();
    assert!(error.contains("target 5 of row 1") && error.contains("2 such rows"), "{error}");
    assert_refused(cross_entropy::forward(&strided(&hidden), &head, &[0; 3]), "cross_entropy", "hidden");
}

/// A row whose logits are huge still has a finite loss and gradient.
#[test]
fn cross_entropy_does_not_overflow() {
    let hidden = (random(&[4, 8], DType::F32, 1) * 1e4).unwrap();
    let head = random(&[9, 8], DType::F32, 2);
    let (loss, dhidden) = loss_and_gradient(&hidden, &head, &[0, 1, 2, 3], 1.0, None).unwrap();
    assert!(loss.sum.is_finite() && loss.sum > 100.0, "{loss:?}");
    assert!(f64s(&dhidden).iter().all(|value| value.is_finite()));
}

#[test]
fn embedding_agrees() {
    for dtype in FLOATS {
        let (table, ids) = (random(&[7, 13], dtype, 1), [6, 0, 3, 3, 1, 3]);
        let g = random(&[6, 13], dtype, 2);
        let y = embedding::forward(&offset(&table), &ids).unwrap();
        assert_eq!(y.dtype(), dtype);
        assert_eq!(f64s(&y), reference::embedding::forward(&f64s(&table), &ids, 13), "{dtype:?}");
        let dtable = ones(&table, DType::F32);
        embedding::backward(&ids, &offset(&g), &dtable).unwrap();
        let want = plus_one(&reference::embedding::backward(&ids, &f64s(&g), 13, 7));
        assert_close(&format!("dtable {dtype:?}"), &dtable, &want);
    }
    let table = random(&[7, 13], DType::F32, 1);
    assert_eq!(embedding::forward(&table, &[]).unwrap().dims(), [0, 13]);
    let error = embedding::forward(&table, &[1, 7]).unwrap_err().to_string();
    assert!(error.contains("id 7 of token 1") && error.contains('7'), "{error}");
    assert_refused(embedding::forward(&strided(&table), &[1]), "embedding", "table");
}

/// `views` are applied to x, W and g.
fn check_linear(leading: &[usize], k: usize, n: usize, [x, w]: [DType; 2], view: impl Fn(&Tensor) -> Tensor) {
    if no_elements(&[leading, &[k, n]].concat()) {
        return;
    }
    let what = format!("linear {leading:?} + [{k}] to {n}, {x:?} with {w:?}");
    let (x, w, bias) = (random(&[leading, &[k]].concat(), x, 1), random(&[n, k], w, 2), random(&[n], w, 3));
    let g = random(&[leading, &[n]].concat(), x.dtype(), 4);
    let size = [leading.iter().product(), k, n];
    let (dx, dw, dbias) = reference::linear::backward(&f64s(&x), &f64s(&w), &f64s(&g), size);
    for bias in [Some(&bias), None] {
        let want = reference::linear::forward(&f64s(&x), &f64s(&w), bias.map(f64s).as_deref(), size);
        let y = linear::forward(&view(&x), &view(&w), bias).unwrap();
        assert_eq!((y.dims(), y.dtype()), (g.dims(), x.dtype()));
        assert_close(&format!("{what}: y"), &y, &want);
        let (x_var, w_var) = (var(&x), var(&w));
        let on_tape = linear_on_tape(&view(&x_var), &w_var, bias).unwrap();
        assert_same(&what, &on_tape, &y);
        let store = on_tape.mul(&view(&g)).unwrap().sum_all().unwrap().backward().unwrap();
        assert_close(&format!("{what}: tape's dx"), store.get(&x_var).unwrap(), &dx);
        assert!(store.get(&w_var).is_none(), "W is frozen");
    }
    for dtype in [x.dtype(), DType::F32] {
        let sink = ones(&x, dtype);
        linear::backward(&view(&x), &view(&w), &view(&g), Some(&sink), None, None).unwrap();
        assert_close(&format!("{what}: dx in {dtype:?}"), &sink, &plus_one(&dx));
    }
    let (dw_sink, dbias_sink) = (ones(&w, DType::F32), ones(&bias, DType::F32));
    linear::backward(&view(&x), &view(&w), &view(&g), None, Some(&dw_sink), Some(&dbias_sink)).unwrap();
    assert_close(&format!("{what}: dW"), &dw_sink, &plus_one(&dw));
    assert_close(&format!("{what}: dbias"), &dbias_sink, &plus_one(&dbias));
}

#[test]
fn linear_agrees() {
    for x in FLOATS {
        for w in FLOATS {
            check_linear(&[5, 3], 123, 77, [x, w], offset);
            check_linear(&[2, 9], 24, 40, [x, w], transposed);
        }
        // The path of few rows, and a weight of more than one tile when it is not f32.
        check_linear(&[1], 700, 1100, [DType::F32, x], strided);
        check_linear(&[5], 300, 900, [DType::F32, x], strided);
    }
    check_linear(&[0], 12, 9, [DType::F32; 2], offset);
    check_linear(&[], 12, 9, [DType::F32; 2], offset);
    check_linear(&[1, 2, 2], 3, 1, [DType::BF16, DType::F32], strided);
}

#[test]
fn adamw_agrees_over_steps() {
    let n = 20_001;
    let adamw = AdamW { learning_rate: 3e-2, beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 };
    let start = random(&[n], DType::F32, 1);
    let block = Tensor::cat(&[&start, &zeros(&start, DType::F32), &zeros(&start, DType::F32)], 0).unwrap();
    let block = offset(&block.reshape((3, n)).unwrap());
    let (mut values, mut first, mut second) = (f64s(&start), vec![0.0; n], vec![0.0; n]);
    for t in 1..=5 {
        let grads = random(&[n], DType::F32, 1 + t as u64);
        let scaled: Vec<f64> = f64s(&grads).iter().map(|g| 0.5 * g).collect();
        reference::adamw::step(&mut values, &mut first, &mut second, &scaled, t, &adamw);
        adamw::step(&block, &offset(&grads), 0.5, t, &adamw).unwrap();
        for (index, want) in [&values, &first, &second].into_iter().enumerate() {
            assert_close(&format!("step {t}, part {index}"), &block.get(index).unwrap(), want);
        }
        let norm: f64 = f64s(&grads).iter().map(|g| g * g).sum();
        let got = adamw::squared_norm(&offset(&grads)).unwrap();
        // Metal has no f64.
        let limit = if test_device().is_metal() { 1e-6 } else { 1e-12 };
        assert!((got - norm).abs() <= limit * norm, "{got} is not {norm}");
    }
    let bad = Tensor::new(&[1.0_f32, f32::NAN, 2.0], &test_device()).unwrap();
    assert!(adamw::squared_norm(&bad).unwrap().is_nan());
    assert_eq!(adamw::squared_norm(&bad.narrow(0, 0, 0).unwrap()).unwrap(), 0.0);
    assert!(
        adamw::step(&block, &random(&[n], DType::F32, 1), 1.0, 0, &adamw).unwrap_err().to_string().contains("step 0")
    );
    assert_refused(adamw::squared_norm(&strided(&start)), "adamw", "grads");
}

/// The same bits on one thread and on several.
#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let run = || {
        let dtype = DType::F32;
        let (q, k) = (random(&[170, 4, 32], dtype, 1), random(&[170, 2, 32], dtype, 2));
        let one = [Sequence { q_start: 0, q_len: 170, k_start: 0, k_len: 170 }];
        let args = AttentionArgs { sequences: &one, scale: 0.2, window: None };
        let (o, lse) = attention::forward(&q, &k, &k, args).unwrap();
        let (dq, dk, dv) = attention::backward(&q, &k, &k, &o, &lse, &q, args).unwrap();
        let (x, w, targets) = (random(&[170, 128], dtype, 3), random(&[600, 128], dtype, 4), [7; 170]);
        let (loss, dx) = loss_and_gradient(&x, &w, &targets, 1.0, None).unwrap();
        let (y, rstd) = rms_norm::forward(&x, &random(&[128], dtype, 5), 1e-5).unwrap();
        let (dx_norm, dweight) = (zeros(&x, dtype), zeros(&random(&[128], dtype, 5), dtype));
        rms_norm::backward(&x, &random(&[128], dtype, 5), &rstd, &y, &dx_norm, Some(&dweight)).unwrap();
        let all = [o, lse, dq, dk, dv, dx, y, dx_norm, dweight, linear::forward(&x, &w, None).unwrap()];
        (loss.sum.to_bits(), all.map(|tensor| f64s(&tensor)))
    };
    let on = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(run);
    let one = on(1);
    assert!(one == on(2) && one == on(5), "the bits depend on the number of threads");
}

fn dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(&FLOATS[..])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    #[test]
    fn any_attention(
        lengths in prop::collection::vec((0_usize..40, 0_usize..30), 0..4),
        (kv_heads, group, dim) in (1_usize..3, 1_usize..4, 1_usize..40),
        window in prop::option::of(1_usize..50),
        dtype in dtype(),
    ) {
        let (mut q_start, mut k_start) = (0, 0);
        let sequences: Vec<Sequence> = lengths.iter().map(|&(q_len, before)| {
            let sequence = Sequence { q_start, q_len, k_start, k_len: q_len + before };
            (q_start, k_start) = (q_start + q_len, k_start + q_len + before);
            sequence
        }).collect();
        check_attention(&sequences, Heads { q_heads: kv_heads * group, kv_heads, dim }, window, dtype);
    }

    #[test]
    fn any_other_op(rows in 0_usize..50, n in 1_usize..150, vocab in 1_usize..300, a in dtype(), b in dtype()) {
        check_rms_norm(&[rows], n, a, a);
        check_rope(rows, 1 + n % 5, 2 * n, a);
        check_swiglu(&[rows, n], a, Activation::Silu);
        check_swiglu(&[rows, n], b, Activation::GeluTanh);
        check_cross_entropy(rows, n, vocab, a, b);
        check_linear(&[rows], n, 1 + vocab / 4, [a, b], Tensor::clone);
    }
}
