//! What does each op of the decoder cost on the CPU, forward and backward, beside Candle's own ops?
//!
//! Rows `<op>/forward/ours`, `<op>/forward/candle`, `<op>/backward/ours`, at SmolLM2-135M's sizes with 512 tokens in f32. Compare
//! rows of one run with each other. Candle's fused ops have no backward, so there is none to compare with.
//! `benches/pytorch_cpu.py` prints PyTorch's times for the same shapes.

use std::hint::black_box;
use std::time::Duration;

use candle_core::{D, DType, Device, Tensor};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main};
use metal_candle::Result;
use metal_candle::backend::custom_ops::adamw::{self, AdamW};
use metal_candle::backend::custom_ops::attention::{AttentionArgs, Sequence};
use metal_candle::backend::custom_ops::swiglu::Activation;
use metal_candle::backend::custom_ops::{attention, cross_entropy, embedding, linear, rms_norm, rope, swiglu};

const TOKENS: usize = 512;
const HIDDEN: usize = 576;
const WIDE: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const DIM: usize = 64;
const VOCAB: usize = 49_152;

fn tensor(shape: &[usize]) -> Tensor {
    Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).unwrap()
}

fn row<T>(group: &mut BenchmarkGroup<WallTime>, name: &str, run: impl Fn() -> Result<T>) {
    group.bench_function(name, |bench| bench.iter(|| black_box(run().unwrap())));
}

fn rms_norm_rows(criterion: &mut Criterion) {
    let (x, weight, g) = (tensor(&[TOKENS, HIDDEN]), tensor(&[HIDDEN]), tensor(&[TOKENS, HIDDEN]));
    let (_, rstd) = rms_norm::forward(&x, &weight, 1e-5).unwrap();
    let dx = x.zeros_like().unwrap();
    let mut group = criterion.benchmark_group("rms_norm");
    row(&mut group, "forward/ours", || rms_norm::forward(&x, &weight, 1e-5));
    row(&mut group, "forward with residual/ours", || rms_norm::forward_add(&x, &g, &weight, 1e-5));
    row(&mut group, "forward/candle", || {
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
        Ok(x.broadcast_div(&scale)?.broadcast_mul(&weight)?)
    });
    row(&mut group, "backward/ours", || rms_norm::backward(&x, &weight, &rstd, &g, &dx, None));
}

fn rope_rows(criterion: &mut Criterion) {
    let (x, cos, sin) = (tensor(&[TOKENS, HEADS, DIM]), tensor(&[TOKENS, DIM / 2]), tensor(&[TOKENS, DIM / 2]));
    let positions: Vec<u32> = (0..TOKENS as u32).collect();
    let mut group = criterion.benchmark_group("rope");
    row(&mut group, "forward/ours", || rope::rotate(&x, &cos, &sin, &positions, false));
    row(&mut group, "forward/candle", || {
        let (first, second) = (x.narrow(2, 0, DIM / 2)?, x.narrow(2, DIM / 2, DIM / 2)?);
        let (cos, sin) = (cos.unsqueeze(1)?, sin.unsqueeze(1)?);
        let y1 = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
        let y2 = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
        Ok(Tensor::cat(&[y1, y2], 2)?)
    });
    row(&mut group, "backward/ours", || rope::rotate(&x, &cos, &sin, &positions, true));
}

fn swiglu_rows(criterion: &mut Criterion) {
    let [gate, up, g] = [(); 3].map(|()| tensor(&[TOKENS, WIDE]));
    let mut group = criterion.benchmark_group("swiglu");
    row(&mut group, "forward/ours", || swiglu::forward(&gate, &up, Activation::Silu));
    row(&mut group, "forward/candle", || Ok((gate.silu()? * &up)?));
    row(&mut group, "forward, gelu/ours", || swiglu::forward(&gate, &up, Activation::GeluTanh));
    row(&mut group, "forward, gelu/candle", || Ok((gate.gelu()? * &up)?));
    row(&mut group, "backward, gelu/ours", || swiglu::backward(&gate, &up, &g, Activation::GeluTanh));
    row(&mut group, "backward/ours", || swiglu::backward(&gate, &up, &g, Activation::Silu));
}

