//! What `train --dry-run` says of memory, as comments below the settings.

use std::fmt::Write;

use metal_candle::backend::memory;
use metal_candle::models::ModelFiles;
use metal_candle::training::dataset::{Dataset, DatasetOptions, Row, split};
use metal_candle::training::memory::{Plan, Sizes};
use metal_candle::training::options::TrainerOptions;
use metal_candle::training::trainer::largest_pass;
use metal_candle::{Error, Result};

use super::settings::Settings;
use super::train::row_length;

/// The memory that a run takes and its largest batch, from the model's sizes and the data's rows; no weight is read.
pub fn describe(settings: &Settings) -> Result<String> {
    let Settings { run, trainer } = settings;
    let (Some(model), Some(data)) = (&run.model, &run.data) else {
        return Ok("# memory: give --model and --data to see what the run takes\n".to_string());
    };
    let device = run.device.open()?;
    let model = ModelFiles::open(model)?;
    let options =
        DatasetOptions { max_seq_length: row_length(&model, trainer.max_seq_length), mask_prompt: run.mask_prompt };
    let train = split(data, "train").ok_or_else(|| Error::file(data, "has no train.jsonl"))?;
    let rows = Dataset::load(&[train], &model.tokenizer, &options)?.rows;
    let holding = trainer.holding(&model, &device)?;
    let sizes = Sizes::new(&model.config, trainer, &holding, &device)?;
    let work = largest_pass(trainer, &rows);
    // What this program has now it has in the run too; on a GPU tensors alone are counted.
    let program = if device.is_cpu() { memory::resident().unwrap_or(0) } else { 0 };
    let free = memory::available(&device)?;
    let lasting = |plan: &Plan| plan.weights + plan.trained;
    let room = free.map(|free| free.saturating_sub(lasting(&sizes.plan(work, Default::default()))));
    let (checkpointing, plan) = sizes.choose(trainer.grad_checkpoint, work, room);
    let (again, blocks) = sizes.again(checkpointing);

    let place = if device.is_cpu() { "memory" } else { "memory of the GPU" };
    let mut text = format!("# {place}, in GB (10⁹ bytes); the largest pass has {} tokens\n", work.tokens);
    let mut line = |name: &str, bytes: u64| {
        let _ = writeln!(text, "#   {name:<36}{:>8.3}", bytes as f64 / 1e9);
    };
    if device.is_cpu() {
        line("program and data", program);
    }
    line(&format!("weights, {}", holding.describe()), plan.weights);
    line("trained values, gradients, moments", plan.trained);
    line("kept of the blocks for backward", plan.kept);
    line("the most beside that", plan.working);
    line("in all", program + plan.total());
    if let Some(free) = free {
        line("free now", free);
    }
    let _ = writeln!(text, "# blocks that backward computes again: {again} of {blocks}");
    if let Some(room) = room {
        text += &largest_batch(&sizes, trainer, &rows, room);
    }
    Ok(text)
}

/// The largest `batch_size` whose steps fit into `room` bytes, with blocks computed again as the options allow.
fn largest_batch(sizes: &Sizes, trainer: &TrainerOptions, rows: &[Row], room: u64) -> String {
    let fits = |batch_size: usize| {
        let work = largest_pass(&TrainerOptions { batch_size, ..trainer.clone() }, rows);
        sizes.choose(trainer.grad_checkpoint, work, Some(room)).1.step() <= room
    };
    let all = rows.len();
    if !fits(1) {
        return "# largest batch_size: none; one row alone does not fit\n".to_string();
    }
    if fits(all) {
        return format!("# largest batch_size: any; all {all} rows fit in one pass\n");
    }
    let (mut low, mut high) = (1, all);
    while high - low > 1 {
        let middle = low.midpoint(high);
        *(if fits(middle) { &mut low } else { &mut high }) = middle;
    }
    format!("# largest batch_size: {low}\n")
}
