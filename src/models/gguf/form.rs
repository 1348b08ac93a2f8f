//! Which of GGUF's forms a `tokenizer.json` has: told by its parts, each of which must be one that the form is made of.

use serde_json::Value as Json;

use super::tokenizer::{GPT2, Words};

/// What a tokenizer is in GGUF.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Form {
    /// Byte-level BPE with a name of `tokenizer.ggml.pre`. llama.cpp composes no characters (NFC) before it, whatever the name.
    Bytes(&'static str),
    /// SentencePiece's BPE. `prefix`: a space is put before a text; `always`: also before one that begins with a space, and after
    /// special tokens.
    SentencePiece { prefix: bool, always: bool },
}

/// The form of a `tokenizer.json`.
///
/// # Errors
/// All that has no form.
pub fn form(json: &Json) -> Result<Form, Vec<String>> {
    let mut problems = Vec::new();
    let model = &json["model"];
    let is_bpe = model["type"].as_str().unwrap_or("BPE") == "BPE" && model["merges"].is_array();
    if !is_bpe {
        problems.push(format!("its model is {}; BPE can be said", model["type"]));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix", "dropout"] {
        let idle = |value: &Json| value.is_null() || value == "" || value.as_f64() == Some(0.0);
        if !idle(&model[key]) {
            problems.push(format!("its model has {key} {}", model[key]));
        }
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        for key in ["lstrip", "rstrip", "single_word"] {
            if token[key] == true {
                problems.push(format!("the added token {} is {key}", token["content"]));
            }
        }
    }
    let form = if model["byte_fallback"] == true { sentence_piece(json) } else { byte_level(json) };
    match form {
        Ok(form) if problems.is_empty() => return Ok(form),
        Ok(_) => {}
        Err(problem) => problems.push(problem),
    }
    Err(problems)
}

fn byte_level(json: &Json) -> Result<Form, String> {
    let compose = match &json["normalizer"] {
        Json::Null => false,
        normalizer if normalizer["type"] == "NFC" => true,
        other => return Err(format!("its normalizer is {other}; none and NFC can be said of a byte-level tokenizer")),
    };
    let patterns = patterns(&json["pre_tokenizer"])?;
    let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
    let whole_words = json["model"]["ignore_merges"] == true;
    Words::name(&patterns, compose, whole_words).map(Form::Bytes).ok_or_else(|| {
        let (ignore, composed) = (if whole_words { " with" } else { " without" }, if compose { " after NFC" } else { "" });
        format!(
            "it cuts a text by {patterns:?}{composed},{ignore} ignore_merges, for which tokenizer.ggml.pre has no name here; {} have",
            Words::NAMES.join(", ")
        )
    })
}

/// The patterns by which a text is cut in turn, before bytes become characters.
fn patterns(pre: &Json) -> Result<Vec<String>, String> {
    let parts: Vec<&Json> = match pre["pretokenizers"].as_array() {
        Some(parts) => parts.iter().collect(),
        None => vec![pre],
    };
    let mut patterns = Vec::new();
    let count = parts.len();
    for (at, part) in parts.into_iter().enumerate() {
        match part["type"].as_str().unwrap_or_default() {
            "Digits" if part["individual_digits"] == true => patterns.push(r"\p{N}".to_string()),
            "Split"
                if part["behavior"] == "Isolated" && part["invert"] != true && part["pattern"]["Regex"].is_string() =>
            {
                patterns.extend(part["pattern"]["Regex"].as_str().map(str::to_string));
            }
            "ByteLevel" if at + 1 == count && part["add_prefix_space"] != true => {
                if part["use_regex"] != false {
                    patterns.push(GPT2.to_string());
                }
                return Ok(patterns);
            }
            _ => return Err(format!("its pre_tokenizer has {part}")),
        }
    }
    Err(format!("its pre_tokenizer is {pre}, without ByteLevel at the end"))
}

