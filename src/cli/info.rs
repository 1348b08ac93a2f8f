//! `metal-candle info`: what this program can do here, and what a model or an adapter is.

use std::collections::BTreeSet;

use candle_core::DType;
use clap::Args;
use metal_candle::backend::cuda;
use metal_candle::models::ModelFiles;
use metal_candle::training::adapter::{AdapterFile, Form};

use super::Outcome;

/// Tell what this program can do here, and what a model or an adapter is
#[derive(Args)]
pub struct Info {
    /// A folder, a GGUF file, or the name of a model on the hub
    #[arg(long)]
    model: Option<String>,
    /// The folder of an adapter
    #[arg(long, value_name = "FOLDER")]
    adapter_path: Option<std::path::PathBuf>,
}

impl Info {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        if self.model.is_none() && self.adapter_path.is_none() {
            machine();
        }
        if let Some(name) = &self.model {
            model(&ModelFiles::open(name)?);
        }
        if let Some(path) = &self.adapter_path {
            let form = match AdapterFile::form(path)? {
                Form::Peft => "PEFT",
                Form::Mlx => "MLX",
            };
            adapter(&AdapterFile::load(path)?, form);
        }
        Ok(())
    }
}

fn machine() {
    row("version", env!("CARGO_PKG_VERSION"));
    row("threads", &rayon::current_num_threads().to_string());
    row("vectors", vectors());
    row("cpu", "trains and generates");
    let cuda = cuda::check(0).map(|()| "trains and generates".to_string());
    row("cuda", &cuda.unwrap_or_else(|error| error.to_string()));
    let metal = cfg!(all(target_vendor = "apple", feature = "custom-metal"));
    row(
        "metal",
        if metal { "has kernels for the ops; models run on the CPU" } else { "this program was built without Metal" },
    );
    let strict = std::env::var("METAL_CANDLE_STRICT").is_ok_and(|value| !value.is_empty() && value != "0");
    row("fallbacks", if strict { "are errors (METAL_CANDLE_STRICT)" } else { "warn once" });
    println!("\nWhat runs on CUDA (+ the fast way, - a slower one):");
    for cuda::Path { op, dtypes, shapes, kernel, fast } in cuda::paths() {
        println!("{} {op}: {kernel}\n    {dtypes}; {shapes}", if fast { '+' } else { '-' });
    }
}

fn vectors() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return "AVX-512";
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return "AVX2 and FMA";
        }
        "SSE2; a processor with AVX2 would be several times faster"
    }
    #[cfg(target_arch = "aarch64")]
    return "NEON";
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    "none"
}

fn model(files: &ModelFiles) {
    let config = &files.config;
    let values: usize = config.weight_shapes().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    row("model", &files.name);
    row("family", &config.model_type);
    row(
        "values",
        &format!("{values} ({:.2} GB in memory as f32)", values as f64 * DType::F32.size_in_bytes() as f64 / 1e9),
    );
    row("blocks", &config.num_layers.to_string());
    row("hidden size", &format!("{}, {} in the MLP", config.hidden_size, config.intermediate_size));
    row("heads", &format!("{} of {}, {} for keys and values", config.num_heads, config.head_dim, config.num_kv_heads));
    let tied = if config.tie_word_embeddings { "the embedding" } else { "its own" };
    row("vocabulary", &format!("{} tokens; output projection: {tied}", config.vocab_size));
    row("context", &format!("{} tokens, rotary base {}", config.max_position_embeddings, config.rope_theta));
    if let Some(window) = config.sliding_window {
        row("window", &format!("{window} tokens from block {}", config.sliding_window_from_layer));
    }
    row("chat template", if files.tokenizer.has_chat_template() { "yes" } else { "no" });
    let end = files.tokenizer.eos_token().map_or("none", |(_, text)| text);
    row("end token", end);
}

fn adapter(file: &AdapterFile, form: &str) {
    let modules = || file.modules.values();
    let values: usize = modules().map(|module| module.a.elem_count() + module.b.elem_count()).sum();
    row("made for", file.base_model.as_deref().unwrap_or("an unnamed model"));
    row("form", form);
    row("rank", &each(modules().map(|module| module.rank().to_string())));
    row("alpha", &each(modules().map(|module| format!("{}, scaling {}", module.alpha(), module.scaling))));
    row("values", &format!("{values} on {} linears", file.modules.len()));
    row("targets", &file.target_names().into_iter().collect::<Vec<_>>().join(", "));
    if modules().any(|module| module.magnitude.is_some()) {
        row("kind", "DoRA");
    }
    if !file.saved.is_empty() {
        row("whole tensors", &file.saved.keys().map(String::as_str).collect::<Vec<_>>().join(", "));
    }
}

/// What the modules have, each value once.
fn each(values: impl Iterator<Item = String>) -> String {
    values.collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join("; ")
}

fn row(name: &str, value: &str) {
    println!("{name:<14} {value}");
}
