//! `slm device`.

use clap::{Args, Subcommand};
use reqwest::Method;
use semver::Version;
use serde::Serialize;
use slmops_api::device::{
    Device as DeviceFacts, DeviceEvent, DevicePatch, Failure as DeviceFailure, Invitation,
    NewInvitation, Phase, WaitCause,
};
use slmops_api::fleet::{DeviceFilter, DeviceState, OrderKind};
use slmops_api::orders::{NewPin, Reason};
use slmops_api::selector::Selector;
use slmops_api::{ModelName, SiteName};

use super::Session;
use crate::error::{Failure, Result};
use crate::output::{fields, table};
use crate::units;

/// Devices.
#[derive(Debug, Subcommand)]
pub enum Device {
    /// Make a one-time invitation; its text is the secret that a device joins with
    #[command(
        after_help = "Example:\n  $ slm device invite --site berlin-3 > invite.txt\n  $ slm-agent join invite.txt --state /var/lib/slm-agent      (on the device)"
    )]
    Invite {
        /// The site of the device that joins
        #[arg(long)]
        site: Option<SiteName>,
        /// A label of the device that joins, as key=value; may be repeated
        #[arg(long = "label", value_parser = parse_label, value_name = "KEY=VALUE")]
        labels: Vec<(String, String)>,
        /// How long it works
        #[arg(long, value_parser = units::parse_seconds, value_name = "TIME", default_value = "1d")]
        valid: u64,
    },
    /// List the devices with what each runs
    #[command(
        after_help = "Examples:\n  $ slm device list --to 'site=berlin-3,fact.memory>=4GB'\n  $ slm device list --state failed --running smollm2-135m-instruct@1.1.0"
    )]
    List {
        #[command(flatten)]
        which: Which,
    },
    /// Show one device: facts, model, configuration, history
    #[command(after_help = "Example:\n  $ slm device show till-7")]
    Show {
        /// Its name or id
        device: String,
    },
    /// Show every effective setting with the layer that set it, and which variant fits
    #[command(after_help = "Example:\n  $ slm device explain till-7")]
    Explain {
        /// Its name or id
        device: String,
    },
    /// Set labels (key=value), remove them (key=) or move the device to a site
    #[command(after_help = "Example:\n  $ slm device label till-7 floor=2 --site berlin-3")]
    Label {
        /// Its name or id
        device: String,
        /// Labels to set, as key=value; `key=` removes one
        #[arg(value_parser = parse_label, value_name = "KEY=VALUE")]
        labels: Vec<(String, String)>,
        /// The site
        #[arg(long)]
        site: Option<SiteName>,
    },
    /// Hold a device to a release, whatever rollouts say
    #[command(
        disable_version_flag = true,
        after_help = "Example:\n  $ slm device pin till-7 --model smollm2-135m-instruct --version 1.0.0 --reason 'certified'"
    )]
    Pin {
        /// Its name or id
        device: String,
        /// The model
        #[arg(long)]
        model: ModelName,
        /// The release
        #[arg(long = "version", value_name = "VERSION")]
        release: Version,
        /// Why; it is shown wherever the pin is, and kept in the audit log
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// Hold a device no longer: it keeps its release until a rollout means it
    #[command(after_help = "Example:\n  $ slm device unpin till-7 --reason 'certified anew'")]
    Unpin {
        /// Its name or id
        device: String,
        /// Why; it is kept in the audit log and the device's history
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Keep a device out of rollouts
    #[command(after_help = "Example:\n  $ slm device exclude till-7 --reason 'at the workshop'")]
    Exclude {
        /// Its name or id
        device: String,
        /// Why; it is shown wherever the exclusion is, and kept in the audit log
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// Let an excluded device take part in rollouts again
    #[command(
        after_help = "Example:\n  $ slm device include till-7 --reason 'back from the workshop'"
    )]
    Include {
        /// Its name or id
        device: String,
        /// Why; it is kept in the audit log and the device's history
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Shut a device out: its key no longer opens anything
    #[command(after_help = "Example:\n  $ slm device revoke till-7")]
    Revoke {
        /// Its name or id
        device: String,
    },
}

/// Which devices are meant; all that is given must hold.
#[derive(Debug, Args)]
pub struct Which {
    /// Words, each of which stands in a device's name, id or class, in a label as key=value, or in
    /// what runs on it
    #[arg(value_name = "WORD")]
    words: Vec<String>,
    /// Only those that a selector means, as in `slm rollout start --to`
    #[arg(long, value_name = "SELECTOR")]
    to: Option<Selector>,
    /// Only those in this state
    #[arg(long, value_parser = parse_state, value_name = "STATE")]
    state: Option<DeviceState>,
    /// Only those on which this answers
    #[arg(long, value_name = "MODEL[@VERSION]", value_parser = parse_running)]
    running: Option<(ModelName, Option<Version>)>,
    /// Only those that are held to a release
    #[arg(long, conflicts_with = "excluded")]
    pinned: bool,
    /// Only those that take no part in rollouts
    #[arg(long)]
    excluded: bool,
}

impl Which {
    /// The filter as the hub takes it.
    pub fn filter(self) -> DeviceFilter {
        let (model, version) = self.running.unzip();
        DeviceFilter {
            search: Some(self.words.join(" ")).filter(|words| !words.is_empty()),
            selector: self.to,
            state: self.state,
            model,
            version: version.flatten(),
            orders: match (self.pinned, self.excluded) {
                (true, _) => Some(OrderKind::Pinned),
                (_, true) => Some(OrderKind::Excluded),
                _ => None,
            },
        }
    }
}

fn parse_state(given: &str) -> Result<DeviceState, String> {
    DeviceState::ALL.into_iter().find(|state| state.name() == given).ok_or_else(|| {
        let names = DeviceState::ALL.map(DeviceState::name);
        format!("`{given}` is no state: write one of {}", names.join(", "))
    })
}

/// `MODEL` or `MODEL@VERSION`.
pub fn parse_running(given: &str) -> Result<(ModelName, Option<Version>), String> {
    let (model, version) = match given.split_once('@') {
        Some((model, version)) => (model, Some(version)),
        None => (given, None),
    };
    let model = model.parse().map_err(|error| format!("{error}"))?;
    let version = version.map(|version| version.parse::<Version>()).transpose();
    Ok((model, version.map_err(|error| format!("`{given}`: {error}"))?))
}

fn parse_label(given: &str) -> Result<(String, String), String> {
    let (key, value) = given
        .split_once('=')
        .ok_or_else(|| format!("`{given}` is not a label: write key=value"))?;
    let good = |text: &str| {
        text.len() <= 128 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-/".contains(&b))
    };
    if key.is_empty() || !good(key) || !good(value) {
        return Err(format!(
            "`{given}` is not a label: use letters, digits, '.', '_', '-' and '/'"
        ));
    }
    Ok((key.to_owned(), value.to_owned()))
}

impl Device {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::Invite { site, labels, valid } => {
                let body = NewInvitation {
                    labels: labels.into_iter().collect(),
                    site,
                    valid_s: Some(valid),
                };
                let invitation: Invitation =
                    hub.call(Method::POST, "/v1/invitations", &body, "invite a device").await?;
                session.progress.say(format!(
                    "Good for one device until {}. Give it to the device as a file or on stdin:\n  \
                     slm-agent join invite.txt --state DIR",
                    super::time(invitation.expires_at)
                ));
                session.out.show(&invitation, || invitation.text.clone())
            }
            Self::List { which } => {
                let filter = which.filter();
                let devices: Vec<DeviceFacts> =
                    hub.list_where("/v1/devices", &filter, "list the devices").await?;
                session.out.show(&devices, || {
                    let rows = devices.iter().map(row);
                    table(&["name", "class", ">memory", "runs", "state", "seen"], rows)
                })
            }
            Self::Show { device } => {
                let name = super::segment(&device)?;
                let what = format!("show the device `{name}`");
                let facts: DeviceFacts = hub.get(&format!("/v1/devices/{name}"), &what).await?;
                if session.out.is_json() {
                    return session.out.show(&facts, String::new);
                }
                let history: Vec<DeviceEvent> =
                    hub.list(&format!("/v1/devices/{name}/history"), &what).await?;
                session.out.show(&facts, || show(&facts, &history))
            }
            Self::Explain { device } => super::blueprint::explain(session, &device).await,
            Self::Label { device, labels, site } => {
                let name = super::segment(&device)?;
                if labels.is_empty() && site.is_none() {
                    return Err(Failure::user("nothing to change")
                        .hint(format!("slm device label {name} key=value")));
                }
                let what = format!("label the device `{name}`");
                let path = format!("/v1/devices/{name}");
                let labels = labels.into_iter();
                let labels =
                    labels.map(|(key, value)| (key, Some(value).filter(|v| !v.is_empty())));
                let site = site.map(|site| site.to_string());
                let body = DevicePatch { labels: Some(labels.collect()), site };
                hub.send(hub.request(Method::PATCH, &path).json(&body), &what).await?;
                session.out.done(&format!("device {name} is changed"))
            }
            Self::Pin { device, model, release: version, reason } => {
                let what = format!("pin the device `{device}` to {model} {version}");
                let done = format!("device {device} is pinned to {model} {version}");
                let body = NewPin { model, version, reason };
                give_order(session, &device, "pin", &body, &what, &done).await
            }
            Self::Unpin { device, reason } => {
                let what = format!("unpin the device `{device}`");
                let done = format!("device {device} is not pinned");
                end_order(session, &device, "pin", reason, &what, &done).await
            }
            Self::Exclude { device, reason } => {
                let what = format!("exclude the device `{device}`");
                let done = format!("device {device} takes no part in rollouts");
                let body = Reason { reason };
                give_order(session, &device, "exclusion", &body, &what, &done).await
            }
            Self::Include { device, reason } => {
                let what = format!("include the device `{device}`");
                let done = format!("device {device} takes part in rollouts");
                end_order(session, &device, "exclusion", reason, &what, &done).await
            }
            Self::Revoke { device } => {
                let name = super::segment(&device)?;
                let what = format!("revoke the device `{name}`");
                hub.act(Method::DELETE, &format!("/v1/devices/{name}"), &what).await?;
                session.out.done(&format!("device {name} is revoked"))
            }
        }
    }
}

