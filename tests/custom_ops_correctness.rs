//! The LoRA ops agree with the f64 reference on every device of this machine: every dtype, shape, layout and rank, forward
//! and backward, with and without dropout, on the tape and off it.
#![allow(missing_docs)]

mod common;

use candle_core::{DType, Device, Tensor, Var};
use common::{assert_close, assert_within, devices, f64s, offset, random, strided, tolerance, transposed};
use metal_candle::backend::custom_ops::lora_linear::lora_linear_with_dropout;
use metal_candle::backend::custom_ops::{
    self as ops, FusedLoRAOp, Sink, fused_lora, fused_lora_with_dropout, lora_linear,
};
use metal_candle::backend::dropout::Dropout;
use metal_candle::backend::reference::{self, fused_lora::Problem};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// Inputs of one call on one device.
#[derive(Debug, Clone)]
struct Case {
    x: Tensor,
    a: Tensor,
    b: Tensor,
    w: Tensor,
    bias: Tensor,
    g: Tensor,
    s: f64,
    dropout: Option<Dropout>,
}

impl Case {
    /// Random and contiguous: x `[leading.., k]`, A `[k, r]`, B `[r, n]`; alpha is 10, which no rank here equals often.
    fn new(leading: &[usize], [k, r, n]: [usize; 3], x: DType, adapter: DType, device: &Device) -> Self {
        let with = |last| [leading, &[last]].concat();
        let random = |shape: &[usize], dtype, seed| random(shape, dtype, seed).to_device(device).unwrap();
        Self {
            x: random(&with(k), x, 1),
            a: random(&[k, r], adapter, 2),
            b: random(&[r, n], adapter, 3),
            w: random(&[n, k], x, 4),
            bias: random(&[n], x, 5),
            g: random(&with(n), x, 6),
            s: 10.0 / r as f64,
            dropout: None,
        }
    }

    fn problem(&self) -> Problem {
        let (k, r, n) = (self.a.dims()[0], self.a.dims()[1], self.b.dims()[1]);
        let mask = self.dropout.map(|dropout| {
            (0..self.x.elem_count() as u64).map(|index| dropout.factor(index) as f64).collect::<Vec<_>>()
        });
        let size = [self.x.elem_count() / k, k, r, n];
        Problem { size, x: f64s(&self.x), a: f64s(&self.a), b: f64s(&self.b), s: self.s, mask }
    }

    /// Both ops, plain and on the tape, forward and backward, against the reference.
    #[track_caller]
    fn check(&self, what: &str) {
        self.check_fused_lora(what);
        self.check_lora_linear(what);
    }

    #[track_caller]
    fn check_fused_lora(&self, what: &str) {
        let Self { x, a, b, g, s, dropout, .. } = self;
        let (problem, g64) = (self.problem(), f64s(g));
        let (delta, h) = reference::fused_lora::forward(&problem);
        let (dx, da, db) = reference::fused_lora::backward(&problem, &g64);

        let got = ops::fused_lora::delta(x, a, b, *s, *dropout).unwrap();
        assert_eq!((got.dims(), got.dtype()), (g.dims(), x.dtype()), "{what}");
        assert_close(&format!("{what}: delta"), &got, &delta);

        let y = g.zeros_like().unwrap().affine(1.0, 1.0).unwrap();
        let got = ops::fused_lora::add_into(&y, x, a, b, *s, *dropout).unwrap();
        assert_close(&format!("{what}: h"), &got, &h);
        let plus_one: Vec<f64> = delta.iter().map(|delta| delta + 1.0).collect();
        assert_close(&format!("{what}: y += delta"), &y, &plus_one);

        for h in [Some(&got), None] {
            let what = format!("{what}, h {}", if h.is_some() { "kept" } else { "computed again" });
            self.check_backward(&what, (&dx, &da, &db), |sink| {
                ops::fused_lora::backward(x, a, b, h, g, *s, *dropout, sink).unwrap();
            });
        }
        let tape = |x: &Tensor, a: &Tensor, b: &Tensor| fused_lora_with_dropout(x, a, b, *s, *dropout).unwrap();
        self.check_tape(what, &ops::fused_lora::delta(x, a, b, *s, *dropout).unwrap(), (&dx, &da, &db), tape);
    }

