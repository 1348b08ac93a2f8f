//! What the tests of the kernels share: random tensors, views that are awkward on purpose, the tolerance table.
#![allow(dead_code, missing_docs)]

pub mod blocks;
pub mod tiny;

use std::process::Output;

use candle_core::{DType, Device, Tensor};
use metal_candle::backend::dropout::philox;

/// The largest accepted `max |got - want| / max |want|`, by the dtype of the values compared. Inputs are rounded to the
/// dtype before the reference sees them, so this bounds f32 sums plus one rounding of the result: half a unit in the last
/// place is 6e-8 (f32), 4.9e-4 (f16), 3.9e-3 (bf16).
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        DType::F16 => 1e-3,
        DType::BF16 => 8e-3,
        other => panic!("no tolerance for {other:?}"),
    }
}

pub const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Where the ops run: the CPU, or with `METAL_CANDLE_TEST_DEVICE=cuda` or `=metal` the first GPU.
pub fn test_device() -> Device {
    thread_local! {
        static DEVICE: Device = match std::env::var("METAL_CANDLE_TEST_DEVICE").as_deref() {
            Err(_) | Ok("cpu") => Device::Cpu,
            Ok("cuda") => {
                metal_candle::backend::cuda::check(0).unwrap();
                Device::new_cuda(0).unwrap()
            }
            Ok("metal") => Device::new_metal(0).unwrap(),
            Ok(other) => panic!("METAL_CANDLE_TEST_DEVICE is {other}; cpu, cuda and metal are known"),
        };
    }
    DEVICE.with(Device::clone)
}

/// Every device that this machine has. The CPU is first.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if candle_core::utils::cuda_is_available() {
        devices.push(Device::new_cuda(0).expect("CUDA is compiled in; is there a GPU?"));
    }
    if candle_core::utils::metal_is_available() {
        devices.push(Device::new_metal(0).expect("Metal is compiled in; is there a GPU?"));
    }
    devices
}

/// Uniform values in [-1, 1), the same on every machine: Philox with key `seed`.
pub fn uniform(count: usize, seed: u64) -> Vec<f32> {
    let key = [seed as u32, (seed >> 32) as u32];
    let blocks = (0..count.div_ceil(4)).flat_map(|block| philox([block as u32, (block >> 32) as u32, 0, 0], key));
    blocks.take(count).map(|word| (word >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// A contiguous CPU tensor of [`uniform`] values, rounded to `dtype`.
pub fn random(shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    let values = uniform(shape.iter().product(), seed);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

/// The same values in a tensor whose last dimension has stride 2, from an offset of 1; between them lies NaN.
pub fn strided(tensor: &Tensor) -> Tensor {
    let junk = nan(tensor.dims(), tensor);
    let last = tensor.rank();
    let view = Tensor::stack(&[&junk, tensor], last).unwrap().narrow(last, 1, 1).unwrap().squeeze(last).unwrap();
    assert!(tensor.elem_count() < 2 || !view.is_contiguous());
    view
}

/// The same values with the last two dimensions stored in the other order. Rank 2 or more.
pub fn transposed(tensor: &Tensor) -> Tensor {
    let last = tensor.rank() - 1;
    let stored = tensor.transpose(last - 1, last).unwrap().contiguous().unwrap();
    stored.transpose(last - 1, last).unwrap()
}

/// The same values, contiguous, but in the middle of a larger buffer; around them lies NaN. Rank 1 or more.
pub fn offset(tensor: &Tensor) -> Tensor {
    let mut dims = tensor.dims().to_vec();
    let rows = dims[0];
    dims[0] = 3;
    let junk = nan(&dims, tensor);
    let view = Tensor::cat(&[&junk, tensor, &junk], 0).unwrap().narrow(0, 3, rows).unwrap();
    assert!(view.is_contiguous());
    view
}

fn nan(dims: &[usize], like: &Tensor) -> Tensor {
    Tensor::full(f32::NAN, dims, like.device()).unwrap().to_dtype(like.dtype()).unwrap()
}

/// All values, row-major, exact.
pub fn f64s(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_device(&Device::Cpu).unwrap().flatten_all().unwrap();
    flat.to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

/// `max |got - want| / max |want|`; NaN anywhere gives infinity. Zero against zero is 0.
pub fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "number of values");
    let mut difference = 0.0_f64;
    let mut scale = 0.0_f64;
    for (got, want) in got.iter().zip(want) {
        if !got.is_finite() || !want.is_finite() {
            return f64::INFINITY;
        }
        difference = difference.max((got - want).abs());
        scale = scale.max(want.abs());
    }
    if difference == 0.0 { 0.0 } else { difference / scale }
}

/// Fails unless `got` is within the [`tolerance`] of its dtype of `want`.
#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &[f64]) {
    assert_within(what, got, want, tolerance(got.dtype()));
}

/// Fails unless `got` is within a relative `limit` of `want`.
#[track_caller]
pub fn assert_within(what: &str, got: &Tensor, want: &[f64], limit: f64) {
    let error = relative_error(&f64s(got), want);
    assert!(error <= limit, "{what}: relative error {error:.3e} is over {limit:.1e}");
}

/// What a run of the program printed; it must have ended well.
#[track_caller]
pub fn good(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Fails unless a run of the program ended with this code and said all these words, without a panic.
#[track_caller]
pub fn refused(output: &Output, code: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(!text.contains("panicked"), "{text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is missing: {text}");
    }
}
