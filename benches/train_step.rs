//! What does a training step cost, and where does the time go?
//!
//! `cargo bench --bench train_step -- [--shape NAME] [--modules qv|all] [--rank R] [--steps N] [--batch ROWS] [--tokens T] [--checkpoint]
//! [--device cpu|cuda]`: a model's sizes with random weights, f32 on the CPU and bf16 on a GPU, and rows of T tokens. Without more, one
//! row of 512 tokens through SmolLM2-135M with rank 8 on the CPU. Prints tokens per second and peak memory of whole steps,
//! then milliseconds a step by kind of op, each measured alone at the step's shapes, and on the CPU the bare matrix products of the step
//! for scale. Times are medians.

use std::collections::HashMap;
use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use metal_candle::Result;
use metal_candle::backend::cpu::gemm::{Matrix, MatrixMut, gemm};
use metal_candle::backend::custom_ops::adamw::AdamW;
use metal_candle::backend::custom_ops::attention::{AttentionArgs, Sequence};
use metal_candle::backend::custom_ops::lora_linear::{self, Part};
use metal_candle::backend::custom_ops::swiglu::Activation;
use metal_candle::backend::custom_ops::{attention, cross_entropy, rms_norm, rope, swiglu};
use metal_candle::models::decoder::{Batch, Checkpointing, Decoder, TrainPass};
use metal_candle::models::linear::{Adapter, DropoutRound};
use metal_candle::models::{ModelConfig, WeightDtype};
use metal_candle::training::params::Params;

fn main() -> Result<()> {
    let options = Options::from_args();
    // As the program does.
    metal_candle::backend::cpu::memory::keep_freed();
    let config = shape(&options.shape);
    let device = if options.cuda { Device::new_cuda(0)? } else { Device::Cpu };
    println!(
        "{}, {} x {} tokens, {:?}, rank {} on {}, checkpointing {}; {}, {} threads, commit {}",
        options.shape,
        options.batch,
        options.tokens,
        options.dtype(&device),
        options.rank,
        if options.all { "all seven linears" } else { "q and v" },
        if options.checkpoint { "every block" } else { "none" },
        processor(),
        rayon::current_num_threads(),
        commit(),
    );
    let step = whole_steps(&config, &options, &device)?;
    by_op(&config, &options, &device, step)
}

struct Options {
    all: bool,
    checkpoint: bool,
    cuda: bool,
    bf16: bool,
    shape: String,
    rank: usize,
    batch: usize,
    steps: usize,
    tokens: usize,
}

impl Options {
    fn dtype(&self, device: &Device) -> DType {
        if self.bf16 { DType::BF16 } else { WeightDtype::Auto.on(device, DType::BF16) }
    }

    fn from_args() -> Self {
        let mut options = Self {
            all: false,
            checkpoint: false,
            cuda: false,
            bf16: false,
            shape: "smollm2-135m".to_string(),
            rank: 8,
            batch: 1,
            steps: 3,
            tokens: 512,
        };
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut number = || args.next().and_then(|value| value.parse().ok()).filter(|&number| number > 0);
            match arg.as_str() {
                "--bench" => {}
                "--bf16" => options.bf16 = true,
                "--checkpoint" => options.checkpoint = true,
                "--steps" => options.steps = number().unwrap_or_else(|| usage("--steps needs a number over 0")),
                "--batch" => options.batch = number().unwrap_or_else(|| usage("--batch needs a number over 0")),
                "--rank" => options.rank = number().unwrap_or_else(|| usage("--rank needs a number over 0")),
                "--shape" => options.shape = args.next().unwrap_or_else(|| usage("--shape needs a name")),
                "--device" => match args.next().as_deref() {
                    Some("cpu") => options.cuda = false,
                    Some("cuda") => options.cuda = true,
                    _ => usage("--device is cpu or cuda"),
                },
                "--tokens" => options.tokens = number().unwrap_or_else(|| usage("--tokens needs a number over 0")),
                "--modules" => match args.next().as_deref() {
                    Some("qv") => options.all = false,
                    Some("all") => options.all = true,
                    _ => usage("--modules is qv or all"),
                },
                other => usage(&format!("{other} is not known")),
            }
        }
        options
    }
}

fn usage(problem: &str) -> ! {
    eprintln!(
        "{problem}; usage: train_step [--shape NAME] [--modules qv|all] [--rank R] [--steps N] [--batch ROWS] [--tokens T] \
         [--checkpoint] [--device cpu|cuda]"
    );
    std::process::exit(2)
}