    #[track_caller]
    fn check_lora_linear(&self, what: &str) {
        let Self { x, a, b, w, bias, g, s, dropout } = self;
        let what = format!("{what}, lora_linear");
        let (problem, w64, g64) = (self.problem(), f64s(w), f64s(g));
        let (dx, da, db) = reference::lora_linear::backward(&problem, &w64, &g64);
        for bias in [Some(bias), None] {
            let bias64 = bias.map(f64s);
            let (y, h) = reference::lora_linear::forward(&problem, &w64, bias64.as_deref());
            let (got_y, got_h) = ops::lora_linear::forward(x, w, bias, a, b, *s, *dropout).unwrap();
            assert_eq!((got_y.dims(), got_y.dtype()), (g.dims(), x.dtype()), "{what}");
            assert_close(&format!("{what}: y"), &got_y, &y);
            assert_close(&format!("{what}: h"), &got_h, &h);
            self.check_backward(&what, (&dx, &da, &db), |sink| {
                ops::lora_linear::backward(x, w, a, b, Some(&got_h), g, *s, *dropout, sink).unwrap();
            });
            let tape =
                |x: &Tensor, a: &Tensor, b: &Tensor| lora_linear_with_dropout(x, w, bias, a, b, *s, *dropout).unwrap();
            self.check_tape(&what, &got_y, (&dx, &da, &db), tape);
        }
    }

    /// Gradients are added to what the buffers hold, in the dtypes that they have, and only to those that are given.
    #[track_caller]
    fn check_backward(&self, what: &str, (dx, da, db): (&[f64], &[f64], &[f64]), run: impl Fn(Sink)) {
        // By way of the CPU: Candle makes no tensor without elements on a CUDA device.
        let ones = |like: &Tensor, dtype| {
            Tensor::ones(like.shape(), dtype, &Device::Cpu).unwrap().to_device(like.device()).unwrap()
        };
        let added = |gradient: &[f64]| gradient.iter().map(|value| value + 1.0).collect::<Vec<f64>>();
        let (da_sink, db_sink) = (ones(&self.a, DType::F32), ones(&self.b, DType::F32));
        for dtype in [self.x.dtype(), DType::F32] {
            let dx_sink = ones(&self.x, dtype);
            run(Sink { dx: Some(&dx_sink), ..Sink::default() });
            assert_close(&format!("{what}: dx in {dtype:?}"), &dx_sink, &added(dx));
        }
        run(Sink { da: Some(&da_sink), db: Some(&db_sink), dx: None });
        assert_close(&format!("{what}: dA"), &da_sink, &added(da));
        assert_close(&format!("{what}: dB"), &db_sink, &added(db));
        let before = f64s(&da_sink);
        run(Sink { db: Some(&db_sink), ..Sink::default() });
        assert_eq!(before, f64s(&da_sink), "{what}: dA was not asked for");
    }

    /// The tape's form gives the plain form's values and the reference's gradients.
    #[track_caller]
    fn check_tape(
        &self,
        what: &str,
        plain: &Tensor,
        (dx, da, db): (&[f64], &[f64], &[f64]),
        op: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor,
    ) {
        let [x, a, b] = [&self.x, &self.a, &self.b].map(|tensor| Var::from_tensor(tensor).unwrap());
        let y = op(&x, &a, &b);
        assert_same(&format!("{what}: tape"), &y, plain);
        let gradients = y.mul(&self.g).unwrap().sum_all().unwrap().backward().unwrap();
        let limit = tolerance(self.x.dtype());
        for (name, variable, want) in [("dx", &x, dx), ("dA", &a, da), ("dB", &b, db)] {
            let got = gradients.get(variable).unwrap_or_else(|| panic!("{what}: {name} is missing"));
            assert_eq!((got.dims(), got.dtype()), (variable.dims(), variable.dtype()), "{what}: {name}");
            assert_within(&format!("{what}: tape's {name}"), got, want, limit.max(tolerance(got.dtype())));
        }
    }
}

