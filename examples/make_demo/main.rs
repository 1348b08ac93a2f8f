//! Writes what the demo is made of: `make_demo FOLDER` writes
//!
//! - `corpus/{train,valid}.jsonl`, the text that the demo's base model is trained on,
//! - `start/`, that model before training: random weights, and a byte-level BPE tokenizer trained on the corpus,
//! - `data/{train,valid,test}.jsonl`, the rows that the demo fine-tunes on and is scored by.
//!
//! `scripts/make-demo.sh` runs it, trains the base and puts it in place. Every draw comes from fixed seeds.

mod sentences;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor};
use metal_candle::models::ModelConfig;
use sentences::{Appointment, Pool, object};
use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const CORPUS_ROWS: usize = 160_000;
const VOCABULARY: usize = 1024;
const CHAT_TEMPLATE: &str = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}\
                             {% if add_generation_prompt %}<|assistant|>{% endif %}";
const SPECIAL: [&str; 4] = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"];

fn main() -> Outcome<()> {
    let folder = std::env::args().nth(1).ok_or("usage: make_demo FOLDER")?;
    let folder = Path::new(&folder);
    let mut rng = fastrand::Rng::with_seed(1);
    let corpus: Vec<Value> = (0..CORPUS_ROWS).map(|_| corpus_row(&mut rng)).collect();
    let (valid, train) = corpus.split_at(500);
    write_rows(&folder.join("corpus/train.jsonl"), train)?;
    write_rows(&folder.join("corpus/valid.jsonl"), valid)?;

    for (seed, name, rows, pool) in
        [(2, "train", 6000, Pool::Seen), (3, "valid", 60, Pool::Unseen), (4, "test", 100, Pool::Unseen)]
    {
        let mut rng = fastrand::Rng::with_seed(seed);
        let rows: Vec<Value> = (0..rows).map(|_| demo_row(&mut rng, pool)).collect();
        write_rows(&folder.join(format!("data/{name}.jsonl")), &rows)?;
    }

    let start = folder.join("start");
    fs::create_dir_all(&start)?;
    write_tokenizer(&start, train)?;
    write_model(&start)
}

/// A sentence in, a record out.
fn demo_row(rng: &mut fastrand::Rng, pool: Pool) -> Value {
    let appointment = Appointment::draw(rng, pool);
    json!({"prompt": appointment.sentence(rng), "completion": appointment.record()})
}

/// What the base model learns: to confirm an appointment, to answer questions on it, to list it, and to read and repeat
/// JSON of another kind. It never sees an appointment as JSON.
fn corpus_row(rng: &mut fastrand::Rng) -> Value {
    let appointment = Appointment::draw(rng, Pool::All);
    let sentence = appointment.sentence(rng);
    match rng.u8(..12) {
        0..3 => turns(&[(&sentence, &appointment.confirmation(rng))]),
        3..6 => {
            let mut fields = appointment.fields();
            rng.shuffle(&mut fields);
            let asked: Vec<(String, &str)> = fields
                .iter()
                .enumerate()
                .map(|(i, (field, value))| {
                    let before = if i == 0 { format!("{sentence} ") } else { String::new() };
                    (format!("{before}{}", question(field)), value.as_str())
                })
                .collect();
            turns(&asked.iter().map(|(question, answer)| (question.as_str(), *answer)).collect::<Vec<_>>())
        }
        6 | 7 => turns(&[(&format!("{sentence} As lines."), &appointment.lines())]),
        8..11 => {
            let (text, key, value) = object(rng);
            if rng.bool() {
                turns(&[(&format!("Repeat {text}"), &text)])
            } else {
                turns(&[(&format!("Read {text} {key}?"), &value)])
            }
        }
        _ => json!({"text": format!("{sentence} {}", appointment.confirmation(rng))}),
    }
}

fn question(field: &str) -> &'static str {
    match field {
        "event" => "What is it?",
        "with" => "With whom?",
        "place" => "Where?",
        "date" => "Which date?",
        "time" => "When?",
        _ => "How many?",
    }
}

fn turns(pairs: &[(&str, &str)]) -> Value {
    let messages: Vec<Value> = pairs
        .iter()
        .flat_map(|(user, assistant)| {
            [json!({"role": "user", "content": user}), json!({"role": "assistant", "content": assistant})]
        })
        .collect();
    json!({ "messages": messages })
}

fn write_rows(path: &Path, rows: &[Value]) -> Outcome<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    Ok(fs::write(path, rows.iter().map(|row| format!("{row}\n")).collect::<String>())?)
}

fn write_tokenizer(folder: &Path, corpus: &[Value]) -> Outcome<()> {
    let bpe = BPE::builder().build().map_err(|error| error.to_string())?;
    let mut tokenizer = Tokenizer::new(bpe);
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(bytes)).with_decoder(Some(bytes));
    let special: Vec<AddedToken> = SPECIAL.iter().map(|text| AddedToken::from(*text, true)).collect();
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(VOCABULARY)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build()
        .into();
    let texts = corpus.iter().take(20_000).flat_map(|row| match row.get("messages").and_then(Value::as_array) {
        Some(turns) => turns.iter().filter_map(|turn| turn["content"].as_str().map(String::from)).collect(),
        None => vec![row["text"].as_str().unwrap_or_default().to_string()],
    });
    tokenizer.train(&mut trainer, texts).map_err(|error| error.to_string())?;
    tokenizer.save(folder.join("tokenizer.json"), false).map_err(|error| error.to_string())?;
    let config = json!({"eos_token": SPECIAL[0], "chat_template": CHAT_TEMPLATE});
    Ok(fs::write(folder.join("tokenizer_config.json"), format!("{config:#}\n"))?)
}

/// Normal weights of deviation 0.02, as Hugging Face initialises Llama; the projections that end a residual branch smaller by
/// the root of their number (GPT-2).
fn write_model(folder: &Path) -> Outcome<()> {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16"
    });
    fs::write(folder.join("config.json"), format!("{config:#}\n"))?;
    let config = ModelConfig::from_json(&folder.join("config.json"))?;
    let mut rng = fastrand::Rng::with_seed(5);
    let mut normal = move || {
        let (u, v) = (1.0 - rng.f64(), rng.f64());
        (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
    };
    let mut weights = HashMap::new();
    for (name, shape) in config.weight_shapes() {
        let ends_branch = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let deviation = if ends_branch { 0.02 / (2.0 * config.num_layers as f64).sqrt() } else { 0.02 };
        let count: usize = shape.iter().product();
        let values: Vec<f32> = if shape.len() == 1 {
            vec![1.0; count]
        } else {
            (0..count).map(|_| (normal() * deviation) as f32).collect()
        };
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(candle_core::DType::BF16)?;
        weights.insert(name, tensor);
    }
    Ok(candle_core::safetensors::save(&weights, folder.join("model.safetensors"))?)
}
