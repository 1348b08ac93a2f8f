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
    let doubled = |end: &str| format!("{{% set a = [1] %}}{}{end}", "{% set a = [a, a] %}".repeat(60));
    let recursive =
        "{% macro m(x, n) %}{% if n %}{{ m([x, x], n - 1) }}{% endif %}{{ x ~ 1 }}{% endmacro %}{{ m([1], 60) }}";
    let wide = format!("{{% set a = ['{}'] %}}{{{{ (a * 40000) ~ 1 }}}}", "x".repeat(600));
    let (deep, many, held) = ("100 deep", "50000 parts", "a namespace is put into another value");
    let hostile = [
        ("{{ tools | tojson(indent=900000000) }}", "indent is 900000000"),
        (
            &grown("[ns.x] if i else range(20000) | list", 80, "{{ ns.x | tojson(indent=32) }}"),
            "tojson wrote over 16777216",
        ),
        (&grown("[ns.x]", 50_000, "{{ ns.x }}"), deep),
        (&grown("[ns.x]", 50_000, "{{ ns.x | tojson }}"), deep),
        (&grown("[ns.x]", 100_000, "{{ ns.x == 1 }}"), deep),
        (&grown("{'a': ns.x}", 100_000, "{{ ns.x ~ 1 }}"), deep),
        (&grown("(ns.x,)", 100_000, "{{ ns.x ~ 1 }}"), deep),
        (&grown("dict(a=ns.x)", 100_000, "{{ ns.x ~ 1 }}"), deep),
        (&grown("[ns.x, ns.x]", 60, "{{ ns.x }}"), many),
        (&grown("[ns.x, ns.x]", 60, "{{ ns.x | tojson }}"), many),
        (&grown("[ns.x, ns.x]", 60, "{{ ns.x ~ 1 }}"), many),
        (&grown("[ns.x, ns.x]", 60, "{{ ns.x | string }}"), many),
        (&grown("[ns.x, ns.x]", 60, "{{ ns.x | join('-') }}"), many),
        (&grown("ns.x + ns.x + [1]", 60, ""), many),
        (&grown("([ns.x] | list) * 2", 60, "{{ ns.x in 'x' }}"), many),
        (&grown("ns.x ~ ns.x", 60, ""), "4194304 bytes"),
        (&format!("{{% set a = '0123' %}}{}", "{% set a = a ~ a %}".repeat(60)), "4194304 bytes"),
        ("{{ ('x' * 100000000).split('x') | length }}", "4194304 bytes"),
        (&doubled("{{ a | string }}"), many),
        (&doubled("{{ a < [a] }}"), many),
        (recursive, many),
        (&wide, "16777216 bytes"),
        ("{{ '{:>1000000000}'.format(1) | length }}", "format() may write over 4194304"),
        (&format!("{{{{ '{}'.format('x' * 1000000) | length }}}}", "{0}".repeat(50)), "format() may write"),
        ("{% set a = [0] %}{{ (a * 100000000) ~ 1 }}", many),
        ("{{ ([0] or 1) * 100000000 ~ 1 }}", "line 1"),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns ~ 1 }}", held),
        ("{% set ns = namespace() %}{% set ns.x = [{'a': ns}] %}", held),
        ("{% set ns = namespace() %}{% set other = namespace(x=ns) %}", held),
        ("{% set ns = namespace() %}{% set a = [ns] %}{% set ns.x = a %}", held),
        ("{% set ns = namespace() %}{% for x in [1] %}{{ x | attr(ns) }}{{ {1: ns} }}{% endfor %}", held),
        ("{% set ns = namespace(a=range(20000)) %}{% set ns.b = range(20000) %}{% set ns.c = range(20000) %}", many),
        ("{{ debug() }}", "debug is unknown"),
        (&format!("{{{{ {}1 }}}}", "not ".repeat(50_000)), "1000 operators"),
        (&format!("{{{{ 'x'{} }}}}", "|upper".repeat(40_000)), "1000 operators"),
        (&format!("{{{{ a{} }}}}", " ~ 1".repeat(60_000)), "1000 operators"),
        (&"x".repeat(300_000), "300000 bytes"),
    ];
    let tools = serde_json::json!([]);
    let run =
        |source: &str| ChatTemplate::new(source, "", "").and_then(|template| template.render(&[], Some(&tools), false));
    for (source, problem) in hostile {
        let error = run(source).unwrap_err().to_string();
        assert!(error.contains(problem), "{:.120}: {error}", source);
    }
}