/// Gives one of a device's orders, and prints what was done.
async fn give_order(
    session: &Session,
    device: &str,
    order: &str,
    body: &impl Serialize,
    what: &str,
    done: &str,
) -> Result<()> {
    let hub = session.hub()?;
    let path = format!("/v1/devices/{}/{order}", super::segment(device)?);
    hub.send(hub.request(Method::PUT, &path).json(body), what).await?;
    session.out.done(done)
}

/// Ends one of a device's orders, and prints what was done.
async fn end_order(
    session: &Session,
    device: &str,
    order: &str,
    reason: Option<String>,
    what: &str,
    done: &str,
) -> Result<()> {
    let hub = session.hub()?;
    let path = format!("/v1/devices/{}/{order}", super::segment(device)?);
    let mut request = hub.request(Method::DELETE, &path);
    if let Some(reason) = reason {
        request = request.query(&[("reason", reason)]);
    }
    hub.send(request, what).await?;
    session.out.done(done)
}

fn row(device: &DeviceFacts) -> Vec<String> {
    vec![
        device.name.clone(),
        device.class.to_string(),
        units::bytes(device.facts.memory_budget_bytes),
        running(device),
        state(device),
        units::ago(device.last_seen),
    ]
}

fn running(device: &DeviceFacts) -> String {
    let model = device.report.as_ref().and_then(|report| report.running.as_ref());
    model.map_or_else(
        || "nothing".to_owned(),
        |m| format!("{} {} {}", m.model, m.version, m.variant),
    )
}

