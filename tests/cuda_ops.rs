//! The CUDA kernels agree with the f64 reference where `custom_ops_correctness` does not reach: every instance of every kernel,
//! tall inputs, outputs that hold NaN before, gradients written instead of added, the same bits in every run.
//!
//! Needs the feature `cuda` and a GPU; says so and passes where one is missing. `METAL_CANDLE_REQUIRE_GPU=1` makes that a failure.
#![allow(missing_docs)]

#[cfg(not(feature = "cuda"))]
#[test]
fn cuda_kernels() {
    println!("SKIPPED: the CUDA kernels were not tested, for this build lacks the feature `cuda`");
}

#[cfg(feature = "cuda")]
mod common;

#[cfg(feature = "cuda")]
mod cuda {
    use candle_core::{DType, Device, Tensor};
    use metal_candle::backend::cuda::{self, fused_lora::Size};
    use metal_candle::backend::custom_ops::{self as ops, Sink};
    use metal_candle::backend::dropout::Dropout;
    use metal_candle::backend::reference::{self, fused_lora::Problem};

    use super::common::{assert_close, f64s, offset, random};

    const MIXES: [(DType, DType); 5] = [
        (DType::F32, DType::F32),
        (DType::F16, DType::F16),
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F32),
        (DType::BF16, DType::F32),
    ];

    /// The GPU, or why the tests are skipped.
    fn gpu() -> Option<Device> {
        match cuda::check(0) {
            Ok(()) => Some(Device::new_cuda(0).unwrap()),
            Err(error) if std::env::var_os("METAL_CANDLE_REQUIRE_GPU").is_some() => panic!("{error}"),
            Err(error) => {
                println!("SKIPPED: the CUDA kernels were not tested: {error}");
                None
            }
        }
    }

    /// Leaves NaN in the pool's memory, so that the next allocations of these sizes start with it.
    fn poison(like: &[&Tensor]) {
        let junk = |tensor: &&Tensor| {
            let nan = Tensor::full(f32::NAN, tensor.shape(), tensor.device()).unwrap();
            (nan.to_dtype(tensor.dtype()).unwrap(), nan)
        };
        drop(like.iter().map(junk).collect::<Vec<_>>());
    }

    struct Case {
        x: Tensor,
        a: Tensor,
        b: Tensor,
        g: Tensor,
        s: f64,
        dropout: Option<Dropout>,
        size: Size,
    }

    impl Case {
        fn new([m, k, r, n]: [usize; 4], (x, adapter): (DType, DType), p: Option<f32>, gpu: &Device) -> Self {
            let random = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(gpu).unwrap();
            Self {
                x: random(&[m, k], x, 1),
                a: random(&[k, r], adapter, 2),
                b: random(&[r, n], adapter, 3),
                g: random(&[m, n], x, 4),
                s: 10.0 / r as f64,
                dropout: p.map(|p| Dropout { p, seed: 5 << 40 | 3, stream: 1 << 33 | 9 }),
                size: Size::new([m, k, r, n]).unwrap(),
            }
        }

        #[track_caller]
        fn check(&self, what: &str) {
            let Self { x, a, b, g, s, dropout, size } = self;
            let mask = dropout.map(|dropout| {
                (0..x.elem_count() as u64).map(|index| dropout.factor(index) as f64).collect::<Vec<_>>()
            });
            let problem =
                Problem { size: [size.m, size.k, size.r, size.n], x: f64s(x), a: f64s(a), b: f64s(b), s: *s, mask };
            let (delta, want_h) = reference::fused_lora::forward(&problem);
            let (dx, da, db) = reference::fused_lora::backward(&problem, &f64s(g));

            poison(&[g]);
            let y = cuda::fused_lora::delta(x, a, b, *s, *dropout, *size).unwrap();
            assert_close(&format!("{what}: delta"), &y, &delta);
            drop(y);
            poison(&[g]);
            let (y, h) = cuda::fused_lora::forward(x, a, b, *s, *dropout, *size).unwrap();
            assert_close(&format!("{what}: delta with h"), &y, &delta);
            assert_close(&format!("{what}: h"), &h, &want_h);
            let sum = Tensor::ones(g.shape(), DType::F32, g.device()).unwrap();
            ops::fused_lora::add_into(&sum, x, a, b, *s, *dropout).unwrap();
            let plus_one: Vec<f64> = delta.iter().map(|value| value + 1.0).collect();
            assert_close(&format!("{what}: f32 y += delta"), &sum, &plus_one);

            let run = || {
                poison(&[x, a, b]);
                let all = [true; 3];
                cuda::fused_lora::gradients(x, a, b, Some(&h), g, *s, *dropout, *size, all).unwrap().map(Option::unwrap)
            };
            let (first, second) = (run(), run());
            for (name, first, second, want) in [
                ("dx", &first[0], &second[0], &dx),
                ("dA", &first[1], &second[1], &da),
                ("dB", &first[2], &second[2], &db),
            ] {
                assert_close(&format!("{what}: {name}"), first, want);
                assert!(f64s(first) == f64s(second), "{what}: {name} differs between two runs");
            }
            let ones = |like: &Tensor, dtype| Tensor::ones(like.shape(), dtype, like.device()).unwrap();
            let (dx_sum, da_sum, db_sum) = (ones(x, DType::F32), ones(a, DType::F32), ones(b, DType::F32));
            let sink = Sink { dx: Some(&dx_sum), da: Some(&da_sum), db: Some(&db_sum) };
            ops::fused_lora::backward(x, a, b, None, g, *s, *dropout, sink).unwrap();
            for (name, got, want) in [("dx", dx_sum, dx), ("dA", da_sum, da), ("dB", db_sum, db)] {
                let want: Vec<f64> = want.iter().map(|value| value + 1.0).collect();
                assert_close(&format!("{what}: {name} added, f32"), &got, &want);
            }
        }
    }

    /// Few rows, a tile of rows and two; ranks of every instance; with and without dropout.
    #[test]
    fn every_instance() {
        let Some(gpu) = gpu() else { return };
        // For compute-sanitizer, which takes a hundred times as long.
        let few = std::env::var_os("METAL_CANDLE_SMALL_GRID").is_some();
        for mix in MIXES {
            for (m, k, n) in [(1, 512, 520), (130, 264, 136), (301, 136, 200), (3200, 64, 72)] {
                for r in [3, 8, 13, 16, 32, 61, 64, 72, 256] {
                    if few && (m > 130 || ![8, 16, 32, 72].contains(&r)) || m > 301 && r > 64 {
                        continue;
                    }
                    for p in [None, Some(0.3)] {
                        let size = [m, k, r, n];
                        Case::new(size, mix, p, &gpu).check(&format!("{size:?} {mix:?}, dropout {p:?}"));
                    }
                }
            }
        }
    }

    /// Sizes and addresses that no vector load takes.
    #[test]
    fn unaligned() {
        let Some(gpu) = gpu() else { return };
        for mix in MIXES {
            for size in [[37, 131, 5, 203], [37, 131, 70, 203], [301, 64, 16, 67], [301, 67, 16, 64]] {
                Case::new(size, mix, Some(0.2), &gpu).check(&format!("{size:?} {mix:?}"));
            }
            let case = Case::new([37, 134, 16, 72], mix, None, &gpu);
            let odd = Case { x: offset(&case.x), g: offset(&case.g), a: offset(&case.a), ..case };
            odd.check(&format!("offset {mix:?}"));
        }
    }

    #[test]
    fn a_hundred_thousand_rows() {
        let Some(gpu) = gpu() else { return };
        if std::env::var_os("METAL_CANDLE_SMALL_GRID").is_some() {
            return;
        }
        Case::new([100_000, 40, 4, 24], (DType::BF16, DType::F32), None, &gpu).check("100,000 rows");
        Case::new([100_000, 24, 9, 33], (DType::F32, DType::F32), Some(0.1), &gpu).check("100,000 odd rows");
    }

    /// Odd sizes, offsets and two dtypes of the base's products.
    #[test]
    fn linear_products() {
        let Some(gpu) = gpu() else { return };
        let types = [DType::F32, DType::F16, DType::BF16];
        for (m, k, n) in [(1, 1, 1), (5, 33, 7), (130, 264, 136), (257, 129, 65)] {
            for x_type in types {
                for w_type in types {
                    let random = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(&gpu).unwrap();
                    let (x, w) = (random(&[m, k], x_type, 1), random(&[n, k], w_type, 2));
                    let (bias, g) = (random(&[n], x_type, 3), offset(&random(&[m, n], x_type, 4)));
                    let what = format!("[{m}, {k}] {x_type:?} by [{n}, {k}] {w_type:?}");
                    let (x64, w64, bias64, g64) = (f64s(&x), f64s(&w), f64s(&bias), f64s(&g));
                    let mut y = vec![0.0; m * n];
                    let (mut dx, mut dw, mut dbias) = (vec![1.0; m * k], vec![1.0; n * k], vec![1.0; n]);
                    for i in 0..m {
                        for j in 0..n {
                            y[i * n + j] = bias64[j] + (0..k).map(|c| x64[i * k + c] * w64[j * k + c]).sum::<f64>();
                            dbias[j] += g64[i * n + j];
                            for c in 0..k {
                                dx[i * k + c] += g64[i * n + j] * w64[j * k + c];
                                dw[j * k + c] += g64[i * n + j] * x64[i * k + c];
                            }
                        }
                    }
                    poison(&[&g]);
                    assert_close(&what, &ops::linear::forward(&x, &w, Some(&bias)).unwrap(), &y);
                    let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &gpu).unwrap();
                    let (dw_sink, dbias_sink) = (ones(&[n, k], DType::F32), ones(&[n], DType::F32));
                    for dtype in [x_type, DType::F32] {
                        let dx_sink = ones(&[m, k], dtype);
                        ops::linear::backward(&x, &w, &g, Some(&dx_sink), None, None).unwrap();
                        assert_close(&format!("{what}: dx {dtype:?}"), &dx_sink, &dx);
                    }
                    ops::linear::backward(&x, &w, &g, None, Some(&dw_sink), Some(&dbias_sink)).unwrap();
                    assert_close(&format!("{what}: dW"), &dw_sink, &dw);
                    assert_close(&format!("{what}: dbias"), &dbias_sink, &dbias);
                }
            }
        }
    }
}
