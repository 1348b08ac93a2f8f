//! `metal-candle bench`: how fast this machine trains, without a download.

mod ops;
mod step;

use candle_core::{DType, Device};
use clap::{Args, Subcommand, ValueEnum};
use metal_candle::models::Holding;
use metal_candle::models::decoder::Checkpointing;
use metal_candle::training::memory::{Sizes, Work as Pass};
use metal_candle::training::options::{FineTuneType, TrainerOptions};
use serde_json::{Value, json};

use super::Outcome;
use super::device::{DeviceKind, DtypeKind, QuantizeKind};

/// Of this build.
const COMMIT: &str = env!("METAL_CANDLE_COMMIT");

/// Measure this machine, without a download
#[derive(Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    Train(Train),
}

/// Training steps of a model's sizes with random weights and tokens: loss, gradients, norm and AdamW
///
/// Prints the median of the steps, the most memory, what the memory plan of `train --dry-run` says of it, and the share of the limit: the
/// tokens a second if nothing but products ran, at the rate of a large product on this machine.
#[derive(Args)]
struct Train {
    /// smollm2-135m, qwen2.5-0.5b, llama-3.2-1b or llama-3.1-8b
    #[arg(long, value_name = "NAME", default_value = "smollm2-135m")]
    shape: String,
    /// Rows in a step
    #[arg(long, value_name = "ROWS", default_value_t = 1, value_parser = at_least_one)]
    batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 512, value_parser = at_least_one)]
    tokens: usize,
    /// Rank of the adapters
    #[arg(long, value_name = "R", default_value_t = 8, value_parser = at_least_one)]
    rank: usize,
    /// The linears with adapters
    #[arg(long, value_enum, default_value_t = Modules::All)]
    modules: Modules,
    /// The adapters
    #[arg(long, value_enum, default_value_t = Kind::Lora)]
    fine_tune_type: Kind,
    /// Whose input alone is kept for backward, which computes them again
    #[arg(long, value_name = "BLOCKS", value_enum, num_args = 0..=1, default_value_t = Again::None, default_missing_value = "every")]
    grad_checkpoint: Again,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceKind::Auto)]
    device: DeviceKind,
    /// What weights and activations are held in; auto: f32 on the CPU, bf16 on a GPU
    #[arg(long, value_enum, default_value_t = DtypeKind::Auto)]
    dtype: DtypeKind,
    /// What the linears are quantized to
    #[arg(long, value_enum, default_value_t = QuantizeKind::None)]
    quantize: QuantizeKind,
    /// Steps to measure, after one that is not
    #[arg(long, default_value_t = 5, value_parser = at_least_one)]
    steps: usize,
    /// Also measure each kind of op alone
    #[arg(long)]
    by_op: bool,
    /// Print one JSON object in place of text
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Low-rank adapters
    Lora,
    /// With a length for each row of the adapted weight
    Dora,
}

/// The linears with adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Modules {
    /// q_proj and v_proj
    Qv,
    /// All seven of a block
    All,
}

impl Modules {
    fn has(self, path: &str) -> bool {
        self == Self::All || path.ends_with("q_proj") || path.ends_with("v_proj")
    }

