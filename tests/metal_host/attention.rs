//! Cases of attention, with what the f64 reference makes of them.
#![allow(dead_code)]

use candle_core::{DType, Device, Tensor};
use metal_candle::backend::custom_ops::attention::{AttentionArgs, Sequence};
use metal_candle::backend::metal::plan::Slot;
use metal_candle::backend::metal::plan::attention::Call;
use metal_candle::backend::reference::attention::{self as reference, Problem};

use crate::common::{f64s, random, tolerance};
use crate::run::{Run, want};

/// Heads of q, heads of k and v, and their size.
#[derive(Clone, Copy)]
pub struct Heads {
    pub query: usize,
    pub key: usize,
    pub size: usize,
}

/// A prompt, a prompt of one token, a decoding step, a chunk that continues a cache, with gaps between the last ones.
pub fn mixed() -> Vec<Sequence> {
    vec![
        Sequence { q_start: 0, q_len: 37, k_start: 0, k_len: 37 },
        Sequence { q_start: 37, q_len: 1, k_start: 37, k_len: 1 },
        Sequence { q_start: 38, q_len: 1, k_start: 40, k_len: 21 },
        Sequence { q_start: 82, q_len: 9, k_start: 61, k_len: 50 },
    ]
}

/// Forward and backward. Behind the last sequence are a tile of queries and one of keys that nothing sees.
pub fn attention(sequences: &[Sequence], heads: Heads, window: Option<usize>, dtype: DType) -> Vec<Run> {
    let Heads { query, key, size } = heads;
    let queries = 33 + sequences.iter().map(|s| s.q_start + s.q_len).max().unwrap_or(0);
    let keys = 33 + sequences.iter().map(|s| s.k_start + s.k_len).max().unwrap_or(0);
    let tensor = |rows, heads, seed| random(&[rows, heads, size], dtype, seed);
    let (q, g) = (tensor(queries, query, 1), tensor(queries, query, 2));
    let (k, v) = (tensor(keys, key, 3), tensor(keys, key, 4));
    let scale = 3.0 / (size as f32).sqrt();
    let args = AttentionArgs { sequences, scale, window };
    let call = Call { queries, keys, query_heads: query, key_heads: key, size, dtype, args };
    let problem = Problem {
        q_heads: query,
        kv_heads: key,
        dim: size,
        sequences: sequences.to_vec(),
        scale: scale as f64,
        window,
    };
    let [q64, k64, v64, g64] = [&q, &k, &v, &g].map(f64s);
    let (o, lse) = reference::forward(&q64, &k64, &v64, &problem);
    let (dq, dk, dv) = reference::backward(&q64, &k64, &v64, &g64, &problem);
    let f32s = |values: &[f64]| values.iter().map(|value| *value as f32).collect::<Vec<_>>();
    let tensor_of = |values: &[f64], dtype| {
        Tensor::from_vec(f32s(values), values.len(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
    };
    let (o_given, lse_given) = (tensor_of(&o, dtype), tensor_of(&lse, DType::F32));
    let what = |form| {
        let count = sequences.len();
        let sizes = format!("{queries} queries, {keys} keys, {query} of {key} heads of {size}");
        format!("attention {form}, {count} sequences, {sizes}, window {window:?}, {dtype:?}")
    };
    // With few keys dq and dk are small differences of delta, which comes from the rounded o.
    let floor = if dtype == DType::F32 { 0.05 } else { dv.iter().fold(0.05, |max: f64, dv| max.max(dv.abs())) };
    let gradient = |slot, values| want(slot, dtype, values).within(2.0 * tolerance(dtype)).at_least(floor);
    let inputs =
        [(Slot::Q, &q), (Slot::K, &k), (Slot::V, &v), (Slot::G, &g), (Slot::O, &o_given), (Slot::Lse, &lse_given)];
    vec![
        Run::new(
            what("forward"),
            call.forward().unwrap(),
            &inputs[..3],
            vec![want(Slot::O, dtype, o), want(Slot::Lse, DType::F32, lse)],
        ),
        Run::new(
            what("backward"),
            call.backward().unwrap(),
            &inputs,
            vec![gradient(Slot::Dq, dq), gradient(Slot::Dk, dk), gradient(Slot::Dv, dv)],
        ),
    ]
}

/// Scores of some thousand, whose exponentials no f32 holds, that grow from block to block: query i finds key i the best.
pub fn large_scores() -> Run {
    let (rows, size) = (40, 8);
    let one = [Sequence { q_start: 0, q_len: rows, k_start: 0, k_len: rows }];
    let args = AttentionArgs { sequences: &one, scale: 1.0, window: None };
    let call = Call { queries: rows, keys: rows, query_heads: 1, key_heads: 1, size, dtype: DType::F32, args };
    let values: Vec<f32> = (0..rows * size).map(|e| (e / size) as f32 * 4.0).collect();
    let q = Tensor::from_vec(values, (rows, 1, size), &Device::Cpu).unwrap();
    let v = random(&[rows, 1, size], DType::F32, 1);
    // Query 0 sees key 0 only; every other score is at least 128 under the best.
    Run::new(
        "attention with scores to 190000".to_string(),
        call.forward().unwrap(),
        &[(Slot::Q, &q), (Slot::K, &q), (Slot::V, &v)],
        vec![
            want(Slot::O, DType::F32, f64s(&v)),
            want(Slot::Lse, DType::F32, (0..rows).map(|i| (128 * i * i) as f64).collect()),
        ],
    )
}
