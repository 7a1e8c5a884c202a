//! Confirmed devices over time, as text and as SVG.

use std::fmt::Write as _;

use crate::report::{Point, Report, RolloutReport};
use crate::time::{HOUR, Time};

/// Columns of a text chart, at most.
const COLUMNS: usize = 64;
/// Lines of a text chart.
const LINES: usize = 10;
/// The size of an SVG chart and of the room for its labels, in pixels.
const SVG: (f64, f64, f64) = (720.0, 240.0, 40.0);
/// Colours of the lines of an SVG chart.
const COLOURS: [&str; 4] = ["#2563eb", "#b45309", "#15803d", "#9333ea"];

impl RolloutReport {
    /// Confirmed devices over time as lines of text: one column for each span of time, as high as
    /// the share of the rollout's devices that have confirmed by its end.
    pub fn chart(&self) -> String {
        let (most, end) = self.scale();
        let columns = COLUMNS.min(self.series.len().saturating_sub(1)).max(1);
        let heights: Vec<u64> = (1..=columns)
            .map(|column| {
                let at = Time(end.0 * column as u64 / columns as u64);
                let confirmed = confirmed_at(&self.series, at);
                u64::from(confirmed) * LINES as u64 * 8 / u64::from(most)
            })
            .collect();
        let width = most.to_string().len();
        let mut text = String::new();
        for line in (0..LINES as u64).rev() {
            let label = match line {
                line if line == LINES as u64 - 1 => most.to_string(),
                0 => "0".to_owned(),
                _ => String::new(),
            };
            let _ = write!(text, "{label:>width$} │");
            for height in &heights {
                // Eighths of this line's height.
                let filled = height.saturating_sub(line * 8).min(8) as usize;
                text.push([' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'][filled]);
            }
            while text.ends_with(' ') {
                text.pop();
            }
            text.push('\n');
        }
        let _ = writeln!(text, "{:>width$} └{}", "", "─".repeat(columns));
        let last = format!("{} h", (end.0 as f64 / HOUR as f64).round());
        let room = columns.saturating_sub(last.len() + 1);
        let _ = writeln!(text, "{:>width$}  0{:room$}{last}", "", "");
        text
    }

    /// The greatest number that the chart shows, and its last moment.
    fn scale(&self) -> (u32, Time) {
        let seen = self.series.iter().map(|point| point.confirmed).max().unwrap_or(0);
        let end = self.series.last().map_or(Time(0), |point| point.at);
        (self.devices.max(seen).max(1), end)
    }
}

impl Report {
    /// Devices that confirmed each release over time, as an SVG image: a line for each rollout, and
    /// a mark where a wave begins.
    pub fn svg(&self) -> String {
        let scales = self.rollouts.iter().map(RolloutReport::scale);
        let (most, end) =
            scales.fold((1, Time(1)), |sum, scale| (sum.0.max(scale.0), sum.1.max(scale.1)));
        let (width, height, margin) = SVG;
        let (right, bottom, top) = (width - margin / 2.0, height - margin, margin / 2.0);
        let x = |at: Time| margin + (right - margin) * at.0 as f64 / end.0 as f64;
        let y = |confirmed: u32| bottom - (bottom - top) * f64::from(confirmed) / f64::from(most);
        let mut lines = String::new();
        for (index, rollout) in self.rollouts.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let mut points = format!("{margin},{bottom}");
            let mut before = 0;
            for point in &rollout.series {
                let _ = write!(points, " {:.1},{:.1}", x(point.at), y(before));
                let _ = write!(points, " {:.1},{:.1}", x(point.at), y(point.confirmed));
                before = point.confirmed;
            }
            for started in rollout.waves.iter().filter_map(|wave| wave.started_at) {
                let at = x(started);
                let _ = writeln!(
                    lines,
                    r#"<path d="M{at:.1},{top}V{bottom}" stroke="{colour}" stroke-dasharray="2 4"/>"#
                );
            }
            let _ = writeln!(
                lines,
                r#"<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>"#
            );
            let (version, state) = (&rollout.version, rollout.state_words());
            let under = top + 14.0 * (index as f64 + 1.0);
            let _ = writeln!(
                lines,
                r#"<text x="{}" y="{under}" fill="{colour}">{version}: {state}</text>"#,
                margin + 6.0
            );
        }
        let hours = (end.0 as f64 / HOUR as f64).round();
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" role="img">
<title>Devices that confirmed each release</title>
<path d="M{margin},{top}V{bottom}H{right}" fill="none" stroke="#888"/>
{lines}<text x="{label}" y="{first}" text-anchor="end">{most}</text>
<text x="{label}" y="{bottom}" text-anchor="end">0</text>
<text x="{margin}" y="{under}">0 h</text>
<text x="{right}" y="{under}" text-anchor="end">{hours} h</text>
</svg>
"##,
            label = margin - 6.0,
            first = top + 4.0,
            under = bottom + 18.0,
        )
    }
}

fn confirmed_at(series: &[Point], at: Time) -> u32 {
    let place = series.partition_point(|point| point.at <= at);
    place.checked_sub(1).map_or(0, |place| series[place].confirmed)
}