/// Equal bits on the CPU; within the tolerance elsewhere, where sums may take another order.
#[track_caller]
fn assert_same(what: &str, got: &Tensor, want: &Tensor) {
    if got.device().is_cpu() {
        assert_eq!(f64s(got), f64s(want), "{what}");
    } else {
        assert_close(what, got, &f64s(want));
    }
}

fn for_devices(run: impl Fn(&Device)) {
    devices().iter().for_each(run);
}

#[test]
fn test_fused_lora_correctness() {
    for_devices(|device| {
        let case = Case::new(&[2, 64], [512, 8, 512], DType::F32, DType::F32, device);
        // A as a new layer has it, within ±1/√k.
        let case = Case { s: 2.0, a: (&case.a / 512_f64.sqrt()).unwrap(), ..case };
        let (delta, h) = reference::fused_lora::forward(&case.problem());
        let (dx, da, db) = reference::fused_lora::backward(&case.problem(), &f64s(&case.g));
        let op = FusedLoRAOp::new(case.a.clone(), case.b.clone(), 2.0).unwrap();
        let composite = case.x.reshape((128, 512)).unwrap().matmul(&case.a).unwrap();
        let composite = (composite.matmul(&case.b).unwrap() * 2.0).unwrap().reshape((2, 64, 512)).unwrap();

        let [x, a, b] = [&case.x, &case.a, &case.b].map(|tensor| Var::from_tensor(tensor).unwrap());
        let y = fused_lora(&x, &a, &b, 2.0).unwrap();
        let gradients = y.mul(&case.g).unwrap().sum_all().unwrap().backward().unwrap();
        let y_sum = Tensor::zeros(case.g.shape(), DType::F32, device).unwrap();
        let got_h = ops::fused_lora::add_into(&y_sum, &case.x, &case.a, &case.b, 2.0, None).unwrap();

        println!("fused_lora on {:?}: x [2, 64, 512], A [512, 8], B [8, 512], s = 2, f32", device.location());
        println!("against the f64 reference:");
        let outputs = [
            ("FusedLoRAOp", case.x.apply_op1(op).unwrap(), &delta),
            ("fused_lora", y.detach(), &delta),
            ("add_into", y_sum, &delta),
            ("h = x A", got_h, &h),
            ("Candle's own ops", composite, &delta),
        ];
        for (what, got, want) in outputs {
            let (difference, largest) = difference(&got, want);
            println!("  {what:<16} max abs difference {difference:.2e}, largest value {largest:.1}");
            assert!(largest > 0.5 && difference < 1e-4, "{what}: max abs difference {difference:.3e}");
        }
        for (what, variable, want) in [("dx", &x, &dx), ("dA", &a, &da), ("dB", &b, &db)] {
            let got = gradients.get(variable).unwrap();
            let (difference, largest) = difference(got, want);
            println!("  {what:<16} max abs difference {difference:.2e}, largest value {largest:.1}");
            assert_close(what, got, want);
        }
    });
}

/// `max |got - want|` and `max |want|`; NaN counts as infinitely far.
fn difference(got: &Tensor, want: &[f64]) -> (f64, f64) {
    let far = |difference: f64| if difference.is_nan() { f64::INFINITY } else { difference };
    let pairs = f64s(got).into_iter().zip(want);
    let difference = pairs.map(|(got, want)| far((got - want).abs())).fold(0.0, f64::max);
    (difference, want.iter().fold(0.0, |largest, want| f64::max(largest, want.abs())))
}

/// dtypes of x and of the adapter that are taken together.
const MIXES: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F32),
    (DType::BF16, DType::F32),
];

#[test]
fn every_dtype_and_odd_shapes() {
    for_devices(|device| {
        for (x, adapter) in MIXES {
            for (leading, size) in [(&[5, 3][..], [123, 5, 77]), (&[70], [33, 8, 65]), (&[2, 1, 3], [1, 1, 1])] {
                let case = Case::new(leading, size, x, adapter, device);
                case.check(&format!("{x:?} with {adapter:?}, x {leading:?} + {size:?}"));
            }
        }
    });
}

