//! Random quantized matrices of every kind, with the values that they stand for.

use candle_core::quantized::QTensor;
use candle_core::{DType, Device};
use metal_candle::backend::quantized::{Kind, QuantizedTensor};

use super::{f64s, random};

/// A random matrix `[n, k]` of a kind on the CPU, and its values: as Candle dequantizes them for llama.cpp's kinds, as they were made
/// for the others.
pub fn blocks(kind: Kind, (n, k): (usize, usize), seed: u64) -> (QuantizedTensor, Vec<f64>) {
    if let Some(dtype) = kind.ggml() {
        let dense = random(&[n, k], DType::F32, seed);
        let values = QTensor::quantize(&dense, dtype).unwrap().dequantize(&Device::Cpu).unwrap();
        return (QuantizedTensor::quantize(&dense, kind).unwrap(), f64s(&values));
    }
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for _ in 0..n * k / kind.block_len() {
        let (scale, min) = (rng.f32() + 0.5, if kind == Kind::Nf4 { 0.0 } else { -4.0 * rng.f32() });
        bytes.extend(scale.to_le_bytes());
        if kind != Kind::Nf4 {
            bytes.extend(min.to_le_bytes());
        }
        for _ in 0..kind.block_len() / 32 {
            let codes: Vec<u8> =
                (0..32).map(|_| if kind == Kind::Affine8 { rng.u8(..) } else { rng.u8(..16) }).collect();
            match kind {
                Kind::Affine8 => bytes.extend(&codes),
                _ => bytes.extend((0..16).map(|j| codes[j] | codes[j + 16] << 4)),
            }
            let value = |code: u8| if kind == Kind::Nf4 { NF4[usize::from(code)] } else { f64::from(code) };
            values.extend(codes.into_iter().map(|code| f64::from(scale) * value(code) + f64::from(min)));
        }
    }
    (QuantizedTensor::new(kind, bytes, (n, k), &Device::Cpu).unwrap(), values)
}

/// As bitsandbytes 0.50.2 gives them (`get_4bit_type("nf4")`).
const NF4: [f64; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];
