//! `loss.svg`: training and validation loss over the steps, drawn from `metrics.jsonl`.

use std::path::Path;

use metal_candle::{Error, Result};
use plotters::prelude::*;
use serde_json::Value;

/// Draws the plot. Without two reports there is nothing to draw and no file.
pub fn write(path: &Path, metrics: &Path) -> Result<()> {
    let text = std::fs::read_to_string(metrics).map_err(Error::io(metrics))?;
    let lines: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let series = |key: &str| -> Vec<(f64, f64)> {
        let point = |line: &Value| Some((line.get("step")?.as_f64()?, line.get(key)?.as_f64()?));
        lines.iter().filter_map(point).filter(|(_, loss)| loss.is_finite()).collect()
    };
    let (train, valid) = (series("train_loss"), series("val_loss"));
    if train.len() < 2 {
        return Ok(());
    }
    draw(path, &train, &valid).map_err(|error| Error::file(path, format!("cannot be drawn: {error}")))
}

fn draw(path: &Path, train: &[(f64, f64)], valid: &[(f64, f64)]) -> Result<(), Box<dyn std::error::Error>> {
    let all = || train.iter().chain(valid);
    let last = all().map(|point| point.0).fold(1.0, f64::max);
    let (low, high) =
        all().map(|point| point.1).fold((f64::MAX, f64::MIN), |(low, high), loss| (low.min(loss), high.max(loss)));
    let margin = ((high - low) * 0.05).max(1e-3);

    let root = SVGBackend::new(path, (800, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..last, (low - margin).max(0.0)..high + margin)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .light_line_style(BLACK.mix(0.05))
        .x_label_formatter(&|step| format!("{step:.0}"))
        .draw()?;
    let (blue, orange) = (RGBColor(31, 119, 180), RGBColor(214, 94, 0));
    let entry = |color: RGBColor| move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2));
    chart
        .draw_series(LineSeries::new(train.iter().copied(), blue.stroke_width(2)))?
        .label("training")
        .legend(entry(blue));
    if !valid.is_empty() {
        chart
            .draw_series(LineSeries::new(valid.iter().copied(), orange.stroke_width(2)).point_size(3))?
            .label("validation")
            .legend(entry(orange));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.2)).draw()?;
    root.present()?;
    Ok(())
}
