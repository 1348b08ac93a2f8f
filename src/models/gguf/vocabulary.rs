//! A `tokenizer.json` said in a GGUF file's keys: the mirror of [`super::tokenizer`].
//!
//! Two kinds have such a form: byte-level BPE whose way to cut a text is one that llama.cpp names, and SentencePiece's BPE. Special
//! tokens around a text are found by encoding one, not by reading the post-processor.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value as Json;

use super::container::list;
use super::form::{Form, form};
use super::tokenizer::kind;
use super::writer::Pairs;
use crate::models::config::read_json;
use crate::models::tokenizer::{SpecialTokens, special_tokens};
use crate::models::{ModelConfig, TextTokenizer};
use crate::{Error, Result};

/// What a reader should know of the keys.
#[derive(Debug, Default)]
pub struct Said {
    pub notes: Vec<String>,
    /// Texts that begin with a space, and what is after special tokens, are cut otherwise.
    pub other_prefix: bool,
}

/// Writes the keys of a folder's tokenizer.
///
/// # Errors
/// One error lists what the keys cannot say.
pub fn write(folder: &Path, config: &ModelConfig, tokenizer: &TextTokenizer, pairs: &mut Pairs) -> Result<Said> {
    let json = read_json(&folder.join("tokenizer.json"))?;
    let refused = |problem: String| refused(folder, &problem);
    let form = form(&json).map_err(|problems| refused(list(&problems)))?;
    let vocabulary = Vocabulary::read(&json, config.vocab_size).map_err(refused)?;
    let mut said = Said::default();
    let unknown = json["model"]["unk_token"].as_str().and_then(|text| vocabulary.id(text));
    match form {
        Form::Bytes(pre) => {
            pairs.text("tokenizer.ggml.model", "gpt2");
            pairs.text("tokenizer.ggml.pre", pre);
        }
        Form::SentencePiece { prefix, always } => {
            pairs.text("tokenizer.ggml.model", "llama");
            pairs.text("tokenizer.ggml.pre", "default");
            pairs.flag("tokenizer.ggml.add_space_prefix", prefix);
            pairs.f32s("tokenizer.ggml.scores", &vocabulary.scores().map_err(refused)?);
            if prefix && !always {
                said.other_prefix = true;
                said.notes.push(
                    "llama.cpp puts a space before every text, also before one that begins with a space and after special tokens"
                        .to_string(),
                );
            }
        }
    }
    pairs.texts("tokenizer.ggml.tokens", &vocabulary.tokens);
    let sentence_piece = matches!(form, Form::SentencePiece { .. });
    pairs.i32s("tokenizer.ggml.token_type", &vocabulary.kinds(sentence_piece, unknown));
    if !sentence_piece {
        pairs.texts("tokenizer.ggml.merges", &vocabulary.merges);
    }
    write_special(folder, config, tokenizer, &vocabulary, unknown, pairs, &mut said.notes)?;
    Ok(said)
}

fn refused(folder: &Path, problem: &str) -> Error {
    Error::file(folder.join("tokenizer.json"), format!("cannot be said in GGUF: {problem}"))
}

/// All tokens by their ids, and the merges as `left right`.
struct Vocabulary {
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
    /// Of the tokens that are no words of the model: whether they are special.
    added: HashMap<u32, bool>,
    merges: Vec<String>,
}

