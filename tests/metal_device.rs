//! The Metal kernels on an Apple GPU, called without a fallback: an error is the compiler's or the driver's own text.
#![cfg(all(target_vendor = "apple", feature = "custom-metal"))]
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{assert_close, assert_within, f64s, offset, random, strided, tolerance, transposed};
use metal_candle::backend::custom_ops::{FusedLoRAOp, Sink, fused_lora_with_dropout};
use metal_candle::backend::dropout::Dropout;
use metal_candle::backend::metal::fused_lora as kernels;
use metal_candle::backend::reference::fused_lora::{self as reference, Problem};
use metal_candle::training::LoRALayer;

const MIXES: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F32),
    (DType::BF16, DType::F32),
];

fn metal() -> Option<Device> {
    let device = Device::new_metal(0).ok();
    if device.is_none() {
        println!("SKIPPED: this machine has no Metal device");
    }
    device
}

struct Case {
    x: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    s: f64,
    dropout: Option<Dropout>,
}

impl Case {
    fn new(leading: &[usize], [k, r, n]: [usize; 3], x: DType, adapter: DType, device: &Device) -> Self {
        let random = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(device).unwrap();
        let (a, b) = (random(&[k, r], adapter, 2), random(&[r, n], adapter, 3));
        let g = random(&[leading, &[n]].concat(), x, 4);
        Self { x: random(&[leading, &[k]].concat(), x, 1), a, b, g, s: 10.0 / r as f64, dropout: None }
    }

    fn check(&self, what: &str) {
        let Self { x, a, b, g, s, dropout } = self;
        let (k, r, n) = (a.dims()[0], a.dims()[1], b.dims()[1]);
        let mask = dropout
            .map(|dropout| (0..x.elem_count() as u64).map(|index| dropout.factor(index) as f64).collect::<Vec<_>>());
        let size = [x.elem_count() / k, k, r, n];
        let problem = Problem { size, x: f64s(x), a: f64s(a), b: f64s(b), s: *s, mask };
        let (delta, h) = reference::forward(&problem);
        let (dx, da, db) = reference::backward(&problem, &f64s(g));
        let plus_one = |values: &[f64]| values.iter().map(|value| value + 1.0).collect::<Vec<_>>();
        let ones = |like: &Tensor, dtype| Tensor::ones(like.shape(), dtype, like.device()).unwrap();

        let y = kernels::delta(x, a, b, *s, *dropout).unwrap();
        assert_eq!((y.dims(), y.dtype()), (g.dims(), x.dtype()), "{what}");
        assert_close(&format!("{what}: delta"), &y, &delta);
        for dtype in [x.dtype(), DType::F32] {
            let y = ones(g, dtype);
            let got = kernels::add_into(&y, x, a, b, *s, *dropout).unwrap();
            assert_close(&format!("{what}: h"), &got, &h);
            assert_close(&format!("{what}: y += delta"), &y, &plus_one(&delta));
            let (dx_sink, da_sink, db_sink) = (ones(x, dtype), ones(a, DType::F32), ones(b, DType::F32));
            let sink = Sink { dx: Some(&dx_sink), da: Some(&da_sink), db: Some(&db_sink) };
            kernels::backward(x, a, b, Some(&got), g, *s, *dropout, &sink).unwrap();
            assert_close(&format!("{what}: dx"), &dx_sink, &plus_one(&dx));
            assert_close(&format!("{what}: dA"), &da_sink, &plus_one(&da));
            assert_close(&format!("{what}: dB"), &db_sink, &plus_one(&db));
        }

        let [x, a, b] = [x, a, b].map(|tensor| Var::from_tensor(tensor).unwrap());
        kernels::ready(&x, &a, &b).unwrap();
        let y = fused_lora_with_dropout(&x, &a, &b, *s, *dropout).unwrap();
        let gradients = y.mul(g).unwrap().sum_all().unwrap().backward().unwrap();
        for (name, variable, want) in [("dx", &x, &dx), ("dA", &a, &da), ("dB", &b, &db)] {
            let got = gradients.get(variable).unwrap();
            let limit = tolerance(x.dtype()).max(tolerance(got.dtype()));
            assert_within(&format!("{what}: tape's {name}"), got, want, limit);
        }
    }
}

#[test]
fn every_tile_in_every_dtype() {
    let Some(device) = metal() else { return };
    for (x, adapter) in MIXES {
        for (leading, size) in [
            (&[1, 1][..], [512, 16, 512]),
            (&[1, 128], [512, 8, 512]),
            (&[5, 3], [123, 5, 77]),
            (&[2, 1025], [123, 9, 77]),
            (&[70], [64, 256, 48]),
        ] {
            Case::new(leading, size, x, adapter, &device)
                .check(&format!("{x:?} with {adapter:?}, {leading:?}, {size:?}"));
        }
    }
}

#[test]
fn dropout_views_and_no_rows() {
    let Some(device) = metal() else { return };
    let case = || Case::new(&[3, 7], [21, 4, 18], DType::F32, DType::F32, &device);
    let dropout = Some(Dropout { p: 0.3, seed: 1 << 40 | 7, stream: 3 << 33 | 5 });
    Case { dropout, ..case() }.check("dropout");
    let Case { x, a, b, g, s, .. } = case();
    let views = Case { x: transposed(&x), a: strided(&a), b: offset(&b), g: strided(&g), s, dropout };
    views.check("every input a view, with dropout");
    Case::new(&[0], [12, 4, 9], DType::F32, DType::F32, &device).check("no rows");
}

#[test]
fn equal_inputs_give_equal_bits() {
    let Some(device) = metal() else { return };
    let Case { x, a, b, g, s, .. } = Case::new(&[1000], [200, 16, 120], DType::F32, DType::F32, &device);
    let run = || {
        let zeros = |like: &Tensor| like.zeros_like().unwrap();
        let (dx, da, db) = (zeros(&x), zeros(&a), zeros(&b));
        let sink = Sink { dx: Some(&dx), da: Some(&da), db: Some(&db) };
        kernels::backward(&x, &a, &b, None, &g, s, None, &sink).unwrap();
        [f64s(&kernels::delta(&x, &a, &b, s, None).unwrap()), f64s(&dx), f64s(&da), f64s(&db)]
    };
    let first = run();
    for _ in 0..5 {
        assert_eq!(first, run());
    }
}

#[test]
fn layers_and_the_op_of_one_argument_take_the_kernels() {
    let Some(device) = metal() else { return };
    let Case { x, a, b, s, .. } = Case::new(&[2, 5], [40, 8, 24], DType::F32, DType::F32, &device);
    let want = f64s(&kernels::delta(&x, &a, &b, s, None).unwrap());
    let op = FusedLoRAOp::new(a.clone(), b.clone(), s as f32).unwrap();
    assert_close("FusedLoRAOp", &x.apply_op1(op).unwrap(), &want);
    assert_close("LoRALayer", &LoRALayer::from_tensors(a, b, s).unwrap().forward(&x).unwrap(), &want);
}

#[test]
fn a_gradient_buffer_with_gaps_is_refused() {
    let Some(device) = metal() else { return };
    let Case { x, a, b, g, s, .. } = Case::new(&[6], [10, 4, 8], DType::F32, DType::F32, &device);
    let da = strided(&a);
    let sink = Sink { da: Some(&da), ..Sink::default() };
    let error = kernels::backward(&x, &a, &b, None, &g, s, None, &sink).unwrap_err().to_string();
    assert!(error.contains("da") && error.contains("contiguous"), "{error}");
}
