//! What do the LoRA ops cost on this NVIDIA GPU, beside Candle's own ops and beside the base's products alone?
//!
//! Prints lines of `work <tab> way <tab> warm µs <tab> cold µs`, the median of several rounds of calls in a loop with one
//! synchronisation at the end; `scripts/cuda-report` makes the table of BENCHMARKS.md from them. Cold: the calls go round
//! buffers that together are larger than the L2 cache. `benches/pytorch_cuda.py` has the same rows, but for quantized weights.
//! `cargo bench --features cuda --bench cuda -- few` measures those alone.
#![allow(missing_docs)]

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("SKIPPED: this build lacks the feature `cuda`");
}

#[cfg(feature = "cuda")]
fn main() -> metal_candle::Result<()> {
    cuda::main()
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::hint::black_box;
    use std::process::Command;
    use std::time::Instant;

    use candle_core::{DType, Device, Tensor};
    use metal_candle::Result;
    use metal_candle::backend::cuda::{self, fused_lora::Size};
    use metal_candle::backend::custom_ops as ops;
    use metal_candle::backend::custom_ops::Weight;
    use metal_candle::backend::custom_ops::lora_linear::{Adapter, Part};
    use metal_candle::backend::quantized::{Kind, QuantizedTensor};

    const S: f64 = 1.75;
    /// More than any L2 cache so far.
    const ROUND_BYTES: usize = 256 << 20;

    type Way<'a> = (&'a str, Box<dyn Fn(&Inputs) -> Result<()> + 'a>);

    struct Inputs {
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        g: Tensor,
        da: Tensor,
        db: Tensor,
        size: Size,
        /// W again.
        blocks: Option<QuantizedTensor>,
    }

    impl Inputs {
        fn new([m, k, r, n]: [usize; 4], dtype: DType, device: &Device) -> Result<Self> {
            let random = |shape: &[usize], scale| Tensor::randn(0.0_f32, scale, shape, device)?.to_dtype(dtype);
            let (x, g) = (random(&[m, k], 1.0)?, random(&[m, n], 1.0)?);
            let (a, b, w) = (random(&[k, r], 0.02)?, random(&[r, n], 0.02)?, random(&[n, k], 0.02)?);
            let sink = |like: &Tensor| Tensor::zeros(like.shape(), DType::F32, device);
            let (da, db) = (sink(&a)?, sink(&b)?);
            Ok(Self { x, w, a, b, g, da, db, size: Size::new([m, k, r, n])?, blocks: None })
        }
    }

    pub fn main() -> Result<()> {
        cuda::check(0)?;
        let device = Device::new_cuda(0)?;
        println!("# GPU: {}", command("nvidia-smi", &["--query-gpu=name,driver_version", "--format=csv,noheader"]));
        let commit = std::env::var("COMMIT").unwrap_or_else(|_| command("git", &["rev-parse", "--short", "HEAD"]));
        println!("# commit: {commit}");
        copy_speed(&device)?;
        if std::env::args().any(|argument| argument == "few") {
            return few_rows(&device);
        }
        for (n, shape) in [(4096, "(8192, 4096, 4096)"), (14336, "(8192, 4096, 14336)")] {
            let sets = sets([8192, 4096, 16, n], DType::BF16, &device)?;
            run(&format!("delta {shape} r 16 bf16"), &sets, &delta_ways())?;
            run(&format!("linear forward {shape} r 16 bf16"), &sets, &linear_ways())?;
            if n == 4096 {
                run(&format!("delta forward+backward {shape} r 16 bf16"), &sets, &delta_backward_ways())?;
                run(&format!("linear forward+backward {shape} r 16 bf16"), &sets, &linear_backward_ways())?;
            }
        }
        for (name, dtype) in [("f16", DType::F16), ("f32", DType::F32)] {
            let sets = sets([8192, 4096, 16, 4096], dtype, &device)?;
            run(&format!("delta (8192, 4096, 4096) r 16 {name}"), &sets, &delta_ways())?;
            run(&format!("delta forward+backward (8192, 4096, 4096) r 16 {name}"), &sets, &delta_backward_ways())?;
        }
        small("delta (128, 512, 512) r 8 f32", [128, 512, 8, 512], DType::F32, &device)?;
        small("delta (128, 2048, 2048) r 8 bf16", [128, 2048, 8, 2048], DType::BF16, &device)?;
        small("delta (1, 4096, 4096) r 16 bf16", [1, 4096, 16, 4096], DType::BF16, &device)?;
        for rank in [8, 32, 64, 128] {
            let sets = sets([8192, 4096, rank, 4096], DType::BF16, &device)?;
            run(&format!("delta (8192, 4096, 4096) r {rank} bf16"), &sets, &delta_ways())?;
            run(&format!("delta forward+backward (8192, 4096, 4096) r {rank} bf16"), &sets, &delta_backward_ways())?;
            run(&format!("linear forward (8192, 4096, 4096) r {rank} bf16"), &sets, &linear_ways()[..2])?;
            run(
                &format!("linear forward+backward (8192, 4096, 4096) r {rank} bf16"),
                &sets,
                &linear_backward_ways()[..2],
            )?;
        }
        let sets = sets([8192, 2048, 16, 2048], DType::BF16, &device)?;
        run("q, k, v forward (8192, 2048, 3 x 2048) r 16 bf16", &sets, &shared_ways())?;
        run("q, k, v forward+backward (8192, 2048, 3 x 2048) r 16 bf16", &sets, &shared_backward_ways())?;
        few_rows(&device)
    }

    /// Products of decoding with a quantized weight.
    fn few_rows(device: &Device) -> Result<()> {
        let ours =
            |i: &Inputs| done(ops::linear::forward(&i.x, i.blocks.as_ref().map_or((&i.w).into(), Weight::from), None)?);
        let dense_first = |i: &Inputs| match &i.blocks {
            Some(blocks) => done(ops::linear::forward(&i.x, &ops::dequantize(blocks, DType::BF16)?, None)?),
            None => Ok(()),
        };
        let base = |i: &Inputs| done(ops::linear::forward(&i.x, &i.w, None)?);
        for kind in [Kind::Q4K, Kind::Nf4, Kind::Q8_0, Kind::Q4_1] {
            for m in [1, 4] {
                let size = [m, 4096, 16, 14336];
                let values = Tensor::randn(0.0_f32, 0.02, (14336, 4096), &Device::Cpu)?;
                let blocks = QuantizedTensor::quantize(&values, kind)?;
                let mut sets = sets(size, DType::BF16, device)?;
                for set in &mut sets {
                    set.blocks = Some(blocks.copy_to(device)?);
                }
                let ways: [Way; 3] =
                    [("ours", Box::new(ours)), ("dense first", Box::new(dense_first)), ("bf16 weight", Box::new(base))];
                run(&format!("linear ({m}, 4096, 14336) {kind:?}"), &sets, &ways)?;
            }
        }
        Ok(())
    }

    fn small(work: &str, size: [usize; 4], dtype: DType, device: &Device) -> Result<()> {
        run(work, &sets(size, dtype, device)?, &delta_ways())
    }

    fn delta_ways<'a>() -> Vec<Way<'a>> {
        let ours = |i: &Inputs| done(ops::fused_lora::delta(&i.x, &i.a, &i.b, S, None)?);
        vec![("ours", Box::new(ours)), ("Candle unfused", Box::new(|i| done(candle_delta(i)?.1)))]
    }

    fn delta_backward_ways<'a>() -> Vec<Way<'a>> {
        let ours = |i: &Inputs| {
            let (y, h) = cuda::fused_lora::forward(&i.x, &i.a, &i.b, S, None, i.size)?;
            let all = [true; 3];
            done((y, cuda::fused_lora::gradients(&i.x, &i.a, &i.b, Some(&h), &i.g, S, None, i.size, all)?))
        };
        let candle = |i: &Inputs| {
            let (h, y) = candle_delta(i)?;
            let u = (i.g.matmul(&i.b.t()?)? * S)?;
            let (da, db) = (i.x.t()?.matmul(&u)?, (h.t()?.matmul(&i.g)? * S)?);
            done((y, u.matmul(&i.a.t()?)?, da, db))
        };
        vec![("ours", Box::new(ours)), ("Candle unfused", Box::new(candle))]
    }

    fn linear_ways<'a>() -> Vec<Way<'a>> {
        let base = |i: &Inputs| done(ops::linear::forward(&i.x, &i.w, None)?);
        let ours = |i: &Inputs| done(ops::lora_linear::forward(&i.x, &i.w, None, &i.a, &i.b, S, None)?);
        let candle = |i: &Inputs| done((i.x.matmul(&i.w.t()?)? + candle_delta(i)?.1)?);
        let after = |i: &Inputs| {
            let y = ops::linear::forward(&i.x, &i.w, None)?;
            done((ops::fused_lora::add_into(&y, &i.x, &i.a, &i.b, S, None)?, y))
        };
        vec![
            ("base alone", Box::new(base)),
            ("ours", Box::new(ours)),
            ("ours, adapter after the base", Box::new(after)),
            ("Candle unfused", Box::new(candle)),
        ]
    }

    fn linear_backward_ways<'a>() -> Vec<Way<'a>> {
        let sizes = |i: &Inputs| [i.size.m, i.size.k, i.size.n];
        let base = move |i: &Inputs| {
            done((ops::linear::forward(&i.x, &i.w, None)?, cuda::linear::gradient(&i.x, &i.w, &i.g, sizes(i))?))
        };
        let ours = |i: &Inputs| {
            let (y, h) = ops::lora_linear::forward(&i.x, &i.w, None, &i.a, &i.b, S, None)?;
            let (h, all) = (Some(&h), [true; 3]);
            done((y, cuda::lora_linear::gradients(&i.x, &i.w, &i.a, &i.b, h, &i.g, S, None, i.size, all)?))
        };
        let candle = |i: &Inputs| {
            let (h, delta) = candle_delta(i)?;
            let y = (i.x.matmul(&i.w.t()?)? + delta)?;
            let u = (i.g.matmul(&i.b.t()?)? * S)?;
            let (da, db) = (i.x.t()?.matmul(&u)?, (h.t()?.matmul(&i.g)? * S)?);
            done((y, (i.g.matmul(&i.w)? + u.matmul(&i.a.t()?)?)?, da, db))
        };
        let after = move |i: &Inputs| {
            let (y, h) = ops::lora_linear::forward(&i.x, &i.w, None, &i.a, &i.b, S, None)?;
            let dx = cuda::linear::gradient(&i.x, &i.w, &i.g, sizes(i))?;
            let sink = ops::Sink { dx: Some(&dx), da: Some(&i.da), db: Some(&i.db) };
            done((ops::fused_lora::backward(&i.x, &i.a, &i.b, Some(&h), &i.g, S, None, sink)?, y))
        };
        vec![
            ("base alone", Box::new(base)),
            ("ours", Box::new(ours)),
            ("ours, adapter after the base", Box::new(after)),
            ("Candle unfused", Box::new(candle)),
        ]
    }

    /// Three linears of one input, for the sake of the comparison with the same weights.
    fn shared(i: &Inputs) -> [Part<'_>; 3] {
        let adapter = Some(Adapter { a: &i.a, b: &i.b, s: S, dropout: None });
        [Part { w: (&i.w).into(), bias: None, adapter }; 3]
    }

    fn shared_ways<'a>() -> Vec<Way<'a>> {
        let base = |i: &Inputs| {
            done(ops::lora_linear::forward_shared(&i.x, &shared(i).map(|part| Part { adapter: None, ..part }))?)
        };
        let ours = |i: &Inputs| done(ops::lora_linear::forward_shared(&i.x, &shared(i))?);
        let apart = |i: &Inputs| {
            let one = || ops::lora_linear::forward(&i.x, &i.w, None, &i.a, &i.b, S, None);
            done([one()?, one()?, one()?])
        };
        vec![("base alone", Box::new(base)), ("ours", Box::new(ours)), ("ours, one by one", Box::new(apart))]
    }

    fn shared_backward_ways<'a>() -> Vec<Way<'a>> {
        let run = |i: &Inputs, parts: [Part; 3], sinks: [(Option<&Tensor>, Option<&Tensor>); 3]| {
            let forward = ops::lora_linear::forward_shared(&i.x, &parts)?;
            let h: Vec<Option<&Tensor>> = forward.iter().map(|(_, h)| h.as_ref()).collect();
            done((ops::lora_linear::backward_shared(&i.x, &parts, &h, &[&i.g; 3], &sinks, true)?, &forward))
        };
        let base = move |i: &Inputs| run(i, shared(i).map(|part| Part { adapter: None, ..part }), [(None, None); 3]);
        let ours = move |i: &Inputs| run(i, shared(i), [(Some(&i.da), Some(&i.db)); 3]);
        vec![("base alone", Box::new(base)), ("ours", Box::new(ours))]
    }

    /// `(h, s · h B)`, as models on Candle write it.
    fn candle_delta(i: &Inputs) -> Result<(Tensor, Tensor)> {
        let h = i.x.matmul(&i.a)?;
        let y = (h.matmul(&i.b)? * S)?;
        Ok((h, y))
    }

    fn done<T>(outputs: T) -> Result<()> {
        black_box(&outputs);
        Ok(())
    }

    /// As many inputs as go beyond the cache, three at least.
    fn sets([m, k, r, n]: [usize; 4], dtype: DType, device: &Device) -> Result<Vec<Inputs>> {
        let bytes = (m * (k + n) + k * n) * dtype.size_in_bytes();
        (0..(ROUND_BYTES / bytes).clamp(3, 64)).map(|_| Inputs::new([m, k, r, n], dtype, device)).collect()
    }

    /// Every way in turn, round after round, so that a drift of the clock meets all alike: a large GPU at its power limit slows
    /// down within milliseconds, so a turn is some milliseconds long at most.
    fn run(work: &str, sets: &[Inputs], ways: &[Way]) -> Result<()> {
        const ROUNDS: usize = 31;
        const TURN: f64 = 4e-3;
        let device = sets[0].x.device();
        let time = |way: &Way, calls: usize, count: usize| {
            device.synchronize()?;
            let start = Instant::now();
            for call in 0..calls {
                (way.1)(&sets[call % count])?;
            }
            device.synchronize()?;
            Ok::<_, metal_candle::Error>(start.elapsed().as_secs_f64() / calls as f64)
        };
        let mut times = vec![[const { Vec::new() }; 2]; ways.len()];
        let mut calls = Vec::new();
        for way in ways {
            // The first calls load kernels, fill the pool and let products choose their algorithms.
            time(way, 2 * sets.len(), sets.len())?;
            let seconds = time(way, 4, sets.len())?;
            calls.push(((TURN / seconds) as usize).clamp(2, 500));
        }
        for _ in 0..ROUNDS {
            for ((way, &calls), times) in ways.iter().zip(&calls).zip(&mut times) {
                for (times, count) in times.iter_mut().zip([1, sets.len()]) {
                    times.push(time(way, calls, count)? * 1e6);
                }
            }
        }
        for ((way, _), times) in ways.iter().zip(&mut times) {
            let [warm, cold] = times.each_mut().map(|times| {
                times.sort_by(f64::total_cmp);
                times[times.len() / 2]
            });
            println!("{work}\t{way}\t{warm:.2}\t{cold:.2}");
        }
        Ok(())
    }

    fn copy_speed(device: &Device) -> Result<()> {
        let tensor = Tensor::zeros(1 << 28, DType::F32, device)?;
        let copies = 10;
        let mut best = f64::INFINITY;
        for _ in 0..4 {
            device.synchronize()?;
            let start = Instant::now();
            for _ in 0..copies {
                black_box(tensor.copy()?);
            }
            device.synchronize()?;
            best = best.min(start.elapsed().as_secs_f64() / copies as f64);
        }
        println!("# device copy: {:.2} TB/s read and written", 2.0 * (1_u64 << 30) as f64 / best / 1e12);
        Ok(())
    }

    fn command(program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program).args(arguments).output();
        output
            .map_or_else(|_| "unknown".to_string(), |output| String::from_utf8_lossy(&output.stdout).trim().to_string())
    }
}
