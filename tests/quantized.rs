//! Products, embedding and loss with quantized weights agree with the f64 reference on the values that Candle dequantizes (for
//! llama.cpp's kinds) or that are known beforehand (for the others). With METAL_CANDLE_TEST_DEVICE=cuda on a GPU.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::blocks::blocks;
use common::{FLOATS, assert_close, f64s, random, strided, test_device};
use metal_candle::backend::custom_ops::lora_linear::{Adapter, Part, backward_shared, forward_add, forward_shared};
use metal_candle::backend::custom_ops::{Weight, cross_entropy, dequantize, embedding, linear, lora_linear};
use metal_candle::backend::quantized::{Kind, QuantizedTensor};
use metal_candle::backend::reference::{self, fused_lora::Problem};

const K: usize = 512;

/// A random matrix `[n, 512]` of a kind, and its values.
fn weight(kind: Kind, n: usize, seed: u64) -> (QuantizedTensor, Vec<f64>) {
    let (w, values) = blocks(kind, (n, K), seed);
    (w.to_device(&test_device()).unwrap(), values)
}

fn on(shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    random(shape, dtype, seed).to_device(&test_device()).unwrap()
}

#[test]
fn dequantized_values_are_those_of_others() {
    for kind in Kind::ALL {
        let (w, values) = weight(kind, 7, 1);
        for dtype in FLOATS {
            let dense = dequantize(&w, dtype).unwrap();
            assert_eq!((dense.dims(), dense.dtype()), ([7, K].as_slice(), dtype));
            assert_close(&format!("{kind:?} as {dtype:?}"), &dense, &values);
        }
        assert_eq!(w.size_in_bytes(), 7 * K / kind.block_len() * kind.block_bytes());
    }
}

/// Rows under and over those of decoding, a number of columns that is no tile's.
#[test]
fn a_linear_and_its_gradient() {
    for kind in Kind::ALL {
        let (w, values) = weight(kind, 38, 2);
        for (m, dtype) in [1, 3, 4, 5, 19].into_iter().flat_map(|m| FLOATS.map(|dtype| (m, dtype))) {
            let what = format!("{kind:?}, {m} rows of {dtype:?}");
            let (x, g) = (on(&[m, K], dtype, 3), on(&[m, 38], dtype, 4));
            let bias = on(&[38], dtype, 5);
            let want = reference::linear::forward(&f64s(&x), &values, Some(&f64s(&bias)), [m, K, 38]);
            assert_close(&format!("{what}: y"), &linear::forward(&x, &w, Some(&bias)).unwrap(), &want);
            let (want_dx, _, _) = reference::linear::backward(&f64s(&x), &values, &f64s(&g), [m, K, 38]);
            let dx = x.zeros_like().unwrap();
            linear::backward(&x, &w, &g, Some(&dx), None, None).unwrap();
            assert_close(&format!("{what}: dx"), &dx, &want_dx);
        }
        let x = on(&[2, K], DType::F32, 3);
        let want = reference::linear::forward(&f64s(&x), &values, None, [2, K, 38]);
        let strided = strided(&x.to_device(&Device::Cpu).unwrap()).to_device(&test_device()).unwrap();
        assert_close(&format!("{kind:?}, strided"), &linear::forward(&strided, &w, None).unwrap(), &want);
    }
}

