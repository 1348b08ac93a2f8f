//! LoRA layers: the configuration, an adapter (A, B), and a frozen linear layer with an adapter.
//!
//! Conventions are PEFT's (<https://github.com/huggingface/peft>, `tuners/lora`): scaling = alpha / rank, A starts
//! Kaiming-uniform with a = √5 (uniform within ±1/√k), B starts at zero, dropout acts on the adapter's input only. A is stored
//! `[k, r]` and B `[r, n]`, the transposes of PEFT's files.

use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor, Var};
use serde::{Deserialize, Serialize};

use crate::backend::custom_ops::weight::{Frozen, Weight};
use crate::backend::custom_ops::{FusedLoRAOp, Sink, fused_lora, linear, lora_linear};
use crate::backend::dropout::{Dropout, philox};
use crate::{Error, Result};

/// Size, strength and place of the adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoRAConfig {
    /// r: columns of A and rows of B; at least 1.
    pub rank: usize,
    /// Strength: the delta is scaled by alpha / rank.
    pub alpha: f64,
    /// Probability to drop an element of the adapter's input while training, in [0, 1).
    pub dropout: f32,
    /// Names of the linear layers that get an adapter, as Hugging Face models call them: `q_proj`, `down_proj`, ...
    pub target_modules: Vec<String>,
}

impl Default for LoRAConfig {
    /// Rank 8, alpha 16, no dropout, on `q_proj` and `v_proj`.
    fn default() -> Self {
        Self { rank: 8, alpha: 16.0, dropout: 0.0, target_modules: vec!["q_proj".into(), "v_proj".into()] }
    }
}

impl LoRAConfig {
    /// The default with another rank; alpha stays 16.
    pub fn new(rank: usize) -> Self {
        Self { rank, ..Self::default() }
    }

    /// Sets alpha.
    pub fn with_alpha(self, alpha: f64) -> Self {
        Self { alpha, ..self }
    }

    /// Sets the dropout probability.
    pub fn with_dropout(self, dropout: f32) -> Self {
        Self { dropout, ..self }
    }

