//! The decoder's own backward pass gives the gradients that Candle's tape gives through the ops' tape forms.
#![allow(missing_docs)]

mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use metal_candle::backend::custom_ops::attention::{AttentionArgs, Sequence};
use metal_candle::backend::custom_ops::{attention, cross_entropy, lora_linear, rms_norm, rope, swiglu};
use metal_candle::models::ModelConfig;
use metal_candle::models::decoder::{Batch, Checkpointing, Decoder, TrainPass};
use metal_candle::models::linear::{Adapter, DropoutRound};
use metal_candle::training::params::Params;

const SCALING: f64 = 2.5;
const RANK: usize = 3;

/// A Llama by the tape forms, written as a user of the ops would write it.
struct TapeDecoder<'a> {
    config: &'a ModelConfig,
    weights: &'a HashMap<String, Tensor>,
    adapters: HashMap<String, (Var, Var)>,
}

impl TapeDecoder<'_> {
    fn linear(&self, path: &str, x: &Tensor) -> Tensor {
        let (a, b) = &self.adapters[path];
        lora_linear(x, &self.weights[&format!("{path}.weight")], None, a, b, SCALING).unwrap()
    }

    fn norm(&self, name: &str, x: &Tensor) -> Tensor {
        rms_norm(x, &self.weights[&format!("{name}.weight")], self.config.rms_norm_eps).unwrap()
    }

    fn loss(&self, batch: &Batch) -> Tensor {
        let (config, tokens) = (self.config, batch.tokens.len());
        let embedding = &self.weights["model.embed_tokens.weight"];
        let ids = Tensor::new(batch.tokens.as_slice(), &Device::Cpu).unwrap();
        let mut x = embedding.index_select(&ids, 0).unwrap();
        let mut start = 0;
        let sequences: Vec<Sequence> = batch
            .lengths
            .iter()
            .map(|&length| {
                let sequence = Sequence { q_start: start, q_len: length, k_start: start, k_len: length };
                start += length;
                sequence
            })
            .collect();
        let positions: Vec<u32> = batch.lengths.iter().flat_map(|&length| 0..length as u32).collect();
        let (cos, sin) = tables(config, 64);
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        let args = AttentionArgs { sequences: &sequences, scale, window: None };
        for layer in 0..config.num_layers {
            let path = |name: &str| format!("model.layers.{layer}.{name}");
            let y = self.norm(&path("input_layernorm"), &x);
            let heads = |name: &str, heads: usize| {
                self.linear(&path(name), &y).reshape((tokens, heads, config.head_dim)).unwrap()
            };
            let (q, k) = (heads("self_attn.q_proj", config.num_heads), heads("self_attn.k_proj", config.num_kv_heads));
            let v = heads("self_attn.v_proj", config.num_kv_heads);
            let rotate = |x: &Tensor| rope(x, &cos, &sin, &positions).unwrap();
            let o = attention(&rotate(&q), &rotate(&k), &v, args).unwrap();
            let o = o.reshape((tokens, config.num_heads * config.head_dim)).unwrap();
            x = (x + self.linear(&path("self_attn.o_proj"), &o)).unwrap();
            let y = self.norm(&path("post_attention_layernorm"), &x);
            let (gate, up) = (self.linear(&path("mlp.gate_proj"), &y), self.linear(&path("mlp.up_proj"), &y));
            x = (x + self.linear(&path("mlp.down_proj"), &swiglu(&gate, &up).unwrap())).unwrap();
        }
        cross_entropy(&self.norm("model.norm", &x), embedding, &batch.targets).unwrap()
    }
}

fn tables(config: &ModelConfig, positions: usize) -> (Tensor, Tensor) {
    let frequencies = config.inv_freq();
    let angles: Vec<f32> = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f32 * f)).collect();
    let angles = Tensor::from_vec(angles, (positions, frequencies.len()), &Device::Cpu).unwrap();
    (angles.cos().unwrap(), angles.sin().unwrap())
}

#[test]
fn the_tape_gives_the_trainers_gradients() {
    let config = ModelConfig::from_value("config.json".as_ref(), &common::tiny::config(60, 0)).unwrap();
    let weights = common::tiny::weights(&config, 3);
    let mut decoder = Decoder::new(&config, weights.clone(), &Device::Cpu).unwrap();
    let mut seed = 100;
    let initial: Vec<(String, Tensor)> = decoder
        .linears()
        .flat_map(|(path, linear)| {
            let (k, n) = linear.sizes();
            seed += 2;
            let small = |shape: &[usize], seed| (common::random(shape, DType::F32, seed) * 0.3).unwrap();
            [(format!("{path}.a"), small(&[k, RANK], seed)), (format!("{path}.b"), small(&[RANK, n], seed + 1))]
        })
        .collect();
    let params = Params::new(&initial, &Device::Cpu).unwrap();
    let named = params.named().unwrap();
    let mut adapters = HashMap::new();
    for pair in named.chunks_exact(2) {
        let path = pair[0].0.strip_suffix(".a").unwrap().to_string();
        let (a, b) = (pair[0].1.clone(), pair[1].1.clone());
        let var = |tensor: &Tensor| Var::from_tensor(&tensor.copy().unwrap()).unwrap();
        adapters.insert(path.clone(), (var(&a.value), var(&b.value)));
        decoder
            .attach(&path, Some(Adapter { a, b, scaling: SCALING, dropout: 0.0, number: 0, magnitude: None }))
            .unwrap();
    }
    let tokens: Vec<u32> = (0..23).map(|i| (i * i + 3) % 60).collect();
    let mut targets: Vec<u32> = tokens[1..].to_vec();
    targets.push(cross_entropy::IGNORE);
    targets[4] = cross_entropy::IGNORE;
    targets[13] = cross_entropy::IGNORE;
    let batch = Batch { tokens, targets, lengths: vec![14, 9] };

    let round = DropoutRound { seed: 0, round: 0 };
    let pass = TrainPass { checkpointing: Checkpointing::None, round, scale: 1.0 / batch.counted() as f32 };
    let loss = decoder.loss_and_gradients(&batch, pass).unwrap();

    let tape = TapeDecoder { config: &config, weights: &weights, adapters };
    let taped = tape.loss(&batch);
    let difference = (taped.to_scalar::<f32>().unwrap() as f64 - loss.mean()).abs();
    assert!(difference < 1e-5 * loss.mean(), "losses differ by {difference}");
    let gradients = taped.backward().unwrap();
    for pair in named.chunks_exact(2) {
        let (a, b) = &tape.adapters[pair[0].0.strip_suffix(".a").unwrap()];
        for ((name, parameter), var) in pair.iter().zip([a, b]) {
            let want = common::f64s(gradients.get(var).unwrap_or_else(|| panic!("{name} has no gradient on the tape")));
            assert!(want.iter().any(|value| value.abs() > 1e-6), "{name}");
            common::assert_within(name, parameter.grad.as_ref().unwrap(), &want, 2e-5);
        }
    }
}