impl Vocabulary {
    fn read(json: &Json, size: usize) -> Result<Self, String> {
        let model = json["model"]["vocab"].as_object().ok_or("its model has no vocab")?;
        let mut ids = HashMap::with_capacity(size);
        let mut problems = Vec::new();
        let mut take = |text: &str, id: Option<u64>| match id.filter(|&id| id < size as u64) {
            Some(id) => drop(ids.insert(text.to_string(), id as u32)),
            None => problems.push(format!("the token '{text}' is not one of the model's {size}")),
        };
        model.iter().for_each(|(text, id)| take(text, id.as_u64()));
        let mut added = HashMap::new();
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            take(token["content"].as_str().unwrap_or_default(), token["id"].as_u64());
            added.insert(token["id"].as_u64().unwrap_or_default() as u32, token["special"] == true);
        }
        let mut tokens: Vec<Option<String>> = vec![None; size];
        for (text, &id) in &ids {
            if let Some(other) = tokens[id as usize].replace(text.clone()) {
                problems.push(format!("the tokens '{text}' and '{other}' are both {id}"));
            }
        }
        let merges = json["model"]["merges"].as_array().into_iter().flatten().map(|merge| match merge {
            Json::String(pair) => Ok(pair.clone()),
            Json::Array(pair) => match pair.as_slice() {
                [Json::String(left), Json::String(right)] => Ok(format!("{left} {right}")),
                _ => Err(format!("the merge {merge} is no pair")),
            },
            other => Err(format!("the merge {other} is no pair")),
        });
        let merges = merges.collect::<Result<_, _>>()?;
        if !problems.is_empty() {
            problems.sort_unstable();
            return Err(list(&problems));
        }
        // As llama.cpp's converter calls the rows of an embedding that have no token.
        let tokens = tokens.into_iter().enumerate().map(|(id, text)| text.unwrap_or_else(|| format!("[PAD{id}]")));
        Ok(Self { tokens: tokens.collect(), ids, added, merges })
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    fn kinds(&self, sentence_piece: bool, unknown: Option<u32>) -> Vec<i32> {
        let kind = |(id, token): (usize, &String)| {
            let id = id as u32;
            if self.id(token) != Some(id) {
                return kind::UNUSED;
            }
            match self.added.get(&id) {
                _ if sentence_piece && unknown == Some(id) => kind::UNKNOWN,
                Some(true) => kind::CONTROL,
                Some(false) => kind::USER_DEFINED,
                None if sentence_piece && is_byte(token) => kind::BYTE,
                None => kind::NORMAL,
            }
        };
        self.tokens.iter().enumerate().map(|token| kind(token) as i32).collect()
    }

    /// SentencePiece joins what has the best score: a token's is the place of the first merge that gives it, negated.
    fn scores(&self) -> Result<Vec<f32>, String> {
        let mut scores = vec![None; self.tokens.len()];
        for (place, merge) in self.merges.iter().enumerate() {
            // A token may hold no space: SentencePiece's are written as another character.
            let whole = merge.replace(' ', "");
            if let Some(id) = self.id(&whole) {
                scores[id as usize].get_or_insert(-(place as f32));
            }
        }
        let joined = |(id, token): &(usize, &String)| {
            scores[*id].is_none()
                && token.chars().nth(1).is_some()
                && !is_byte(token)
                && !self.added.contains_key(&(*id as u32))
                && self.ids.contains_key(*token)
        };
        let unmade: Vec<String> =
            self.tokens.iter().enumerate().filter(joined).map(|(_, token)| format!("'{token}'")).collect();
        if !unmade.is_empty() {
            return Err(format!("no merge gives its tokens {}, as SentencePiece's have it", list(&unmade)));
        }
        Ok(scores.into_iter().map(|score| score.unwrap_or(0.0)).collect())
    }
}

fn is_byte(token: &str) -> bool {
    token.len() == 6 && token.starts_with("<0x") && token.ends_with('>')
}

fn write_special(
    folder: &Path,
    config: &ModelConfig,
    tokenizer: &TextTokenizer,
    vocabulary: &Vocabulary,
    unknown: Option<u32>,
    pairs: &mut Pairs,
    notes: &mut Vec<String>,
) -> Result<()> {
    let SpecialTokens { bos, chat_template, other_templates, unknown: named_unknown, padding, .. } =
        special_tokens(folder)?;
    let eos = tokenizer.eos_token().map(|(id, _)| id);
    let (before, after) = around(folder, tokenizer)?;
    let bos = before.or_else(|| vocabulary.id(&bos)).or(config.bos_token_id);
    if after.is_some() && after != eos {
        return Err(refused(folder, &format!("it ends a text with token {after:?}, and the end token is {eos:?}")));
    }
    let rest: Vec<u32> = tokenizer.stop_tokens().iter().copied().filter(|id| Some(*id) != eos).collect();
    if rest.len() > 2 {
        notes.push(format!("of the tokens that end a text, GGUF has no key for {:?}", &rest[2..]));
    }
    let ids = [
        ("bos", bos),
        ("eos", eos),
        ("eot", rest.first().copied()),
        ("eom", rest.get(1).copied()),
        ("unknown", unknown.or_else(|| vocabulary.id(&named_unknown?))),
        ("padding", padding.and_then(|text| vocabulary.id(&text))),
    ];
    for (name, id) in ids {
        if let Some(id) = id {
            pairs.u32(&format!("tokenizer.ggml.{name}_token_id"), id);
        }
    }
    pairs.flag("tokenizer.ggml.add_bos_token", before.is_some());
    pairs.flag("tokenizer.ggml.add_eos_token", after.is_some());
    if let Some(template) = chat_template {
        pairs.text("tokenizer.chat_template", &template);
    }
    if !other_templates.is_empty() {
        notes
            .push(format!("of the chat templates only the default one is carried, not {}", other_templates.join(", ")));
    }
    Ok(())
}