    /// Sets the target modules.
    pub fn with_target_modules<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        Self { target_modules: names.into_iter().map(Into::into).collect(), ..self }
    }

    /// s = alpha / rank.
    pub fn scaling(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Setting`] that lists all values that cannot be used.
    pub fn validate(&self) -> Result<()> {
        let mut problems = Vec::new();
        if self.rank == 0 {
            problems.push("rank is 0, but must be at least 1".to_string());
        }
        if !self.alpha.is_finite() || self.alpha <= 0.0 {
            problems.push(format!("alpha is {}, but must be positive and finite", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            problems.push(format!("dropout is {}, but must be at least 0 and under 1", self.dropout));
        }
        if self.target_modules.is_empty() {
            problems.push("target_modules is empty: name at least one linear layer".to_string());
        }
        if self.target_modules.iter().any(|name| name.trim().is_empty()) {
            problems.push("target_modules holds an empty name".to_string());
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::setting("LoRA configuration", problems.join("; "))) }
    }
}

/// One adapter: `delta(x) = s · (drop(x) A) B`.
#[derive(Debug)]
pub struct LoRALayer {
    /// `[k, r]`
    pub(crate) a: Tensor,
    /// `[r, n]`
    pub(crate) b: Tensor,
    /// s = alpha / r
    pub(crate) scaling: f64,
    /// The probability to drop an input element while training.
    pub(crate) dropout: f32,
    seed: u64,
    training: bool,
    /// Counts forward passes with dropout: each draws a mask of its own.
    passes: AtomicU64,
}

impl LoRALayer {
    /// A new adapter for a linear layer from `k` to `n`, in f32 variables: A uniform within ±1/√k, drawn by Philox from
    /// `seed` (give every layer a seed of its own), B zero.
    ///
    /// # Errors
    /// An invalid configuration; k or n of zero; a device that cannot hold the variables.
    pub fn new(k: usize, n: usize, config: &LoRAConfig, seed: u64, device: &Device) -> Result<Self> {
        config.validate()?;
        if k == 0 || n == 0 {
            return Err(Error::op("LoRALayer", format!("k is {k} and n is {n}, but both must be at least 1")));
        }
        let a = Tensor::from_vec(kaiming_uniform(k, config.rank, seed), (k, config.rank), device)?;
        let a = Var::from_tensor(&a)?;
        let b = Var::zeros((config.rank, n), DType::F32, device)?;
        let mut layer = Self::from_tensors(a.into_inner(), b.into_inner(), config.scaling())?;
        layer.dropout = config.dropout;
        layer.seed = seed;
        Ok(layer)
    }

    /// An adapter from A `[k, r]` and B `[r, n]` as they are: variables stay trainable, other tensors stay frozen. No
    /// dropout.
    ///
    /// # Errors
    /// When the two do not fit each other in shape, dtype or device.
    pub fn from_tensors(a: Tensor, b: Tensor, scaling: f64) -> Result<Self> {
        fused_lora::check_adapter("LoRALayer", &a, &b)?;
        Ok(Self { a, b, scaling, dropout: 0.0, seed: 0, training: false, passes: AtomicU64::new(0) })
    }

    /// A, `[k, r]`.
    pub fn a(&self) -> &Tensor {
        &self.a
    }

    /// B, `[r, n]`.
    pub fn b(&self) -> &Tensor {
        &self.b
    }

    /// s = alpha / r.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// Those of A and B that are variables, for an optimizer.
    pub fn vars(&self) -> Vec<Var> {
        let variables = [&self.a, &self.b].into_iter().filter(|tensor| tensor.is_variable());
        variables.filter_map(|tensor| Var::from_tensor(tensor).ok()).collect()
    }

    /// Whether [`Self::forward`] applies dropout. A new layer does not.
    pub fn set_training(&mut self, training: bool) {
        self.training = training;
    }

    /// The delta for x `[.., k]`, `[.., n]`, of x's dtype, on Candle's tape: gradients for x, A and B where they are tracked.
    /// The base layer's output is not included.
    ///
    /// # Errors
    /// A wrong shape, dtype or device; the message names the tensor and both shapes.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let dropout = self.next_dropout();
        // The one-argument op holds A and B as state, where Candle's backward pass cannot reach them.
        if dropout.is_some() || self.a.track_op() || self.b.track_op() || !x.device().is_cpu() {
            return fused_lora::fused_lora_with_dropout(x, &self.a, &self.b, self.scaling, dropout);
        }
        Ok(x.apply_op1(FusedLoRAOp::with_scaling(self.a.clone(), self.b.clone(), self.scaling)?)?)
    }

    fn next_dropout(&self) -> Option<Dropout> {
        if !self.training || self.dropout == 0.0 {
            return None;
        }
        Some(Dropout { p: self.dropout, seed: self.seed, stream: self.passes.fetch_add(1, Ordering::Relaxed) })
    }
}

/// A frozen linear layer with or without an adapter: `y = x Wᵀ + bias + s · (drop(x) A) B`.
#[derive(Debug)]
pub struct LoRALinear {
    /// W, `[n, k]`.
    weight: Frozen,
    /// `[n]`
    pub(crate) bias: Option<Tensor>,
    pub(crate) adapter: Option<LoRALayer>,
}

impl LoRALinear {
    /// `weight` `[n, k]`, a tensor or quantized, `bias` `[n]`, an adapter from k to n.
    ///
    /// # Errors
    /// Parts that do not fit each other in shape.
    pub fn new(weight: impl Into<Frozen>, bias: Option<Tensor>, adapter: Option<LoRALayer>) -> Result<Self> {
        const OP: &str = "LoRALinear";
        let weight = weight.into();
        let (n, k) = match *weight.borrow().dims() {
            [n, k] if n > 0 && k > 0 => (n, k),
            ref dims => return Err(Error::op(OP, format!("weight {dims:?} must be [n, k], not empty"))),
        };
        if let Some(bias) = bias.as_ref().filter(|bias| bias.dims() != [n]) {
            return Err(Error::op(OP, format!("bias {:?} does not fit weight [{n}, {k}]", bias.dims())));
        }
        if let Some(LoRALayer { a, b, .. }) = &adapter
            && (a.dims()[0], b.dims()[1]) != (k, n)
        {
            let (a, b) = (a.dims(), b.dims());
            return Err(Error::op(OP, format!("a {a:?} and b {b:?} do not fit weight [{n}, {k}]")));
        }
        Ok(Self { weight, bias, adapter })
    }

    /// The frozen weight W, `[n, k]`.
    pub fn weight(&self) -> Weight<'_> {
        self.weight.borrow()
    }

    /// The frozen bias, `[n]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The adapter.
    pub fn adapter(&self) -> Option<&LoRALayer> {
        self.adapter.as_ref()
    }

    /// The adapter, to switch dropout on or off.
    pub fn adapter_mut(&mut self) -> Option<&mut LoRALayer> {
        self.adapter.as_mut()
    }

    /// y for x `[.., k]` on Candle's tape: gradients for x, A and B, none for the frozen weight and bias.
    ///
    /// # Errors
    /// A wrong shape, dtype or device; the message names the tensor and both shapes.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (w, bias) = (self.weight(), self.bias.as_ref());
        match &self.adapter {
            Some(adapter) => {
                let LoRALayer { a, b, scaling, .. } = adapter;
                lora_linear::lora_linear_with_dropout(x, w, bias, a, b, *scaling, adapter.next_dropout())
            }
            None => linear::linear(x, w, bias),
        }
    }

    /// y and what [`Self::backward`] needs of the adapter, `h = drop(x) A`. Not on the tape.
    ///
    /// # Errors
    /// A wrong shape, dtype or device; the message names the tensor and both shapes.
    pub fn forward_saved(&self, x: &Tensor, dropout: Option<Dropout>) -> Result<(Tensor, Option<Tensor>)> {
        let (w, bias) = (self.weight(), self.bias.as_ref());
        match &self.adapter {
            Some(LoRALayer { a, b, scaling, .. }) => {
                let (y, h) = lora_linear::forward(x, w, bias, a, b, *scaling, dropout)?;
                Ok((y, Some(h)))
            }
            None => Ok((linear::forward(x, w, bias)?, None)),
        }
    }

    /// Adds the gradients that have somewhere to go, given the gradient g of y and the h and dropout of
    /// [`Self::forward_saved`]. `da` and `db` are the adapter's and ignored without one; `dw` and `dbias` are the base layer's,
    /// for full fine-tuning.
    ///
    /// # Errors
    /// A wrong shape, dtype or device; a sink for an adapter that is not there.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &self,
        x: &Tensor,
        h: Option<&Tensor>,
        g: &Tensor,
        dropout: Option<Dropout>,
        dx: Option<&Tensor>,
        da: Option<&Tensor>,
        db: Option<&Tensor>,
        dw: Option<&Tensor>,
        dbias: Option<&Tensor>,
    ) -> Result<()> {
        linear::backward(x, self.weight(), g, dx, dw, dbias)?;
        match &self.adapter {
            Some(LoRALayer { a, b, scaling, .. }) => {
                fused_lora::backward(x, a, b, h, g, *scaling, dropout, Sink { dx, da, db })
            }
            None if da.is_some() || db.is_some() => {
                Err(Error::op("LoRALinear", "a gradient of A or B is wanted, but the layer has no adapter"))
            }
            None => Ok(()),
        }
    }
}

