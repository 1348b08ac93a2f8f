//! The fused LoRA delta against the same product of Candle's own ops, on the best device of this machine.
//!
//! `benches/mlx_baseline.py` does the same work in MLX: the same shapes, every output computed and waited for. A call ends when
//! its results are there, so on a GPU the time of one call includes one wait.
#![allow(missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{devices, random};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use metal_candle::backend::custom_ops::fused_lora;
use metal_candle::backend::fallback::device_name;

/// Rows of x, k = n, r. `mlx_baseline.py` has the same.
const SHAPES: [(usize, usize, usize); 5] =
    [(128, 512, 8), (128, 1024, 8), (128, 2048, 8), (128, 2048, 16), (1, 2048, 16)];
/// alpha / r.
const SCALING: f64 = 2.0;

type Delta = fn(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>;
/// The two ways, by name.
const WAYS: [(&str, Delta); 2] = [
    ("fused", |x, a, b| Ok(fused_lora(x, a, b, SCALING)?)),
    ("unfused", |x, a, b| x.flatten_to(1)?.matmul(a)?.matmul(b)?.affine(SCALING, 0.0)?.unsqueeze(0)),
];

/// x `[1, rows, k]`, A, B and the output's gradient, on the device, as variables where they are trained.
struct Inputs {
    x: Var,
    a: Var,
    b: Var,
    g: Tensor,
}

impl Inputs {
    fn new((rows, width, rank): (usize, usize, usize), device: &Device) -> candle_core::Result<Self> {
        let tensor = |shape: &[usize], seed| random(shape, DType::F32, seed).to_device(device);
        Ok(Self {
            x: Var::from_tensor(&tensor(&[1, rows, width], 1)?)?,
            a: Var::from_tensor(&tensor(&[width, rank], 2)?)?,
            b: Var::from_tensor(&tensor(&[rank, width], 3)?)?,
            g: tensor(&[1, rows, width], 4)?,
        })
    }

    fn forward(&self, delta: Delta) -> candle_core::Result<()> {
        let y = delta(&self.x.as_detached_tensor(), &self.a.as_detached_tensor(), &self.b.as_detached_tensor())?;
        y.device().synchronize()
    }

    fn forward_backward(&self, delta: Delta) -> candle_core::Result<()> {
        let y = delta(&self.x, &self.a, &self.b)?;
        let gradients = y.mul(&self.g)?.sum_all()?.backward()?;
        let all = [&self.x, &self.a, &self.b].iter().all(|variable| gradients.get(variable).is_some());
        assert!(all, "a gradient is missing");
        y.device().synchronize()
    }
}

fn lora(criterion: &mut Criterion) {
    // As the program does: else both ways spend their time on memory that goes back to the system and comes again.
    metal_candle::backend::cpu::memory::keep_freed();
    let device = devices().pop().expect("there is always the CPU");
    type Work = fn(&Inputs, Delta) -> candle_core::Result<()>;
    let works: [(&str, Work); 2] =
        [("lora_fused_forward", Inputs::forward), ("lora_fused_forward_backward", Inputs::forward_backward)];
    for (work_name, work) in works {
        let mut group = criterion.benchmark_group(work_name);
        for shape in SHAPES {
            let inputs = Inputs::new(shape, &device).unwrap();
            let (rows, width, rank) = shape;
            for (way_name, way) in WAYS {
                let id = BenchmarkId::new(way_name, format!("{} {rows}x{width} r{rank}", device_name(&device)));
                group.bench_function(id, |bencher| bencher.iter(|| work(&inputs, way).unwrap()));
            }
        }
        group.finish();
    }
}

criterion_group!(benches, lora);
criterion_main!(benches);
