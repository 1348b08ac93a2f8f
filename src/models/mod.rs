//! Models: configuration, weights, tokenizer, and the decoder that runs them.

pub mod block;
pub mod chat_template;
pub mod config;
pub mod decoder;
pub mod linear;
pub mod tokenizer;
pub mod weights;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

pub use chat_template::Message;
pub use config::{ModelConfig, RopeScaling};
pub use tokenizer::TextTokenizer;

use crate::{Error, Result};

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
}

/// What a folder may hold of the tokenizer; copied beside weights that are saved.
const TOKENIZER_FILES: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

impl ModelFiles {
    /// Opens a folder in Hugging Face's layout.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(name);
        if !path.is_dir() {
            return Err(Error::file(path, "is not a folder with a model"));
        }
        let config = ModelConfig::from_json(&path.join("config.json"))?;
        let tokenizer = TextTokenizer::from_folder(path, &config.eos_token_ids)?;
        Self::checked(name, config, tokenizer, Source::Folder(path.to_path_buf()))
    }

    /// Exactly the tensors of [`ModelConfig::weight_shapes`], in `dtype` on `device`.
    ///
    /// # Errors
    /// One error lists every tensor that is missing, has another shape, or is not of this model.
    pub fn weights(&self, dtype: DType, device: &Device) -> Result<HashMap<String, Tensor>> {
        match &self.source {
            Source::Folder(folder) => weights::load(folder, &self.config, dtype, device),
        }
    }

    /// Whether [`ModelFiles::save_with_weights`] can write this model.
    pub fn check_can_save(&self) -> Result<()> {
        match &self.source {
            Source::Folder(_) => Ok(()),
        }
    }

    /// Writes a folder with these weights in the dtype of this model's own, its configuration and tokenizer. Each file is
    /// written beside and renamed.
    pub fn save_with_weights(&self, weights: HashMap<String, Tensor>, folder: &Path) -> Result<()> {
        let Source::Folder(source) = &self.source;
        let dtype = weights::dtype(source)?;
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let cast = weights.into_iter().map(|(name, tensor)| Ok((name, tensor.to_device(&Device::Cpu)?.to_dtype(dtype)?)));
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
