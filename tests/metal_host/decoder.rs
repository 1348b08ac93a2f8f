//! Cases of the decoder's ops, of the loss and of the optimizer, with what the f64 references make of them.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use metal_candle::backend::cpu::adamw::Step;
use metal_candle::backend::custom_ops::adamw::AdamW;
use metal_candle::backend::custom_ops::swiglu::Activation;
use metal_candle::backend::metal::plan::{Slot, adamw, cross_entropy, embedding, rms_norm, rope, swiglu};
use metal_candle::backend::reference;

use crate::common::{f64s, random, tolerance};
use crate::run::{Run, plus_one, want};

fn ones(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::ones(shape, dtype, &Device::Cpu).unwrap()
}

/// Forward with and without a residual, and backward with and without dw, of m rows of n.
pub fn rms_norm(m: usize, n: usize, x_dtype: DType, weight_dtype: DType) -> Vec<Run> {
    let what = |form: &str| format!("rms_norm {form}, [{m}, {n}], {x_dtype:?} with {weight_dtype:?}");
    let eps = 1e-2;
    let call = rms_norm::Call { rows: m, width: n, eps, x: x_dtype, weight: weight_dtype };
    let tensor = |seed| random(&[m, n], x_dtype, seed);
    let (x, residual, g, weight) = (tensor(1), tensor(2), tensor(3), random(&[n], weight_dtype, 4));
    let inputs = [(Slot::X, &x), (Slot::Residual, &residual), (Slot::Weight, &weight)];
    let forward = |of: &Tensor| reference::rms_norm::forward(&f64s(of), &f64s(&weight), eps);
    let (y, rstd) = forward(&x);
    let written = |y, rstd| vec![want(Slot::Y, x_dtype, y), want(Slot::Rstd, DType::F32, rstd)];
    let mut runs = vec![Run::new(what("forward"), call.forward(false).unwrap(), &inputs, written(y, rstd.clone()))];

    let sum = (&x + &residual).unwrap();
    let (y, sum_rstd) = forward(&sum);
    let mut all = written(y, sum_rstd);
    all.push(want(Slot::Sum, x_dtype, f64s(&sum)).within(0.0));
    runs.push(Run::new(what("forward of a sum"), call.forward(true).unwrap(), &inputs, all));

    let (dx, dweight) = reference::rms_norm::backward(&f64s(&x), &f64s(&weight), eps, &f64s(&g));
    let rstd: Vec<f32> = rstd.into_iter().map(|rstd| rstd as f32).collect();
    let rstd = Tensor::from_vec(rstd, m, &Device::Cpu).unwrap();
    let (dx_sink, dweight_sink) = (ones(&[m, n], x_dtype), ones(&[n], DType::F32));
    for wanted in [true, false] {
        let given = [
            (Slot::X, &x),
            (Slot::Weight, &weight),
            (Slot::Rstd, &rstd),
            (Slot::G, &g),
            (Slot::Dx, &dx_sink),
            (Slot::Dweight, &dweight_sink),
        ];
        let mut all = vec![want(Slot::Dx, x_dtype, plus_one(&dx))];
        if wanted {
            // x rstd is rounded to x's dtype.
            all.push(want(Slot::Dweight, DType::F32, plus_one(&dweight)).within(tolerance(x_dtype)));
        }
        let form = format!("backward, dw {wanted}");
        runs.push(Run::new(what(&form), call.backward(wanted).unwrap(), &given[..5 + wanted as usize], all));
    }
    runs
}

/// Forward and backward of `count` elements, of which some saturate the sigmoid.
pub fn swiglu(count: usize, dtype: DType, activation: Activation) -> Vec<Run> {
    let tensor = |seed, scale: f64| (random(&[count], DType::F32, seed) * scale).unwrap().to_dtype(dtype).unwrap();
    let (gate, up, g) = (tensor(1, 120.0), tensor(2, 1.0), tensor(3, 1.0));
    let given = [(Slot::Gate, &gate), (Slot::Up, &up), (Slot::G, &g)];
    let y = reference::swiglu::forward(&f64s(&gate), &f64s(&up), activation);
    let (dgate, dup) = reference::swiglu::backward(&f64s(&gate), &f64s(&up), &f64s(&g), activation);
    let what = |form| format!("{activation:?} {form}, {count}, {dtype:?}");
    vec![
        Run::new(
            what("forward"),
            swiglu::forward(count, dtype, activation).unwrap(),
            &given[..2],
            vec![want(Slot::Y, dtype, y)],
        ),
        Run::new(
            what("backward"),
            swiglu::backward(count, dtype, activation).unwrap(),
            &given,
            vec![want(Slot::Dgate, dtype, dgate), want(Slot::Dup, dtype, dup)],
        ),
    ]
}