/// x of rank 1 to 4, and long enough for several tiles and tasks.
#[test]
fn every_rank_of_x() {
    for_devices(|device| {
        for leading in [&[][..], &[1], &[5], &[2, 3], &[2, 1, 3], &[300]] {
            Case::new(leading, [40, 4, 24], DType::F32, DType::F32, device).check(&format!("x {leading:?} + [40]"));
        }
        // The shape of the brief, (5, 123, 77): 5 rows from 123 to 77 columns.
        Case::new(&[5], [123, 6, 77], DType::F32, DType::F32, device).check("(5, 123, 77)");
    });
}

#[test]
fn every_adapter_rank_to_256() {
    for_devices(|device| {
        for rank in 1..=256 {
            Case::new(&[5], [23, rank, 19], DType::F32, DType::F32, device).check_fused_lora(&format!("rank {rank}"));
        }
        for rank in [1, 16, 17, 100, 256] {
            Case::new(&[37], [64, rank, 48], DType::BF16, DType::F32, device).check(&format!("bf16, rank {rank}"));
        }
    });
}

#[test]
fn no_rows_give_empty_outputs_and_leave_buffers_alone() {
    for_devices(|device| {
        for (leading, dtype) in [(&[0][..], DType::F32), (&[2, 0], DType::BF16)] {
            Case::new(leading, [12, 4, 9], dtype, DType::F32, device)
                .check(&format!("x {leading:?} + [12], {dtype:?}"));
        }
    });
}

#[test]
fn strided_transposed_and_offset_views() {
    type View = fn(&Tensor) -> Tensor;
    let views: [(&str, View); 3] = [("strided", strided), ("transposed", transposed), ("offset", offset)];
    for_devices(|device| {
        for (x, adapter) in [MIXES[0], MIXES[4]] {
            let case = Case::new(&[3, 7], [21, 4, 18], x, adapter, device);
            for (name, view) in views {
                let Case { x, a, b, w, g, .. } = &case;
                Case { x: view(x), ..case.clone() }.check(&format!("{name} x"));
                Case { a: view(a), ..case.clone() }.check(&format!("{name} A"));
                Case { b: view(b), ..case.clone() }.check(&format!("{name} B"));
                Case { g: view(g), ..case.clone() }.check(&format!("{name} g"));
                Case { w: view(w), ..case.clone() }.check_lora_linear(&format!("{name} W"));
            }
            let mixed = Case { x: transposed(&case.x), a: strided(&case.a), b: offset(&case.b), ..case.clone() };
            Case { g: strided(&case.g), bias: strided(&case.bias), ..mixed }.check("every input a view");
            let column = case.x.narrow(0, 1, 1).unwrap().broadcast_as((3, 7, 21)).unwrap();
            Case { x: column, ..case.clone() }.check("broadcast x");
        }
    });
}

/// Buffers of gradients may be views into one larger buffer; what lies around them is not touched.
#[test]
fn gradients_go_into_views() {
    for_devices(|device| {
        let case = Case::new(&[6], [10, 3, 8], DType::F32, DType::F32, device);
        let buffer = Tensor::ones(100, DType::F32, device).unwrap();
        let part =
            |start, shape: (usize, usize)| buffer.narrow(0, start, shape.0 * shape.1).unwrap().reshape(shape).unwrap();
        let sink = Sink { dx: None, da: Some(&part(5, (10, 3))), db: Some(&part(40, (3, 8))) };
        ops::fused_lora::backward(&case.x, &case.a, &case.b, None, &case.g, case.s, None, sink).unwrap();
        let (_, da, db) = reference::fused_lora::backward(&case.problem(), &f64s(&case.g));
        let mut want = vec![1.0; 100];
        want[5..35].iter_mut().zip(da).for_each(|(to, from)| *to += from);
        want[40..64].iter_mut().zip(db).for_each(|(to, from)| *to += from);
        assert_close("the buffer", &buffer, &want);
    });
}