fn sentence_piece(json: &Json) -> Result<Form, String> {
    const SPACE: &str = "▁";
    let normalizer = &json["normalizer"];
    let steps = match normalizer["normalizers"].as_array() {
        Some(steps) => steps.as_slice(),
        None if normalizer.is_null() => &[],
        None => std::slice::from_ref(normalizer),
    };
    let mut prefix = false;
    let mut escaped = false;
    for step in steps {
        match step["type"].as_str().unwrap_or_default() {
            "Prepend" if step["prepend"] == SPACE && !escaped => prefix = true,
            "Replace" if step["pattern"]["String"] == " " && step["content"] == SPACE => escaped = true,
            _ => return Err(format!("its normalizer has {step}, which is not SentencePiece's")),
        }
    }
    let pre = &json["pre_tokenizer"];
    match pre["type"].as_str() {
        None if escaped => Ok(Form::SentencePiece { prefix, always: true }),
        Some("Metaspace") if !escaped && !prefix && pre["replacement"] == SPACE && pre["split"] == false => {
            match pre["prepend_scheme"].as_str() {
                Some("always" | "first") => Ok(Form::SentencePiece { prefix: true, always: false }),
                Some("never") => Ok(Form::SentencePiece { prefix: false, always: false }),
                _ => Err(format!("its pre_tokenizer is {pre}")),
            }
        }
        _ => Err(format!("its pre_tokenizer is {pre}, which is not SentencePiece's")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tokenizer::{LLAMA3, QWEN2, TEKKEN};
    use super::*;

    fn pre(pre_tokenizer: Json, normalizer: Json, ignore_merges: bool) -> Result<Form, Vec<String>> {
        let model = json!({"type": "BPE", "merges": [], "vocab": {}, "ignore_merges": ignore_merges});
        form(&json!({"pre_tokenizer": pre_tokenizer, "normalizer": normalizer, "model": model}))
    }

    /// As the models' own files have it.
    #[test]
    fn ways_to_cut_a_text_are_told_by_their_parts() {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
        let split = |pattern: &str| {
            let split =
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]})
        };
        let digits = json!({"type": "Digits", "individual_digits": true});
        let smollm = json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]});
        let nfc = json!({"type": "NFC"});
        let null = || Json::Null;
        assert_eq!(pre(bytes(true), null(), false), Ok(Form::Bytes("gpt-2")));
        assert_eq!(pre(smollm, null(), false), Ok(Form::Bytes("smollm")));
        assert_eq!(pre(split(LLAMA3), null(), true), Ok(Form::Bytes("llama-bpe")));
        assert_eq!(pre(split(QWEN2), nfc.clone(), false), Ok(Form::Bytes("qwen2")));
        assert_eq!(pre(split(TEKKEN), null(), true), Ok(Form::Bytes("tekken")));
        // Each part counts.
        assert!(pre(split(LLAMA3), null(), false).unwrap_err()[0].contains("without ignore_merges"));
        assert!(pre(split(LLAMA3), nfc, true).unwrap_err()[0].contains("after NFC"));
        assert!(pre(json!({"type": "Whitespace"}), null(), false).unwrap_err()[0].contains("Whitespace"));
    }

    #[test]
    fn sentence_pieces_forms_are_told_apart() {
        let told = |normalizer: Json, pre: Json| {
            let model = json!({"type": "BPE", "merges": [], "vocab": {}, "byte_fallback": true});
            form(&json!({"normalizer": normalizer, "pre_tokenizer": pre, "model": model}))
        };
        let prepend = json!({"type": "Prepend", "prepend": "▁"});
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let both = json!({"type": "Sequence", "normalizers": [prepend, replace.clone()]});
        let metaspace = |scheme: &str, split: bool| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split});
        let is = |prefix, always| Ok(Form::SentencePiece { prefix, always });
        assert_eq!(told(both, Json::Null), is(true, true));
        assert_eq!(told(replace, Json::Null), is(false, true));
        assert_eq!(told(Json::Null, metaspace("always", false)), is(true, false));
        assert_eq!(told(Json::Null, metaspace("first", false)), is(true, false));
        assert_eq!(told(Json::Null, metaspace("never", false)), is(false, false));
        assert!(told(Json::Null, metaspace("first", true)).is_err());
        assert!(told(json!({"type": "NFKC"}), Json::Null).unwrap_err()[0].contains("NFKC"));
    }
}
