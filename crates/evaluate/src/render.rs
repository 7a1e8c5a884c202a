//! Reports and decisions as Markdown tables.

use std::fmt::Write as _;

use slmops_api::report::{Estimate, EvaluationReport, GateDecision, Verdict};

/// One line for each report, in the given order: name, size, quality, tasks, speed, memory.
pub fn reports(reports: &[(&str, &EvaluationReport)]) -> String {
    let mut tasks: Vec<&str> = Vec::new();
    for (_, report) in reports {
        for task in &report.tasks {
            if !tasks.contains(&task.name.as_str()) {
                tasks.push(&task.name);
            }
        }
    }
    let mut text = String::from("| variant | size MB | perplexity | KL divergence | same top-1 |");
    let mut rule = String::from("|---|---:|---:|---:|---:|");
    for task in &tasks {
        let _ = write!(text, " {task} |");
        rule.push_str("---:|");
    }
    text.push_str(" tokens/s | prompt tokens/s | first token ms | peak memory MB |\n");
    rule.push_str("---:|---:|---:|---:|\n");
    text.push_str(&rule);
    for (name, report) in reports {
        let _ = write!(
            text,
            "| {name} | {:.1} | {:.2} | {} | {} % |",
            megabytes(report.size_bytes),
            report.perplexity,
            with_margin(&report.kl_divergence),
            percent(&report.top1_agreement),
        );
        for task in &tasks {
            let found = report.tasks.iter().find(|result| result.name == *task);
            let shown = found.map_or("-".into(), |found| {
                let right = found.items.iter().filter(|right| **right).count();
                format!("{right}/{}", found.items.len())
            });
            let _ = write!(text, " {shown} |");
        }
        let _ = writeln!(
            text,
            " {:.1} | {:.0} | {:.0} | {:.0} |",
            report.decode_tokens_per_s,
            report.prompt_tokens_per_s,
            report.time_to_first_token_ms,
            megabytes(report.peak_memory_bytes),
        );
    }
    text
}

/// A gate's decision, one line a row.
pub fn gate(decision: &GateDecision) -> String {
    let mut text =
        String::from("| metric | against | loss | 95 % interval | allowed | verdict |\n");
    text.push_str("|---|---|---:|---:|---:|---|\n");
    for row in &decision.rows {
        let _ = writeln!(
            text,
            "| {} | {} | {:.4} | {:.4} to {:.4} | {:.4} | {} |",
            row.metric,
            row.against,
            row.loss.mean,
            row.loss.low,
            row.loss.high,
            row.allowed,
            verdict(row.verdict)
        );
    }
    text
}

/// A verdict in words.
pub fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::NoWorse => "no worse",
        Verdict::Worse => "worse",
        Verdict::TooFewSamples => "too few samples",
    }
}

/// Decimal megabytes, as sizes of files are told.
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn with_margin(estimate: &Estimate) -> String {
    format!("{:.4} ± {:.4}", estimate.mean, margin(estimate))
}

fn percent(estimate: &Estimate) -> String {
    format!("{:.1} ± {:.1}", estimate.mean * 100.0, margin(estimate) * 100.0)
}

/// Half the interval; nothing sensible when a single sample left it unbounded.
fn margin(estimate: &Estimate) -> f64 {
    let half = (estimate.high - estimate.low) / 2.0;
    if half.is_finite() && half < 1e6 { half } else { f64::NAN }
}
