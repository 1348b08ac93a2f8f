//! Chat templates, which come with a model: parsed, and rendered with a conversation.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use metal_candle::models::Message;
use metal_candle::models::chat_template::ChatTemplate;
use metal_candle_fuzz::bounded;
use serde_json::{Value, json};

static TALK: LazyLock<(Vec<Message>, Value)> = LazyLock::new(|| {
    let mut call = Message::new("assistant", "");
    call.extra
        .insert("tool_calls".into(), json!([{"function": {"name": "sum", "arguments": {"a": 1, "b": [2.5, null]}}}]));
    let talk = vec![
        Message::new("system", "be brief"),
        Message::new("user", " what is 1 + 2.5? "),
        call,
        Message::new("tool", "3.5"),
        Message::new("assistant", "<think>\nadd\n</think>\nit is 3.5"),
    ];
    (talk, json!([{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}]))
});

fuzz_target!(|input: &[u8]| {
    let Ok(source) = std::str::from_utf8(input) else { return };
    bounded(input, 64 << 20, 256, || {
        let Ok(template) = ChatTemplate::new(source, "<s>", "</s>") else { return };
        let (messages, tools) = &*TALK;
        let _ = template.render(messages, Some(tools), false);
        let _ = template.render(&messages[..2], None, true);
    });
});