/// Linears of one input with adapters, one of them dense.
#[test]
fn adapters_on_quantized_linears() {
    let s = 10.0 / 6.0;
    for kind in Kind::ALL {
        for (m, r, dtype) in [(1, 8, DType::F32), (3, 6, DType::F32), (20, 8, DType::F32), (24, 8, DType::BF16)] {
            let what = format!("{kind:?}, {m} rows of {dtype:?}, rank {r}");
            let x = on(&[m, K], dtype, 6);
            let (w, values) = weight(kind, 38, 7);
            let dense = on(&[40, K], dtype, 8);
            let (a, b) = (on(&[K, r], DType::F32, 9), on(&[r, 38], DType::F32, 10));
            let adapter = Some(Adapter { a: &a, b: &b, s, dropout: None });
            let parts =
                [Part { w: (&w).into(), bias: None, adapter }, Part { w: (&dense).into(), bias: None, adapter: None }];
            let made = forward_shared(&x, &parts).unwrap();
            let problem = Problem { size: [m, K, r, 38], x: f64s(&x), a: f64s(&a), b: f64s(&b), s, mask: None };
            let (want_y, want_h) = reference::lora_linear::forward(&problem, &values, None);
            assert_close(&format!("{what}: y"), &made[0].0, &want_y);
            assert_close(&format!("{what}: h"), made[0].1.as_ref().unwrap(), &want_h);
            let want = reference::linear::forward(&f64s(&x), &f64s(&dense), None, [m, K, 40]);
            assert_close(&format!("{what}: the dense one"), &made[1].0, &want);

            let residual = on(&[m, 38], dtype, 11);
            let want: Vec<f64> = want_y.iter().zip(f64s(&residual)).map(|(y, residual)| y + residual).collect();
            assert_close(&format!("{what}: with a residual"), &forward_add(&x, &parts[0], &residual).unwrap().0, &want);

            let g = [on(&[m, 38], dtype, 12), on(&[m, 40], dtype, 13)];
            let sink = |like: &Tensor| Tensor::zeros(like.shape(), DType::F32, &test_device()).unwrap();
            let (da, db) = (sink(&a), sink(&b));
            let h = [made[0].1.as_ref(), None];
            let sinks = [(Some(&da), Some(&db)), (None, None)];
            let dx = backward_shared(&x, &parts, &h, &[&g[0], &g[1]], &sinks, true).unwrap().unwrap();
            let (mut want_dx, want_da, want_db) = reference::lora_linear::backward(&problem, &values, &f64s(&g[0]));
            let (more, _, _) = reference::linear::backward(&f64s(&x), &f64s(&dense), &f64s(&g[1]), [m, K, 40]);
            want_dx.iter_mut().zip(more).for_each(|(dx, more)| *dx += more);
            assert_close(&format!("{what}: dx"), &dx, &want_dx);
            assert_close(&format!("{what}: dA"), &da, &want_da);
            assert_close(&format!("{what}: dB"), &db, &want_db);
        }
    }
}

#[test]
fn embedding_and_loss() {
    for kind in Kind::ALL {
        let (w, values) = weight(kind, 50, 14);
        let ids = [3, 49, 0, 3];
        if test_device().is_cpu() {
            let want: Vec<f64> = ids.iter().flat_map(|&id| values[id as usize * K..][..K].to_vec()).collect();
            for dtype in FLOATS {
                let rows = embedding::forward_quantized(&w, &ids, dtype).unwrap();
                assert_close(&format!("{kind:?}: rows of {dtype:?}"), &rows, &want);
            }
            assert!(embedding::forward_quantized(&w, &[50], DType::F32).is_err());
        }
        for dtype in [DType::F32, DType::BF16] {
            let hidden = (on(&[5, K], dtype, 15) * 0.1).unwrap();
            let targets = [1, cross_entropy::IGNORE, 49, 7, 7];
            let hidden64 = f64s(&hidden);
            let (want_loss, _) = reference::cross_entropy::forward(&hidden64, &values, K, &targets);
            let (want, _) = reference::cross_entropy::backward(&hidden64, &values, K, &targets, 0.25);
            let (loss, dhidden) = cross_entropy::forward_backward(&hidden, &w, &targets, 0.25, None).unwrap();
            let loss = loss.read().unwrap();
            let limit = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
            assert!((loss.sum - want_loss).abs() <= limit * want_loss, "{kind:?}: {} for {want_loss}", loss.sum);
            assert_close(&format!("{kind:?}: dhidden of {dtype:?}"), &dhidden, &want);
        }
    }
}

#[test]
fn what_has_no_gradient_is_refused() {
    let (w, _) = weight(Kind::Q8_0, 8, 16);
    let (x, g) = (on(&[2, K], DType::F32, 17), on(&[2, 8], DType::F32, 18));
    let dw = Tensor::zeros((8, K), DType::F32, &test_device()).unwrap();
    let error = linear::backward(&x, &w, &g, None, Some(&dw), None).unwrap_err().to_string();
    assert!(error.contains("dw") && error.contains("quantized"), "{error}");
    let error = cross_entropy::forward_backward(&x, &w, &[1, 2], 1.0, Some(&dw)).unwrap_err().to_string();
    assert!(error.contains("dhead") && error.contains("quantized"), "{error}");
    let wrong = on(&[2, 256], DType::F32, 19);
    assert!(linear::forward(&wrong, &w, None).is_err());
}

