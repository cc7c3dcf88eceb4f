//! A figure: what was measured, beside its baseline of the same run, and its bar.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// What a figure is held to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bar {
    /// The ratio to the baseline is at least this.
    Ratio(f64),
    /// The ratio to the baseline is at most this.
    RatioAtMost(f64),
    /// The value is at most this.
    AtMost(f64),
    /// Nothing: it explains another figure.
    None,
}

/// One line of the result.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: Cow<'static, str>,
    pub(crate) baseline: Option<f64>,
    pub(crate) ratio: Option<f64>,
    pub(crate) bar: Option<String>,
    pub(crate) ok: Option<bool>,
}

impl Figure {
    /// A value by itself.
    pub(crate) fn alone(name: &str, value: f64, unit: &'static str, bar: Bar) -> Figure {
        Figure::with(name, value, unit, None, None, bar)
    }

    /// Rounds of one kind beside rounds of the baseline, taken in turns: the medians, and the median of
    /// the ratios of each round.
    pub(crate) fn beside(name: &str, rounds: &[f64], baseline: &[f64], unit: &'static str, bar: Bar) -> Figure {
        let ratios: Vec<f64> = rounds.iter().zip(baseline).map(|(ours, raw)| ours / raw).collect();
        Figure::with(name, median(rounds), unit, Some(median(baseline)), Some(median(&ratios)), bar)
    }

    fn with(name: &str, value: f64, unit: &'static str, baseline: Option<f64>, ratio: Option<f64>, bar: Bar) -> Figure {
        let (bar, ok) = match bar {
            Bar::Ratio(least) => (Some(format!("≥ {least}")), ratio.map(|r| r >= least)),
            Bar::RatioAtMost(most) => (Some(format!("≤ {most} ×")), ratio.map(|r| r <= most)),
            Bar::AtMost(most) => (Some(format!("≤ {most}")), Some(value <= most)),
            Bar::None => (None, None),
        };
        Figure { name: name.into(), value, unit: unit.into(), baseline, ratio, bar, ok }
    }

    /// For people.
    pub(crate) fn line(&self) -> String {
        let number = |value: f64| match value.abs() {
            v if v >= 1000.0 => format!("{:.0}", v.round()),
            v if v >= 10.0 => format!("{value:.1}"),
            _ => format!("{value:.3}"),
        };
        let baseline = self.baseline.map_or_else(String::new, number);
        let ratio = self.ratio.map_or_else(String::new, |r| format!("{r:.2}"));
        let bar = self.bar.clone().unwrap_or_default();
        let ok = match self.ok {
            Some(true) => "ok",
            Some(false) => "MISSED",
            None => "",
        };
        format!(
            "{:<58} {:>10} {:<9} {:>10} {:>6}  {:<8} {ok}",
            self.name,
            number(self.value),
            self.unit,
            baseline,
            ratio,
            bar
        )
    }

    /// The columns of `line`.
    pub(crate) fn head() -> String {
        format!("{:<58} {:>10} {:<9} {:>10} {:>6}  {:<8}", "", "value", "unit", "baseline", "ratio", "bar")
    }
}

/// The middle one; the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    percentile(values, 0.5)
}

/// The value below which this share lies, between neighbours by their distance.
pub(crate) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let place = share * last as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let values = [4.0, 1.0, 3.0, 2.0];
        assert_eq!(median(&values), 2.5);
        assert_eq!((percentile(&values, 0.0), percentile(&values, 1.0)), (1.0, 4.0));
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_bar_is_held_against_the_ratio_of_each_round() {
        // The second round was disturbed: both were slower.
        let figure = Figure::beside("x", &[90.0, 9.0, 85.0], &[100.0, 10.0, 100.0], "1/s", Bar::Ratio(0.9));
        assert_eq!((figure.ratio, figure.ok), (Some(0.9), Some(true)));
        let figure = Figure::beside("x", &[90.0], &[100.0], "1/s", Bar::Ratio(0.91));
        assert_eq!(figure.ok, Some(false));
        assert_eq!(Figure::alone("x", 2.0, "ms", Bar::AtMost(1.0)).ok, Some(false));
    }
}