/// The sizes of a published model.
fn shape(name: &str) -> ModelConfig {
    // hidden, MLP, blocks, heads, key heads, vocabulary, tied.
    let (family, sizes, tied) = match name {
        "smollm2-135m" => ("llama", [576, 1536, 30, 9, 3, 49152], true),
        "qwen2.5-0.5b" => ("qwen2", [896, 4864, 24, 14, 2, 151_936], true),
        "llama-3.2-1b" => ("llama", [2048, 8192, 16, 32, 8, 128_256], true),
        "llama-3.1-8b" => ("llama", [4096, 14336, 32, 32, 8, 128_256], false),
        _ => usage("--shape is smollm2-135m, qwen2.5-0.5b, llama-3.2-1b or llama-3.1-8b"),
    };
    let [hidden, wide, blocks, heads, kv_heads, vocab] = sizes;
    let json = serde_json::json!({
        "model_type": family, "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0, "tie_word_embeddings": tied
    });
    ModelConfig::from_value(name.as_ref(), &json).expect("the sizes above are those of a model")
}

/// Seconds of a step: loss, gradients, norm, AdamW.
fn whole_steps(config: &ModelConfig, options: &Options, device: &Device) -> Result<f64> {
    let dtype = options.dtype(device);
    let mut weights = HashMap::new();
    for (name, shape) in config.weight_shapes() {
        let spread = if shape.len() == 1 { 0.0 } else { 1.0 / (shape[shape.len() - 1] as f64).sqrt() };
        let mean = if shape.len() == 1 { 1.0 } else { 0.0 };
        let values = Tensor::randn(mean as f32, spread as f32, shape, device)?;
        weights.insert(name, values.to_dtype(dtype)?);
    }
    let mut decoder = Decoder::new(config, weights, device)?;
    let wanted = |path: &str| options.all || path.ends_with("q_proj") || path.ends_with("v_proj");
    let targets: Vec<(String, (usize, usize))> =
        decoder.linears().filter(|(path, _)| wanted(path)).map(|(path, linear)| (path, linear.sizes())).collect();
    let mut initial = Vec::new();
    for (path, (k, n)) in &targets {
        initial.push((format!("{path}.a"), Tensor::randn(0.0_f32, 0.02, (*k, options.rank), device)?));
        initial.push((format!("{path}.b"), Tensor::randn(0.0_f32, 0.02, (options.rank, *n), device)?));
    }
    let params = Params::new(&initial, device)?;
    let named = params.named()?;
    for (number, ((path, _), pair)) in targets.iter().zip(named.chunks_exact(2)).enumerate() {
        let (a, b) = (pair[0].1.clone(), pair[1].1.clone());
        decoder.attach(path, Some(Adapter { a, b, scaling: 2.0, dropout: 0.0, number: number as u32 }))?;
    }

    let count = options.batch * options.tokens;
    let tokens: Vec<u32> = (0..count as u32).map(|i| i * 7919 % config.vocab_size as u32).collect();
    let targets = tokens.iter().map(|token| (token + 1) % config.vocab_size as u32).collect();
    let batch = Batch { tokens, targets, lengths: vec![options.tokens; options.batch] };
    let checkpointing = if options.checkpoint { Checkpointing::EveryBlock } else { Checkpointing::None };
    let round = DropoutRound { seed: 0, round: 0 };
    let adamw = AdamW { learning_rate: 1e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0 };
    let mut seconds = Vec::new();
    for t in 1..=options.steps + 1 {
        let start = Instant::now();
        params.zero_gradients()?;
        let pass = TrainPass { checkpointing, round, scale: 1.0 / count as f32 };
        let loss = decoder.loss_and_gradients(&batch, pass)?;
        let norm = params.gradient_norm()?;
        params.step(&adamw, 1.0, t)?;
        device.synchronize()?;
        let now = start.elapsed().as_secs_f64();
        if t == 1 {
            peak_gpu(device, true);
        }
        println!("step {t}: {:.4} s, loss {:.4}, gradient norm {norm:.4}", now, loss.mean());
        if t > 1 {
            seconds.push(now);
        }
    }
    let step = median(seconds);
    println!("{:.0} tokens/s, peak resident {:.2} GB", count as f64 / step, peak_resident_gb());
    if let Some(bytes) = peak_gpu(device, false) {
        println!("peak on the GPU {:.2} GiB", bytes as f64 / (1_u64 << 30) as f64);
    }
    Ok(step)
}

/// The most bytes of tensors on the GPU, since the last call with `reset`.
fn peak_gpu(device: &Device, reset: bool) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return metal_candle::backend::cuda::peak_memory(device, reset).ok();
    }
    let _ = (device, reset);
    None
}

