//! Rows become tokens and targets as they should, and bad rows are named.
#![allow(missing_docs)]

mod common;

use std::path::{Path, PathBuf};

use metal_candle::backend::custom_ops::cross_entropy::IGNORE;
use metal_candle::models::TextTokenizer;
use metal_candle::models::tokenizer::SpecialTokens;
use metal_candle::training::dataset::{Dataset, DatasetOptions, Row};

const CHATML: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<assistant>{% endif %}";
/// Shows reasoning of the last turn only, as Qwen3's template does.
const FORGETS: &str = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}(thinking)\
                       {% endif %}{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

fn tokenizer(template: Option<&str>) -> TextTokenizer {
    let eos = Some(common::tiny::EOS.to_string());
    let special = SpecialTokens { eos, chat_template: template.map(str::to_string), ..SpecialTokens::default() };
    TextTokenizer::new(common::tiny::tokenizer(), special, &[]).unwrap()
}

fn write(folder: &Path, lines: &[&str]) -> PathBuf {
    let path = folder.join("train.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn load(
    lines: &[&str],
    template: Option<&str>,
    max_seq_length: usize,
    mask_prompt: bool,
) -> metal_candle::Result<Dataset> {
    let folder = tempfile::tempdir().unwrap();
    let path = write(folder.path(), lines);
    Dataset::load(&[path], &tokenizer(template), &DatasetOptions { max_seq_length, mask_prompt })
}

/// The row's text, with what is trained on in brackets.
fn shown(row: &Row, template: Option<&str>) -> String {
    let tokenizer = tokenizer(template);
    let mut text = String::new();
    let mut inside = false;
    for (i, &token) in row.tokens.iter().enumerate() {
        let trained = i > 0 && row.targets[i - 1] != IGNORE;
        if trained {
            assert_eq!(row.targets[i - 1], token, "a target is the token that follows");
        }
        if trained != inside {
            text.push(if trained { '[' } else { ']' });
            inside = trained;
        }
        text.push_str(&tokenizer.decode(&[token], false).unwrap());
    }
    assert_eq!(row.targets.last(), Some(&IGNORE), "nothing follows the last token");
    if inside { text + "]" } else { text }
}

#[test]
fn each_kind_of_row_is_told_apart() {
    let lines = [
        r#"{"prompt": "ask ", "completion": "answer"}"#,
        r#"{"text": "only text"}"#,
        r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"}]}"#,
        r#"{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}"#,
    ];
    let data = load(&lines, Some(CHATML), 512, true).unwrap();
    let rows: Vec<String> = data.rows.iter().map(|row| shown(row, Some(CHATML))).collect();
    assert_eq!(rows[0], "<user>ask <|end|>\n<assistant>[answer<|end|>\n]");
    assert_eq!(rows[1], "o[nly text<|end|>]");
    assert_eq!(rows[2], "<user>hi<|end|>\n<assistant>[yes<|end|>\n]<user>so<|end|>\n<assistant>[no<|end|>\n]");
    assert_eq!(rows[3], "<user>a<|end|>\n<assistant>[b<|end|>\n]");
    assert_eq!((data.rows[2].line, data.report.rows), (3, 4));

    let data = load(&lines[..1], None, 512, true).unwrap();
    assert_eq!(
        shown(&data.rows[0], None),
        "ask[ answer<|end|>]",
        "the token with the space holds the answer's first letter too"
    );
    assert_eq!(data.report.joined_pairs, 1);
    let data = load(&lines[..1], Some(CHATML), 512, false).unwrap();
    assert!(shown(&data.rows[0], Some(CHATML)).starts_with("<[user>ask"));
}

#[test]
fn turns_that_a_template_changes_later_are_not_trained_on() {
    let line = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so"}, {"role": "assistant", "content": "no"}]}"#;
    let data = load(&[line], Some(FORGETS), 512, true).unwrap();
    let text = shown(&data.rows[0], Some(FORGETS));
    assert_eq!(text, "<user>hi<|end|>\n<assistant>yes<|end|>\n<user>so<|end|>\n<assistant>[(thinking)no<|end|>\n]");
    assert_eq!(data.report.last_turn_only, 1);
}

#[test]
fn long_rows_are_cut_and_counted_and_rows_without_a_target_skipped() {
    let long = format!(r#"{{"prompt": "p", "completion": "{}"}}"#, "word ".repeat(100));
    let hidden = format!(r#"{{"prompt": "{}", "completion": "x"}}"#, "word ".repeat(100));
    let data = load(&[&long, &hidden, r#"{"text": "a row"}"#], Some(CHATML), 40, true).unwrap();
    assert_eq!((data.rows.len(), data.report.truncated, data.report.skipped_empty), (2, 2, 1));
    assert_eq!(data.rows[0].tokens.len(), 40);
    assert!(data.rows.iter().all(|row| row.targets.iter().any(|&target| target != IGNORE)));
    let warnings = data.report.warnings().join("; ");
    assert!(warnings.contains("2 rows were longer") && warnings.contains("1 rows are left out"), "{warnings}");

    let nothing = load(&[&hidden], Some(CHATML), 40, true).unwrap_err().to_string();
    assert!(nothing.contains("1 rows") && nothing.contains("max_seq_length"), "{nothing}");
}

#[test]
fn every_bad_row_is_named_with_file_and_line() {
    let lines = [
        r#"{"text": "good"}"#,
        "{not json",
        "",
        r#"{"question": "?"}"#,
        r#"{"messages": []}"#,
        r#"{"prompt": 1, "completion": "x"}"#,
        r#"{"messages": [{"role": "user"}]}"#,
        r#"["a list"]"#,
    ];
    let error = load(&lines, Some(CHATML), 64, false).unwrap_err().to_string();
    for place in ["train.jsonl:2", "train.jsonl:4", "train.jsonl:5", "train.jsonl:6", "train.jsonl:7", "train.jsonl:8"]
    {
        assert!(error.contains(place), "{place} is missing: {error}");
    }
    assert!(error.contains("6 rows") && error.contains("question") && !error.contains("train.jsonl:1:"), "{error}");
}

#[test]
fn keys_that_nothing_reads_are_reported() {
    let data = load(&[r#"{"text": "a", "id": 1}"#, r#"{"text": "b", "id": 2, "tag": 0}"#], None, 64, false).unwrap();
    let warnings = data.report.warnings().join("; ");
    assert!(warnings.contains("id (2)") && warnings.contains("tag (1)"), "{warnings}");
}
