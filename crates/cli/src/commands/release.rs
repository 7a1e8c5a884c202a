//! `slm release`.

use clap::Subcommand;
use reqwest::Method;
use semver::Version;
use serde::Serialize;
use slmops_api::channel::NewPromotion;
use slmops_api::delta::DeltaJob;
use slmops_api::model::Release as ReleaseFacts;
use slmops_api::rollout::Rollout;
use slmops_api::{ChannelName, ModelName};

use super::{Session, rollout};
use crate::error::Result;
use crate::output::{fields, table};
use crate::ship::report;
use crate::units;

/// Releases.
#[derive(Debug, Subcommand)]
pub enum Release {
    /// List releases
    #[command(after_help = "Example:\n  $ slm release list smollm2-135m-instruct")]
    List {
        /// Only those of this model
        model: Option<ModelName>,
    },
    /// Show one release: its variants, what was measured, what the gate said
    #[command(after_help = "Example:\n  $ slm release show smollm2-135m-instruct 1.0.0")]
    Show {
        /// The model
        model: ModelName,
        /// The version
        version: Version,
    },
    /// Bring a release to a channel: a rollout to the devices that follow it
    #[command(
        after_help = "Example:\n  $ slm release promote smollm2-135m-instruct@1.1.0 --to beta --watch"
    )]
    Promote {
        /// The release, as MODEL@VERSION
        #[arg(value_parser = parse_release, value_name = "MODEL@VERSION")]
        release: (ModelName, Version),
        /// The channel
        #[arg(long, value_name = "CHANNEL")]
        to: ChannelName,
        /// Even if it was not confirmed on the channel before
        #[arg(long, requires = "reason")]
        force: bool,
        /// Why it is forced; kept in the audit log
        #[arg(long, requires = "force", value_name = "TEXT")]
        reason: Option<String>,
        /// Stay until the rollout is over
        #[arg(long)]
        watch: bool,
    },
}

fn parse_release(given: &str) -> Result<(ModelName, Version), String> {
    let (model, version) = given
        .split_once('@')
        .ok_or_else(|| format!("`{given}` is no release: write MODEL@VERSION"))?;
    let model = model.parse().map_err(|error| format!("{error}"))?;
    let version = version.parse().map_err(|error| format!("`{version}` is no version: {error}"))?;
    Ok((model, version))
}

impl Release {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::List { model } => {
                let mut releases: Vec<ReleaseFacts> =
                    hub.list("/v1/releases", "list the releases").await?;
                releases
                    .retain(|one| model.as_ref().is_none_or(|model| one.release.model == *model));
                session.out.show(&releases, || {
                    let rows = releases.iter().map(|one| {
                        let variants: Vec<&str> =
                            one.release.variants.iter().map(|v| v.name.as_str()).collect();
                        let gate = match &one.release.gate_override {
                            Some(_) => "overridden".to_owned(),
                            None => report::worst(&one.release.variants),
                        };
                        vec![
                            one.release.model.to_string(),
                            one.release.version.to_string(),
                            variants.join(" "),
                            gate,
                            super::time(one.created_at),
                            one.created_by.clone(),
                        ]
                    });
                    table(&["model", "version", "variants", "gate", "created", "by"], rows)
                })
            }
            Self::Show { model, version } => {
                let what = format!("show the release {model} {version}");
                let release: ReleaseFacts =
                    hub.get(&format!("/v1/releases/{model}/{version}"), &what).await?;
                let what = format!("show the deltas to {model} {version}");
                let deltas: Vec<DeltaJob> =
                    hub.list(&format!("/v1/releases/{model}/{version}/deltas"), &what).await?;
                let shown = Shown { release, deltas };
                session.out.show(&shown, || show(&shown.release) + &deltas_table(&shown))
            }
            Self::Promote { release: (model, version), to, force: _, reason, watch } => {
                let what = format!("promote {model} {version} to channel {to}");
                let path = format!("/v1/releases/{model}/{version}/promote");
                let body = NewPromotion { to, force: reason };
                let rollout: Rollout = hub.call(Method::POST, &path, &body, &what).await?;
                if watch {
                    let ended = rollout::follow(session, &hub, &rollout.id).await?;
                    return rollout::finish(session, &ended);
                }
                session.out.show(&rollout, || rollout::status(&rollout))
            }
        }
    }
}

/// A release, and the deltas to it.
#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    release: ReleaseFacts,
    deltas: Vec<DeltaJob>,
}

fn deltas_table(shown: &Shown) -> String {
    if shown.deltas.is_empty() {
        return String::new();
    }
    let rows = shown.deltas.iter().map(|job| {
        let variants = &shown.release.release.variants;
        let variant = variants.iter().find(|variant| variant.weights == job.to);
        let bytes = job.delta.as_ref().map_or_else(String::new, |delta| {
            let percent = delta.bytes as f64 * 100.0 / delta.to_bytes.max(1) as f64;
            format!("{} ({percent:.1} %)", units::bytes(delta.bytes))
        });
        vec![
            job.from.short(),
            variant.map_or_else(|| job.to.short(), |variant| variant.name.to_string()),
            job.devices.to_string(),
            super::word(&job.state),
            bytes,
            job.why.clone(),
        ]
    });
    let table = table(&["from", "to", "devices", "state", "bytes", "why"], rows);
    format!("\n\nDeltas from what devices run:\n{table}")
}

fn show(release: &ReleaseFacts) -> String {
    let mut head = vec![
        ("release", format!("{} {}", release.release.model, release.release.version)),
        ("created", format!("{} by {}", super::time(release.created_at), release.created_by)),
        ("original", release.release.original.to_string()),
        ("signed by", release.release.key.to_string()),
    ];
    let requires = &release.release.requires;
    let least = [("engine", &requires.engine), ("agent", &requires.agent)];
    for (what, version) in least.into_iter().filter_map(|(what, it)| Some((what, it.as_ref()?))) {
        head.push(("requires", format!("{what} {version} or later")));
    }
    if let Some(forced) = &release.release.gate_override {
        head.push(("gate", format!("overridden: {}", forced.reason)));
    }
    let mut text = fields(&head);
    text.push_str("\n\n");
    text.push_str(&report::variants_table(&release.release.variants));
    for variant in &release.release.variants {
        if let Some(gate) = &variant.gate {
            text.push_str(&format!(
                "\n\n{} gate: {}\n",
                variant.name,
                report::verdict(gate.verdict)
            ));
            text.push_str(&report::gate_table(gate));
        }
    }
    text.push_str("\n\nManifests in the hub's registry:");
    for variant in &release.release.variants {
        let adapter = variant.adapter.map_or_else(String::new, |adapter| {
            format!(" and {} of an adapter", units::bytes(adapter.size_bytes))
        });
        text.push_str(&format!(
            "\n  {}@{}  {} ({}{adapter})",
            release.release.model,
            variant.manifest,
            variant.name,
            units::bytes(variant.size_bytes)
        ));
    }
    text
}
