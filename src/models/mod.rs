//! Models: configuration, weights, tokenizer, and the decoder that runs them.

pub mod block;
pub mod chat_template;
pub mod config;
pub mod decoder;
pub mod gguf;
pub mod holding;
pub mod hub;
pub mod linear;
pub mod tokenizer;
pub mod weights;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

pub use chat_template::Message;
pub use config::{ModelConfig, RopeScaling};
pub use holding::Holding;
pub use hub::Hub;
pub use tokenizer::TextTokenizer;

use self::linear::BaseWeight;
use crate::backend::quantized::Quantize;
use crate::{Error, Result};

/// What frozen weights, and with them the activations, are held in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightDtype {
    /// f32 on the CPU; on a GPU the file's own where that is f32, else bf16.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits with the range of f32.
    Bf16,
    /// 16 bits with more digits and less range.
    F16,
}

impl WeightDtype {
    /// The dtype on a device of weights that are `own` in their file.
    pub fn on(self, device: &Device, own: DType) -> DType {
        match self {
            Self::Auto if device.is_cpu() || own == DType::F32 => DType::F32,
            Self::F32 => DType::F32,
            Self::Auto | Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// A model's files, with what is small of them read.
#[derive(Debug)]
pub struct ModelFiles {
    /// The name or path that the model was opened by.
    pub name: String,
    /// Its sizes and variants.
    pub config: ModelConfig,
    /// Its tokenizer.
    pub tokenizer: TextTokenizer,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Folder(PathBuf),
    Gguf(PathBuf),
}

/// What a folder may hold of the tokenizer; copied beside weights that are saved.
const TOKENIZER_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

const NOT_SAVED: &str = "a quantized model is not written out again; train an adapter on it, or take the safetensors that it was made \
                         from";

impl ModelFiles {
    /// Opens a folder in Hugging Face's layout, a GGUF file, or a model of the hub by its name (`owner/name` or
    /// `owner/name@revision`), as the environment says ([`Hub::from_env`]).
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(name);
        if path.is_file() {
            if !gguf::is_gguf(path)? {
                return Err(Error::file(path, "is not a GGUF file; a model is one, or a folder with config.json"));
            }
            let (config, tokenizer) = gguf::open(path)?;
            return Self::checked(name, config, tokenizer, Source::Gguf(path.to_path_buf()));
        }
        if path.is_dir() {
            return Self::from_folder(name, path);
        }
        if hub::is_name(name) {
            return Self::from_hub(name, &Hub::from_env()?);
        }
        Err(Error::file(path, "is not there; a model is a folder, a GGUF file, or owner/name on the hub"))
    }

    /// Opens a model of the hub, downloading what is not in the cache.
    pub fn from_hub(name: &str, hub: &Hub) -> Result<Self> {
        Self::from_folder(name, &hub.fetch(name)?)
    }

    fn from_folder(name: &str, folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        if !path.exists() {
            let files = fs::read_dir(folder).map_err(Error::io(folder))?.flatten();
            let gguf = files.map(|file| file.path()).find(|path| path.extension().is_some_and(|end| end == "gguf"));
            let advice = gguf.map(|file| format!("; give the file {} itself", file.display())).unwrap_or_default();
            return Err(Error::file(folder, format!("has no config.json{advice}")));
        }
        let config = ModelConfig::from_json(&path)?;
        let tokenizer = TextTokenizer::from_folder(folder, &config.eos_token_ids)?;
        Self::checked(name, config, tokenizer, Source::Folder(folder.to_path_buf()))
    }

    /// Exactly the tensors of [`ModelConfig::weight_shapes`], in `dtype` on `device`.
    ///
    /// # Errors
    /// One error lists every tensor that is missing, has another shape, or is not of this model.
    pub fn weights(&self, dtype: DType, device: &Device) -> Result<HashMap<String, Tensor>> {
        let base = self.base(&Holding::dense(dtype), device)?;
        let dense = base.into_iter().filter_map(|(name, weight)| match weight {
            BaseWeight::Dense(parameter) => Some((name, parameter.value)),
            BaseWeight::Quantized(_) => None,
        });
        Ok(dense.collect())
    }

    /// What the weights are to be held in on a device: those of a file that are quantized stay so where an option does not say
    /// otherwise. On a GPU embedding and output projection are dense always.
    pub fn holding(&self, quantize: Quantize, dtype: DType, device: &Device) -> Result<Holding> {
        // First, since it also sees whether the file has the layers that the configuration tells of.
        let mut kinds = match &self.source {
            Source::Folder(folder) => weights::kinds(folder, &self.config)?,
            Source::Gguf(file) => gguf::kinds(file, &self.config)?,
        };
        if quantize != Quantize::Auto {
            let holding = Holding::linears(&self.config, quantize, dtype);
            holding.check(&self.config)?;
            if let Some(note) = holding.differs_from(quantize) {
                tracing::warn!("{note}");
            }
            return Ok(holding);
        }
        kinds.retain(|name, _| device.is_cpu() || holding::is_linear(name));
        Ok(Holding { dtype, kinds })
    }

    /// The weights, held as [`ModelFiles::holding`] says.
    ///
    /// # Errors
    /// As [`ModelFiles::weights`].
    pub fn base(&self, holding: &Holding, device: &Device) -> Result<HashMap<String, BaseWeight>> {
        match &self.source {
            Source::Folder(folder) => weights::load(folder, &self.config, holding, device),
            Source::Gguf(file) => gguf::load(file, &self.config, holding, device),
        }
    }

    /// The weights one after the other, on the CPU, held as [`ModelFiles::holding`] says.
    ///
    /// # Errors
    /// As [`ModelFiles::weights`]; what `visit` returns.
    pub fn visit(&self, holding: &Holding, visit: &mut dyn FnMut(&str, BaseWeight) -> Result<()>) -> Result<()> {
        match &self.source {
            Source::Folder(folder) => weights::visit(folder, &self.config, holding, &Device::Cpu, visit),
            Source::Gguf(file) => gguf::visit(file, &self.config, holding, visit),
        }
    }

    /// The file or folder that it was read from.
    pub fn path(&self) -> &Path {
        match &self.source {
            Source::Folder(path) | Source::Gguf(path) => path,
        }
    }

    /// Whether it was read from a GGUF file.
    pub fn is_gguf(&self) -> bool {
        matches!(self.source, Source::Gguf(_))
    }

    /// What the file's first weight is held in; bf16 for a GGUF file, whose weights are quantized.
    pub fn own_dtype(&self) -> Result<DType> {
        match &self.source {
            Source::Folder(folder) => weights::dtype(folder),
            Source::Gguf(_) => Ok(DType::BF16),
        }
    }

    /// The folder with the model's safetensors.
    ///
    /// # Errors
    /// A model from a GGUF file, which has none.
    pub fn folder(&self) -> Result<&Path> {
        match &self.source {
            Source::Folder(folder) => Ok(folder),
            Source::Gguf(file) => Err(Error::file(file, NOT_SAVED)),
        }
    }

    /// Whether [`ModelFiles::save_with_weights`] can write this model.
    pub fn check_can_save(&self) -> Result<()> {
        match &self.source {
            Source::Folder(folder) if weights::kinds(folder, &self.config)?.is_empty() => Ok(()),
            Source::Folder(folder) => Err(Error::file(folder, NOT_SAVED)),
            Source::Gguf(file) => Err(Error::file(file, NOT_SAVED)),
        }
    }

    /// Writes a folder with these weights in the dtype of this model's own, its configuration and tokenizer. Each file is
    /// written beside and renamed.
    pub fn save_with_weights(&self, weights: HashMap<String, Tensor>, folder: &Path) -> Result<()> {
        let source = match &self.source {
            Source::Folder(source) => source,
            Source::Gguf(file) => return Err(Error::file(file, NOT_SAVED)),
        };
        let dtype = weights::dtype(source)?;
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let cast =
            weights.into_iter().map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.to_dtype(dtype)?)));
        let cast = cast.collect::<Result<HashMap<String, Tensor>>>()?;
        let path = folder.join("model.safetensors");
        crate::training::files::write_atomically(&path, |file| {
            let bytes = safetensors::serialize(cast.iter().map(|(name, tensor)| (name.as_str(), tensor)), None);
            let bytes = bytes.map_err(|error| Error::file(&path, error.to_string()))?;
            std::io::Write::write_all(file, &bytes).map_err(Error::io(&path))
        })?;
        for name in ["config.json", "generation_config.json"].iter().chain(&TOKENIZER_FILES) {
            let (from, to) = (source.join(name), folder.join(name));
            if from.exists() && from != to {
                fs::copy(&from, &to).map_err(Error::io(&to))?;
            }
        }
        Ok(())
    }

    fn checked(name: &str, config: ModelConfig, tokenizer: TextTokenizer, source: Source) -> Result<Self> {
        if tokenizer.vocab_size() > config.vocab_size {
            let (tokens, rows) = (tokenizer.vocab_size(), config.vocab_size);
            let problem = format!("its tokenizer has {tokens} tokens and its embedding only {rows} rows");
            return Err(Error::file(name, problem));
        }
        Ok(Self { name: name.to_string(), config, tokenizer, source })
    }
}
