//! One JSONL row: which kind it is, and the text that it becomes.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::models::{Message, TextTokenizer};

/// A row by its kind.
#[derive(Debug, Clone, PartialEq)]
pub enum RowKind {
    /// A conversation; turns before `trained_from` are never trained on under a mask.
    Messages {
        /// The turns.
        messages: Vec<Message>,
        /// Descriptions of tools, for the template.
        tools: Option<Value>,
        /// The first turn that may be trained on.
        trained_from: usize,
    },
    /// A prompt and what should follow it.
    Pair {
        /// What is asked.
        prompt: String,
        /// What should be answered.
        completion: String,
    },
    /// Text to go on with.
    Text(String),
}

/// A row's text and what in it is trained on.
#[derive(Debug, Clone, PartialEq)]
pub struct Rendered {
    /// The whole text.
    pub text: String,
    /// Bytes that are trained on; `None` for all.
    pub trained: Option<Vec<Range<usize>>>,
    /// Whether the tokenizer adds its special tokens; templates write their own.
    pub add_special: bool,
    /// Whether the end token follows.
    pub end: bool,
    /// Whether a pair was joined without a template.
    pub joined: bool,
    /// Whether only the last turn could be told apart.
    pub last_turn_only: bool,
}

/// Tells what a line is. Also returns the keys that nothing reads.
pub fn parse(line: &[u8]) -> Result<(RowKind, Vec<String>), String> {
    let text = std::str::from_utf8(line).map_err(|error| format!("is not UTF-8 ({error})"))?;
    let value: Value = serde_json::from_str(text).map_err(|error| format!("is not JSON ({error})"))?;
    let Value::Object(mut map) = value else { return Err("is not a JSON object".to_string()) };
    let kind = if map.contains_key("messages") {
        let messages = messages(map.remove("messages").unwrap_or_default(), "messages")?;
        RowKind::Messages { messages, tools: tools(&mut map)?, trained_from: 0 }
    } else if map.contains_key("prompt") && map.contains_key("completion") {
        match (map.remove("prompt").unwrap_or_default(), map.remove("completion").unwrap_or_default()) {
            (Value::String(prompt), Value::String(completion)) => RowKind::Pair { prompt, completion },
            (prompt @ Value::Array(_), completion @ Value::Array(_)) => {
                let mut turns = messages(prompt, "prompt")?;
                let trained_from = turns.len();
                turns.extend(messages(completion, "completion")?);
                RowKind::Messages { messages: turns, tools: tools(&mut map)?, trained_from }
            }
            _ => return Err("prompt and completion must be two texts or two lists of messages".to_string()),
        }
    } else if let Some(text) = map.remove("text") {
        RowKind::Text(text.as_str().ok_or("text is not a string")?.to_string())
    } else {
        let keys: Vec<&str> = map.keys().map(String::as_str).collect();
        let found = if keys.is_empty() { "none".to_string() } else { keys.join(", ") };
        return Err(format!("needs messages, prompt and completion, or text; its keys are {found}"));
    };
    Ok((kind, map.into_iter().map(|(key, _)| key).collect()))
}

/// The row's text. With `mask_prompt` it also says where the assistant speaks.
pub fn render(row: &RowKind, tokenizer: &TextTokenizer, mask_prompt: bool) -> Result<Rendered, String> {
    match row {
        RowKind::Text(text) => Ok(plain(text.clone(), None, false)),
        RowKind::Pair { prompt, completion } if !tokenizer.has_chat_template() => {
            let text = format!("{prompt}{completion}");
            let span = prompt.len()..text.len();
            Ok(plain(text, mask_prompt.then(|| vec![span]), true))
        }
        RowKind::Pair { prompt, completion } => {
            let turns = [Message::new("user", prompt), Message::new("assistant", completion)];
            conversation(&turns, None, 1, tokenizer, mask_prompt)
        }
        RowKind::Messages { messages, tools, trained_from } => {
            conversation(messages, tools.as_ref(), *trained_from, tokenizer, mask_prompt)
        }
    }
}

fn plain(text: String, trained: Option<Vec<Range<usize>>>, joined: bool) -> Rendered {
    Rendered { text, trained, add_special: true, end: true, joined, last_turn_only: false }
}

/// An assistant's turn reaches from where a generation would begin to where the conversation up to it ends. Both are found by
/// rendering, which is only sound where the shorter rendering begins the longer one.
fn conversation(
    messages: &[Message],
    tools: Option<&Value>,
    trained_from: usize,
    tokenizer: &TextTokenizer,
    mask_prompt: bool,
) -> Result<Rendered, String> {
    let render = |upto: usize, generation: bool| {
        tokenizer.render_chat(&messages[..upto], tools, generation).map_err(|error| error.to_string())
    };
    let text = render(messages.len(), false)?;
    let done = |text, trained, last_turn_only| {
        Ok(Rendered { text, trained, add_special: false, end: false, joined: false, last_turn_only })
    };
    if !mask_prompt {
        return done(text, None, false);
    }
    let span = |turn: usize| -> Result<Option<Range<usize>>, String> {
        let (before, after) = (render(turn, true)?, render(turn + 1, false)?);
        Ok((after.starts_with(&before) && text.starts_with(&after)).then_some(before.len()..after.len()))
    };
    let turns = (trained_from..messages.len()).filter(|&turn| messages[turn].role == "assistant");
    let mut spans = Vec::new();
    let mut lost = false;
    for turn in turns {
        match span(turn)? {
            Some(span) => spans.push(span),
            None if turn + 1 == messages.len() => {
                return Err(
                    "the chat template does not begin the answer where a generation would begin, so the prompt \
                            cannot be masked; train without mask_prompt"
                        .to_string(),
                );
            }
            None => lost = true,
        }
    }
    if lost {
        // Turns that later ones change cannot be found in the text; the last one can.
        spans.drain(..spans.len().saturating_sub(1));
    }
    done(text, Some(spans), lost)
}

fn messages(value: Value, key: &str) -> Result<Vec<Message>, String> {
    let Value::Array(items) = value else { return Err(format!("{key} is not a list")) };
    if items.is_empty() {
        return Err(format!("{key} is empty"));
    }
    let parse = |(index, item): (usize, Value)| {
        let message: Message = serde_json::from_value(item).map_err(|error| format!("{key}[{index}]: {error}"))?;
        let speaks = message.content.is_some() || message.extra.contains_key("tool_calls");
        if speaks { Ok(message) } else { Err(format!("{key}[{index}] has neither content nor tool_calls")) }
    };
    items.into_iter().enumerate().map(parse).collect()
}

/// A list of JSON schemas, or a text that holds one.
fn tools(map: &mut Map<String, Value>) -> Result<Option<Value>, String> {
    match map.remove("tools") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => serde_json::from_str(&text).map(Some).map_err(|error| format!("tools: {error}")),
        Some(list @ Value::Array(_)) => Ok(Some(list)),
        Some(_) => Err("tools is neither a list nor a text with one".to_string()),
    }
}