/// Both directions, with positions in no order.
pub fn rope(tokens: usize, heads: usize, size: usize, dtype: DType) -> Vec<Run> {
    let known = 2 * tokens + 3;
    let positions: Vec<u32> = (0..tokens).map(|token| (token * 7 % known) as u32).collect();
    let angles = (random(&[known, size / 2], DType::F32, 1) * 3.0).unwrap();
    let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
    let x = random(&[tokens, heads, size], dtype, 2);
    let run = |inverse| {
        let y = reference::rope::rotate(&f64s(&x), &f64s(&cos), &f64s(&sin), &positions, heads, size, inverse);
        Run::new(
            format!("rope, [{tokens}, {heads}, {size}], {dtype:?}, inverse {inverse}"),
            rope::rotate(&positions, heads, size, dtype, inverse).unwrap(),
            &[(Slot::X, &x), (Slot::Cos, &cos), (Slot::Sin, &sin)],
            vec![want(Slot::X, dtype, y)],
        )
    };
    vec![run(false), run(true)]
}

/// Gather, scatter, and backward with repeated ids.
pub fn embedding(tokens: usize, width: usize, dtype: DType) -> Vec<Run> {
    let vocab = 2 * tokens + 1;
    let ids: Vec<u32> = (0..tokens).map(|token| (token * token % tokens) as u32).collect();
    let apart: Vec<u32> = (0..tokens).map(|token| (2 * (tokens - token)) as u32).collect();
    let (table, x) = (random(&[vocab, width], dtype, 1), random(&[tokens, width], dtype, 2));
    let mut scattered = plus_one(&vec![0.0; vocab * width]);
    for (row, &id) in f64s(&x).chunks_exact(width).zip(&apart) {
        scattered[id as usize * width..][..width].copy_from_slice(row);
    }
    let what = |form| format!("embedding {form}, {tokens} of {width}, {dtype:?}");
    let gathered = reference::embedding::forward(&f64s(&table), &ids, width);
    let dtable = reference::embedding::backward(&ids, &f64s(&x), width, vocab);
    vec![
        Run::new(
            what("gather"),
            embedding::gather(&ids, width, dtype).unwrap(),
            &[(Slot::Table, &table)],
            vec![want(Slot::Y, dtype, gathered).within(0.0)],
        ),
        Run::new(
            what("scatter"),
            embedding::scatter(&apart, width, dtype).unwrap(),
            &[(Slot::X, &x), (Slot::Y, &ones(&[vocab, width], dtype))],
            vec![want(Slot::Y, dtype, scattered).within(0.0)],
        ),
        Run::new(
            what("backward"),
            embedding::backward(&ids, width, dtype).unwrap(),
            &[(Slot::G, &x), (Slot::Dtable, &ones(&[vocab, width], DType::F32))],
            vec![want(Slot::Dtable, DType::F32, plus_one(&dtable))],
        ),
    ]
}

