//! Calls of the LoRA op on the CPU host, against the f64 reference.
#![allow(dead_code)]

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use metal_candle::backend::dropout::Dropout;
use metal_candle::backend::metal::plan::fused_lora::Call;
use metal_candle::backend::metal::plan::{Plan, Slot};
use metal_candle::backend::reference::fused_lora::{self, Problem};

use crate::common::{f64s, random, relative_error, tolerance};
use crate::harness::{self, Host, Tensors};
use crate::run::{ORDERS, RAN, bytes, plus_one, values};

/// dtypes of x and of the adapter that are taken together.
pub const MIXES: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F32),
    (DType::BF16, DType::F32),
];

/// A test's cases: what each is called, and the case.
pub type Cases = Vec<(String, Case)>;

/// Inputs of one call and what the reference makes of them.
pub struct Case {
    pub call: Call,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
}

impl Case {
    /// m rows, `[k, r, n]`; alpha is 10, which no rank here equals often.
    pub fn new(m: usize, [k, r, n]: [usize; 3], x: DType, adapter: DType) -> Self {
        let call = Call { batch: 1, seq: m, k, r, n, s: 10.0 / r as f64, dropout: None, x, adapter };
        let (a, b) = (random(&[k, r], adapter, 2), random(&[r, n], adapter, 3));
        Self { call, x: random(&[m, k], x, 1), a, b, g: random(&[m, n], x, 4) }
    }

    pub fn with_dropout(mut self) -> Self {
        self.call.dropout = Some(Dropout { p: 0.3, seed: 1 << 40 | 7, stream: 3 << 33 | 5 });
        self
    }

    fn problem(&self) -> Problem {
        let Call { k, r, n, s, dropout, .. } = self.call;
        let mask = dropout.map(|dropout| {
            (0..self.x.elem_count() as u64).map(|index| dropout.factor(index) as f64).collect::<Vec<_>>()
        });
        Problem { size: [self.call.rows(), k, r, n], x: f64s(&self.x), a: f64s(&self.a), b: f64s(&self.b), s, mask }
    }

    /// The inputs, and `others` with their values at the start.
    pub fn tensors(&self, others: &[(Slot, &Tensor)]) -> Tensors {
        let inputs = [(Slot::X, &self.x), (Slot::A, &self.a), (Slot::B, &self.b), (Slot::G, &self.g)];
        let given = inputs.iter().chain(others).map(|(slot, tensor)| (*slot, bytes(tensor))).collect();
        Tensors { given, made: BTreeMap::new() }
    }

    /// Every form, forward and backward, in every dtype that outputs may have.
    pub fn check(&self, host: &Host, what: &str) -> Result<(), String> {
        let Call { k, r, n, x, .. } = self.call;
        let m = self.call.rows();
        let (problem, g) = (self.problem(), f64s(&self.g));
        let (delta, h) = fused_lora::forward(&problem);
        let (dx, da, db) = fused_lora::backward(&problem, &g);
        let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
        let outputs = if x == DType::F32 { vec![x] } else { vec![x, DType::F32] };
        let run = |form: &str, plan: &Plan, tensors: &Tensors, written: &[(Slot, DType)]| {
            let names = plan.launches.iter().map(|launch| launch.kernel.clone());
            RAN.lock().unwrap().extend(names);
            let results = host.run(plan, tensors, ORDERS).map_err(|error| format!("{what}, {form}: {error}"))?;
            let written: Vec<_> = written.iter().map(|(slot, dtype)| (*slot, *dtype, tolerance(*dtype))).collect();
            harness::save_case(&format!("{what}, {form}"), plan, tensors, &results, &written);
            Ok::<_, String>(results)
        };
        let close = |form: &str, got: &[u8], dtype, want: &[f64]| {
            let error = relative_error(&values(got, dtype), want);
            let limit = tolerance(dtype);
            if error <= limit { Ok(()) } else { Err(format!("{what}, {form}: error {error:.2e} is over {limit:.1e}")) }
        };

        let mut tensors = self.tensors(&[]);
        tensors.made.insert(Slot::Y, m * n * x.size_in_bytes());
        let written = run("delta", &self.call.delta().unwrap(), &tensors, &[(Slot::Y, x)])?;
        close("delta", &written[&Slot::Y], x, &delta)?;

        let mut kept = None;
        for &y in &outputs {
            let mut tensors = self.tensors(&[(Slot::Y, &ones(&[m, n], y))]);
            tensors.made.insert(Slot::H, m * r * 4);
            let written = run(
                &format!("add_into {y:?}"),
                &self.call.add_into(y).unwrap(),
                &tensors,
                &[(Slot::Y, y), (Slot::H, DType::F32)],
            )?;
            close("y += delta", &written[&Slot::Y], y, &plus_one(&delta))?;
            close("h", &written[&Slot::H], DType::F32, &h)?;
            kept = Some(written[&Slot::H].clone());
        }

        for &dx_dtype in &outputs {
            for &g_dtype in &outputs {
                let g = self.g.to_dtype(g_dtype).unwrap();
                let sinks = [
                    (Slot::G, &g),
                    (Slot::Dx, &ones(&[m, k], dx_dtype)),
                    (Slot::Da, &ones(&[k, r], DType::F32)),
                    (Slot::Db, &ones(&[r, n], DType::F32)),
                ];
                // h from forward, or computed again.
                for h in [kept.as_ref().filter(|_| g_dtype == dx_dtype), None] {
                    let mut tensors = self.tensors(&sinks);
                    tensors.given.extend(h.map(|h| (Slot::H, h.clone())));
                    let plan = self.call.backward(g_dtype, Some(dx_dtype), true, true, h.is_some()).unwrap();
                    let form = format!("backward, g {g_dtype:?}, dx {dx_dtype:?}, h {}", h.is_some());
                    let written = run(
                        &form,
                        &plan,
                        &tensors,
                        &[(Slot::Dx, dx_dtype), (Slot::Da, DType::F32), (Slot::Db, DType::F32)],
                    )?;
                    close(&format!("{form}: dx"), &written[&Slot::Dx], dx_dtype, &plus_one(&dx))?;
                    close(&format!("{form}: dA"), &written[&Slot::Da], DType::F32, &plus_one(&da))?;
                    close(&format!("{form}: dB"), &written[&Slot::Db], DType::F32, &plus_one(&db))?;
                }
            }
        }
        Ok(())
    }
}
