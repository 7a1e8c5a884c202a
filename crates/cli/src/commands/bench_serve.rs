//! `slm bench serve`.

use std::path::PathBuf;

use serde::Serialize;

use super::Session;
use super::bench::Taken;
use crate::bench::serve::{self, Figures, Measured, Plan, quantile};
use crate::error::Result;
use crate::output::{fields, table};
use crate::units;

/// `slm bench serve`.
#[derive(Debug, clap::Args)]
pub struct ServeBench {
    /// The model, a GGUF file
    model: PathBuf,
    /// Rounds; the median of each figure counts
    #[arg(long, value_name = "COUNT", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Compute threads; 0 means one for each core
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    threads: u32,
    /// Requests that 200 clients make at once
    #[arg(long, value_name = "COUNT", default_value_t = 2000)]
    requests: u32,
    /// Another OpenAI-compatible endpoint with the same model, which is measured in the same rounds
    #[arg(long, value_name = "URL")]
    peer: Option<String>,
}

/// All that was measured, and where.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    taken: Taken,
    model: String,
    #[serde(flatten)]
    measured: Measured,
}

impl ServeBench {
    pub(super) async fn run(self, session: &Session) -> Result<()> {
        let taken = Taken::here();
        let plan = Plan {
            rounds: self.rounds as usize,
            threads: self.threads,
            requests: self.requests as usize,
        };
        let peer = self.peer.as_deref();
        let measured = serve::run(&self.model, plan, peer, &session.progress).await?;
        let model = self.model.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let report = Report { taken, model, measured };
        session.out.show(&report, || text(&report))
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5)
}

fn text(report: &Report) -> String {
    let Measured { raw, served, peer, crowd } = &report.measured;
    let model = ("model", report.model.clone());
    let mut text = fields(&[&report.taken.lines()[..], &[model]].concat());
    text.push_str("\n\n");
    let rate = |what: &str, of: fn(&Figures) -> &Vec<f64>, wanted: f64| {
        let (loops, ours) = (median(of(raw)), median(of(served)));
        vec![
            what.to_owned(),
            format!("{loops:.1}"),
            format!("{ours:.1}"),
            peer.as_ref().map_or_else(String::new, |peer| format!("{:.1}", median(of(peer)))),
            format!("{:.3} of the loop", ours / loops),
            format!("≥ {wanted}"),
            yes(ours / loops >= wanted),
        ]
    };
    let time = |what: &str, share: f64, wanted: f64| {
        let of = |figures: &Figures| quantile(&figures.first_token_ms, share);
        let added = of(served) - of(raw);
        vec![
            what.to_owned(),
            format!("{:.1}", of(raw)),
            format!("{:.1}", of(served)),
            peer.as_ref().map_or_else(String::new, |peer| format!("{:.1}", of(peer))),
            format!("{added:.1} ms more"),
            format!("≤ {wanted} ms"),
            yes(added <= wanted),
        ]
    };
    let more = served.resident_bytes.saturating_sub(raw.resident_bytes);
    let rows = [
        rate("decode, one stream, tokens/s", |it| &it.decode_per_s, 0.98),
        rate("prompt, tokens/s", |it| &it.prompt_per_s, 0.97),
        rate("decode, 8 streams, tokens/s", |it| &it.streams_per_s, 1.0),
        time("first token p50, ms", 0.5, 2.0),
        time("first token p99, ms", 0.99, 5.0),
        vec![
            "resident memory".to_owned(),
            units::bytes(raw.resident_bytes),
            units::bytes(served.resident_bytes),
            String::new(),
            format!("{} more", units::bytes(more)),
            "≤ 25 MB".to_owned(),
            yes(more <= 25_000_000),
        ],
    ];
    let head = ["", ">loop", ">slm serve", ">peer", ">against the loop", ">wanted", "met"];
    text.push_str(&table(&head, rows));
    text.push_str("\n\n");
    let grown = crowd.resident_bytes.1.saturating_sub(crowd.resident_bytes.0);
    text.push_str(&fields(&[
        (
            "200 clients, queue of 64",
            format!(
                "{} answered, {} turned away with 429, {} failed",
                crowd.answered, crowd.turned_away, crowd.failed
            ),
        ),
        (
            "their waiting",
            format!("median {:.2} s, longest {:.2} s", crowd.median_s, crowd.longest_s),
        ),
        ("memory meanwhile", format!("{} more", units::bytes(grown))),
    ]));
    text
}

fn yes(met: bool) -> String {
    if met { "yes" } else { "NO" }.to_owned()
}
