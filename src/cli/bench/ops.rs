//! Where the time of a training step goes: each kind of op measured alone at the step's shapes.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use metal_candle::Result;
use metal_candle::backend::custom_ops::attention::{AttentionArgs, Sequence};
use metal_candle::backend::custom_ops::lora_linear::{self, Part};
use metal_candle::backend::custom_ops::swiglu::Activation;
use metal_candle::backend::custom_ops::{attention, cross_entropy, rms_norm, rope, swiglu};
use metal_candle::backend::quantized::QuantizedTensor;
use metal_candle::models::ModelConfig;
use metal_candle::models::block::LINEAR_NAMES;
use metal_candle::models::linear::BaseWeight;

use super::Modules;
use super::step::Work;

/// Seconds of a step by kind of op, each measured alone at the step's shapes; on a GPU without the host's part, for calls follow
/// each other.
pub fn by_op(config: &ModelConfig, work: &Work, device: &Device) -> Result<Vec<(&'static str, f64)>> {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let t = work.batch * work.tokens;
    let (heads, kv_heads, dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
    let (layers, kv) = (config.num_layers as f64, kv_heads * dim);
    let dtype = work.holding.dtype;
    let random = |shape: &[usize], dtype: DType| Tensor::randn(0.0_f32, 1.0, shape, device)?.to_dtype(dtype);
    let tensor = |shape: &[usize]| random(shape, dtype);
    let time = |run: &dyn Fn() -> Result<()>| time(device, run);
    // Linears that share an input as (k, [n]), and whether each has an adapter.
    let all = work.modules == Modules::All;
    let groups: [(usize, Vec<(usize, bool)>); 4] = [
        (hidden, vec![(heads * dim, true), (kv, all), (kv, true)]),
        (heads * dim, vec![(hidden, all)]),
        (hidden, vec![(wide, all), (wide, all)]),
        (wide, vec![(hidden, all)]),
    ];
    let mut rows: Vec<(&str, f64)> = Vec::new();
    let (mut base_forward, mut base_backward, mut forward, mut backward) = (0.0, 0.0, 0.0, 0.0);
    let mut names = LINEAR_NAMES.iter();
    for (k, linears) in &groups {
        let x = tensor(&[t, *k])?;
        let mut held = Vec::new();
        for &(n, adapted) in linears {
            let (a, b) = (random(&[*k, work.rank], DType::F32)?, random(&[work.rank, n], DType::F32)?);
            let (da, db) = (a.zeros_like()?, b.zeros_like()?);
            let name = names.next().copied().unwrap_or_default();
            let w: BaseWeight = match work.holding.kinds.get(&format!("model.layers.0.{name}.weight")) {
                Some(&kind) => {
                    let dense = Tensor::randn(0.0_f32, 1.0, (n, *k), &Device::Cpu)?;
                    QuantizedTensor::quantize(&dense, kind)?.to_device(device)?.into()
                }
                None => tensor(&[n, *k])?.into(),
            };
            held.push((w, a, b, da, db, tensor(&[t, n])?, adapted));
        }
        let adapter = |a, b, adapted: bool| adapted.then_some(lora_linear::Adapter { a, b, s: 2.0, dropout: None });
        let parts: Vec<Part> = held
            .iter()
            .map(|(w, a, b, .., adapted)| Part { w: w.value(), bias: None, adapter: adapter(a, b, *adapted) })
            .collect();
        let base: Vec<Part> = parts.iter().map(|part| Part { adapter: None, ..*part }).collect();
        let g: Vec<&Tensor> = held.iter().map(|(.., g, _)| g).collect();
        let sinks: Vec<_> = held.iter().map(|(_, _, _, da, db, ..)| (Some(da), Some(db))).collect();
        let none = vec![(None, None); parts.len()];
        let saved = lora_linear::forward_shared(&x, &parts)?;
        let h: Vec<Option<&Tensor>> = saved.iter().map(|(_, h)| h.as_ref()).collect();
        let no_h = vec![None; parts.len()];
        base_forward += layers * time(&|| lora_linear::forward_shared(&x, &base).map(drop))?;
        forward += layers * time(&|| lora_linear::forward_shared(&x, &parts).map(drop))?;
        base_backward += layers * time(&|| lora_linear::backward_shared(&x, &base, &no_h, &g, &none, true).map(drop))?;
        backward += layers * time(&|| lora_linear::backward_shared(&x, &parts, &h, &g, &sinks, true).map(drop))?;
    }
    rows.push(("linears forward", base_forward));
    rows.push(("linears backward", base_backward));
    rows.push(("adapters forward", forward - base_forward));
    rows.push(("adapters backward", backward - base_backward));

    let (q, k) = (tensor(&[t, heads, dim])?, tensor(&[t, kv_heads, dim])?);
    let v = tensor(&[t, kv_heads, dim])?;
    let sequences: Vec<Sequence> = (0..work.batch)
        .map(|row| row * work.tokens)
        .map(|start| Sequence { q_start: start, q_len: work.tokens, k_start: start, k_len: work.tokens })
        .collect();
    let args = AttentionArgs { sequences: &sequences, scale: 0.125, window: None };
    let (o, lse) = attention::forward(&q, &k, &v, args)?;
    rows.push(("attention forward", layers * time(&|| attention::forward(&q, &k, &v, args).map(drop))?));
    let backward = || attention::backward(&q, &k, &v, &o, &lse, &q, args).map(drop);
    rows.push(("attention backward", layers * time(&backward)?));

    let (x, w_norm, rstd) = (tensor(&[t, hidden])?, tensor(&[hidden])?, random(&[t], DType::F32)?);
    let dx = x.zeros_like()?;
    let norm = time(&|| rms_norm::forward(&x, &w_norm, 1e-5).map(drop))?;
    rows.push(("rms_norm forward, and again", layers * 4.0 * norm));
    let norm = time(&|| rms_norm::backward(&x, &w_norm, &rstd, &x, &dx, None))?;
    rows.push(("rms_norm backward", layers * 2.0 * norm));
    if device.is_cpu() {
        // On a GPU the products add them.
        let add = || {
            black_box((&x + &dx)?);
            Ok(())
        };
        rows.push(("residuals", layers * 2.0 * time(&add)?));
    }

    let table = random(&[t, dim / 2], DType::F32)?;
    let positions: Vec<u32> = (0..t as u32).map(|i| i % work.tokens as u32).collect();
    let rotate = |x: Tensor| time(&|| rope::rotate(&x, &table, &table, &positions, false));
    rows.push(("rope", 2.0 * layers * (rotate(q.zeros_like()?)? + rotate(k.zeros_like()?)?)));

    let (gate, up) = (tensor(&[t, wide])?, tensor(&[t, wide])?);
    let g = tensor(&[t, wide])?;
    rows.push(("swiglu forward", layers * time(&|| swiglu::forward(&gate, &up, Activation::Silu).map(drop))?));
    let backward = || swiglu::backward_in_place(&gate, &up, &g, Activation::Silu);
    rows.push(("swiglu backward, and again", layers * time(&backward)?));

    let (hidden_states, head) = (tensor(&[t, hidden])?, tensor(&[config.vocab_size, hidden])?);
    let targets: Vec<u32> = (0..t as u32).map(|i| i % config.vocab_size as u32).collect();
    let loss = || cross_entropy::forward_backward(&hidden_states, &head, &targets, 1.0, None).map(drop);
    rows.push(("cross_entropy with head", time(&loss)?));

    Ok(rows)
}

/// Seconds of a run. On the CPU the median of as many as take a tenth of a second, at least 3; on a GPU the mean of as many, asked for
/// without waiting between them.
fn time(device: &Device, run: &dyn Fn() -> Result<()>) -> Result<f64> {
    black_box(run()?);
    device.synchronize()?;
    let (start, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < 3 || start.elapsed().as_secs_f64() < 0.1 {
        let start = Instant::now();
        let runs = if device.is_cpu() { 1 } else { 10 };
        for _ in 0..runs {
            black_box(run()?);
        }
        device.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64() / runs as f64);
    }
    Ok(median(seconds))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
