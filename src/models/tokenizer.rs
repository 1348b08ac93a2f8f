//! Text to tokens and back, with the model's special tokens and chat template.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::chat_template::{ChatTemplate, Message};
use super::config::read_json;
use crate::{Error, Result};

/// Where a token begins and ends in a text, in bytes.
pub type Span = (usize, usize);

/// A model's tokenizer.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    template: Option<ChatTemplate>,
    eos: Option<(u32, String)>,
    stop: Vec<u32>,
}

/// What a tokenizer's files say besides its vocabulary.
#[derive(Debug, Clone, Default)]
pub struct SpecialTokens {
    /// The text of the token that begins a text; empty where there is none.
    pub bos: String,
    /// The text of the token that ends one.
    pub eos: Option<String>,
    /// The chat template's source.
    pub chat_template: Option<String>,
    /// The names of further templates, for which there is no use here.
    pub other_templates: Vec<String>,
    /// The text of the token for what is not in the vocabulary.
    pub unknown: Option<String>,
    /// The text of the token that fills up rows.
    pub padding: Option<String>,
}

impl TextTokenizer {
    /// Reads `tokenizer.json`, and what is there of `tokenizer_config.json` and `chat_template.jinja`.
    pub fn from_folder(folder: &Path, stop: &[u32]) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !path.exists() {
            return Err(Error::file(folder, "has no tokenizer.json"));
        }
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        // tokenizers 0.23 panics on JSON that is broken within its decoder.
        serde_json::from_slice::<Value>(&bytes).map_err(|error| Error::file(&path, format!("is not JSON: {error}")))?;
        let inner = Tokenizer::from_bytes(bytes).map_err(|error| Error::file(&path, error.to_string()))?;
        let special = special_tokens(folder)?;
        Self::new(inner, special, stop)
    }

    /// From parts, as a GGUF file holds them. `stop` are the tokens that the model's configuration ends a text with.
    pub fn new(mut inner: Tokenizer, special: SpecialTokens, stop: &[u32]) -> Result<Self> {
        // Files may ask for either; rows are cut and laid end to end by the trainer.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(text_error)?;
        let eos = match special.eos {
            None => stop.first().and_then(|&id| Some((id, inner.id_to_token(id)?))),
            Some(text) => match inner.token_to_id(&text) {
                Some(id) => Some((id, text)),
                None => return Err(Error::Text(format!("the end token '{text}' is not in the vocabulary"))),
            },
        };
        let mut stop = stop.to_vec();
        if let Some((id, _)) = eos
            && !stop.contains(&id)
        {
            stop.push(id);
        }
        let end = eos.as_ref().map_or("", |(_, text)| text);
        let template = special.chat_template.map(|source| ChatTemplate::new(&source, &special.bos, end)).transpose()?;
        Ok(Self { inner, template, eos, stop })
    }

    /// The tokens of a text; `add_special_tokens` adds what the tokenizer puts around one (often a begin token).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(text_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// [`TextTokenizer::encode`] with the range of the text's bytes that each token covers.
    pub fn encode_with_offsets(&self, text: &str, add_special_tokens: bool) -> Result<(Vec<u32>, Vec<Span>)> {
        let encoding = self.inner.encode(text, add_special_tokens).map_err(text_error)?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// The text of tokens, with or without the special ones among them.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(text_error)
    }

    /// Turns tokens into text one by one.
    pub fn decode_stream(&self) -> DecodeStream<'_> {
        DecodeStream { inner: self.inner.decode_stream(true) }
    }

    /// The tokens that end a generation.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop
    }

    /// The token that ends a text, with its spelling.
    pub fn eos_token(&self) -> Option<(u32, &str)> {
        self.eos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    /// The tokens of the vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The tokens that are found in a text as they stand, before it is cut into words.
    pub fn added_tokens(&self) -> Vec<(u32, String)> {
        let added = self.inner.get_added_tokens_decoder().into_iter();
        let mut added: Vec<(u32, String)> = added.map(|(id, token)| (id, token.content)).collect();
        added.sort_unstable();
        added
    }

    /// The tokenizer as a `tokenizer.json` holds it.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(text_error)
    }

    /// Whether the model came with a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Renders a conversation with the model's chat template.
    pub fn render_chat(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let missing = || Error::Text("the model has no chat template; give it plain text rows or prompts".to_string());
        self.template.as_ref().ok_or_else(missing)?.render(messages, tools, add_generation_prompt)
    }
}

/// Text from tokens as they come. A character that is spread over several tokens comes with its last one.
pub struct DecodeStream<'a> {
    inner: tokenizers::tokenizer::DecodeStream<
        'a,
        tokenizers::ModelWrapper,
        tokenizers::NormalizerWrapper,
        tokenizers::PreTokenizerWrapper,
        tokenizers::PostProcessorWrapper,
        tokenizers::DecoderWrapper,
    >,
}

impl DecodeStream<'_> {
    /// The text that this token completes, if any.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.inner.step(id).map_err(text_error)
    }
}

/// What is there of `tokenizer_config.json` and `chat_template.jinja`.
pub(super) fn special_tokens(folder: &Path) -> Result<SpecialTokens> {
    let mut special = SpecialTokens::default();
    let config = folder.join("tokenizer_config.json");
    if config.exists() {
        let json = read_json(&config)?;
        special.bos = token_text(&json, "bos_token").unwrap_or_default();
        special.eos = token_text(&json, "eos_token");
        special.unknown = token_text(&json, "unk_token");
        special.padding = token_text(&json, "pad_token");
        special.chat_template = chat_template(&json);
        let named = json.get("chat_template").and_then(Value::as_array).into_iter().flatten();
        let names = named.filter_map(|entry| entry.get("name")?.as_str()).filter(|name| *name != "default");
        special.other_templates = names.map(str::to_string).collect();
    }
    let jinja = folder.join("chat_template.jinja");
    if jinja.exists() {
        special.chat_template = Some(std::fs::read_to_string(&jinja).map_err(Error::io(&jinja))?);
    }
    Ok(special)
}

fn text_error(error: tokenizers::Error) -> Error {
    Error::Text(format!("tokenizer: {error}"))
}

/// A special token stands as its text or as an object with its text in `content`.
fn token_text(json: &Value, key: &str) -> Option<String> {
    let value = json.get(key)?;
    Some(value.as_str().or_else(|| value.get("content")?.as_str())?.to_string())
}

/// One template, or a list of named ones of which `default` is for conversations.
fn chat_template(json: &Value) -> Option<String> {
    match json.get("chat_template")? {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))?;
            Some(default.get("template")?.as_str()?.to_string())
        }
        _ => None,
    }
}
