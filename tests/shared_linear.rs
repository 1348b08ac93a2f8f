//! Linears that share an input agree with the f64 reference: on the CPU, and on a GPU of compute capability 9.0 by its own kernels, with
//! outputs that hold NaN before, and the same bits in every run.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor};
use common::{assert_close, f64s, random};
use metal_candle::backend::custom_ops::fused_lora::{self, Sink};
use metal_candle::backend::custom_ops::lora_linear::{Adapter, Part, backward_shared, forward_add, forward_shared};
use metal_candle::backend::dropout::Dropout;
use metal_candle::backend::reference::{self, fused_lora::Problem};

/// m rows, k columns, and for each linear n and r (0: no adapter).
struct Case {
    m: usize,
    k: usize,
    linears: Vec<(usize, usize)>,
    adapters: DType,
    dtype: DType,
    p: Option<f32>,
}

struct Linear {
    w: Tensor,
    bias: Option<Tensor>,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    r: usize,
    s: f64,
    dropout: Option<Dropout>,
}

impl Linear {
    fn part(&self) -> Part<'_> {
        let Self { w, bias, a, b, s, dropout, .. } = self;
        let adapter = (self.r > 0).then_some(Adapter { a, b, s: *s, dropout: *dropout });
        Part { w: w.into(), bias: bias.as_ref(), adapter }
    }
}

impl Case {
    fn check(&self, device: &Device, own_kernels: bool) {
        let what = format!("{} x {} -> {:?} {:?}, dropout {:?}", self.m, self.k, self.linears, self.adapters, self.p);
        println!("{what}");
        let on = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(device).unwrap();
        let (m, k) = (self.m, self.k);
        let x = on(&[m, k], self.dtype, 1);
        let linears: Vec<Linear> = (0..)
            .zip(&self.linears)
            .map(|(i, &(n, r))| Linear {
                w: on(&[n, k], self.dtype, 10 + i),
                bias: (i % 2 == 0).then(|| on(&[n], self.dtype, 20 + i)),
                a: on(&[k, r.max(1)], self.adapters, 30 + i),
                b: on(&[r.max(1), n], self.adapters, 40 + i),
                g: on(&[m, n], self.dtype, 50 + i),
                r,
                s: 10.0 / r.max(1) as f64,
                dropout: self.p.map(|p| Dropout { p, seed: 7, stream: i }),
            })
            .collect();
        let parts: Vec<Part> = linears.iter().map(Linear::part).collect();
        let sink = |like: &Tensor| Tensor::zeros(like.shape(), DType::F32, device).unwrap();
        let run = || {
            poison(&x, &linears);
            let forward = taken_forward(&x, &parts, own_kernels);
            let h: Vec<Option<&Tensor>> = forward.iter().map(|(_, h)| h.as_ref()).collect();
            let g: Vec<&Tensor> = linears.iter().map(|linear| &linear.g).collect();
            let grads: Vec<(Tensor, Tensor)> = linears.iter().map(|l| (sink(&l.a), sink(&l.b))).collect();
            let sinks: Vec<_> = grads.iter().map(|(da, db)| (Some(da), Some(db))).collect();
            poison(&x, &linears);
            let dx = backward_shared(&x, &parts, &h, &g, &sinks, true).unwrap().unwrap();
            (forward, grads, dx)
        };
        let (forward, grads, dx) = run();
        let (again, grads_again, dx_again) = run();

        let mut want_dx = vec![0.0; m * k];
        for (i, linear) in linears.iter().enumerate() {
            let Linear { w, bias, a, b, g, r, s, dropout } = linear;
            let n = w.dims()[0];
            let what = format!("{what}, linear {i}");
            let bias = bias.as_ref().map(f64s);
            let (y, h) = &forward[i];
            assert!(f64s(y) == f64s(&again[i].0), "{what}: y differs between two runs");
            if *r == 0 {
                let (want, w) = (reference::linear::forward(&f64s(&x), &f64s(w), bias.as_deref(), [m, k, n]), f64s(w));
                assert_close(&format!("{what}: y"), y, &want);
                let (dx, _, _) = reference::linear::backward(&f64s(&x), &w, &f64s(g), [m, k, n]);
                want_dx.iter_mut().zip(dx).for_each(|(to, dx)| *to += dx);
                continue;
            }
            let mask = dropout
                .map(|dropout| (0..(m * k) as u64).map(|index| dropout.factor(index) as f64).collect::<Vec<_>>());
            let problem = Problem { size: [m, k, *r, n], x: f64s(&x), a: f64s(a), b: f64s(b), s: *s, mask };
            let (want_y, want_h) = reference::lora_linear::forward(&problem, &f64s(w), bias.as_deref());
            let (dx, da, db) = reference::lora_linear::backward(&problem, &f64s(w), &f64s(g));
            want_dx.iter_mut().zip(dx).for_each(|(to, dx)| *to += dx);
            assert_close(&format!("{what}: y"), y, &want_y);
            let residual = on(&[m, n], self.dtype, 60);
            let (with_residual, _) = forward_add(&x, &linear.part(), &residual).unwrap();
            let want: Vec<f64> = want_y.iter().zip(f64s(&residual)).map(|(y, residual)| y + residual).collect();
            assert_close(&format!("{what}: y with a residual"), &with_residual, &want);
            assert_close(&format!("{what}: h"), h.as_ref().unwrap(), &want_h);
            assert_close(&format!("{what}: dA"), &grads[i].0, &da);
            assert_close(&format!("{what}: dB"), &grads[i].1, &db);
            for (first, second) in [(&grads[i].0, &grads_again[i].0), (&grads[i].1, &grads_again[i].1)] {
                assert!(f64s(first) == f64s(second), "{what}: a gradient differs between two runs");
            }
        }
        if own_kernels && linears[0].dropout.is_none() && linears[0].r > 0 {
            check_delta(&format!("{what}: the adapter alone"), &x, &linears[0]);
        }
        assert_close(&format!("{what}: dx"), &dx, &want_dx);
        assert!(f64s(&dx) == f64s(&dx_again), "{what}: dx differs between two runs");
    }
}