/// A device's state in words.
pub fn state(device: &DeviceFacts) -> String {
    if device.revoked {
        return "revoked".to_owned();
    }
    match &device.report {
        None => "not heard of yet".to_owned(),
        Some(report) => phase(&report.phase),
    }
}

/// A phase in words.
pub fn phase(phase: &Phase) -> String {
    match phase {
        Phase::Idle => "idle".to_owned(),
        Phase::Downloading { done_bytes, total_bytes } => {
            format!("downloading {} of {}", units::bytes(*done_bytes), units::bytes(*total_bytes))
        }
        Phase::Downloaded => "downloaded".to_owned(),
        Phase::Verified => "verified".to_owned(),
        Phase::Staged => "staged, being probed".to_owned(),
        Phase::Activated => "activated".to_owned(),
        Phase::Confirmed => "confirmed".to_owned(),
        Phase::RolledBack { failure } => format!("rolled back: {}", failure_text(failure)),
        Phase::Prestaged { cause, until } => {
            format!("has it and {}{}", wait(*cause), units::until(*until))
        }
        Phase::Waiting { cause, until } => format!("{}{}", wait(*cause), units::until(*until)),
    }
}

fn wait(cause: WaitCause) -> &'static str {
    match cause {
        WaitCause::Network => "waits for the network",
        WaitCause::DiskFull => "waits: the disk is full",
        WaitCause::Storage => "waits: its state folder cannot be written",
        WaitCause::Held => "waits: the rollout is held",
        WaitCause::NotBefore => "waits for its time",
        WaitCause::Hours => "waits for its hours",
        WaitCause::Clock => "waits: it does not know what time it is",
        WaitCause::Metered => "waits: its link is metered",
    }
}

