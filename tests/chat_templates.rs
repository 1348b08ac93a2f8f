//! Chat templates render as in transformers, byte for byte, and refuse what they refuse there.
//!
//! `tests/fixtures/make_templates.py` wrote what is compared with. The real templates are compared where
//! `scripts/fetch-test-models.sh templates` has brought them; the test says so when they are skipped.
#![allow(missing_docs)]

use std::fs;
use std::path::Path;

use metal_candle::models::Message;
use metal_candle::models::chat_template::ChatTemplate;
use serde_json::Value;

#[test]
fn templates_render_as_in_transformers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join("tests/fixtures/templates");
    let expected: Value = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let token = |name: &str| expected[name].as_str().unwrap();
    let dates = ["%d %b %Y", "%d %B %Y", "%Y-%m-%d"].map(today);
    let (mut compared, mut wrong) = (0, Vec::new());
    for (name, cases) in expected["templates"].as_object().unwrap() {
        let real = root.join("models/templates").join(name);
        let path = if name == "constructs.jinja" { folder.join(name) } else { real };
        let Ok(source) = fs::read_to_string(&path) else {
            eprintln!("SKIPPED: {} is not there; scripts/fetch-test-models.sh templates brings it", path.display());
            continue;
        };
        let template = ChatTemplate::new(&source, token("bos_token"), token("eos_token")).unwrap();
        for (case, conversation) in cases.as_array().unwrap().iter().zip(expected["conversations"].as_array().unwrap())
        {
            let messages: Vec<Message> = serde_json::from_value(conversation["messages"].clone()).unwrap();
            let prompt = conversation["add_generation_prompt"].as_bool().unwrap();
            let got = template.render(&messages, conversation.get("tools"), prompt);
            let got = got.map(|text| dates.iter().fold(text, |text, date| text.replace(date, "{TODAY}")));
            let good = match &got {
                Ok(text) => case["text"] == text.as_str() || case["digest"] == digest(text),
                Err(_) => case.get("refused").is_some(),
            };
            if !good {
                wrong.push(format!("{name}: {conversation}\n  ours {got:?}\n  transformers {case}"));
            }
            compared += 1;
        }
    }
    assert!(wrong.is_empty(), "{} of {compared} differ:\n{}", wrong.len(), wrong.join("\n"));
    println!("{compared} renderings agree");
}

/// The date as templates write it.
fn today(format: &str) -> String {
    let source = format!("{{{{ strftime_now('{format}') }}}}");
    ChatTemplate::new(&source, "", "").unwrap().render(&[], None, false).unwrap()
}

/// FNV-1a of 64 bits.
fn digest(text: &str) -> String {
    let step = |value: u64, byte: u8| (value ^ byte as u64).wrapping_mul(0x100_0000_01b3);
    format!("{:016x}", text.bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

/// Each of these made the program overflow its stack, run on without end or ask for all memory, or would without the fuel.
#[test]
fn hostile_templates_end() {
    let grown = |step: &str, times: usize, end: &str| {
        format!(
            "{{% set ns = namespace(x=[]) %}}{{% for i in range({times}) %}}{{% set ns.x = {step} %}}{{% endfor %}}{end}"
        )
    };
    let hostile = [
        ("{{ tools | tojson(indent=900000000) }}", "indent is 900000000"),
        (&grown("[ns.x]", 50_000, "{{ ns.x }}"), "100 deep"),
        (&grown("[ns.x]", 50_000, "{{ ns.x | tojson }}"), "100 deep"),
        (&grown("[ns.x, ns.x]", 60, "{{ ns.x }}"), "1000000 parts"),
        (&grown("[ns.x, ns.x]", 60, "{{ ns.x | tojson }}"), "1000000 parts"),
        (&grown("ns.x ~ ns.x", 60, ""), "fuel"),
        (&"x".repeat(300_000), "300000 bytes"),
    ];
    let tools = serde_json::json!([]);
    let run =
        |source: &str| ChatTemplate::new(source, "", "").and_then(|template| template.render(&[], Some(&tools), false));
    for (source, problem) in hostile {
        let error = run(source).unwrap_err().to_string();
        assert!(error.contains(problem), "{:.60}: {error}", source);
    }
    // Deep, and harmless: the stack takes them.
    for source in [
        grown("[ns.x]", 100_000, "{{ ns.x == 1 }}"),
        grown("[ns.x]", 100_000, "{{ (ns.x ~ 1) | length }}"),
        format!("{{{{ {}1 }}}}", "not ".repeat(50_000)),
        format!("{{{{ 'x'{} }}}}", "|upper".repeat(40_000)),
    ] {
        run(&source).unwrap();
    }
}
