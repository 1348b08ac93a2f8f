//! Whole training steps of a model with random weights.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use metal_candle::backend::custom_ops::adamw::AdamW;
use metal_candle::backend::custom_ops::linear;
use metal_candle::backend::memory;
use metal_candle::backend::quantized::QuantizedTensor;
use metal_candle::models::decoder::{Batch, Checkpointing, Decoder, TrainPass};
use metal_candle::models::linear::{Adapter, BaseWeight, DropoutRound, Magnitude, Parameter};
use metal_candle::models::{Holding, ModelConfig};
use metal_candle::training::params::Params;
use metal_candle::{Error, Result};

use super::Modules;

/// The sizes of published models.
const SHAPES: [(&str, &str, [usize; 6], bool); 4] = [
    // hidden, MLP, blocks, heads, key heads, vocabulary; whether the embedding is the head too.
    ("smollm2-135m", "llama", [576, 1536, 30, 9, 3, 49_152], true),
    ("qwen2.5-0.5b", "qwen2", [896, 4864, 24, 14, 2, 151_936], true),
    ("llama-3.2-1b", "llama", [2048, 8192, 16, 32, 8, 128_256], true),
    ("llama-3.1-8b", "llama", [4096, 14_336, 32, 32, 8, 128_256], false),
];

/// What a step works on.
#[derive(Debug, Clone)]
pub struct Work {
    pub batch: usize,
    pub tokens: usize,
    pub rank: usize,
    pub modules: Modules,
    /// Whether the adapters have magnitudes.
    pub dora: bool,
    /// What the weights are held in.
    pub holding: Holding,
    pub checkpointing: Checkpointing,
}

/// What steps took.
pub struct Took {
    /// Of each step but the first.
    pub seconds: Vec<f64>,
    /// Bytes of tensors on a GPU, of the process on the CPU.
    pub peak: Option<u64>,
}

/// The model of a shape's name.
pub fn model(name: &str) -> Result<ModelConfig> {
    let Some((_, family, sizes, tied)) = SHAPES.iter().find(|(known, ..)| *known == name) else {
        let known: Vec<&str> = SHAPES.iter().map(|(name, ..)| *name).collect();
        return Err(Error::setting("--shape", format!("{name} is not known; there is {}", known.join(", "))));
    };
    let [hidden, wide, blocks, heads, kv_heads, vocab] = sizes;
    let json = serde_json::json!({
        "model_type": family, "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "tie_word_embeddings": tied
    });
    ModelConfig::from_value(name.as_ref(), &json)
}

