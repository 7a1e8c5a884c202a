//! `slm fleet`.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Subcommand;
use jiff::Timestamp;
use reqwest::Method;
use semver::Version;
use slmops_api::fleet::{DeviceState, FleetSummary};
use slmops_api::telemetry::{Span, TelemetryQuery, TelemetrySeries};
use slmops_api::{ClassName, ModelName, SiteName};

use super::Session;
use super::device::{Which, parse_running};
use crate::client;
use crate::error::Result;
use crate::output::{fields, table};
use crate::units;

/// The fleet as a whole.
#[derive(Debug, Subcommand)]
pub enum Fleet {
    /// Count devices by state, class and release, a label, and when they were last heard of
    #[command(
        after_help = "Examples:\n  $ slm fleet summary\n  $ slm fleet summary --to class=small --by floor"
    )]
    Summary {
        #[command(flatten)]
        which: Which,
        /// The label by whose values they are grouped
        #[arg(long, value_name = "LABEL", default_value = "site")]
        by: String,
    },
    /// Show what devices count in use, release by release: requests, errors, speed, memory
    #[command(
        after_help = "Examples:\n  $ slm fleet telemetry --running smollm2-135m-instruct\n  $ slm fleet telemetry --class small --by-day --since 30d"
    )]
    Telemetry {
        /// Only of this model or release
        #[arg(long, value_name = "MODEL[@VERSION]", value_parser = parse_running)]
        running: Option<(ModelName, Option<Version>)>,
        /// Only of devices of this class
        #[arg(long)]
        class: Option<ClassName>,
        /// Only of devices of this site
        #[arg(long)]
        site: Option<SiteName>,
        /// A line for each day of UTC instead of each hour
        #[arg(long)]
        by_day: bool,
        /// How far back [default: 2d, or 60d by day]
        #[arg(long, value_parser = units::parse_seconds, value_name = "TIME")]
        since: Option<u64>,
    },
}

impl Fleet {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::Summary { which, by } => {
                let request = hub.request(Method::GET, "/v1/fleet/summary");
                let request = request.query(&which.filter()).query(&[("by", by)]);
                let what = "count the fleet";
                let summary: FleetSummary =
                    client::json(hub.send(request, what).await?, what).await?;
                session.out.show(&summary, || show(&summary))
            }
            Self::Telemetry { running, class, site, by_day, since } => {
                let (model, version) = running.unzip();
                let since = since.map(|seconds| Timestamp::now() - Duration::from_secs(seconds));
                let query = TelemetryQuery {
                    model,
                    version: version.flatten(),
                    class,
                    site,
                    span: Some(if by_day { Span::Day } else { Span::Hour }),
                    since,
                };
                let what = "read what devices count";
                let series: Vec<TelemetrySeries> =
                    hub.list_where("/v1/telemetry", &query, what).await?;
                session.out.show(&series, || telemetry(&series, by_day))
            }
        }
    }
}

fn telemetry(series: &[TelemetrySeries], by_day: bool) -> String {
    let header = [
        if by_day { "day" } else { "hour" },
        "release",
        ">answered",
        ">failed",
        ">crashes",
        ">tokens/s",
        ">first token",
        ">95 %",
        ">memory",
    ];
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let ms = |value: f64| format!("{value:.0} ms");
    let rows = series.iter().flat_map(|series| {
        series.points.iter().map(move |point| {
            // In UTC, as they are added up.
            let start = point.start.strftime(if by_day { "%Y-%m-%d" } else { "%Y-%m-%d %H:%M" });
            vec![
                start.to_string(),
                format!("{} {}", series.model, series.version),
                point.answered.to_string(),
                point.errors.to_string(),
                point.crashes.to_string(),
                or_none(point.tokens_per_s.map(|speed| format!("{:.1}", speed.p50))),
                or_none(point.first_token_ms.map(|time| ms(time.p50))),
                or_none(point.first_token_ms.map(|time| ms(time.p95))),
                or_none(point.memory_bytes.map(|memory| units::bytes(memory.p50 as u64))),
            ]
        })
    });
    table(&header, rows)
}

fn states(states: &BTreeMap<DeviceState, u64>) -> String {
    let each = states.iter().map(|(state, devices)| format!("{devices} {}", state.name()));
    each.collect::<Vec<_>>().join(", ")
}

fn show(summary: &FleetSummary) -> String {
    let mut within = Vec::new();
    for band in summary.last_seen.iter().filter(|band| band.devices > 0) {
        within.push(match band.within_s {
            Some(within_s) => {
                format!(
                    "{} within {}",
                    band.devices,
                    units::duration(Duration::from_secs(within_s))
                )
            }
            None => format!("{} longer ago", band.devices),
        });
    }
    let or_none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
    let head = [
        ("devices", summary.devices.to_string()),
        ("state", or_none(states(&summary.states))),
        ("last seen", or_none(within.join(", "))),
        ("orders", format!("{} pinned, {} excluded", summary.pinned, summary.excluded)),
        ("quarantine", format!("{} packages", summary.quarantined)),
        (
            "use",
            format!(
                "{:.1} tokens/s; {} requests, {} failed; {} pulled",
                summary.tokens_per_s,
                summary.requests,
                summary.errors,
                units::bytes(summary.downloaded_bytes)
            ),
        ),
    ];
    let mut text = fields(&head);
    let releases = summary.classes.iter().flat_map(|class| {
        class.releases.iter().map(|it| {
            vec![
                class.class.to_string(),
                format!("{} {}", it.model, it.version),
                it.running.to_string(),
                it.updating.to_string(),
                it.failed.to_string(),
            ]
        })
    });
    let none = summary.classes.iter().filter(|class| class.without > 0).map(|class| {
        let (class, without) = (class.class.to_string(), class.without.to_string());
        vec![class, "no model".to_owned(), without, "0".to_owned(), "0".to_owned()]
    });
    text.push_str("\n\n");
    text.push_str(&table(
        &["class", "release", ">running", ">updating", ">failed"],
        releases.chain(none),
    ));
    let groups = summary.groups.iter().map(|group| {
        let value = group.value.clone().unwrap_or_else(|| "-".to_owned());
        vec![value, group.devices.to_string(), states(&group.states)]
    });
    text.push_str("\n\n");
    text.push_str(&table(&[&summary.by, ">devices", "state"], groups));
    if summary.more_groups > 0 {
        text.push_str(&format!("\nand {} more, with fewer devices", summary.more_groups));
    }
    text
}
