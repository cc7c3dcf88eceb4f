//! The plots of `docs/performance/`.

use std::path::Path;

use plotters::prelude::*;

use crate::Problem;
use crate::figure::Figure;

/// Rates over time, of one kind.
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) values: Vec<f64>,
}

const BLUE_: RGBColor = RGBColor(37, 99, 235);
const AMBER: RGBColor = RGBColor(217, 119, 6);
const GREEN_: RGBColor = RGBColor(5, 150, 105);
const GREY: RGBColor = RGBColor(107, 114, 128);

/// Writes what there is to see into the folder.
pub(crate) fn write(folder: &Path, figures: &[Figure], curves: &[Curve]) -> Result<(), Problem> {
    std::fs::create_dir_all(folder)?;
    let beside: Vec<&Figure> = figures.iter().filter(|f| f.ratio.is_some() && f.unit != "ms").collect();
    if !beside.is_empty() {
        ratios(&folder.join("ratios.svg"), &beside)?;
    }
    if !curves.is_empty() {
        pinned(&folder.join("pinned.svg"), curves)?;
    }
    Ok(())
}

/// Where the axis of the ratios ends: longer bars are cut off there.
const FULL: f64 = 1.5;

/// Each figure as a bar, as a share of its baseline, with a mark where its bar is set.
fn ratios(path: &Path, figures: &[&Figure]) -> Result<(), Problem> {
    let height = 100 + 30 * figures.len() as u32;
    let root = SVGBackend::new(path, (900, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = ("sans-serif", 14).into_font().color(&BLACK);
    root.draw(&Text::new("black: what it is held to; amber: missed", (12, height as i32 - 24), text.clone()))?;
    let rows = figures.len() as f64;
    let mut chart = ChartBuilder::on(&root)
        .caption("each figure as a share of its baseline in the same run", ("sans-serif", 17))
        .margin(10)
        .margin_right(70)
        .margin_bottom(30)
        .x_label_area_size(28)
        .y_label_area_size(390)
        .build_cartesian_2d(0.0..FULL, rows..0.0)?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().light_line_style(WHITE).draw()?;
    let (right, _) = chart.backend_coord(&(FULL, 0.0));
    for (row, figure) in figures.iter().enumerate() {
        let (top, ratio) = (row as f64, figure.ratio.unwrap_or(0.0));
        let color = if figure.ok == Some(false) { AMBER } else { BLUE_ };
        chart.draw_series([Rectangle::new([(0.0, top + 0.2), (ratio.min(FULL), top + 0.8)], color.filled())])?;
        let bar = figure.bar.as_deref().and_then(|b| b.trim_start_matches("≥ ").parse::<f64>().ok());
        if let Some(bar) = bar {
            chart.draw_series([PathElement::new(vec![(bar, top + 0.05), (bar, top + 0.95)], BLACK.stroke_width(2))])?;
        }
        let (_, y) = chart.backend_coord(&(0.0, top + 0.28));
        root.draw(&Text::new(figure.name.clone(), (12, y), text.clone()))?;
        let more = if ratio > FULL { "→ " } else { "" };
        root.draw(&Text::new(format!("{more}{ratio:.2}"), (right + 10, y), text.clone()))?;
    }
    root.present()?;
    Ok(())
}

/// The drain while messages pass, with and without a pinned horizon.
fn pinned(path: &Path, curves: &[Curve]) -> Result<(), Problem> {
    let root = SVGBackend::new(path, (900, 380)).into_drawing_area();
    root.fill(&WHITE)?;
    let chunks = curves.iter().map(|c| c.values.len()).max().unwrap_or(1);
    let highest = curves.iter().flat_map(|c| &c.values).copied().fold(1.0, f64::max) * 1.15;
    let mut chart = ChartBuilder::on(&root)
        .caption("drain while a transaction pins the horizon", ("sans-serif", 17))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(1..chunks, 0.0..highest)?;
    chart
        .configure_mesh()
        .x_desc("chunk of messages")
        .y_desc("messages a second")
        .y_label_formatter(&|rate| format!("{rate:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    for (curve, color) in curves.iter().zip([GREY, BLUE_, GREEN_]) {
        let points = curve.values.iter().enumerate().map(|(n, v)| (n + 1, *v));
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(GREY)
        .position(SeriesLabelPosition::LowerRight)
        .draw()?;
    root.present()?;
    Ok(())
}