/// Step 3 with scaled gradients, and the parts of the gradients' norm.
pub fn adamw(n: usize) -> Vec<Run> {
    let t = 3;
    let adamw = AdamW { learning_rate: 3e-2, beta1: 0.9, beta2: 0.99, epsilon: 1e-3, weight_decay: 0.5 };
    let step = Step {
        grad_scale: 0.5,
        decay: (1.0 - adamw.learning_rate * adamw.weight_decay) as f32,
        beta2: adamw.beta2 as f32,
        one_minus_beta1: (1.0 - adamw.beta1) as f32,
        one_minus_beta2: (1.0 - adamw.beta2) as f32,
        step_size: (adamw.learning_rate / (1.0 - adamw.beta1.powi(t))) as f32,
        root_correction2: (1.0 - adamw.beta2.powi(t)).sqrt() as f32,
        epsilon: adamw.epsilon as f32,
    };
    let (block, grads) = (random(&[3, n], DType::F32, 1).abs().unwrap(), random(&[n], DType::F32, 2));
    let mut values = f64s(&block);
    let (first, rest) = values.split_at_mut(n);
    let (second, third) = rest.split_at_mut(n);
    let scaled: Vec<f64> = f64s(&grads).iter().map(|g| 0.5 * g).collect();
    reference::adamw::step(first, second, third, &scaled, t as usize, &adamw);
    let (parts, threads) = (adamw::parts(n), 256);
    let mut squares = vec![0.0; parts];
    for (i, g) in f64s(&grads).iter().enumerate() {
        squares[i / threads % parts] += g * g;
    }
    vec![
        Run::new(
            format!("adamw step, {n}"),
            adamw::step(n, step).unwrap(),
            &[(Slot::Block, &block), (Slot::Grads, &grads)],
            vec![want(Slot::Block, DType::F32, values)],
        ),
        Run::new(
            format!("adamw squares, {n}"),
            adamw::squares(n).unwrap(),
            &[(Slot::Grads, &grads)],
            vec![want(Slot::Parts, DType::F32, squares).within(1e-6)],
        ),
    ]
}

/// Rows of logits to losses, with and without the gradient. Over one hidden value of 1 the head is the row of logits.
pub fn cross_entropy(rows: usize, vocab: usize) -> Vec<Run> {
    let logits = (random(&[rows, vocab], DType::F32, 1) * 30.0).unwrap();
    let targets: Vec<u32> = (0..rows).map(|row| ((row * 5 + vocab - 1) % vocab) as u32).collect();
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    for (row, &target) in f64s(&logits).chunks_exact(vocab).zip(&targets) {
        losses.push(reference::cross_entropy::forward(&[1.0], row, 1, &[target]).0);
        gradient.extend(reference::cross_entropy::backward(&[1.0], row, 1, &[target], 0.25).1);
    }
    let run = |scale: Option<f32>| {
        let left = if scale.is_some() { gradient.clone() } else { f64s(&logits) };
        Run::new(
            format!("cross_entropy, [{rows}, {vocab}], scale {scale:?}"),
            cross_entropy::rows(&targets, vocab, scale).unwrap(),
            &[(Slot::Logits, &logits)],
            vec![want(Slot::Losses, DType::F32, losses.clone()), want(Slot::Logits, DType::F32, left)],
        )
    };
    vec![run(None), run(Some(0.25))]
}

/// A NaN logit makes the row NaN, and no other; minus infinity is a probability of 0.
pub fn cross_entropy_of_no_numbers() -> Run {
    let vocab = 70;
    let mut logits: Vec<f32> =
        f64s(&random(&[3, vocab], DType::F32, 1)).into_iter().map(|logit| logit as f32).collect();
    logits[5] = f32::NAN;
    logits[vocab..vocab + 40].fill(f32::NEG_INFINITY);
    let targets = [9, 60, 3];
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    for (row, &target) in logits.chunks_exact(vocab).zip(&targets) {
        let row: Vec<f64> = row.iter().map(|&logit| logit as f64).collect();
        losses.push(reference::cross_entropy::forward(&[1.0], &row, 1, &[target]).0);
        gradient.extend(reference::cross_entropy::backward(&[1.0], &row, 1, &[target], 0.5).1);
    }
    assert!(losses[0].is_nan() && losses[1].is_finite());
    Run::new(
        "cross_entropy of NaN and minus infinity".to_string(),
        cross_entropy::rows(&targets, vocab, Some(0.5)).unwrap(),
        &[(Slot::Logits, &Tensor::from_vec(logits, (3, vocab), &Device::Cpu).unwrap())],
        vec![want(Slot::Losses, DType::F32, losses), want(Slot::Logits, DType::F32, gradient)],
    )
}
