//! A LoRA layer trains what it should: A and B get gradients, the frozen base gets none, dropout is PEFT's.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::blocks::blocks;
use common::{assert_close, devices, f64s, random};
use metal_candle::backend::quantized::Kind;
use metal_candle::backend::reference::{self, fused_lora::Problem};
use metal_candle::training::{LoRAConfig, LoRALayer, LoRALinear};

/// A layer from 12 to 9 of rank 4 and alpha 10, with B not zero.
fn layer(device: &Device, dropout: f32) -> LoRALayer {
    let config = LoRAConfig::new(4).with_alpha(10.0).with_dropout(dropout);
    let layer = LoRALayer::new(12, 9, &config, 3, device).unwrap();
    layer.vars()[1].set(&random(&[4, 9], DType::F32, 2).to_device(device).unwrap()).unwrap();
    layer
}

fn problem(layer: &LoRALayer, x: &Tensor, mask: Option<Vec<f64>>) -> Problem {
    let size = [x.elem_count() / 12, 12, 4, 9];
    Problem { size, x: f64s(x), a: f64s(layer.a()), b: f64s(layer.b()), s: 2.5, mask }
}

fn gradients(y: &Tensor, g: &Tensor) -> candle_core::backprop::GradStore {
    y.mul(g).unwrap().sum_all().unwrap().backward().unwrap()
}

#[test]
fn a_layer_trains_a_and_b() {
    for device in devices() {
        let layer = layer(&device, 0.0);
        assert_eq!(layer.scaling(), 2.5);
        let x = random(&[2, 5, 12], DType::F32, 1).to_device(&device).unwrap();
        let g = random(&[2, 5, 9], DType::F32, 4).to_device(&device).unwrap();
        let problem = problem(&layer, &x, None);
        let (delta, _) = reference::fused_lora::forward(&problem);
        let (_, da, db) = reference::fused_lora::backward(&problem, &f64s(&g));
        let y = layer.forward(&x).unwrap();
        assert_close("delta", &y, &delta);
        let gradients = gradients(&y, &g);
        assert_close("dA", gradients.get(layer.a()).unwrap(), &da);
        assert_close("dB", gradients.get(layer.b()).unwrap(), &db);
        assert_eq!(layer.vars().len(), 2);
    }
}

/// The forms with and without the tape are the same op.
#[test]
fn a_frozen_layer_gives_the_same_delta_and_the_input_s_gradient() {
    for device in devices() {
        let trained = layer(&device, 0.0);
        let frozen = LoRALayer::from_tensors(trained.a().detach(), trained.b().detach(), 2.5).unwrap();
        assert!(frozen.vars().is_empty());
        let x = Var::from_tensor(&random(&[5, 12], DType::F32, 1).to_device(&device).unwrap()).unwrap();
        let g = random(&[5, 9], DType::F32, 4).to_device(&device).unwrap();
        let (y, want) = (frozen.forward(&x).unwrap(), trained.forward(&x).unwrap());
        assert_eq!(f64s(&y), f64s(&want));
        let (got, want) = (gradients(&y, &g), gradients(&want, &g));
        assert_close("dx", got.get(&x).unwrap(), &f64s(want.get(&x).unwrap()));
        assert!(got.get(frozen.a()).is_none() && got.get(frozen.b()).is_none());
    }
}

