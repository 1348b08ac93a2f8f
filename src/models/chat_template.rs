//! Chat templates in Jinja, as Hugging Face transformers renders them (`apply_chat_template`): blocks trimmed, Python's string
//! methods, `raise_exception`, `strftime_now`, `tojson` without HTML escapes.
//!
//! A template comes with a model and is not trusted: it has no loader, so it reads no file; its source, the fuel that it runs on and
//! the values that it builds are limited (`bounded.rs`), and it is parsed and run on a stack of its own, since the engine follows
//! nesting by recursion.

mod bounded;

use std::collections::BTreeMap;

use minijinja::machinery::{self, CodeGenerator, Instructions};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value, context};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text; absent in some turns that call tools.
    #[serde(default)]
    pub content: Option<String>,
    /// What else the row had: `tool_calls`, `name`, `reasoning_content`; templates may read them.
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A turn with only a role and a text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), extra: serde_json::Map::new() }
    }
}

/// A parsed template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: String,
    eos: String,
}

const NAME: &str = "chat_template";

/// Instructions that one rendering may take: far more than any conversation needs.
const FUEL: u64 = 4_000_000;

/// Bytes of a template; those of known models have under 30 thousand.
const LONGEST: usize = 256 << 10;

/// The engine's deepest recursion: nesting as deep as [`FUEL`] and [`LONGEST`] allow. What is not touched takes no memory.
const STACK: usize = 512 << 20;

impl ChatTemplate {
    /// Parses a template; `bos` and `eos` are the tokens that it may write.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        if source.len() > LONGEST {
            let length = source.len();
            return Err(Error::Text(format!("the model's chat template has {length} bytes; {LONGEST} are read")));
        }
        // Marks the assistant's text for masks in transformers; it prints nothing of its own.
        let source = without_generation_tags(source);
        let template = Self { environment: environment(), source, bos: bos.to_string(), eos: eos.to_string() };
        stacker::grow(STACK, || {
            template.instructions().map(|_| ()).map_err(|error| failed("cannot be parsed", &error))
        })?;
        Ok(template)
    }

    /// Compiled anew for each rendering: instructions borrow the source.
    fn instructions(&self) -> Result<Instructions<'_>, minijinja::Error> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
        let parsed = machinery::parse(&self.source, NAME, syntax)?;
        bounded::compilable(&parsed)?;
        let mut code = CodeGenerator::new(NAME, &self.source);
        code.compile_stmt(&parsed);
        Ok(bounded::guarded(&code.finish().0))
    }

    /// Renders a conversation; with `add_generation_prompt` it ends where the assistant's next turn begins.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let tools = tools.map_or(Value::from(()), |tools| Value::from(Serde(tools)));
        let values = context! {
            messages => Value::from(Serde(messages)),
            tools => tools,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        };
        let rendered = || {
            let instructions = self.instructions()?;
            let mut text = String::new();
            let mut out = machinery::make_string_output(&mut text);
            let blocks = BTreeMap::new();
            machinery::eval(&self.environment, &instructions, values, &blocks, &mut out, AutoEscape::None)?;
            Ok(text)
        };
        stacker::grow(STACK, rendered).map_err(|error| failed("cannot render this conversation", &error))
    }
}

/// What templates may call, and what they run on.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    // Its errors print the variables, which are the user's conversation.
    environment.set_debug(false);
    environment.set_formatter(|out, state, value| {
        bounded::bounded(state, value)?;
        minijinja::escape_formatter(out, state, value)
    });
    environment.set_unknown_method_callback(|state, value, method, args| {
        match (method, value.as_str()) {
            ("format", Some(text)) => bounded::formattable(text, args)?,
            // Compares with each value.
            ("count", None) => bounded::bounded(state, value)?,
            _ => {}
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
    });
    environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    bounded::install(&mut environment);
    environment
}

fn failed(what: &str, error: &minijinja::Error) -> Error {
    Error::Text(format!("the model's chat template {what}: {error:#}"))
}

/// `{% generation %}` and `{% endgeneration %}` become empty comments that trim as the tags would.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // In `{%}` the percent sign does not close what it opens.
        let Some(length) = rest[start + 2..].find("%}") else { break };
        let tag = &rest[start..start + length + 4];
        let inner = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        out.push_str(&rest[..start]);
        if inner == "generation" || inner == "endgeneration" {
            out.push_str(&tag.replace('%', "#"));
        } else {
            out.push_str(tag);
        }
        rest = &rest[start + tag.len()..];
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, which is what transformers installs.
fn tojson(state: &mut State, value: Value, options: minijinja::value::Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // Others of json.dumps' arguments (ensure_ascii, separators, sort_keys) are refused rather than missed.
    options.assert_all_used()?;
    const WIDEST: usize = 32;
    if let Some(wide) = indent.filter(|&indent| indent > WIDEST) {
        let problem = format!("tojson's indent is {wide}; at most {WIDEST} is taken");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, problem));
    }
    bounded::bounded(state, &value)?;
    let json = serde_json::to_value(&value)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut text = String::new();
    write_json(&json, indent, 0, &mut text);
    if text.len() > bounded::TEXT {
        let problem = format!("tojson wrote over {} bytes", bounded::TEXT);
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, problem));
    }
    Ok(Value::from_safe_string(text))
}