/// Milliseconds a step of each kind of op, measured alone; on a GPU without the host's part, for calls follow each other.
fn by_op(config: &ModelConfig, options: &Options, device: &Device, step: f64) -> Result<()> {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let t = options.batch * options.tokens;
    let (heads, kv_heads, dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
    let (layers, kv) = (config.num_layers as f64, kv_heads * dim);
    let dtype = options.dtype(device);
    let random = |shape: &[usize], dtype: DType| Tensor::randn(0.0_f32, 1.0, shape, device)?.to_dtype(dtype);
    let tensor = |shape: &[usize]| random(shape, dtype);
    let time = |run: &dyn Fn() -> Result<()>| time(device, run);
    // Linears that share an input as (k, [n]), and whether each has an adapter.
    let all = options.all;
    let groups: [(usize, Vec<(usize, bool)>); 4] = [
        (hidden, vec![(heads * dim, true), (kv, all), (kv, true)]),
        (heads * dim, vec![(hidden, all)]),
        (hidden, vec![(wide, all), (wide, all)]),
        (wide, vec![(hidden, all)]),
    ];
    let mut rows: Vec<(&str, f64)> = Vec::new();
    let (mut bare, mut base_forward, mut base_backward, mut forward, mut backward) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for (k, linears) in &groups {
        let x = tensor(&[t, *k])?;
        let mut held = Vec::new();
        for &(n, adapted) in linears {
            let (a, b) = (random(&[*k, options.rank], DType::F32)?, random(&[options.rank, n], DType::F32)?);
            let (da, db) = (a.zeros_like()?, b.zeros_like()?);
            held.push((tensor(&[n, *k])?, a, b, da, db, tensor(&[t, n])?, adapted));
            if device.is_cpu() {
                bare += layers * 2.0 * bare_product(t, n, *k);
            }
        }
        let adapter = |a, b, adapted: bool| adapted.then_some(lora_linear::Adapter { a, b, s: 2.0, dropout: None });
        let parts: Vec<Part> = held
            .iter()
            .map(|(w, a, b, .., adapted)| Part { w, bias: None, adapter: adapter(a, b, *adapted) })
            .collect();
        let base: Vec<Part> = parts.iter().map(|part| Part { adapter: None, ..*part }).collect();
        let g: Vec<&Tensor> = held.iter().map(|(.., g, _)| g).collect();
        let sinks: Vec<_> = held.iter().map(|(_, _, _, da, db, ..)| (Some(da), Some(db))).collect();
        let none = vec![(None, None); parts.len()];
        let saved = lora_linear::forward_shared(&x, &parts)?;
        let h: Vec<Option<&Tensor>> = saved.iter().map(|(_, h)| h.as_ref()).collect();
        let no_h = vec![None; parts.len()];
        base_forward += layers * time(&|| lora_linear::forward_shared(&x, &base).map(drop))?;
        forward += layers * time(&|| lora_linear::forward_shared(&x, &parts).map(drop))?;
        base_backward += layers * time(&|| lora_linear::backward_shared(&x, &base, &no_h, &g, &none, true).map(drop))?;
        backward += layers * time(&|| lora_linear::backward_shared(&x, &parts, &h, &g, &sinks, true).map(drop))?;
    }
    rows.push(("linears forward", base_forward));
    rows.push(("linears backward", base_backward));
    rows.push(("adapters forward", forward - base_forward));
    rows.push(("adapters backward", backward - base_backward));

    let (q, k) = (tensor(&[t, heads, dim])?, tensor(&[t, kv_heads, dim])?);
    let v = tensor(&[t, kv_heads, dim])?;
    let sequences: Vec<Sequence> = (0..options.batch)
        .map(|row| row * options.tokens)
        .map(|start| Sequence { q_start: start, q_len: options.tokens, k_start: start, k_len: options.tokens })
        .collect();
    let args = AttentionArgs { sequences: &sequences, scale: 0.125, window: None };
    let (o, lse) = attention::forward(&q, &k, &v, args)?;
    rows.push(("attention forward", layers * time(&|| attention::forward(&q, &k, &v, args).map(drop))?));
    let backward = || attention::backward(&q, &k, &v, &o, &lse, &q, args).map(drop);
    rows.push(("attention backward", layers * time(&backward)?));

    let (x, w_norm, rstd) = (tensor(&[t, hidden])?, tensor(&[hidden])?, random(&[t], DType::F32)?);
    let dx = x.zeros_like()?;
    let norm = time(&|| rms_norm::forward(&x, &w_norm, 1e-5).map(drop))?;
    let norm_add = time(&|| rms_norm::forward_add(&x, &dx, &w_norm, 1e-5).map(drop))?;
    rows.push(("rms_norm forward, and again", layers * (3.0 * norm + norm_add)));
    let norm = time(&|| rms_norm::backward(&x, &w_norm, &rstd, &x, &dx, None))?;
    rows.push(("rms_norm backward", layers * 2.0 * norm));
    let add = || {
        black_box((&x + &dx)?);
        Ok(())
    };
    rows.push(("sum of the block's halves", layers * time(&add)?));

    let table = random(&[t, dim / 2], DType::F32)?;
    let positions: Vec<u32> = (0..t as u32).map(|i| i % options.tokens as u32).collect();
    let rotate = |x: Tensor| time(&|| rope::rotate(&x, &table, &table, &positions, false));
    rows.push(("rope", 2.0 * layers * (rotate(q.zeros_like()?)? + rotate(k.zeros_like()?)?)));

    let (gate, up) = (tensor(&[t, wide])?, tensor(&[t, wide])?);
    let forward = time(&|| swiglu::forward(&gate, &up, Activation::Silu).map(drop))?;
    let backward = time(&|| swiglu::backward(&gate, &up, &up, Activation::Silu).map(drop))?;
    rows.push(("swiglu forward, twice", 2.0 * layers * forward));
    rows.push(("swiglu backward", layers * backward));

    let (hidden_states, head) = (tensor(&[t, hidden])?, tensor(&[config.vocab_size, hidden])?);
    let targets: Vec<u32> = (0..t as u32).map(|i| i % config.vocab_size as u32).collect();
    let loss = || cross_entropy::forward_backward(&hidden_states, &head, &targets, 1.0, None).map(drop);
    rows.push(("cross_entropy with head", time(&loss)?));

    println!("\n{:<28}{:>8}{:>10}", "a step, each op alone", "ms", "share");
    let sum: f64 = rows.iter().map(|(_, seconds)| seconds).sum();
    for (name, seconds) in rows.iter().chain(&[("sum", sum), ("the whole step", step)]) {
        println!("{name:<28}{:>8.1}{:>9.1}%", seconds * 1e3, seconds / step * 100.0);
    }
    if device.is_cpu() {
        let bare_head = 2.0 * bare_product(t, config.vocab_size, hidden);
        println!("bare products of the linears {:>7.1}{:>9.1}%", bare * 1e3, bare / step * 100.0);
        println!("bare products of the head    {:>7.1}{:>9.1}%", bare_head * 1e3, bare_head / step * 100.0);
    }
    Ok(())
}

/// Seconds of `[m, k] · [k, n]`.
fn bare_product(m: usize, n: usize, k: usize) -> f64 {
    let (lhs, rhs, mut dst) = (vec![1.0; m * k], vec![1.0; n * k], vec![0.0; m * n]);
    let start = Instant::now();
    let mut best = f64::INFINITY;
    while start.elapsed().as_secs_f64() < 0.1 {
        let start = Instant::now();
        let rhs = Matrix::new(&rhs, n, k).t();
        gemm(MatrixMut::new(&mut dst, m, n), 0.0, 1.0, Matrix::new(&lhs, m, k), rhs);
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// Seconds of a run. On the CPU the median of as many as take a tenth of a second, at least 3; on a GPU the mean of as many, asked for
/// without waiting between them.
fn time(device: &Device, run: &dyn Fn() -> Result<()>) -> Result<f64> {
    black_box(run()?);
    device.synchronize()?;
    let (start, mut seconds) = (Instant::now(), Vec::new());
    while seconds.len() < 3 || start.elapsed().as_secs_f64() < 0.1 {
        let start = Instant::now();
        let runs = if device.is_cpu() { 1 } else { 10 };
        for _ in 0..runs {
            black_box(run()?);
        }
        device.synchronize()?;
        seconds.push(start.elapsed().as_secs_f64() / runs as f64);
    }
    Ok(median(seconds))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or(std::env::consts::ARCH, |(_, name)| name).to_string()
}

fn commit() -> String {
    let output = std::process::Command::new("git").args(["describe", "--always", "--dirty"]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string()).unwrap_or_default();
    if text.is_empty() { "unknown".into() } else { text }
}

/// The most memory that this process has had, in units of 10⁹ bytes.
#[cfg(unix)]
fn peak_resident_gb() -> f64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF);
    // The system counts in KiB, Apple's in bytes.
    let unit = if cfg!(target_vendor = "apple") { 1.0 } else { 1024.0 };
    usage.map_or(f64::NAN, |usage| usage.max_rss() as f64 * unit / 1e9)
}

#[cfg(not(unix))]
fn peak_resident_gb() -> f64 {
    f64::NAN
}
