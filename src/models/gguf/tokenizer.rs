//! A GGUF file's tokenizer, said in the form of `tokenizer.json`: `gpt2` (byte-level BPE) and `llama` (SentencePiece's BPE).
//!
//! llama.cpp names the way that a text is cut into words before BPE (`tokenizer.ggml.pre`); the patterns here are those of the
//! models' own `tokenizer.json`.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};
use tokenizers::Tokenizer;

use super::container::{Container, Result, Value, list};
use crate::models::tokenizer::SpecialTokens;

/// What the tokenizer's keys say besides the tokenizer itself.
pub struct Special {
    /// The tokens that end a generation.
    pub stop: Vec<u32>,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// Their texts and the chat template.
    pub texts: SpecialTokens,
}

/// Keys that are read, or that change nothing here. Ids of special tokens are told by their ending.
const KNOWN: [&str; 15] = [
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    "remove_extra_whitespaces",
    "escape_whitespaces",
    // Pairs of texts, and the choice of a template: not used.
    "add_sep_token",
    "token_type_count",
    "mask_token",
    "clean_up_tokenization_spaces",
];

/// How llama.cpp numbers the kinds of tokens.
pub mod kind {
    pub const NORMAL: u64 = 1;
    pub const UNKNOWN: u64 = 2;
    pub const CONTROL: u64 = 3;
    pub const USER_DEFINED: u64 = 4;
    pub const UNUSED: u64 = 5;
    pub const BYTE: u64 = 6;
}

/// GPT-2's words.
pub const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How a byte-level tokenizer prepares a text.
pub struct Words {
    /// Patterns that cut the text in turn, each into matches and what lies between.
    patterns: &'static [&'static str],
    /// Whether the text is composed (NFC) first.
    compose: bool,
    /// Whether a word that is a token is taken whole, whatever the merges say.
    whole_words: bool,
    /// Whether the begin token is added where the file does not say.
    add_bos: bool,
}

impl Words {
    /// One name of each way, of those that models have.
    pub const NAMES: [&str; 5] = ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"];

    /// The name of a way, if it has one.
    pub fn name(patterns: &[&str], compose: bool, whole_words: bool) -> Option<&'static str> {
        let is =
            |words: Self| words.patterns == patterns && (words.compose, words.whole_words) == (compose, whole_words);
        Self::NAMES.into_iter().find(|name| Self::of(name).is_some_and(is))
    }

    fn of(pre: &str) -> Option<Self> {
        let words = |patterns| Self { patterns, compose: false, whole_words: false, add_bos: false };
        Some(match pre {
            "gpt-2" => words(&[GPT2]),
            "smollm" | "starcoder" | "refact" | "command-r" => words(&[r"\p{N}", GPT2]),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
                Self { whole_words: true, add_bos: true, ..words(&[LLAMA3]) }
            }
            "qwen2" | "deepseek-r1-qwen" => Self { compose: true, ..words(&[QWEN2]) },
            "tekken" => Self { whole_words: true, add_bos: true, ..words(&[TEKKEN]) },
            // What llama.cpp does for files from before it named the ways.
            "default" => words(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]),
            _ => return None,
        })
    }
}

/// The vocabulary as the file has it.
struct Vocabulary<'a> {
    tokens: &'a [&'a str],
    kinds: Vec<u64>,
    ids: HashMap<&'a str, u32>,
}