/// The delta is linear in each of x, A and B alone, so a central difference of any step is exact but for rounding.
#[test]
fn gradients_are_finite_differences() {
    for_devices(|device| {
        let case = Case::new(&[2, 2], [7, 3, 5], DType::F32, DType::F32, device);
        let [x, a, b] = [&case.x, &case.a, &case.b].map(|tensor| Var::from_tensor(tensor).unwrap());
        let ops: [(&str, Op); 2] = [
            ("fused_lora", Box::new(|x, a, b| fused_lora(x, a, b, case.s).unwrap())),
            ("lora_linear", Box::new(|x, a, b| lora_linear(x, &case.w, Some(&case.bias), a, b, case.s).unwrap())),
        ];
        for (op_name, op) in &ops {
            let loss = |x: &Tensor, a: &Tensor, b: &Tensor| -> f64 {
                f64s(&op(x, a, b)).iter().zip(f64s(&case.g)).map(|(y, g)| y * g).sum()
            };
            let gradients = op(&x, &a, &b).mul(&case.g).unwrap().sum_all().unwrap().backward().unwrap();
            for (index, (name, variable)) in [("dx", &x), ("dA", &a), ("dB", &b)].into_iter().enumerate() {
                let slope = |element: usize| {
                    let [up, down] = [0.5, -0.5].map(|by| {
                        let mut values = f64s(variable);
                        values[element] += by;
                        let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
                        let moved = Tensor::from_vec(values, variable.dims(), device).unwrap();
                        let mut inputs = [x.as_tensor(), a.as_tensor(), b.as_tensor()];
                        inputs[index] = &moved;
                        loss(inputs[0], inputs[1], inputs[2])
                    });
                    up - down
                };
                let slopes: Vec<f64> = (0..variable.elem_count()).map(slope).collect();
                assert_close(&format!("{op_name}: {name}"), gradients.get(variable).unwrap(), &slopes);
            }
        }
    });
}

type Op<'a> = Box<dyn Fn(&Tensor, &Tensor, &Tensor) -> Tensor + 'a>;

/// Backward draws the mask that forward drew: both agree with the reference under one explicit mask.
#[test]
fn dropout_is_the_same_in_forward_and_backward() {
    for_devices(|device| {
        for (x, adapter) in [MIXES[0], MIXES[4]] {
            let dropout = Some(Dropout { p: 0.3, seed: 1 << 40 | 7, stream: 3 << 33 | 5 });
            for size in [[123, 5, 77], [64, 8, 32]] {
                Case { dropout, ..Case::new(&[5, 9], size, x, adapter, device) }.check("dropout");
            }
            let case = Case { dropout, ..Case::new(&[3, 7], [21, 4, 18], x, adapter, device) };
            Case { x: transposed(&case.x), ..case.clone() }.check("dropout, transposed x");
            Case { x: offset(&case.x), ..case.clone() }.check("dropout, x with an offset");
        }
    });
}

/// With A and B all ones and k = 1 column, the delta shows each factor: 0 or 1 / (1 - p), the first with probability p.
#[test]
fn dropout_keeps_the_mean_and_drops_the_share() {
    for_devices(|device| {
        let (rows, p) = (40_000, 0.25_f32);
        let one = |shape: (usize, usize)| Tensor::ones(shape, DType::F32, device).unwrap();
        let factors = |seed, stream| {
            let dropout = Some(Dropout { p, seed, stream });
            f64s(&ops::fused_lora::delta(&one((rows, 1)), &one((1, 1)), &one((1, 1)), 1.0, dropout).unwrap())
        };
        let first = factors(1, 1);
        let kept = 1.0 / (1.0 - p as f64);
        assert!(first.iter().all(|&factor| factor == 0.0 || (factor - kept).abs() < 1e-6));
        // Six standard deviations of a share of 40,000 draws.
        let limit = 6.0 * (p as f64 * (1.0 - p as f64) / rows as f64).sqrt();
        let dropped = |factors: &[f64]| factors.iter().filter(|&&factor| factor == 0.0).count() as f64 / rows as f64;
        assert!((dropped(&first) - p as f64).abs() < limit, "{} of the elements are dropped", dropped(&first));
        assert_eq!(first, factors(1, 1), "the same seed and stream draw the same mask");
        for other in [factors(2, 1), factors(1, 2)] {
            let both = first.iter().zip(&other).filter(|(a, b)| **a == 0.0 && **b == 0.0).count() as f64 / rows as f64;
            assert!((both - (p * p) as f64).abs() < limit, "masks of two seeds or streams are independent: {both}");
        }
    });
}

