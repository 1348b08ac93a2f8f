//! The decoder and the optimizer agree with transformers and PEFT: logits, loss, every gradient, three AdamW steps.
//!
//! `tests/fixtures/make.py` wrote what is compared with.
#![allow(missing_docs)]

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use metal_candle::backend::custom_ops::adamw::AdamW;
use metal_candle::backend::custom_ops::cross_entropy::IGNORE;
use metal_candle::models::decoder::{Batch, Checkpointing, Decoder, TrainPass};
use metal_candle::models::linear::{Adapter, DropoutRound, Magnitude, Parameter};
use metal_candle::models::{Holding, ModelConfig, weights};
use metal_candle::training::adapter::{AdapterFile, Module};
use metal_candle::training::params::Params;

const MODELS: [&str; 5] = ["llama", "llama_linear", "mistral", "qwen2", "qwen3"];
const TOLERANCE: f64 = 1e-4;

/// The CPU, and a GPU where this build and this machine have one.
fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if metal_candle::backend::cuda::check(0).is_ok() {
        devices.push(Device::new_cuda(0).unwrap());
    }
    devices
}

fn cases() -> Vec<(&'static str, Device)> {
    let all = devices().into_iter();
    all.flat_map(|device| MODELS.map(|name| (name, device.clone()))).collect()
}

struct Fixture {
    device: Device,
    folder: PathBuf,
    json: serde_json::Value,
    tensors: HashMap<String, Tensor>,
}

impl Fixture {
    fn open(name: &str, device: &Device) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let json = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let tensors = candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
        Self { device: device.clone(), folder, json, tensors }
    }

    fn decoder(&self) -> Decoder {
        self.decoder_in(DType::F32)
    }

    fn decoder_in(&self, dtype: DType) -> Decoder {
        let config = ModelConfig::from_json(&self.folder.join("config.json")).unwrap();
        let weights = weights::load(&self.folder, &config, &Holding::dense(dtype), &self.device).unwrap();
        Decoder::new(&config, weights, &self.device).unwrap()
    }

    fn batch(&self) -> Batch {
        batch(&self.json)
    }

    /// What fifty steps of PEFT came to.
    fn steps(&self) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(self.folder.join("steps.json")).unwrap()).unwrap()
    }

    /// The decoder with PEFT's adapter, trainable.
    fn with_adapter(&self) -> (Decoder, Params) {
        self.with_adapter_in(DType::F32)
    }

    fn with_adapter_in(&self, dtype: DType) -> (Decoder, Params) {
        let file = AdapterFile::load(&self.folder.join("adapter")).unwrap();
        assert_eq!(file.modules.len(), 14);
        assert!(file.modules.values().all(|module| (module.rank(), module.alpha()) == (4, 10.0)));
        let initial: Vec<(String, Tensor)> = file
            .modules
            .iter()
            .flat_map(|(module, Module { a, b, .. })| {
                [(format!("{module}.lora_A.weight"), a.clone()), (format!("{module}.lora_B.weight"), b.clone())]
            })
            .collect();
        let params = Params::new(&initial, &self.device).unwrap();
        let mut decoder = self.decoder_in(dtype);
        for ((path, module), pair) in file.modules.iter().zip(params.named().unwrap().chunks_exact(2)) {
            let (a, b) = (pair[0].1.clone(), pair[1].1.clone());
            let adapter = Adapter { a, b, scaling: module.scaling, dropout: 0.0, number: 0, magnitude: None };
            decoder.attach(path, Some(adapter)).unwrap();
        }
        (decoder, params)
    }
}

/// The rows and labels of a fixture.
fn batch(json: &serde_json::Value) -> Batch {
    let mut batch = Batch::default();
    let (rows, labels) = (json["rows"].as_array().unwrap(), json["labels"].as_array().unwrap());
    for (row, labels) in rows.iter().zip(labels) {
        let row: Vec<u32> = row.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let labels = labels.as_array().unwrap().iter().map(|id| u32::try_from(id.as_i64().unwrap()).unwrap_or(IGNORE));
        // transformers keeps the label at the token's own place.
        batch.targets.extend(labels.skip(1).chain([IGNORE]));
        batch.lengths.push(row.len());
        batch.tokens.extend(row);
    }
    batch
}

fn pass(batch: &Batch, checkpointing: Checkpointing) -> TrainPass {
    let round = DropoutRound { seed: 0, round: 0 };
    TrainPass { checkpointing, round, scale: 1.0 / batch.counted() as f32 }
}