/// A failure in words.
pub fn failure_text(failure: &DeviceFailure) -> String {
    match failure {
        DeviceFailure::Probes { results } => {
            let failed: Vec<&str> =
                results.iter().filter(|r| !r.passed).map(|r| r.name.as_str()).collect();
            format!("{} of {} probes failed ({})", failed.len(), results.len(), failed.join(", "))
        }
        DeviceFailure::Load => "the engine could not load it".to_owned(),
        DeviceFailure::Crash => "its worker died".to_owned(),
        DeviceFailure::Signature => "its signature is not trusted here".to_owned(),
        DeviceFailure::Digest => "its bytes are not what their digest says".to_owned(),
        DeviceFailure::Package => "its package is not understood".to_owned(),
        DeviceFailure::Configuration { settings } => {
            format!("the engine did not honour {}", settings.join(", "))
        }
        DeviceFailure::Memory { measured_bytes, budget_bytes } => format!(
            "it took {} of memory, the device offers {}",
            units::bytes(*measured_bytes),
            units::bytes(*budget_bytes)
        ),
        DeviceFailure::Timeout => "it was not confirmed in time".to_owned(),
        DeviceFailure::Worse { metric } => format!("the gate found it worse in {metric}"),
    }
}

fn decided(what: &str, by: &str, at: jiff::Timestamp, reason: &str) -> String {
    format!("{what} by {by}, {}: {reason}", super::time(at))
}

fn rules(device: &DeviceFacts) -> String {
    match device.desired.rules.to_string() {
        none if none.is_empty() => "none".to_owned(),
        rules => rules,
    }
}