    fn targets(self) -> Vec<String> {
        match self {
            Self::Qv => vec!["q_proj".to_string(), "v_proj".to_string()],
            Self::All => vec!["all-linear".to_string()],
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Again {
    /// Of no block
    None,
    /// Of all blocks
    Every,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("it must be a number over 0".to_string()),
    }
}

impl Bench {
    /// Runs the subcommand.
    pub fn run(self) -> Outcome {
        match self.what {
            What::Train(train) => train.run(),
        }
    }
}

impl Train {
    fn run(self) -> Outcome {
        let device = self.device.open()?;
        let config = step::model(&self.shape)?;
        let dtype = self.dtype.weights().on(&device, DType::BF16);
        let checkpointing = match self.grad_checkpoint {
            Again::None => Checkpointing::None,
            Again::Every => Checkpointing::EveryBlock,
        };
        let Self { batch, tokens, rank, modules, .. } = self;
        let holding = Holding::linears(&config, self.quantize.library(), dtype);
        let dora = self.fine_tune_type == Kind::Dora;
        let work = step::Work { batch, tokens, rank, modules, dora, holding: holding.clone(), checkpointing };
        let options = TrainerOptions {
            fine_tune_type: if dora { FineTuneType::Dora } else { FineTuneType::Lora },
            rank,
            target_modules: modules.targets(),
            ..Default::default()
        };
        let count = batch * tokens;
        let program = if device.is_cpu() { metal_candle::backend::memory::resident().unwrap_or(0) } else { 0 };
        let plan = Sizes::new(&config, &options, &holding, &device)?
            .plan(Pass { tokens: count, longest: tokens, counted: count }, checkpointing);
        let planned = program + plan.total();
        let linears = match (modules, dora) {
            (Modules::All, false) => "all seven linears",
            (Modules::Qv, false) => "q and v",
            (Modules::All, true) => "all seven linears, DoRA",
            (Modules::Qv, true) => "q and v, DoRA",
        };
        let again = if checkpointing == Checkpointing::None { "none" } else { "every block" };
        let tell = |line: String| {
            if !self.json {
                println!("{line}");
            }
        };
        tell(format!(
            "{}, {batch} x {tokens} tokens, {}, rank {rank} on {linears}, checkpointing {again}; {}, commit {COMMIT}",
            self.shape,
            holding.describe(),
            machine(&device),
        ));
        let mut took = step::run(&config, &work, self.steps, &device, &tell)?;
        let rate = step::product_rate(dtype, &device)?;
        let limit = rate / step::operations_a_token(&config, &work);
        let step = median(&mut took.seconds);
        let speed = count as f64 / step;
        let ops = if self.by_op { ops::by_op(&config, &work, &device)? } else { Vec::new() };
        if self.json {
            let ops: Vec<Value> = ops.iter().map(|(name, seconds)| json!({"op": name, "ms": seconds * 1e3})).collect();
            let report = json!({
                "shape": self.shape, "batch": batch, "tokens": tokens, "dtype": holding.describe(), "rank": rank, "modules": linears,
                "checkpointing": again, "machine": machine(&device), "commit": COMMIT,
                "tokens_per_second": speed, "step_ms": step * 1e3, "peak_bytes": took.peak, "planned_bytes": planned,
                "product_ops_per_second": rate, "limit_tokens_per_second": limit, "ops": ops,
            });
            println!("{report}");
            return Ok(());
        }
        let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / (1_u64 << 30) as f64);
        let peak = took.peak.map_or("unknown".to_string(), gib);
        println!("{speed:.0} tokens/s, {:.1} ms a step, peak memory {peak} (planned {})", step * 1e3, gib(planned));
        println!(
            "{:.0} % of the limit, {limit:.0} tokens/s at the {:.2} TFLOP/s of a large {} product here",
            100.0 * speed / limit,
            rate / 1e12,
            dtype.as_str()
        );
        if self.by_op {
            println!("\n{:<28}{:>8}{:>10}", "a step, each op alone", "ms", "share");
            let sum: f64 = ops.iter().map(|(_, seconds)| seconds).sum();
            for (name, seconds) in ops.iter().chain(&[("sum", sum), ("the whole step", step)]) {
                println!("{name:<28}{:>8.1}{:>9.1}%", seconds * 1e3, seconds / step * 100.0);
            }
        }
        Ok(())
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The processor with its threads, or the GPU.
fn machine(device: &Device) -> String {
    if device.is_cuda() {
        let name = std::fs::read_dir("/proc/driver/nvidia/gpus").ok().and_then(|gpus| {
            let file = gpus.flatten().next()?.path().join("information");
            let text = std::fs::read_to_string(file).ok()?;
            Some(text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_string())
        });
        return name.unwrap_or_else(|| "an NVIDIA GPU".to_string());
    }
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let name = name.map_or(std::env::consts::ARCH, |(_, name)| name);
    format!("{name}, {} threads", rayon::current_num_threads())
}