/// One step more than `steps`, the first of which is not counted: loss, gradients, norm, AdamW. Each is told to `tell`.
pub fn run(config: &ModelConfig, work: &Work, steps: usize, device: &Device, tell: &dyn Fn(String)) -> Result<Took> {
    let (mut weights, mut quantized) = (HashMap::new(), HashMap::new());
    for (name, shape) in config.weight_shapes() {
        let (mean, spread) = match shape.as_slice() {
            [_] => (1.0, 0.0),
            [.., columns] => (0.0, 1.0 / (*columns as f32).sqrt()),
            [] => continue,
        };
        let weight: BaseWeight = match work.holding.kinds.get(&name) {
            None => Tensor::randn(mean, spread, shape, device)?.to_dtype(work.holding.dtype)?.into(),
            Some(&kind) => {
                // Quantized once for each shape; every block has bytes of its own all the same.
                let made = match quantized.entry(shape.clone()) {
                    Entry::Occupied(made) => made.into_mut(),
                    Entry::Vacant(place) => {
                        let dense = Tensor::randn(mean, spread, shape, &Device::Cpu)?;
                        place.insert(QuantizedTensor::quantize(&dense, kind)?)
                    }
                };
                made.copy_to(device)?.into()
            }
        };
        weights.insert(name, weight);
    }
    drop(quantized);
    let mut decoder = Decoder::new(config, weights, device)?;
    let targets: Vec<(String, (usize, usize))> = decoder
        .linears()
        .filter(|(path, _)| work.modules.has(path))
        .map(|(path, linear)| (path, linear.sizes()))
        .collect();
    let mut initial = Vec::new();
    for (path, (k, n)) in &targets {
        initial.push((format!("{path}.a"), Tensor::randn(0.0_f32, 0.02, (*k, work.rank), device)?));
        initial.push((format!("{path}.b"), Tensor::randn(0.0_f32, 0.02, (work.rank, *n), device)?));
        if work.dora {
            initial.push((format!("{path}.m"), Tensor::ones(*n, DType::F32, device)?));
        }
    }
    let params = Params::new(&initial, device)?;
    drop(initial);
    let named = params.named()?;
    let parts = if work.dora { 3 } else { 2 };
    for (number, ((path, _), parts)) in targets.iter().zip(named.chunks_exact(parts)).enumerate() {
        let (a, b, scaling) = (parts[0].1.clone(), parts[1].1.clone(), 2.0);
        let weight = &decoder.linear_mut(path)?.weight;
        let trained = |(_, m): &(&str, Parameter)| {
            Ok::<_, Error>(Magnitude::of(weight, &a.value, &b.value, scaling)?.trained(m.clone()))
        };
        let magnitude = parts.get(2).map(trained).transpose()?;
        decoder.attach(path, Some(Adapter { a, b, scaling, dropout: 0.0, number: number as u32, magnitude }))?;
    }

    let count = work.batch * work.tokens;
    let tokens: Vec<u32> = (0..count as u32).map(|i| i * 7919 % config.vocab_size as u32).collect();
    let targets = tokens.iter().map(|token| (token + 1) % config.vocab_size as u32).collect();
    let batch = Batch { tokens, targets, lengths: vec![work.tokens; work.batch] };
    let adamw = AdamW { learning_rate: 1e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    let mut seconds = Vec::new();
    for t in 1..=steps + 1 {
        let start = Instant::now();
        params.zero_gradients()?;
        let round = DropoutRound { seed: 0, round: 0 };
        let pass = TrainPass { checkpointing: work.checkpointing, round, scale: 1.0 / count as f32 };
        let loss = decoder.loss_and_gradients(&batch, pass)?;
        let norm = params.gradient_norm()?;
        params.step(&adamw, 1.0, t)?;
        device.synchronize()?;
        let now = start.elapsed().as_secs_f64();
        tell(format!("step {t}: {:.1} ms, loss {:.4}, gradient norm {norm:.4}", now * 1e3, loss.mean()));
        if t == 1 {
            memory::peak(device, true)?;
        } else {
            seconds.push(now);
        }
    }
    Ok(Took { seconds, peak: memory::peak(device, false)? })
}

/// Operations of a step for each token: the products of linears and head, forward and for the input's gradient, and attention's (two
/// products forward, five backward, half of the scores masked); twice forward where every block is computed again.
pub fn operations_a_token(config: &ModelConfig, work: &Work) -> f64 {
    let linears: usize = config
        .weight_shapes()
        .iter()
        .filter(|(name, shape)| name.contains("_proj") && shape.len() == 2)
        .map(|(_, shape)| shape.iter().product::<usize>())
        .sum();
    let head = config.vocab_size * config.hidden_size;
    let attention = (config.num_layers * config.num_heads * config.head_dim * work.tokens) as f64;
    let forward = 2.0 * linears as f64 + 2.0 * attention;
    let again = if work.checkpointing == Checkpointing::EveryBlock { forward } else { 0.0 };
    4.0 * (linears + head) as f64 + 7.0 * attention + again
}

/// Operations a second of a large product of the dtype here: the best of several runs.
pub fn product_rate(dtype: DType, device: &Device) -> Result<f64> {
    let [m, k, n] = if device.is_cpu() { [512, 1536, 2048] } else { [8192, 8192, 8192] };
    let matrix = |rows: usize, columns: usize| Tensor::randn(0.0_f32, 1.0, (rows, columns), device)?.to_dtype(dtype);
    let (x, w) = (matrix(m, k)?, matrix(n, k)?);
    let runs = 10;
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        let start = Instant::now();
        for _ in 0..runs {
            std::hint::black_box(linear::forward(&x, &w, None)?);
        }
        device.synchronize()?;
        best = best.min(start.elapsed().as_secs_f64() / runs as f64);
    }
    Ok(2.0 * (m * k * n) as f64 / best)
}
