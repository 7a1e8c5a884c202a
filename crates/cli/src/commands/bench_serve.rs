//! `slm bench serve`.

use std::path::PathBuf;

use serde::Serialize;

use super::Session;
use super::bench::Taken;
use crate::bench::serve::{self, Figures, Measured, Peers, Plan, quantile};
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
    /// Another OpenAI-compatible endpoint with the same model, which is measured in the same rounds; may
    /// be given several times
    #[arg(long, value_name = "URL")]
    peer: Vec<String>,
    /// A folder of other servers' programs, each of which is started with the options of `slm serve` and
    /// prints its URL; scripts/bench-peers.sh installs some [default: ~/.cache/slmops/peers]
    #[arg(long, value_name = "DIR")]
    peers: Option<PathBuf>,
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
        let installed = || {
            let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
            home.join(".cache/slmops/peers")
        };
        let folder = self.peers.clone().unwrap_or_else(installed);
        let peers = Peers { folder, urls: self.peer.clone() };
        let measured = serve::run(&self.model, plan, &peers, &session.progress).await?;
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
    let Measured { raw, served, peers, crowd } = &report.measured;
    let model = ("model", report.model.clone());
    let mut text = fields(&[&report.taken.lines()[..], &[model]].concat());
    text.push_str("\n\n");
    let row =
        |what: &str, shown: &dyn Fn(&Figures) -> String, [against, wanted, met]: [String; 3]| {
            let all = [raw, served].into_iter().chain(peers.iter().map(|peer| &peer.figures));
            let mut row = vec![what.to_owned()];
            row.extend(all.map(shown));
            row.extend([against, wanted, met]);
            row
        };
    let rate = |what: &str, of: fn(&Figures) -> &Vec<f64>, wanted: f64| {
        let share = median(of(served)) / median(of(raw));
        let shown = |figures: &Figures| format!("{:.1}", median(of(figures)));
        let against =
            [format!("{share:.3} of the loop"), format!("≥ {wanted}"), yes(share >= wanted)];
        row(what, &shown, against)
    };
    let time = |what: &str, of: fn(&Figures) -> &Vec<f64>, share: f64, wanted: f64| {
        let at = |figures: &Figures| quantile(of(figures), share);
        let added = at(served) - at(raw);
        let against =
            [format!("{added:.1} ms more"), format!("≤ {wanted} ms"), yes(added <= wanted)];
        row(what, &|figures| format!("{:.1}", at(figures)), against)
    };
    let resident = |figures: &Figures| figures.resident_bytes.map_or("–".to_owned(), units::bytes);
    let bytes = |figures: &Figures| figures.resident_bytes.unwrap_or(0);
    let more = bytes(served).saturating_sub(bytes(raw));
    let more =
        [format!("{} more", units::bytes(more)), "≤ 25 MB".to_owned(), yes(more <= 25_000_000)];
    let rows = [
        rate("decode, one stream, tokens/s", |it| &it.decode_per_s, 0.98),
        rate("prompt, tokens/s", |it| &it.prompt_per_s, 0.97),
        rate("decode, 8 streams, tokens/s", |it| &it.streams_per_s, 1.0),
        time("first token p50, ms", |it| &it.first_token_ms, 0.5, 2.0),
        time("first token p99, ms", |it| &it.first_token_ms, 0.99, 5.0),
        time("the same, prompt cached, p50, ms", |it| &it.cached_first_token_ms, 0.5, 2.0),
        time("the same, prompt cached, p99, ms", |it| &it.cached_first_token_ms, 0.99, 5.0),
        row("resident memory", &resident, more),
    ];
    let named: Vec<String> = peers.iter().map(|peer| format!(">{}", peer.name)).collect();
    let mut head = vec!["", ">loop", ">slm serve"];
    head.extend(named.iter().map(String::as_str));
    head.extend([">against the loop", ">wanted", "met"]);
    text.push_str(&table(&head, rows));
    if peers.is_empty() {
        text.push_str("\n\nNo peer was measured: scripts/bench-peers.sh installs some.");
    }
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