fn show(device: &DeviceFacts, history: &[DeviceEvent]) -> String {
    let facts = &device.facts;
    let mut head = vec![
        ("device", format!("{} ({})", device.name, device.id)),
        ("class", device.class.to_string()),
        ("site", device.site.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string)),
        ("state", state(device)),
        ("runs", running(device)),
        ("reason", device.desired.reason.clone()),
        ("rules", rules(device)),
        ("endpoint", facts.endpoint.clone().unwrap_or_else(|| "none yet".to_owned())),
        ("machine", format!("{}, {} cores, {}", facts.cpu, facts.cores, facts.arch)),
        ("features", facts.cpu_features.join(" ")),
        ("kernel", facts.kernel.clone()),
        (
            "memory",
            format!(
                "{} for models, of {}",
                units::bytes(facts.memory_budget_bytes),
                units::bytes(facts.memory_bytes)
            ),
        ),
        ("disk", format!("{} free", units::bytes(facts.disk_free_bytes))),
        ("link", if facts.metered { "metered" } else { "not metered" }.to_owned()),
        ("time zone", facts.time_zone.clone().unwrap_or_else(|| "none (UTC)".to_owned())),
        ("agent", format!("{}; {}", facts.agent_version, facts.engine)),
        ("enrolled", super::time(device.enrolled_at)),
        ("last seen", units::ago(device.last_seen)),
    ];
    if let Some(pin) = &device.orders.pin {
        head.push((
            "pinned",
            decided(&format!("to {} {}", pin.model, pin.version), &pin.by, pin.at, &pin.reason),
        ));
    }
    if let Some(exclusion) = &device.orders.exclusion {
        head.push((
            "excluded",
            decided("from rollouts", &exclusion.by, exclusion.at, &exclusion.reason),
        ));
    }
    if let Some(report) = &device.report {
        let telemetry = &report.telemetry;
        head.push((
            "use",
            format!(
                "{} requests, {} failed, {} tokens, {:.1} tokens/s, first token {:.0} ms",
                telemetry.requests,
                telemetry.errors,
                telemetry.generated_tokens,
                telemetry.tokens_per_s,
                telemetry.time_to_first_token_ms
            ),
        ));
        head.push((
            "worker",
            format!(
                "{} now, {} at its peak; {} crashes",
                units::bytes(telemetry.worker_memory_bytes),
                units::bytes(telemetry.worker_peak_memory_bytes),
                telemetry.worker_crashes
            ),
        ));
        head.push(("downloaded", units::bytes(telemetry.downloaded_bytes)));
        if let Some(effective) = &report.effective {
            head.push((
                "engine says",
                format!(
                    "context {}, {} parallel, {} threads, batch {}, KV {}, flash attention {}{}",
                    effective.context_tokens,
                    effective.parallel,
                    effective.threads,
                    effective.batch_tokens,
                    super::word(&effective.kv_type),
                    if effective.flash_attention { "on" } else { "off" },
                    match effective.idle_after_s {
                        0 => String::new(),
                        seconds => format!(", sleeps after {seconds} s without a request"),
                    },
                ),
            ));
        }
    }
    let mut text = fields(&head);
    if !history.is_empty() {
        text.push_str("\n\nHistory:\n");
        let rows = history.iter().map(|event| {
            vec![super::time(event.at), event.generation.to_string(), event.what.clone()]
        });
        text.push_str(&table(&["when", ">generation", "what"], rows));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_state("failed"), Ok(DeviceState::Failed));
        assert!(parse_state("broken").unwrap_err().contains("confirmed, updating, failed"));
        let model: ModelName = "m".parse().unwrap();
        assert_eq!(parse_running("m"), Ok((model.clone(), None)));
        assert_eq!(parse_running("m@1.0.0"), Ok((model, Some(Version::new(1, 0, 0)))));
        for bad in ["", "@1.0.0", "m@", "m@one", "M"] {
            assert!(parse_running(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_label("floor=2"), Ok(("floor".to_owned(), "2".to_owned())));
        assert_eq!(parse_label("floor="), Ok(("floor".to_owned(), String::new())));
        for bad in ["floor", "=2", "a b=c", "a=b c"] {
            assert!(parse_label(bad).is_err(), "{bad}");
        }
    }
}