/// The op of one argument: the same delta, a gradient for the input, none for A and B although they are variables.
#[test]
fn the_op_of_one_argument_trains_nothing() {
    for_devices(|device| {
        for (x, adapter) in MIXES {
            let case = Case::new(&[4, 3], [19, 4, 13], x, adapter, device);
            let [x, a, b] = [&case.x, &case.a, &case.b].map(|tensor| Var::from_tensor(tensor).unwrap());
            let op = FusedLoRAOp::new(a.as_tensor().clone(), b.as_tensor().clone(), case.s as f32).unwrap();
            let (delta, _) = reference::fused_lora::forward(&case.problem());
            let (dx, ..) = reference::fused_lora::backward(&case.problem(), &f64s(&case.g));
            let y = x.apply_op1(op.clone()).unwrap();
            assert_close("delta", &y, &delta);
            assert_same("a clone", &x.apply_op1(op.clone()).unwrap(), &y);
            assert_close("strided x", &strided(&x).apply_op1(op.clone()).unwrap(), &delta);
            assert_close("x with an offset", &offset(&x).apply_op1(op).unwrap(), &delta);
            let gradients = y.mul(&case.g).unwrap().sum_all().unwrap().backward().unwrap();
            assert_close("dx", gradients.get(&x).unwrap(), &dx);
            assert!(gradients.get(&a).is_none() && gradients.get(&b).is_none());
        }
    });
}

#[test]
fn errors_name_the_tensor_and_both_shapes() {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let f32s = |shape: &[usize]| zeros(shape, DType::F32);
    let (x, a, b, w) = (f32s(&[2, 6]), f32s(&[6, 3]), f32s(&[3, 4]), f32s(&[4, 6]));
    let message = |result: metal_candle::Result<Tensor>| result.unwrap_err().to_string();
    let cases = [
        (message(fused_lora(&f32s(&[2, 5]), &a, &b, 1.0)), &["fused_lora", "x [2, 5]", "a [6, 3]"][..]),
        (message(fused_lora(&x, &a, &f32s(&[2, 4]), 1.0)), &["a [6, 3]", "b [2, 4]"]),
        (message(fused_lora(&x, &f32s(&[6]), &b, 1.0)), &["a [6]", "b [3, 4]"]),
        (message(fused_lora(&f32s(&[]), &a, &b, 1.0)), &["x []"]),
        (message(fused_lora(&x, &f32s(&[6, 0]), &f32s(&[0, 4]), 1.0)), &["a [6, 0]", "b [0, 4]", "empty"]),
        (message(fused_lora(&zeros(&[2, 6], DType::I64), &a, &b, 1.0)), &["x", "I64", "F32, F16 or BF16"]),
        (message(fused_lora(&x, &zeros(&[6, 3], DType::F16), &b, 1.0)), &["a", "F16", "b", "F32"]),
        (
            message(fused_lora(&x, &zeros(&[6, 3], DType::F16), &zeros(&[3, 4], DType::F16), 1.0)),
            &["a and b", "F16", "x's F32"],
        ),
        (message(lora_linear(&x, &f32s(&[4, 7]), None, &a, &b, 1.0)), &["lora_linear", "w [4, 7]", "x [2, 6]"]),
        (message(lora_linear(&x, &f32s(&[5, 6]), None, &a, &b, 1.0)), &["w [5, 6]", "b [3, 4]"]),
        (message(lora_linear(&x, &w, Some(&f32s(&[5])), &a, &b, 1.0)), &["bias", "[5]", "[4]"]),
        (message(FusedLoRAOp::new(a.clone(), w.clone(), 1.0).map(|_| x.clone())), &["a [6, 3]", "b [4, 6]"]),
    ];
    for (message, parts) in cases {
        assert!(parts.iter().all(|part| message.contains(part)), "'{message}' lacks one of {parts:?}");
    }
    let dropout = Some(Dropout { p: 1.0, seed: 0, stream: 0 });
    assert!(message(fused_lora_with_dropout(&x, &a, &b, 1.0, dropout)).contains("dropout 1"));
    let op = FusedLoRAOp::new(a.clone(), b.clone(), 1.0).unwrap();
    let error = f32s(&[2, 5]).apply_op1(op).unwrap_err().to_string();
    assert!(error.contains("x [2, 5]") && error.contains("a [6, 3]"), "{error}");

    let backward = |g: &Tensor, sink: Sink| {
        ops::fused_lora::backward(&x, &a, &b, None, g, 1.0, None, sink).unwrap_err().to_string()
    };
    let error = backward(&f32s(&[2, 5]), Sink::default());
    assert!(error.contains("g has shape [2, 5]") && error.contains("[2, 4]"), "{error}");
    let error = backward(&f32s(&[2, 4]), Sink { da: Some(&zeros(&[6, 3], DType::BF16)), ..Sink::default() });
    assert!(error.contains("da has dtype BF16") && error.contains("F32"), "{error}");
    let error = backward(&f32s(&[2, 4]), Sink { db: Some(&f32s(&[4, 3])), ..Sink::default() });
    assert!(error.contains("db has shape [4, 3]") && error.contains("[3, 4]"), "{error}");
    let error = backward(&f32s(&[2, 4]), Sink { dx: Some(&f32s(&[6, 2]).t().unwrap()), ..Sink::default() });
    assert!(error.contains("dx") && error.contains("not contiguous"), "{error}");
}