/// Stops where [`tojson`] refuses the text.
fn write_json(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    if out.len() > bounded::TEXT {
        return;
    }
    let line = |depth: usize, out: &mut String| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value {
        serde_json::Value::Array(items) if !items.is_empty() => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index == 0 { "" } else { comma });
                line(depth + 1, out);
                write_json(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        serde_json::Value::Object(map) if !map.is_empty() => {
            out.push('{');
            for (index, (key, item)) in map.iter().enumerate() {
                out.push_str(if index == 0 { "" } else { comma });
                line(depth + 1, out);
                out.push_str(&serde_json::Value::String(key.clone()).to_string());
                out.push_str(": ");
                write_json(item, indent, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        other => out.push_str(&other.to_string()),
    }
}

/// Today's date by a `strftime` format, UTC. Knows the fields that templates of known models use.
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let (year, month, day) = civil_from_days((seconds / 86_400) as i64);
    const MONTHS: &str = "January February March April May June July August September October November December";
    let name = MONTHS.split(' ').nth(month - 1).unwrap_or_default();
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(char) = chars.next() {
        if char != '%' {
            out.push(char);
            continue;
        }
        match chars.next() {
            Some('Y') => out.push_str(&year.to_string()),
            Some('m') => out.push_str(&format!("{month:02}")),
            Some('d') => out.push_str(&format!("{day:02}")),
            Some('b') => out.push_str(&name[..3]),
            Some('B') => out.push_str(name),
            Some('H') => out.push_str(&format!("{:02}", seconds / 3600 % 24)),
            Some('M') => out.push_str(&format!("{:02}", seconds / 60 % 60)),
            Some('S') => out.push_str(&format!("{:02}", seconds % 60)),
            Some('%') => out.push('%'),
            other => {
                let field = other.map_or("%".to_string(), |field| format!("%{field}"));
                return Err(minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    format!("strftime_now does not know the field {field}"),
                ));
            }
        }
    }
    Ok(out)
}

/// Year, month and day of a day counted from 1970-01-01 (Howard Hinnant, "chrono-compatible low-level date algorithms").
fn civil_from_days(days: i64) -> (i64, usize, usize) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month as usize, (day_of_year - (153 * shifted + 2) / 5 + 1) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}\n{{ '<|im_start|>' + message['role'] + '\\n' + message['content'].strip() \
                          + '<|im_end|>' + '\\n' }}\n{% endfor %}\n{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}\n\
                          {% endif %}";

    #[test]
    fn chatml() {
        let template = ChatTemplate::new(CHATML, "", "<|im_end|>").unwrap();
        let turns = [Message::new("user", " hi "), Message::new("assistant", "yes")];
        let text = template.render(&turns[..1], None, true).unwrap();
        // A newline after a variable stays, one after a block goes: Jinja's trim_blocks.
        assert_eq!(text, "<|im_start|>user\nhi<|im_end|>\n\n<|im_start|>assistant\n\n");
        assert!(template.render(&turns, None, false).unwrap().ends_with("<|im_start|>assistant\nyes<|im_end|>\n\n"));
    }

    #[test]
    fn what_a_template_says_is_an_error_and_it_cannot_run_for_ever() {
        let template = ChatTemplate::new("{{ raise_exception('roles must alternate') }}", "", "").unwrap();
        assert!(template.render(&[], None, false).unwrap_err().to_string().contains("roles must alternate"));
        let long = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}\
                    {% endfor %}";
        assert!(ChatTemplate::new(long, "", "").unwrap().render(&[], None, false).is_err());
        assert!(
            ChatTemplate::new("{% include '/etc/passwd' %}", "", "").and_then(|t| t.render(&[], None, false)).is_err()
        );
    }

    #[test]
    fn json_and_dates_are_written_as_python_does() {
        let tools = serde_json::json!([{"a": 1, "b": ["<é>", true, null], "c": {}}]);
        let render =
            |source: &str| ChatTemplate::new(source, "", "").unwrap().render(&[], Some(&tools), false).unwrap();
        assert_eq!(render("{{ tools | tojson }}"), r#"[{"a": 1, "b": ["<é>", true, null], "c": {}}]"#);
        assert_eq!(render("{{ tools[0].b | tojson(indent=2) }}"), "[\n  \"<é>\",\n  true,\n  null\n]");
        assert_eq!(civil_from_days(0), (1970, 1, 1));
        assert_eq!(civil_from_days(20_781), (2026, 11, 24));
        assert_eq!(render("{% generation -%}  x{% endgeneration %}"), "x");
    }
}
