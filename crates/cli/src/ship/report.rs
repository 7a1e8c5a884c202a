//! Evaluation reports and gates as tables.

use slmops_api::model::Variant;
use slmops_api::report::{EvaluationReport, GateDecision, Verdict};

use crate::output::table;
use crate::units;

/// A verdict in words.
pub fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::NoWorse => "no worse",
        Verdict::Worse => "WORSE",
        Verdict::TooFewSamples => "too few samples",
    }
}

/// The most severe verdict of some variants, in words.
pub fn worst(variants: &[Variant]) -> String {
    let verdicts: Vec<Verdict> =
        variants.iter().filter_map(|variant| Some(variant.gate.as_ref()?.verdict)).collect();
    let found = [Verdict::Worse, Verdict::TooFewSamples, Verdict::NoWorse]
        .into_iter()
        .find(|wanted| verdicts.contains(wanted));
    found.map_or("none", verdict).to_owned()
}

/// One row of the table of measurements.
pub struct Row<'a> {
    /// The variant, or `reference`.
    pub name: String,
    /// For whom.
    pub classes: String,
    /// What was measured.
    pub report: &'a EvaluationReport,
    /// What the gate said.
    pub gate: Option<&'a GateDecision>,
}

/// The measurements of some model files, one row each.
pub fn measurements(rows: &[Row<'_>]) -> String {
    let header = [
        "variant",
        "for",
        ">size",
        ">perplexity",
        ">KL",
        ">top-1",
        ">tasks",
        ">tokens/s",
        ">first token",
        ">memory",
        "gate",
    ];
    table(
        &header,
        rows.iter().map(|row| {
            let report = row.report;
            let items = report.tasks.iter().flat_map(|task| &task.items);
            let (right, all) =
                items.fold((0, 0), |(right, all), item| (right + u32::from(*item), all + 1));
            vec![
                row.name.clone(),
                row.classes.clone(),
                units::bytes(report.size_bytes),
                format!("{:.2}", report.perplexity),
                format!("{:.4}", report.kl_divergence.mean),
                format!("{:.1} %", report.top1_agreement.mean * 100.0),
                format!("{right}/{all}"),
                format!("{:.1}", report.decode_tokens_per_s),
                format!("{:.0} ms", report.time_to_first_token_ms),
                units::bytes(report.peak_memory_bytes),
                row.gate.map_or("", |gate| verdict(gate.verdict)).to_owned(),
            ]
        }),
    )
}

/// The table of a release's variants.
pub fn variants_table(variants: &[Variant]) -> String {
    let rows: Vec<Row<'_>> = variants
        .iter()
        .map(|variant| Row {
            name: variant.name.to_string(),
            classes: join(&variant.classes),
            report: &variant.report,
            gate: variant.gate.as_ref(),
        })
        .collect();
    measurements(&rows)
}

/// Names joined for people.
pub fn join<T: ToString>(names: &[T]) -> String {
    names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// Every row of a gate's decision.
pub fn gate_table(gate: &GateDecision) -> String {
    let rows = gate.rows.iter().map(|row| {
        vec![
            row.metric.clone(),
            row.against.clone(),
            format!("{:+.4}", row.loss.mean),
            format!("[{:+.4}, {:+.4}]", row.loss.low, row.loss.high),
            format!("{:.4}", row.allowed),
            row.loss.samples.to_string(),
            verdict(row.verdict).to_owned(),
        ]
    });
    table(
        &["metric", "against", ">loss", ">95 % interval", ">allowed", ">samples", "verdict"],
        rows,
    )
}

/// The rows that say `worse`, one line each, for messages.
pub fn worse_rows(name: &str, gate: &GateDecision) -> Vec<String> {
    let worse = gate.rows.iter().filter(|row| row.verdict == Verdict::Worse);
    worse
        .map(|row| {
            format!(
                "{name}: {} lost {:.4} [{:.4}, {:.4}] against {}, {:.4} is allowed",
                row.metric, row.loss.mean, row.loss.low, row.loss.high, row.against, row.allowed
            )
        })
        .collect()
}