/// Tensors of two devices; runs where there are two.
#[test]
fn a_mix_of_devices_is_an_error() {
    for device in devices().iter().filter(|device| !device.is_cpu()) {
        let here = Case::new(&[2], [6, 3, 4], DType::F32, DType::F32, &Device::Cpu);
        let there = Case::new(&[2], [6, 3, 4], DType::F32, DType::F32, device);
        let message = |x: &Tensor, a: &Tensor, b: &Tensor| fused_lora(x, a, b, 1.0).unwrap_err().to_string();
        for error in [message(&there.x, &here.a, &here.b), message(&here.x, &here.a, &there.b)] {
            assert!(error.contains("[6, 3]") && error.contains(" is on "), "{error}");
        }
        let error = lora_linear(&there.x, &here.w, None, &there.a, &there.b, 1.0).unwrap_err().to_string();
        assert!(error.contains("w [4, 6] is on") && error.contains("x [2, 6]"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    /// Any shape, dtype, layout and dropout.
    #[test]
    fn any_shape(
        leading in prop::collection::vec(0_usize..6, 0..=3),
        (k, r, n) in (1_usize..90, 1_usize..40, 1_usize..90),
        mix in 0..MIXES.len(),
        layout in 0..4,
        p in prop::option::of(0.0_f32..0.9),
    ) {
        for_devices(|device| {
            let (x, adapter) = MIXES[mix];
            let case = Case::new(&leading, [k, r, n], x, adapter, device);
            // Candle makes no view's copy without elements on a CUDA device.
            let layout = if case.x.elem_count() == 0 && device.is_cuda() { 0 } else { layout };
            let x = match layout {
                1 => strided(&case.x),
                2 if !leading.is_empty() => transposed(&case.x),
                3 => offset(&case.x),
                _ => case.x.clone(),
            };
            let dropout = p.map(|p| Dropout { p, seed: 11, stream: 2 });
            Case { x, dropout, ..case }.check(&format!("x {leading:?} + [{k}], r {r}, n {n}, {dropout:?}"));
        });
    }
}
