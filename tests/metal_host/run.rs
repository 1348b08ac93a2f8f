//! One plan on the CPU host: its inputs, and what the reference says that it must write.
#![allow(dead_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use candle_core::{DType, Tensor};
use metal_candle::backend::metal::plan::{Plan, Slot};

use crate::common::{relative_error, tolerance};
use crate::harness::{self, Host, Tensors};

/// Orders of threads that every case runs under.
pub const ORDERS: u32 = 3;

/// Kernels that some test ran.
pub static RAN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// A tensor that a plan must write.
#[derive(Clone)]
pub struct Want {
    slot: Slot,
    dtype: DType,
    values: Vec<f64>,
    limit: f64,
    floor: f64,
}

pub fn want(slot: Slot, dtype: DType, values: Vec<f64>) -> Want {
    Want { slot, dtype, values, limit: tolerance(dtype), floor: 0.0 }
}

impl Want {
    /// Where something was rounded to another dtype on the way.
    pub fn within(self, limit: f64) -> Self {
        Self { limit, ..self }
    }

    /// Values that are small differences of larger ones are judged as if the largest were this.
    pub fn at_least(self, floor: f64) -> Self {
        Self { floor, ..self }
    }

    /// The limit as a share of the largest value of `got`, which saved cases are compared with.
    fn relative_limit(&self, got: &[f64]) -> f64 {
        let largest = |values: &[f64]| {
            let finite = values.iter().filter(|value| value.is_finite());
            finite.fold(0.0, |largest: f64, value| largest.max(value.abs()))
        };
        let got = largest(got);
        if got > 0.0 { self.limit * largest(&self.values).max(self.floor) / got } else { self.limit }
    }
}

/// A plan with its inputs and what it must write.
#[derive(Clone)]
pub struct Run {
    pub what: String,
    pub plan: Plan,
    pub tensors: Tensors,
    pub want: Vec<Want>,
}

impl Run {
    /// `given`: what is read or added to. Every other wanted tensor starts as NaN.
    pub fn new(what: String, plan: Plan, given: &[(Slot, &Tensor)], want: Vec<Want>) -> Self {
        let given: BTreeMap<_, _> = given.iter().map(|(slot, tensor)| (*slot, bytes(tensor))).collect();
        let made = want.iter().filter(|want| !given.contains_key(&want.slot));
        let made = made.map(|want| (want.slot, want.values.len() * want.dtype.size_in_bytes())).collect();
        Self { what, plan, tensors: Tensors { given, made }, want }
    }

    /// Values within the tolerance of their dtype, the same bits in every order of threads.
    pub fn check(&self, host: &Host) -> Result<(), String> {
        RAN.lock().unwrap().extend(self.plan.launches.iter().map(|launch| launch.kernel.clone()));
        let got = host.run(&self.plan, &self.tensors, ORDERS).map_err(|error| format!("{}: {error}", self.what))?;
        let limit = |want: &Want| want.relative_limit(&values(&got[&want.slot], want.dtype));
        let written: Vec<_> = self.want.iter().map(|want| (want.slot, want.dtype, limit(want))).collect();
        harness::save_case(&self.what, &self.plan, &self.tensors, &got, &written);
        for Want { slot, dtype, values: want, limit, floor } in &self.want {
            let error = distance(&values(&got[slot], *dtype), want, *floor);
            if error > *limit {
                return Err(format!("{}: {slot:?}: error {error:.2e} is over {limit:.1e}", self.what));
            }
        }
        Ok(())
    }
}

/// [`relative_error`] over the finite values; others must be the same.
fn distance(got: &[f64], want: &[f64], floor: f64) -> f64 {
    let same = |(got, want): (&f64, &f64)| want.is_finite() || got == want || (got.is_nan() && want.is_nan());
    if got.len() != want.len() || !got.iter().zip(want).all(same) {
        return f64::INFINITY;
    }
    let finite = got.iter().zip(want).filter(|(_, want)| want.is_finite());
    let (got, want): (Vec<f64>, Vec<f64>) = finite.chain([(&floor, &floor)]).unzip();
    relative_error(&got, &want)
}

/// Values plus what was there before: 1.
pub fn plus_one(values: &[f64]) -> Vec<f64> {
    values.iter().map(|value| value + 1.0).collect()
}

pub fn bytes(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::F16 => flat.to_vec1::<half::f16>().unwrap().iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::BF16 => flat.to_vec1::<half::bf16>().unwrap().iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::U8 => flat.to_vec1().unwrap(),
        _ => flat.to_vec1::<f32>().unwrap().iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

pub fn values(bytes: &[u8], dtype: DType) -> Vec<f64> {
    match dtype {
        DType::F16 => bytes.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
        DType::BF16 => bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f64).collect(),
    }
}