/// Normal values of a deviation, by Box and Muller from pairs of Philox's words.
pub(crate) fn normal(count: usize, deviation: f64, seed: u64) -> Vec<f32> {
    let unit = |word: u32| (f64::from(word) + 0.5) / 4_294_967_296.0;
    let pair = |words: [u32; 2]| {
        let (radius, angle) = ((-2.0 * unit(words[0]).ln()).sqrt(), 2.0 * std::f64::consts::PI * unit(words[1]));
        [radius * angle.cos(), radius * angle.sin()]
    };
    let values = initial_words(count, seed).flat_map(|[a, b, c, d]| [pair([a, b]), pair([c, d])]).flatten();
    values.take(count).map(|value| (deviation * value) as f32).collect()
}

/// Words for the initial values of an adapter, four at a time.
fn initial_words(count: usize, seed: u64) -> impl Iterator<Item = [u32; 4]> {
    let key = [seed as u32, (seed >> 32) as u32];
    // A third counter word that no dropout mask uses keeps the two kinds of draws apart.
    (0..count.div_ceil(4) as u64)
        .map(move |block| philox([block as u32, (block >> 32) as u32, u32::MAX, u32::MAX], key))
}

/// `[k, r]` values uniform within ±1/√k: Kaiming's bound √(6 / ((1 + a²) k)) with a = √5, as PyTorch's linear layers and PEFT's A.
pub(crate) fn kaiming_uniform(k: usize, r: usize, seed: u64) -> Vec<f32> {
    let bound = 1.0 / (k as f64).sqrt();
    initial_words(k * r, seed)
        .flatten()
        .take(k * r)
        .map(|word| ((word as f64 + 0.5) / 2_147_483_648.0 - 1.0) as f32 * bound as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_defaults_scale_and_refuse() {
        let config = LoRAConfig::default();
        assert_eq!((config.rank, config.scaling()), (8, 2.0));
        assert!(config.validate().is_ok());
        let bad = LoRAConfig::new(0).with_alpha(f64::NAN).with_dropout(1.0).with_target_modules([""; 0]);
        let message = bad.validate().unwrap_err().to_string();
        for name in ["rank", "alpha", "dropout", "target_modules"] {
            assert!(message.contains(name), "{message}");
        }
        let parsed: LoRAConfig = serde_json::from_str(r#"{"rank": 4, "alpha": 10}"#).unwrap();
        assert_eq!(parsed, LoRAConfig::new(4).with_alpha(10.0));
        assert!(serde_json::from_str::<LoRAConfig>(r#"{"ranks": 4}"#).is_err());
    }

    #[test]
    fn a_new_layer_is_uniform_within_its_bound_and_changes_nothing() {
        let config = LoRAConfig::new(6).with_alpha(9.0);
        let layer = LoRALayer::new(400, 31, &config, 7, &Device::Cpu).unwrap();
        let a: Vec<f32> = layer.a().flatten_all().unwrap().to_vec1().unwrap();
        assert!(a.iter().all(|value| value.abs() <= 0.05));
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let variance = a.iter().map(|value| value * value).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 3e-3 && (variance / (0.05 * 0.05 / 3.0) - 1.0).abs() < 0.1, "{mean} {variance}");
        let drawn = normal(20_001, 0.25, 7);
        let moment = |power: i32| drawn.iter().map(|value| f64::from(*value).powi(power)).sum::<f64>() / 20_001.0;
        // Within four standard errors of a normal's: 0, 1/16 and, of the fourth power, 3/256.
        assert!(moment(1).abs() < 0.0071 && (moment(2) * 16.0 - 1.0).abs() < 0.04, "{} {}", moment(1), moment(2));
        assert!((moment(4) * 256.0 / 3.0 - 1.0).abs() < 0.1, "{}", moment(4));
        let x = Tensor::ones((3, 400), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(layer.forward(&x).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap(), 0.0);
        let other = LoRALayer::new(400, 31, &config, 8, &Device::Cpu).unwrap();
        assert_ne!(a, other.a().flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
}