/// The tokens that are put before and after a text.
fn around(folder: &Path, tokenizer: &TextTokenizer) -> Result<(Option<u32>, Option<u32>)> {
    let (with, without) = (tokenizer.encode("a", true)?, tokenizer.encode("a", false)?);
    if with == without {
        return Ok((None, None));
    }
    let at = with.windows(without.len().max(1)).position(|part| part == without);
    match at.map(|at| (&with[..at], &with[at + without.len()..])) {
        Some((before @ ([] | [_]), after @ ([] | [_]))) => Ok((before.first().copied(), after.first().copied())),
        _ => Err(refused(folder, &format!("with special tokens it gives {with:?} where it gives {without:?} without"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn tokens_without_a_merge_or_without_a_row_are_named() {
        let json = |vocab: Json, merges: Json| json!({"model": {"vocab": vocab, "merges": merges}, "added_tokens": []});
        let read = |json: &Json| Vocabulary::read(json, 4);
        let scores =
            read(&json(json!({"a": 0, "b": 1, "ab": 2, "ba": 3}), json!([["b", "a"], "a b"]))).unwrap().scores();
        assert_eq!(scores, Ok(vec![0.0, 0.0, -1.0, 0.0]));
        let unmade = read(&json(json!({"a": 0, "b": 1, "ab": 2, "<0x0A>": 3}), json!([]))).unwrap().scores();
        assert!(unmade.unwrap_err().contains("its tokens 'ab', as"));
        let problem = read(&json(json!({"a": 0, "b": 9, "c": 0}), json!([]))).err().unwrap();
        assert!(problem.contains("'b' is not one of the model's 4") && problem.contains("are both 0"), "{problem}");
    }

    /// Every place in a `tokenizer.json`, as a pointer.
    fn places(json: &Json, at: &str, all: &mut Vec<String>) {
        all.push(at.to_string());
        match json {
            Json::Object(map) => map.iter().for_each(|(key, value)| places(value, &format!("{at}/{key}"), all)),
            Json::Array(items) => {
                items.iter().enumerate().for_each(|(i, item)| places(item, &format!("{at}/{i}"), all));
            }
            _ => {}
        }
    }

    #[test]
    fn damaged_files_do_not_panic() {
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true});
        let added = json!([{"id": 3, "content": "<s>", "special": true, "lstrip": false}]);
        let whole = |model: Json, normalizer: Json, pre: Json| json!({"model": model, "normalizer": normalizer, "pre_tokenizer": pre, "added_tokens": added});
        let vocab = json!({"a": 0, "b": 1, "ab": 2});
        let byte_level = whole(
            json!({"type": "BPE", "vocab": vocab, "merges": [["a", "b"], "a b"], "unk_token": "a"}),
            Json::Null,
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes]}),
        );
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let sentence_piece = whole(
            json!({"type": "BPE", "vocab": vocab, "merges": ["a b"], "byte_fallback": true}),
            json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}),
            Json::Null,
        );
        let mut read = 0;
        for whole in [byte_level, sentence_piece] {
            assert!(form(&whole).is_ok(), "{:?}", form(&whole));
            let mut all = Vec::new();
            places(&whole, "", &mut all);
            for place in all {
                for other in
                    [Json::Null, json!([]), json!({}), json!(-1), json!(1e9), json!(""), json!([[]]), json!(true)]
                {
                    let mut damaged = whole.clone();
                    *damaged.pointer_mut(&place).unwrap() = other;
                    let _ = form(&damaged);
                    if let Ok(vocabulary) = Vocabulary::read(&damaged, 5) {
                        let _ = vocabulary.scores();
                        assert_eq!(vocabulary.kinds(true, Some(4)).len(), 5);
                        read += 1;
                    }
                }
            }
        }
        assert!(read > 100, "{read}");
    }
}