/// `max |got - want| / max |want|`.
fn distance(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    let (got, want) = (flat(got), flat(want));
    let largest = want.iter().fold(0.0f64, |largest, value| largest.max(value.abs() as f64));
    let difference = got.iter().zip(&want).fold(0.0f64, |worst, (a, b)| worst.max((a - b).abs() as f64));
    assert!(largest > 0.0 && difference.is_finite());
    difference / largest
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn close(what: &str, got: f64, want: f64) {
    assert!((got - want).abs() <= TOLERANCE * want.abs(), "{what}: {got} instead of {want}");
}

#[test]
fn logits_gradients_and_three_steps() {
    for (name, device) in cases() {
        let fixture = Fixture::open(name, &device);
        let (decoder, params) = fixture.with_adapter();
        let batch = fixture.batch();
        let logits = distance(&decoder.logits(&batch).unwrap(), &fixture.tensors["logits"]);
        assert!(logits < TOLERANCE, "{name}: logits differ by {logits}");

        let optimizer = AdamW { learning_rate: 1e-2, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        let mut worst = 0.0f64;
        for step in 1..=3 {
            params.zero_gradients().unwrap();
            let loss = decoder.loss_and_gradients(&batch, pass(&batch, Checkpointing::None)).unwrap();
            close(&format!("{name}: loss {step}"), loss.mean(), fixture.json["losses"][step - 1].as_f64().unwrap());
            close(&format!("{name}: loss alone"), decoder.loss(&batch).unwrap().mean(), loss.mean());
            if step == 1 {
                for (tensor, parameter) in params.named().unwrap() {
                    let want = fixture.tensors[&format!("grad.{tensor}")].t().unwrap();
                    let error = distance(&parameter.grad.unwrap(), &want);
                    assert!(error < TOLERANCE, "{name}: the gradient of {tensor} differs by {error}");
                    worst = worst.max(error);
                }
            }
            params.step(&optimizer, 1.0, step).unwrap();
        }
        for (tensor, parameter) in params.named().unwrap() {
            let want = fixture.tensors[&format!("after.{tensor}")].t().unwrap();
            let error = distance(&parameter.value, &want);
            assert!(error < TOLERANCE, "{name}: after three steps {tensor} differs by {error}");
        }
        println!("{name} on {:?}: logits within {logits:.1e}, gradients within {worst:.1e}", device.location());
    }
}

/// Fifty steps with weight decay, clipping and a schedule end where PEFT's end. In bf16 the losses stay within 3 % of f32's.
#[test]
fn fifty_steps_stay_with_peft() {
    for (device, dtype, limit) in precisions() {
        let fixture = Fixture::open("llama", &device);
        let (decoder, params) = fixture.with_adapter_in(dtype);
        stays_with_peft(&fixture, &decoder, &params, dtype, limit);
    }
}

/// The same of a DoRA adapter on linears with a bias, with B and the magnitudes at LoRA+'s learning rate.
#[test]
fn fifty_steps_of_dora_and_lora_plus_stay_with_peft() {
    for (device, dtype, limit) in precisions() {
        let fixture = Fixture::open("qwen2", &device);
        let file = AdapterFile::load(&fixture.folder.join("dora")).unwrap();
        let mut decoder = fixture.decoder_in(dtype);
        let (mut slow, mut fast) = (Vec::new(), Vec::new());
        for (path, Module { a, b, magnitude, .. }) in &file.modules {
            slow.push((format!("{path}.lora_A.weight"), a.clone()));
            fast.push((format!("{path}.lora_B.weight"), b.clone()));
            fast.push((format!("{path}.lora_magnitude_vector.weight"), magnitude.clone().unwrap()));
        }
        let ratio = fixture.steps()["loraplus_ratio"].as_f64().unwrap();
        let params = Params::grouped(vec![(1.0, slow), (ratio, fast)], &device).unwrap();
        let mut named: HashMap<&str, Parameter> = params.named().unwrap().into_iter().collect();
        for (path, module) in &file.modules {
            let mut take = |part: &str| named.remove(format!("{path}.{part}.weight").as_str()).unwrap();
            let (a, b, m) = (take("lora_A"), take("lora_B"), take("lora_magnitude_vector"));
            let weight = decoder.linear_mut(path).unwrap().weight.clone();
            let magnitude = Magnitude::of(&weight, &a.value, &b.value, module.scaling).unwrap();
            let magnitude = Some(magnitude.trained(m));
            let adapter = Adapter { a, b, scaling: module.scaling, dropout: 0.0, number: 0, magnitude };
            decoder.attach(path, Some(adapter)).unwrap();
        }
        stays_with_peft(&fixture, &decoder, &params, dtype, limit);
    }
}

fn precisions() -> Vec<(Device, DType, f64)> {
    let of = |device: Device| [(device.clone(), DType::F32, TOLERANCE), (device, DType::BF16, 0.03)];
    devices().into_iter().flat_map(of).collect()
}

fn stays_with_peft(fixture: &Fixture, decoder: &Decoder, params: &Params, dtype: DType, limit: f64) {
    let steps = fixture.steps();
    let ends = candle_core::safetensors::load(fixture.folder.join("steps.safetensors"), &Device::Cpu).unwrap();
    let batches: Vec<Batch> = steps["batches"].as_array().unwrap().iter().map(batch).collect();
    let (rates, losses) = (steps["rates"].as_array().unwrap(), steps["losses"].as_array().unwrap());
    assert_eq!((rates.len(), losses.len()), (50, 50));
    let mut worst = 0.0f64;
    for (i, (rate, want)) in rates.iter().zip(losses).enumerate() {
        let batch = &batches[i % batches.len()];
        params.zero_gradients().unwrap();
        let loss = decoder.loss_and_gradients(batch, pass(batch, Checkpointing::None)).unwrap().mean();
        worst = worst.max((loss / want.as_f64().unwrap() - 1.0).abs());
        assert!(worst <= limit, "{dtype:?}, step {i}: the loss is {loss} instead of {want}");
        let norm = params.gradient_norm().unwrap();
        let learning_rate = rate.as_f64().unwrap();
        let optimizer = AdamW { learning_rate, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 };
        params.step(&optimizer, (1.0 / (norm + 1e-6)).min(1.0) as f32, i + 1).unwrap();
    }
    let named = params.named().unwrap();
    let end = named.iter().map(|(name, parameter)| {
        let want = &ends[*name];
        let want = if want.rank() == 2 { want.t().unwrap() } else { want.clone() };
        distance(&parameter.value, &want)
    });
    let end = end.fold(0.0f64, f64::max);
    println!("{dtype:?} on {:?}: losses within {worst:.1e}, adapters within {end:.1e}", fixture.device.location());
    assert!(dtype != DType::F32 || end < TOLERANCE, "the adapters differ by {end}");
}

#[test]
fn every_weight_gets_its_gradient_in_full_fine_tuning() {
    for (name, device) in cases() {
        let fixture = Fixture::open(name, &device);
        let mut decoder = fixture.decoder();
        let initial: Vec<(String, Tensor)> =
            decoder.parameters_mut().into_iter().map(|(name, slot)| (name, slot.value.clone())).collect();
        let params = Params::new(&initial, &fixture.device).unwrap();
        for ((_, slot), (_, trained)) in decoder.parameters_mut().into_iter().zip(params.named().unwrap()) {
            *slot = trained;
        }
        let batch = fixture.batch();
        let loss = decoder.loss_and_gradients(&batch, pass(&batch, Checkpointing::EveryBlock)).unwrap();
        close(name, loss.mean(), fixture.json["full_loss"].as_f64().unwrap());
        for (tensor, parameter) in params.named().unwrap() {
            let want = &fixture.tensors[&format!("full.{tensor}")];
            let got = parameter.grad.unwrap();
            // The softmax cancels a bias that all keys share, but for the rotation: its gradient is small, compared as it is.
            let error = distance(&got, want);
            assert!(error < TOLERANCE, "{name}: the gradient of {tensor} differs by {error}");
        }
    }
}

#[test]
fn checkpointing_gives_the_same_bits() {
    for (name, device) in cases() {
        let fixture = Fixture::open(name, &device);
        let (decoder, params) = fixture.with_adapter();
        let batch = fixture.batch();
        let gradients = |checkpointing| {
            params.zero_gradients().unwrap();
            decoder.loss_and_gradients(&batch, pass(&batch, checkpointing)).unwrap();
            params.named().unwrap().iter().map(|(_, p)| flat(p.grad.as_ref().unwrap())).collect::<Vec<_>>()
        };
        let whole = gradients(Checkpointing::None);
        assert_eq!(whole, gradients(Checkpointing::EveryBlock), "{name}");
        assert_eq!(whole, gradients(Checkpointing::Lowest(1)), "{name}");
    }
}

#[test]
fn a_cache_gives_the_same_logits() {
    for (name, device) in cases() {
        let fixture = Fixture::open(name, &device);
        let (decoder, _) = fixture.with_adapter();
        let batch = fixture.batch();
        let mut cache = metal_candle::inference::KvCache::new(&decoder.config, DType::F32, &device).unwrap();
        let length = batch.lengths[0];
        let mut done = 0;
        for count in [3, 1, 1, length - 5] {
            let got = decoder.forward_cached(&batch.tokens[done..done + count], &mut cache).unwrap();
            done += count;
            let want = fixture.tensors["logits"].get(done - 1).unwrap();
            let error = distance(&got, &want);
            assert!(error < TOLERANCE, "{name}: logits after {done} tokens differ by {error}");
        }
    }
}