/// The tokenizer and the special tokens of a file.
pub fn read(container: &Container) -> Result<(Tokenizer, Special)> {
    let get = |key: &str| container.get(&format!("tokenizer.ggml.{key}"));
    let unknown = container.pairs().filter_map(|(key, value)| Some((key, key.strip_prefix("tokenizer.ggml.")?, value)));
    let unknown: Vec<String> = unknown
        .filter(|(_, key, value)| {
            !(value.is_idle() || KNOWN.contains(key) || key.ends_with("_token_id") || key.ends_with("_token_ids"))
        })
        .map(|(key, ..)| key.to_string())
        .collect();
    if !unknown.is_empty() {
        return Err(format!("its tokenizer has keys that are not understood: {}", list(&unknown)));
    }
    let vocabulary = Vocabulary::read(container)?;
    let parts = match get("model") {
        Some(Value::Text("gpt2")) => byte_level(container, &vocabulary)?,
        Some(Value::Text("llama")) => sentence_piece(container, &vocabulary)?,
        Some(other) => return Err(format!("tokenizer.ggml.model {other} is not known; 'gpt2' and 'llama' are")),
        None => return Err("has no tokenizer.ggml.model".to_string()),
    };

    let special = |key: &str| -> Result<Option<u32>> {
        let Some(value) = get(key) else { return Ok(None) };
        let id = value.unsigned().filter(|&id| id < vocabulary.tokens.len() as u64);
        id.map(|id| Some(id as u32)).ok_or_else(|| format!("tokenizer.ggml.{key} is {value}: not a token"))
    };
    let (bos, eos) = (special("bos_token_id")?, special("eos_token_id")?);
    let mut stop = Vec::new();
    for id in [eos, special("eot_token_id")?, special("eom_token_id")?].into_iter().flatten() {
        if !stop.contains(&id) {
            stop.push(id);
        }
    }
    let text = |id: u32| vocabulary.tokens[id as usize].to_string();
    let flag = |key: &str, default: bool| match get(key) {
        None => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => Err(format!("tokenizer.ggml.{key} is {other}; it must be true or false")),
    };
    let before = if flag("add_bos_token", parts.add_bos)? { bos } else { None };
    let after = if flag("add_eos_token", false)? { eos } else { None };
    let json = parts.tokenizer(&vocabulary, before.map(|id| (id, text(id))), after.map(|id| (id, text(id))));
    let bytes = serde_json::to_vec(&json).map_err(|error| error.to_string())?;
    let tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| format!("its tokenizer cannot be built: {error}"))?;

    let chat_template = match container.get("tokenizer.chat_template") {
        Some(Value::Text(source)) => Some(source.to_string()),
        _ => None,
    };
    let texts = SpecialTokens {
        bos: bos.map(text).unwrap_or_default(),
        eos: eos.map(text),
        chat_template,
        ..SpecialTokens::default()
    };
    Ok((tokenizer, Special { stop, bos, texts }))
}

impl<'a> Vocabulary<'a> {
    fn read(container: &'a Container) -> Result<Self> {
        let Some(Value::Texts(tokens)) = container.get("tokenizer.ggml.tokens") else {
            return Err("has no tokenizer.ggml.tokens".to_string());
        };
        let kinds: Vec<u64> = match container.get("tokenizer.ggml.token_type") {
            None => vec![kind::NORMAL; tokens.len()],
            Some(Value::Numbers(kinds)) if kinds.len() == tokens.len() => {
                kinds.iter().map(|kind| kind.unsigned().unwrap_or_default()).collect()
            }
            Some(other) => return Err(format!("tokenizer.ggml.token_type is {other} for {} tokens", tokens.len())),
        };
        let mut ids = HashMap::new();
        for (id, token) in tokens.iter().enumerate() {
            if kinds[id] != kind::UNUSED && ids.insert(*token, id as u32).is_some() {
                return Err(format!("tokenizer.ggml.tokens has '{token}' twice"));
            }
        }
        Ok(Self { tokens, kinds, ids })
    }

    /// The tokens that are found in a text as they stand, before it is cut into words.
    fn added(&self) -> Vec<Json> {
        let added = self
            .tokens
            .iter()
            .zip(&self.kinds)
            .enumerate()
            .filter(|(_, (_, kind))| matches!(**kind, kind::CONTROL | kind::USER_DEFINED | kind::UNKNOWN));
        let entry = added.map(|(id, (token, kind))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": *kind != kind::USER_DEFINED})
        });
        entry.collect()
    }
}

/// The pieces of `tokenizer.json` that differ between the two kinds.
struct Parts {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    merges: Vec<Json>,
    model: Map<String, Json>,
    add_bos: bool,
}