/// Comparing two lists that share no memory visits all of both, and pays for it.
#[test]
fn comparisons_run_out_of_fuel() {
    let source = |compare: &str| {
        let [a, b] = ["a", "b"].map(|name| format!("{{% set {name} = [range(40000) | list, []] %}}"));
        let text = "{% set text = 'x' * 4000000 %}";
        format!("{text}{a}{b}{{% for i in range(40000) %}}{{{{ {compare} }}}}{{% endfor %}}")
    };
    for compare in ["a < b < a", "b in [a, 1]", "[a, 1] | select('eq', b) | length", "text is lower", "[text] < [text]"]
    {
        let template = ChatTemplate::new(&source(compare), "", "").unwrap();
        let error = template.render(&[], None, false).unwrap_err().to_string();
        assert!(error.contains("fuel"), "{compare}: {error}");
    }
}

/// What the guards of values must leave as it is: jumps over them, chained comparisons, recursion, errors with their lines.
#[test]
fn templates_compute_as_without_the_guards() {
    let cases = [
        (
            "{% for a, b in [(1, 2), (3, 4)] if a < b <= 4 %}{{ a + b }}{{ ' ' if not loop.last }}{% else %}-{% endfor %}",
            "3 7",
        ),
        ("{{ 3 < 2 < 1 }} {{ 1 < 2 < 3 == 3 }} {{ 1 not in [2] }}", "False True True"),
        ("{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }},{% endfor %}", "1,2,,,3,"),
        (
            "{% macro m(a, b=[1]) %}{{ a }}{{ b[0] }}{{ caller() if caller }}{% endmacro %}{{ m(*[5], **{'b': [6]}) }}{% call m(7) %}x{% endcall %}",
            "5671x",
        ),
        (
            "{% set ns = namespace(a=1) %}{% for i in [1, 2] %}{% set ns.a, ns.b = ns.a + i, [i] %}{% endfor %}{{ ns.a }}{{ ns.b }}",
            "4[2]",
        ),
        (
            "{% set x %}{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}{% endset %}{{ x | upper }}",
            "013",
        ),
        ("{{ '{:>5}|{x}'.format('a', x=[1]) }}", "    a|[1]"),
        ("{{ [1, 2][1] if false or [] else {'a': (1, 2)}.a | sum }}", "3"),
    ];
    for (source, wanted) in cases {
        let got = ChatTemplate::new(source, "", "").unwrap().render(&[], None, false);
        assert_eq!(got.unwrap(), wanted, "{source}");
    }
    let source = "1\n2 {{ [1, 2] }}\n{{ 'x' | nothing }}";
    let error = ChatTemplate::new(source, "", "").unwrap().render(&[], None, false).unwrap_err().to_string();
    assert!(error.contains("chat_template:3"), "{error}");
}

/// Two thousand turns of two thousand bytes: what a template asks of the whole conversation in each turn does not visit it.
#[test]
fn a_long_conversation_has_fuel() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let source = fs::read_to_string(root.join("tests/fixtures/templates/constructs.jinja")).unwrap();
    let template = ChatTemplate::new(&source, "<s>", "</s>").unwrap();
    let roles = ["user", "assistant"].into_iter().cycle();
    let turns: Vec<_> = roles.take(2000).map(|role| Message::new(role, "a word ".repeat(300))).collect();
    let text = template.render(&turns, None, false).unwrap();
    assert!(text.len() > 2000 * 2000, "{}", text.len());
}
