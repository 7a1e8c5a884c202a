//! Families in Prometheus' text format 0.0.4. Their names are made of OpenTelemetry's as its rules for
//! Prometheus say: `gen_ai.server.request.duration` in `s` is `gen_ai_server_request_duration_seconds`.

use std::fmt::Write as _;

use super::family::{Attributes, Family, Kind, Reading};

pub(crate) fn text(families: &[Family]) -> String {
    let mut text = String::new();
    for family in families {
        let name = name(family);
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}", family.help);
        for point in &family.points {
            let labels = labels(&point.attributes);
            match &point.value {
                Reading::Number(value) if labels.is_empty() => {
                    let _ = writeln!(text, "{name} {value}");
                }
                Reading::Number(value) => {
                    let _ = writeln!(text, "{name}{{{labels}}} {value}");
                }
                Reading::Histogram(histogram) => {
                    let mut cumulative = 0;
                    for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
                        cumulative += count;
                        let _ =
                            writeln!(text, "{name}_bucket{{{labels},le=\"{bound}\"}} {cumulative}");
                    }
                    let count = histogram.count();
                    let _ = writeln!(text, "{name}_bucket{{{labels},le=\"+Inf\"}} {count}");
                    let _ = writeln!(text, "{name}_sum{{{labels}}} {}", histogram.sum);
                    let _ = writeln!(text, "{name}_count{{{labels}}} {count}");
                }
            }
        }
    }
    text
}

fn name(family: &Family) -> String {
    let unit = match family.unit {
        "s" => "_seconds",
        "By" => "_bytes",
        // Units in braces count things.
        _ => "",
    };
    let total = if family.kind == Kind::Counter { "_total" } else { "" };
    format!("{}{unit}{total}", family.name.replace('.', "_"))
}

fn labels(attributes: &Attributes) -> String {
    let label = |(name, value): &(&'static str, String)| {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', " ");
        format!("{}=\"{value}\"", name.replace('.', "_"))
    };
    attributes.iter().map(label).collect::<Vec<_>>().join(",")
}