/// The first linear's adapter without the linear: many ranks take the same kernels.
fn check_delta(what: &str, x: &Tensor, Linear { a, b, g, r, s, .. }: &Linear) {
    let size = [x.dims()[0], x.dims()[1], *r, b.dims()[1]];
    let problem = Problem { size, x: f64s(x), a: f64s(a), b: f64s(b), s: *s, mask: None };
    let (delta, want_h) = reference::fused_lora::forward(&problem);
    let (want_dx, da, db) = reference::fused_lora::backward(&problem, &f64s(g));
    assert_close(&format!("{what}: delta"), &fused_lora::delta(x, a, b, *s, None).unwrap(), &delta);
    let y = g.zeros_like().unwrap();
    let h = fused_lora::add_into(&y, x, a, b, *s, None).unwrap();
    assert_close(&format!("{what}: h"), &h, &want_h);
    let sink = |like: &Tensor| Tensor::ones(like.shape(), DType::F32, x.device()).unwrap();
    let (dx, da_sink, db_sink) = (x.zeros_like().unwrap(), sink(a), sink(b));
    let sinks = Sink { dx: Some(&dx), da: Some(&da_sink), db: Some(&db_sink) };
    fused_lora::backward(x, a, b, Some(&h), g, *s, None, sinks).unwrap();
    let plus_one = |values: Vec<f64>| values.into_iter().map(|value| value + 1.0).collect::<Vec<_>>();
    assert_close(&format!("{what}: dx"), &dx, &want_dx);
    assert_close(&format!("{what}: dA"), &da_sink, &plus_one(da));
    assert_close(&format!("{what}: dB"), &db_sink, &plus_one(db));
}

/// [`forward_shared`]; with `own_kernels` an error where the kernels for compute capability 9.0 don't take the call.
fn taken_forward(x: &Tensor, parts: &[Part], own_kernels: bool) -> Vec<(Tensor, Option<Tensor>)> {
    #[cfg(feature = "cuda")]
    if own_kernels {
        let all = metal_candle::backend::cuda::shared_linear::forward(x, parts).unwrap();
        return all.expect("the kernels for compute capability 9.0 take this call");
    }
    assert!(!own_kernels);
    forward_shared(x, parts).unwrap()
}

/// Leaves NaN in the memory pool.
fn poison(x: &Tensor, linears: &[Linear]) {
    let like = linears.iter().flat_map(|linear| [&linear.g, &linear.a, &linear.b, x]);
    drop(
        like.map(|t| Tensor::full(f32::NAN, t.shape(), t.device()).unwrap().to_dtype(t.dtype()).unwrap())
            .collect::<Vec<_>>(),
    );
}

#[test]
fn on_the_cpu() {
    for dtype in common::FLOATS {
        for (linears, p) in
            [(vec![(7, 3), (4, 0), (9, 5)], None), (vec![(7, 3), (12, 2)], Some(0.25)), (vec![(6, 0)], None)]
        {
            Case { m: 11, k: 10, linears, adapters: DType::F32, dtype, p }.check(&Device::Cpu, false);
        }
    }
}

#[cfg(feature = "cuda")]
#[test]
fn on_hopper() {
    use metal_candle::backend::cuda;
    if let Err(error) = cuda::check(0) {
        assert!(std::env::var_os("METAL_CANDLE_REQUIRE_GPU").is_none(), "{error}");
        return println!("SKIPPED: the kernels for compute capability 9.0 were not tested: {error}");
    }
    if !cuda::shared_linear::available(0).unwrap() {
        return println!("SKIPPED: the kernels for compute capability 9.0 were not tested: this GPU has another");
    }
    let device = Device::new_cuda(0).unwrap();
    let dtype = DType::BF16;
    let mut cases = Vec::new();
    for adapters in [DType::F32, DType::BF16] {
        // One column tile and many row tiles; ranks about the edges of a pass, of 64 columns of terms, of 16 bytes.
        for r in [1, 5, 8, 16, 17, 22, 32, 33, 64, 65, 256] {
            cases.push(Case { m: 11_300, k: 136, linears: vec![(200, r)], adapters, dtype, p: None });
        }
        for (m, k, linears, p) in [
            (11_300, 72, vec![(256, 16), (72, 16), (8, 16)], None),
            (11_300, 264, vec![(64, 4), (136, 0), (264, 33)], None),
            (11_265, 64, vec![(128, 48), (64, 48)], None),
            (11_300, 136, vec![(200, 12), (64, 3)], Some(0.25)),
            (11_300, 136, vec![(200, 0)], None),
        ] {
            cases.push(Case { m, k, linears, adapters, dtype, p });
        }
    }
    // Many tiles in both directions, the last ones not full.
    let linears = vec![(1032, 20), (264, 4)];
    cases.push(Case { m: 2_100, k: 1032, linears, adapters: DType::F32, dtype, p: None });
    // The reference takes most of the time.
    std::thread::scope(|scope| {
        let threads: Vec<_> = cases.iter().map(|case| scope.spawn(|| case.check(&device, true))).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}
