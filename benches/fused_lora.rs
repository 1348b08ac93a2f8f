//! Is the fused LoRA delta faster than Candle's own ops, forward and backward?
//!
//! Rows `fused_lora/<m>x<k> r<r>/ours` and `.../candle`, in one run on the CPU: compare them with each other, not with other
//! days. Candle's path is `(x A) B · s` by matmul, as models on Candle write it, with its own backward pass.

use std::hint::black_box;

use candle_core::{DType, Device, Tensor, Var};
use criterion::{Criterion, criterion_group, criterion_main};
use metal_candle::backend::custom_ops::{FusedLoRAOp, Sink, fused_lora};

fn tensor(shape: &[usize], dtype: DType) -> Tensor {
    Tensor::randn(0.0_f32, 1.0, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn candle_delta(x: &Tensor, a: &Tensor, b: &Tensor, s: f64) -> candle_core::Result<Tensor> {
    x.broadcast_matmul(a)?.broadcast_matmul(b)? * s
}

fn forward(criterion: &mut Criterion) {
    for (m, k, r, n, dtype) in [
        (128, 512, 8, 512, DType::F32),
        (128, 512, 8, 512, DType::BF16),
        (512, 576, 8, 576, DType::F32),
        (512, 2048, 16, 2048, DType::F32),
        (1, 2048, 16, 2048, DType::F32),
    ] {
        let (x, a, b) = (tensor(&[1, m, k], dtype), tensor(&[k, r], dtype), tensor(&[r, n], dtype));
        let mut group = criterion.benchmark_group(format!("fused_lora/1x{m}x{k} r{r} {dtype:?}"));
        let op = FusedLoRAOp::new(a.clone(), b.clone(), 2.0).unwrap();
        group.bench_function("ours", |bench| bench.iter(|| black_box(x.apply_op1_no_bwd(&op).unwrap())));
        group.bench_function("candle", |bench| bench.iter(|| black_box(candle_delta(&x, &a, &b, 2.0).unwrap())));
        group.finish();
    }
}

fn backward(criterion: &mut Criterion) {
    for (m, k, r, n) in [(128, 512, 8, 512), (512, 576, 8, 576), (512, 2048, 16, 2048)] {
        let f32s = |shape: &[usize]| tensor(shape, DType::F32);
        let (x, a, b, g) = (f32s(&[1, m, k]), f32s(&[k, r]), f32s(&[r, n]), f32s(&[1, m, n]));
        let mut group = criterion.benchmark_group(format!("fused_lora_backward/1x{m}x{k} r{r}"));
        let [dx, da, db] = [&x, &a, &b].map(|like| like.zeros_like().unwrap());
        let sink = Sink { dx: Some(&dx), da: Some(&da), db: Some(&db) };
        group.bench_function("ours, plain", |bench| {
            bench.iter(|| fused_lora::backward(&x, &a, &b, None, &g, 2.0, None, sink).unwrap());
        });
        let [x, a, b] = [&x, &a, &b].map(|tensor| Var::from_tensor(tensor).unwrap());
        let forward_backward = |y: Tensor| black_box(y.mul(&g).unwrap().sum_all().unwrap().backward().unwrap());
        group.bench_function("ours, tape with forward", |bench| {
            bench.iter(|| forward_backward(fused_lora(&x, &a, &b, 2.0).unwrap()));
        });
        group.bench_function("candle, tape with forward", |bench| {
            bench.iter(|| forward_backward(candle_delta(&x, &a, &b, 2.0).unwrap()));
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).measurement_time(std::time::Duration::from_secs(2)).without_plots();
    targets = forward, backward
}
criterion_main!(benches);