fn attention_rows(criterion: &mut Criterion) {
    let (q, g) = (tensor(&[TOKENS, HEADS, DIM]), tensor(&[TOKENS, HEADS, DIM]));
    let (k, v) = (tensor(&[TOKENS, KV_HEADS, DIM]), tensor(&[TOKENS, KV_HEADS, DIM]));
    let sequences = [Sequence { q_start: 0, q_len: TOKENS, k_start: 0, k_len: TOKENS }];
    let args = AttentionArgs { sequences: &sequences, scale: 0.125, window: None };
    let (o, lse) = attention::forward(&q, &k, &v, args).unwrap();
    let hidden = |i: usize| if i % TOKENS > i / TOKENS { f32::NEG_INFINITY } else { 0.0 };
    let mask: Vec<f32> = (0..TOKENS * TOKENS).map(hidden).collect();
    let mask = Tensor::from_vec(mask, (TOKENS, TOKENS), &Device::Cpu).unwrap();
    let mut group = criterion.benchmark_group("attention");
    row(&mut group, "forward/ours", || attention::forward(&q, &k, &v, args));
    row(&mut group, "forward/candle", || {
        let heads = |x: &Tensor| -> candle_core::Result<Tensor> {
            let (tokens, heads, dim) = x.dims3()?;
            let x = x.unsqueeze(2)?.expand((tokens, heads, HEADS / heads, dim))?.reshape((tokens, HEADS, dim))?;
            x.transpose(0, 1)?.contiguous()
        };
        let (q, k, v) = (heads(&q)?, heads(&k)?, heads(&v)?);
        let scores = (q.matmul(&k.t()?)? * 0.125)?.broadcast_add(&mask)?;
        let scores = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let p = scores.broadcast_div(&scores.sum_keepdim(D::Minus1)?)?;
        Ok(p.matmul(&v)?.transpose(0, 1)?.contiguous()?)
    });
    row(&mut group, "backward/ours", || attention::backward(&q, &k, &v, &o, &lse, &g, args));
}

fn linear_rows(criterion: &mut Criterion) {
    let (x, w, g) = (tensor(&[TOKENS, HIDDEN]), tensor(&[WIDE, HIDDEN]), tensor(&[TOKENS, WIDE]));
    let (half, dx) = (w.to_dtype(DType::BF16).unwrap(), x.zeros_like().unwrap());
    let mut group = criterion.benchmark_group("linear");
    row(&mut group, "forward/ours", || linear::forward(&x, &w, None));
    row(&mut group, "forward, bf16 weight/ours", || linear::forward(&x, &half, None));
    row(&mut group, "forward/candle", || Ok(x.matmul(&w.t()?)?));
    row(&mut group, "backward/ours", || linear::backward(&x, &w, &g, Some(&dx), None, None));
}

fn cross_entropy_rows(criterion: &mut Criterion) {
    // An eighth of a step's rows, to keep the run short.
    let rows = TOKENS / 8;
    let (hidden, head) = (tensor(&[rows, HIDDEN]), tensor(&[VOCAB, HIDDEN]));
    let targets: Vec<u32> = (0..rows as u32).collect();
    let ids = Tensor::from_slice(&targets, (rows, 1), &Device::Cpu).unwrap();
    let mut group = criterion.benchmark_group("cross_entropy");
    row(&mut group, "forward/ours", || cross_entropy::forward(&hidden, &head, &targets));
    row(&mut group, "forward/candle", || {
        let z = hidden.matmul(&head.t()?)?;
        let z = z.broadcast_sub(&z.max_keepdim(D::Minus1)?)?;
        let lse = z.exp()?.sum_keepdim(D::Minus1)?.log()?;
        Ok((lse - z.gather(&ids, 1)?)?.sum_all()?)
    });
    row(&mut group, "forward and backward/ours", || {
        cross_entropy::forward_backward(&hidden, &head, &targets, 1.0, None)
    });
}

fn small_rows(criterion: &mut Criterion) {
    let (table, g) = (tensor(&[VOCAB, HIDDEN]), tensor(&[TOKENS, HIDDEN]));
    let (ids, dtable): (Vec<u32>, _) =
        ((0..TOKENS as u32).map(|i| i * 97 % VOCAB as u32).collect(), table.zeros_like().unwrap());
    let index = Tensor::from_slice(&ids, TOKENS, &Device::Cpu).unwrap();
    let mut group = criterion.benchmark_group("embedding");
    row(&mut group, "forward/ours", || embedding::forward(&table, &ids));
    row(&mut group, "forward/candle", || Ok(table.index_select(&index, 0)?));
    row(&mut group, "backward/ours", || embedding::backward(&ids, &g, &dtable));
    group.finish();

    let (block, grads) = (tensor(&[3, 1 << 20]).abs().unwrap(), tensor(&[1 << 20]));
    let constants = AdamW { learning_rate: 1e-6, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    let mut group = criterion.benchmark_group("adamw");
    row(&mut group, "step of 2²⁰/ours", || adamw::step(&block, &grads, 1.0, 1, &constants));
    row(&mut group, "squared norm of 2²⁰/ours", || adamw::squared_norm(&grads));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_secs(2)).without_plots();
    targets = rms_norm_rows, rope_rows, swiglu_rows, attention_rows, linear_rows, cross_entropy_rows, small_rows
}
criterion_main!(benches);