impl Parts {
    fn tokenizer(
        mut self,
        vocabulary: &Vocabulary,
        before: Option<(u32, String)>,
        after: Option<(u32, String)>,
    ) -> Json {
        self.model.insert("type".to_string(), json!("BPE"));
        self.model.insert("vocab".to_string(), json!(vocabulary.ids));
        self.model.insert("merges".to_string(), Json::Array(self.merges));
        let piece = |token: &(u32, String)| json!({"SpecialToken": {"id": token.1, "type_id": 0}});
        let sequence = json!({"Sequence": {"id": "A", "type_id": 0}});
        let single: Vec<Json> = before.iter().map(piece).chain([sequence]).chain(after.iter().map(piece)).collect();
        let tokens: Map<String, Json> = before
            .iter()
            .chain(&after)
            .map(|(id, text)| (text.clone(), json!({"id": text, "ids": [id], "tokens": [text]})))
            .collect();
        let processor =
            json!({"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens});
        json!({
            "version": "1.0",
            "added_tokens": vocabulary.added(),
            "normalizer": self.normalizer,
            "pre_tokenizer": self.pre_tokenizer,
            "post_processor": if tokens_are_added(&before, &after) { processor } else { Json::Null },
            "decoder": self.decoder,
            "model": self.model,
        })
    }
}

fn tokens_are_added<T>(before: &Option<T>, after: &Option<T>) -> bool {
    before.is_some() || after.is_some()
}

fn byte_level(container: &Container, vocabulary: &Vocabulary) -> Result<Parts> {
    let pre = match container.get("tokenizer.ggml.pre") {
        Some(Value::Text(pre)) => pre,
        None => {
            tracing::warn!(
                "the file does not say how words are cut (tokenizer.ggml.pre); llama.cpp's default is taken"
            );
            "default"
        }
        Some(other) => return Err(format!("tokenizer.ggml.pre is {other}")),
    };
    let words = Words::of(pre).ok_or_else(|| {
        let known = "gpt-2, smollm, starcoder, refact, command-r, llama-bpe, falcon3, pixtral, qwen2, deepseek-r1-qwen, tekken and default";
        format!("tokenizer.ggml.pre '{pre}' is not known; {known} are")
    })?;
    if let Some(value) = container.get("tokenizer.ggml.add_space_prefix").filter(|value| !value.is_idle()) {
        return Err(format!(
            "tokenizer.ggml.add_space_prefix is {value}, which is not known of a byte-level tokenizer"
        ));
    }
    let Some(Value::Texts(merges)) = container.get("tokenizer.ggml.merges") else {
        return Err("has no tokenizer.ggml.merges".to_string());
    };
    let merges = merges.iter().map(|merge| {
        let pair = merge.split_once(' ').filter(|(left, right)| {
            let known = |token: &str| vocabulary.ids.contains_key(token);
            known(left) && known(right) && known(&format!("{left}{right}"))
        });
        let (left, right) =
            pair.ok_or_else(|| format!("tokenizer.ggml.merges has '{merge}', whose tokens are not there"))?;
        Ok(json!([left, right]))
    });
    let merges = merges.collect::<Result<Vec<Json>>>()?;
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let splits = words.patterns.iter().map(
        |pattern| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}),
    );
    let pre_tokenizers: Vec<Json> = splits.chain([bytes.clone()]).collect();
    let model = json!({"ignore_merges": words.whole_words, "fuse_unk": false, "byte_fallback": false});
    Ok(Parts {
        normalizer: if words.compose { json!({"type": "NFC"}) } else { Json::Null },
        pre_tokenizer: json!({"type": "Sequence", "pretokenizers": pre_tokenizers}),
        decoder: bytes,
        merges,
        model: model.as_object().cloned().unwrap_or_default(),
        add_bos: words.add_bos,
    })
}

/// SentencePiece joins the neighbours whose joint has the best score. A pair's place among `merges` says the same to BPE.
fn sentence_piece(container: &Container, vocabulary: &Vocabulary) -> Result<Parts> {
    let flag = |key: &str, default: bool| match container.get(&format!("tokenizer.ggml.{key}")) {
        Some(Value::Bool(value)) => *value,
        _ => default,
    };
    if flag("remove_extra_whitespaces", false) {
        return Err(
            "tokenizer.ggml.remove_extra_whitespaces is true; a text is taken with all its spaces here".to_string()
        );
    }
    if !flag("escape_whitespaces", true) {
        return Err("tokenizer.ggml.escape_whitespaces is false, which is not known".to_string());
    }
    let scores: Vec<f64> = match container.get("tokenizer.ggml.scores") {
        Some(Value::Numbers(scores)) if scores.len() == vocabulary.tokens.len() => {
            scores.iter().map(|score| score.float().unwrap_or_default()).collect()
        }
        _ => return Err("has no tokenizer.ggml.scores for its tokens".to_string()),
    };
    let normal = |id: u32| vocabulary.kinds[id as usize] == kind::NORMAL;
    let id = |text: &str| vocabulary.ids.get(text).copied().filter(|&id| normal(id));
    let mut pairs = Vec::new();
    for (whole, token) in vocabulary.tokens.iter().enumerate().filter(|(whole, _)| normal(*whole as u32)) {
        for (at, _) in token.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (id(&token[..at]), id(&token[at..])) {
                pairs.push((whole, left, right));
            }
        }
    }
    pairs.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then(a.cmp(b)));
    let text = |id: u32| vocabulary.tokens[id as usize];
    let merges = pairs.into_iter().map(|(_, left, right)| json!([text(left), text(right)])).collect();

    let unknown = vocabulary.tokens.iter().zip(&vocabulary.kinds).find(|(_, kind)| **kind == kind::UNKNOWN);
    let prefix = flag("add_space_prefix", true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let model = json!({"unk_token": unknown.map(|(token, _)| token), "fuse_unk": true, "byte_fallback": true});
    Ok(Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Json::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        merges,
        model: model.as_object().cloned().unwrap_or_default(),
        add_bos: true,
    })
}