#[test]
fn a_linear_trains_its_adapter_and_not_its_base() {
    for device in devices() {
        for with_bias in [false, true] {
            let w = Var::from_tensor(&random(&[9, 12], DType::F32, 5).to_device(&device).unwrap()).unwrap();
            let bias = Var::from_tensor(&random(&[9], DType::F32, 6).to_device(&device).unwrap()).unwrap();
            let held = with_bias.then(|| bias.as_tensor().clone());
            let linear = LoRALinear::new(w.as_tensor().clone(), held, Some(layer(&device, 0.0))).unwrap();
            let x = random(&[2, 5, 12], DType::F32, 1).to_device(&device).unwrap();
            let g = random(&[2, 5, 9], DType::F32, 4).to_device(&device).unwrap();
            let adapter = linear.adapter().unwrap();
            let (problem, bias64) = (problem(adapter, &x, None), f64s(&bias));
            let bias64 = with_bias.then_some(bias64.as_slice());
            let (want, _) = reference::lora_linear::forward(&problem, &f64s(&w), bias64);
            let (_, da, db) = reference::lora_linear::backward(&problem, &f64s(&w), &f64s(&g));
            let y = linear.forward(&x).unwrap();
            assert_close("y", &y, &want);
            let gradients = gradients(&y, &g);
            assert_close("dA", gradients.get(adapter.a()).unwrap(), &da);
            assert_close("dB", gradients.get(adapter.b()).unwrap(), &db);
            assert!(gradients.get(&w).is_none() && gradients.get(&bias).is_none(), "the base is frozen");
        }
    }
}

/// PEFT drops elements of the adapter's input only, in training only, another mask each pass, and scales what is kept.
#[test]
fn dropout_is_peft_s() {
    for device in devices() {
        let mut layer = layer(&device, 0.5);
        // A of ones and one non-zero column of x a row: the delta of a row is 0 or twice the one without dropout.
        layer.vars()[0].set(&Tensor::ones((12, 4), DType::F32, &device).unwrap()).unwrap();
        let rows: Vec<f32> = (0..64 * 12).map(|i| if i % 12 == (i / 12) % 12 { 1.0 } else { 0.0 }).collect();
        let x = Tensor::from_vec(rows, (64, 12), &device).unwrap();
        let without = f64s(&layer.forward(&x).unwrap());
        let (want, _) = reference::fused_lora::forward(&problem(&layer, &x, None));
        assert_close("a layer that is not training drops nothing", &layer.forward(&x).unwrap(), &want);

        layer.set_training(true);
        let masks: Vec<Vec<bool>> = (0..2)
            .map(|_| {
                let y = f64s(&layer.forward(&x).unwrap());
                let row_kept = |(row, full): (&[f64], &[f64])| {
                    let kept = row.iter().any(|value| *value != 0.0);
                    let factor = if kept { 2.0 } else { 0.0 };
                    assert!(row.iter().zip(full).all(|(y, full)| (y - factor * full).abs() < 1e-5), "{row:?} {full:?}");
                    kept
                };
                y.chunks_exact(9).zip(without.chunks_exact(9)).map(row_kept).collect()
            })
            .collect();
        assert_ne!(masks[0], masks[1], "each pass draws a mask of its own");
        for mask in &masks {
            let kept = mask.iter().filter(|kept| **kept).count();
            // 32 expected of 64, standard deviation 4.
            assert!((12..=52).contains(&kept), "{kept} of 64 kept");
        }

        let w = random(&[9, 12], DType::F32, 5).to_device(&device).unwrap();
        layer.vars()[1].set(&Tensor::zeros((4, 9), DType::F32, &device).unwrap()).unwrap();
        let linear = LoRALinear::new(w.clone(), None, Some(layer)).unwrap();
        let base = reference::linear::forward(&f64s(&x), &f64s(&w), None, [64, 12, 9]);
        assert_close("the base sees all of x", &linear.forward(&x).unwrap(), &base);
    }
}