/// x, A and B of a small problem, as variables.
fn variables(k: usize, n: usize) -> [Var; 3] {
    let of = |shape: [usize; 2], seed| Var::from_tensor(&on(&shape, DType::F32, seed)).unwrap();
    [of([3, k], 20), of([k, 4], 21), of([4, n], 22)]
}

/// On Candle's tape a quantized weight gives what the tensor of its values gives: the output, and gradients for x, A and B.
#[test]
fn the_tape_forms_agree_with_those_of_the_dequantized_weight() {
    for kind in Kind::ALL {
        let (w, values) = weight(kind, 10, 23);
        let dense: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        let dense = Tensor::from_vec(dense, (10, K), &test_device()).unwrap();
        let [x, a, b] = variables(K, 10);
        let (bias, g) = (on(&[10], DType::F32, 24), on(&[3, 10], DType::F32, 25));
        let adapted = |w: Weight| lora_linear(&x, w, Some(&bias), &a, &b, 1.5).unwrap();
        let plain = |w: Weight| linear::linear(&x, w, Some(&bias)).unwrap();
        let loss = |w: Weight| cross_entropy::cross_entropy(&(x.as_tensor() * 0.1).unwrap(), w, &[3, 9, 0]).unwrap();
        for (what, y, want) in [
            ("lora_linear", adapted((&w).into()), adapted((&dense).into())),
            ("linear", plain((&w).into()), plain((&dense).into())),
            ("cross_entropy", loss((&w).into()), loss((&dense).into())),
        ] {
            assert_close(&format!("{kind:?}: {what}"), &y, &f64s(&want));
            let backward = |y: &Tensor| match y.rank() {
                0 => y.backward().unwrap(),
                _ => (y * &g).unwrap().sum_all().unwrap().backward().unwrap(),
            };
            let (got, want) = (backward(&y), backward(&want));
            for (name, variable) in [("dx", &x), ("dA", &a), ("dB", &b)] {
                match (got.get(variable), want.get(variable)) {
                    (Some(got), Some(want)) => assert_close(&format!("{kind:?}: {what}: {name}"), got, &f64s(want)),
                    (got, want) => assert!(got.is_none() && want.is_none() && what != "lora_linear", "{what}: {name}"),
                }
            }
        }
    }
}

/// Differences of the f64 reference over the blocks' values, without a tape.
#[test]
fn the_tapes_gradients_are_those_of_finite_differences() {
    let (k, n, s) = (64, 5, 0.75);
    let (w, values) = blocks(Kind::Nf4, (n, k), 26);
    let w = w.to_device(&test_device()).unwrap();
    let [x, a, b] = variables(k, n);
    let g = on(&[3, n], DType::F32, 27);
    let y = lora_linear(&x, &w, None, &a, &b, s).unwrap();
    let got = (y * &g).unwrap().sum_all().unwrap().backward().unwrap();
    let inputs = [&x, &a, &b].map(|variable| f64s(variable));
    let weighted = |inputs: &[Vec<f64>; 3]| {
        let [x, a, b] = inputs.clone();
        let problem = Problem { size: [3, k, 4, n], x, a, b, s, mask: None };
        let (y, _) = reference::lora_linear::forward(&problem, &values, None);
        y.iter().zip(f64s(&g)).map(|(y, g)| y * g).sum::<f64>()
    };
    for (which, variable) in [&x, &a, &b].into_iter().enumerate() {
        let step = 1e-3;
        let difference = |at: usize| {
            let moved = |by: f64| {
                let mut inputs = inputs.clone();
                inputs[which][at] += by;
                weighted(&inputs)
            };
            (moved(step) - moved(-step)) / (2.0 * step)
        };
        let want: Vec<f64> = (0..inputs[which].len()).map(difference).collect();
        assert_close(["dx", "dA", "dB"][which], got.get(variable).unwrap(), &want);
    }
}
