//! Keys and values of the tokens that a model has seen.

use candle_core::{DType, Device, Tensor};

use crate::models::ModelConfig;
use crate::{Error, Result};

/// Room for this many tokens is made at a time.
const BLOCK: usize = 256;

/// Keys and values of all layers, each `[capacity, kv_heads, head_dim]`, of which the first `len` rows are filled.
pub struct KvCache {
    layers: Vec<Layer>,
    limit: usize,
    /// What the rows were made by: [`Decoder::stamp`](crate::models::decoder::Decoder::stamp).
    owner: u64,
}

struct Layer {
    k: Tensor,
    v: Tensor,
    len: usize,
}

impl KvCache {
    /// An empty cache for a model.
    pub fn new(config: &ModelConfig, dtype: DType, device: &Device) -> Result<Self> {
        let empty = || Tensor::zeros((0, config.num_kv_heads, config.head_dim), dtype, device);
        let layers = (0..config.num_layers).map(|_| Ok(Layer { k: empty()?, v: empty()?, len: 0 }));
        Ok(Self { layers: layers.collect::<Result<_>>()?, limit: config.max_position_embeddings, owner: 0 })
    }

    /// Tokens held. While a pass is under way the first layers are ahead; this is the last one's.
    pub fn len(&self) -> usize {
        self.layers.last().map_or(0, |layer| layer.len)
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The most tokens that the model takes.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.len = layer.len.min(len);
        }
    }

    /// Forgets everything; the memory stays.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Notes who is about to append.
    ///
    /// # Errors
    /// When rows are held that another decoder made, or the same one with other adapters: mixing them gives wrong text.
    pub fn claim(&mut self, stamp: u64) -> Result<()> {
        if self.owner != stamp && self.layers.iter().any(|layer| layer.len > 0) {
            let problem = "holds keys that were made with another adapter or by another model; clear it first";
            return Err(Error::op("key-value cache", problem));
        }
        self.owner = stamp;
        Ok(())
    }

    /// Appends keys and values `[T, kv_heads, D]` to a layer and returns views of all it holds.
    ///
    /// # Errors
    /// When the model's longest context would be passed.
    pub fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let limit = self.limit;
        let held = &mut self.layers[layer];
        let (new, len) = (k.dims()[0], held.len + k.dims()[0]);
        if len > limit {
            let problem = format!("{} tokens and {new} more are over the model's context of {limit}", held.len);
            return Err(Error::op("key-value cache", problem));
        }
        let capacity = held.k.dims()[0];
        if len > capacity {
            // Doubling keeps the copies of a long generation few.
            let wanted = len.next_multiple_of(BLOCK).max(2 * capacity).min(limit.max(len));
            held.k = grown(&held.k, held.len, wanted)?;
            held.v = grown(&held.v, held.len, wanted)?;
        }
        held.k.slice_set(&k.contiguous()?, 0, held.len)?;
        held.v.slice_set(&v.contiguous()?, 0, held.len)?;
        held.len = len;
        Ok((held.k.narrow(0, 0, len)?, held.v.narrow(0, 0, len)?))
    }
}

fn grown(old: &Tensor, len: usize, capacity: usize) -> Result<Tensor> {
    let mut dims = old.dims().to_vec();
    dims[0] = capacity;
    let new = Tensor::zeros(dims, old.dtype(), old.device())?;
    if len > 0 {
        new.slice_set(&old.narrow(0, 0, len)?, 0, 0)?;
    }
    Ok(new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_what_was_appended_over_growth_and_truncation() {
        let json = serde_json::json!({"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 10, "intermediate_size": 8, "max_position_embeddings": 600});
        let config = ModelConfig::from_value("config.json".as_ref(), &json).unwrap();
        let mut cache = KvCache::new(&config, DType::F32, &Device::Cpu).unwrap();
        let rows = |from: usize, to: usize| {
            let values: Vec<f32> = (from * 8..to * 8).map(|i| i as f32).collect();
            Tensor::from_vec(values, (to - from, 2, 4), &Device::Cpu).unwrap()
        };
        for (from, to) in [(0, 1), (1, 255), (255, 259), (259, 600)] {
            let (k, v) = cache.append(0, &rows(from, to), &rows(from, to)).unwrap();
            assert_eq!((k.dims()[0], v.dims()[0]), (to, to));
            let all = k.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert!(all.iter().enumerate().all(|(i, &value)| value == i as f32));
        }
        assert!(cache.append(0, &rows(0, 1), &rows(0, 1)).unwrap_err().to_string().contains("600"));
        cache.truncate(3);
        let (k, _) = cache.append(0, &rows(3, 5), &rows(3, 5)).unwrap();
        assert_eq!(k.flatten_all().unwrap().to_vec1::<f32>().unwrap()[39], 39.0);
    }
}