/// The pass without the tape, which the decoder's training uses, gives the tape's values and gradients.
#[test]
fn the_plain_pass_equals_the_tape() {
    for device in devices() {
        let w = random(&[9, 12], DType::F32, 5).to_device(&device).unwrap();
        let linear = LoRALinear::new(w.clone(), None, Some(layer(&device, 0.0))).unwrap();
        let x = Var::from_tensor(&random(&[7, 12], DType::F32, 1).to_device(&device).unwrap()).unwrap();
        let g = random(&[7, 9], DType::F32, 4).to_device(&device).unwrap();
        let y = linear.forward(&x).unwrap();
        let (plain, h) = linear.forward_saved(&x, None).unwrap();
        assert_close("y", &plain, &f64s(&y));
        let gradients = gradients(&y, &g);
        let adapter = linear.adapter().unwrap();
        let [dx, da, db] = [x.as_tensor(), adapter.a(), adapter.b()].map(|like| like.zeros_like().unwrap().detach());
        linear.backward(&x, h.as_ref(), &g, None, Some(&dx), Some(&da), Some(&db), None, None).unwrap();
        assert_close("dx", &dx, &f64s(gradients.get(&x).unwrap()));
        assert_close("dA", &da, &f64s(gradients.get(adapter.a()).unwrap()));
        assert_close("dB", &db, &f64s(gradients.get(adapter.b()).unwrap()));

        let bare = LoRALinear::new(w, None, None).unwrap();
        let error = bare.backward(&x, None, &g, None, None, Some(&da), None, None, None).unwrap_err().to_string();
        assert!(error.contains("no adapter"), "{error}");
    }
}

#[test]
fn a_quantized_base_is_the_tensor_of_its_values() {
    for device in devices() {
        let (w, values) = blocks(Kind::Q4_0, (9, 32), 5);
        let dense: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        let dense = Tensor::from_vec(dense, (9, 32), &device).unwrap();
        let adapter = || {
            let of = |shape: [usize; 2], seed| random(&shape, DType::F32, seed).to_device(&device).unwrap();
            LoRALayer::from_tensors(of([32, 4], 1), of([4, 9], 2), 0.5).unwrap()
        };
        let linear = LoRALinear::new(w.to_device(&device).unwrap(), None, Some(adapter())).unwrap();
        let want = LoRALinear::new(dense, None, Some(adapter())).unwrap();
        let x = Var::from_tensor(&random(&[7, 32], DType::F32, 3).to_device(&device).unwrap()).unwrap();
        let g = random(&[7, 9], DType::F32, 4).to_device(&device).unwrap();
        let (y, want_y) = (linear.forward(&x).unwrap(), want.forward(&x).unwrap());
        assert_close("y", &y, &f64s(&want_y));
        assert_close("the plain y", &linear.forward_saved(&x, None).unwrap().0, &f64s(&want_y));
        let want_dx = gradients(&want_y, &g);
        assert_close("dx", gradients(&y, &g).get(&x).unwrap(), &f64s(want_dx.get(&x).unwrap()));
        let dx = x.zeros_like().unwrap().detach();
        let backward = |dw| linear.backward(&x, None, &g, None, Some(&dx), None, None, dw, None);
        backward(None).unwrap();
        assert_close("the plain dx", &dx, &f64s(want_dx.get(&x).unwrap()));
        let error = backward(Some(&dx)).unwrap_err().to_string();
        assert!(error.contains("dw"), "{error}");
    }
}

#[test]
fn errors_name_the_parts_and_their_shapes() {
    let zeros = |rows, columns| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu).unwrap();
    let message = |result: metal_candle::Result<LoRALinear>| result.unwrap_err().to_string();
    let adapter = || LoRALayer::from_tensors(zeros(12, 4), zeros(4, 9), 1.0).unwrap();
    let error = message(LoRALinear::new(zeros(9, 11), None, Some(adapter())));
    assert!(error.contains("a [12, 4]") && error.contains("b [4, 9]") && error.contains("weight [9, 11]"), "{error}");
    let bias = Tensor::zeros(8, DType::F32, &Device::Cpu).unwrap();
    let error = message(LoRALinear::new(zeros(9, 12), Some(bias), Some(adapter())));
    assert!(error.contains("bias [8]") && error.contains("weight [9, 12]"), "{error}");
    let error = LoRALayer::from_tensors(zeros(12, 4), zeros(5, 9), 1.0).unwrap_err().to_string();
    assert!(error.contains("a [12, 4]") && error.contains("b [5, 9]"), "{error}");
    let error = adapter().forward(&zeros(2, 11)).unwrap_err().to_string();
    assert!(error.contains("x [2, 11]") && error.contains("a [12, 4]"), "{error}");
}
