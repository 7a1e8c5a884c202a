//! `slm rollout`.

mod plan;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Subcommand;
use reqwest::Method;
use semver::Version;
use slmops_api::channel::NewPromotion;
use slmops_api::gate::{GatePolicy, Metric};
use slmops_api::plan::RolloutPlan;
use slmops_api::rollout::{
    ApprovalStep, Freeze, NewApproval, NewRollout, Outcome, Rollout as RolloutFacts, RolloutPolicy,
    RolloutState, Unheard, WavePer, WaveSize,
};
use slmops_api::rules::Metered;
use slmops_api::selector::Selector;
use slmops_api::window::Windows;
use slmops_api::{ChannelName, ModelName, RolloutId};

use super::Session;
use crate::client::Hub;
use crate::error::{Context as _, Exit, Failure, Result};
use crate::output::{fields, print, table};
use crate::units;

/// How long one look at a rollout may take.
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a hub may be silent before following its rollout ends.
const FOLLOW_PATIENCE: Duration = Duration::from_secs(300);
/// How often a followed rollout is looked at.
pub const FOLLOW_INTERVAL: Duration = Duration::from_millis(400);

/// Rollouts.
#[derive(Debug, Subcommand)]
pub enum Rollout {
    /// Start rolling a release out
    #[command(
        after_help = "Example:\n  $ slm rollout start smollm2-135m-instruct 1.1.0 --to class=small --waves 1,25%,rest --bake 10m"
    )]
    Start {
        /// The model
        model: ModelName,
        /// The release
        version: Version,
        /// Which devices, and how
        #[command(flatten)]
        policy: Box<PolicyArgs>,
        /// Stay until it is over
        #[arg(long)]
        watch: bool,
    },
    /// Show what a rollout would do to whom, wave by wave; nothing happens
    #[command(
        after_help = "Examples:\n  $ slm rollout plan smollm2-135m-instruct 1.1.0 --to class=small --waves 1,25%,rest\n  $ slm rollout plan --id r0123456789abcdef          (one that is under way)"
    )]
    Plan {
        /// The model
        #[arg(required_unless_present = "id", requires = "version")]
        model: Option<ModelName>,
        /// The release
        version: Option<Version>,
        /// A rollout that is under way, instead of a model and options
        #[arg(long, conflicts_with_all = ["model", "PolicyArgs"])]
        id: Option<RolloutId>,
        /// A promotion to this channel, by its policy, instead of options
        #[arg(long, value_name = "CHANNEL", requires = "version", conflicts_with_all = ["id", "PolicyArgs"])]
        channel: Option<ChannelName>,
        /// Which devices, and how
        #[command(flatten)]
        policy: Box<PolicyArgs>,
    },
    /// List rollouts, newest first
    #[command(after_help = "Example:\n  $ slm rollout list")]
    List,
    /// Show how far a rollout is
    #[command(after_help = "Example:\n  $ slm rollout status --watch")]
    Status {
        /// The rollout; the newest if absent
        id: Option<RolloutId>,
        /// Stay until it is over
        #[arg(long)]
        watch: bool,
    },
    /// Print every decision with the evidence behind it
    #[command(after_help = "Example:\n  $ slm rollout why")]
    Why {
        /// The rollout; the newest if absent
        id: Option<RolloutId>,
    },
    /// Tell no further device; those that were told begin nothing new from their next poll on
    #[command(after_help = "Example:\n  $ slm rollout pause")]
    Pause {
        /// The rollout; the newest if absent
        id: Option<RolloutId>,
    },
    /// Go on with a paused or halted rollout
    #[command(after_help = "Example:\n  $ slm rollout resume")]
    Resume {
        /// The rollout; the newest if absent
        id: Option<RolloutId>,
    },
    /// Agree that a wave starts
    #[command(after_help = "Example:\n  $ slm rollout approve --wave 2")]
    Approve {
        /// The rollout; the newest if absent
        id: Option<RolloutId>,
        /// The wave, from 1; it may be approved before its turn
        #[arg(long, value_name = "NUMBER")]
        wave: u32,
    },
    /// End a rollout: who has confirmed stays on it, who is on the way keeps what it had
    #[command(after_help = "Example:\n  $ slm rollout abort")]
    Abort {
        /// The rollout; the newest if absent
        id: Option<RolloutId>,
    },
    /// Take a rollout back: its devices get a new generation that names their model before
    #[command(after_help = "Example:\n  $ slm rollout rollback")]
    Rollback {
        /// The rollout; the newest if absent
        id: Option<RolloutId>,
    },
}

/// Which devices, in which waves.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct PolicyArgs {
    /// A policy file (TOML; see docs/rollouts.md); the options below win over it
    #[arg(long, value_name = "FILE")]
    pub policy: Option<PathBuf>,
    /// Which devices: `all`, or terms such as class=small|large, site!=berlin and
    /// fact.memory>=4GB, joined by commas; facts are memory, budget, disk, cores, arch, cpu,
    /// engine and agent [default: all]
    #[arg(long, value_name = "SELECTOR")]
    pub to: Option<Selector>,
    /// The waves in order: numbers of devices, shares, and `rest` [default: 1,rest]
    #[arg(long, value_parser = parse_waves, value_name = "WAVES")]
    pub waves: Option<Waves>,
    /// Within what the waves are counted: fleet, class or site [default: fleet]
    #[arg(long, value_parser = parse_per, value_name = "WHAT")]
    pub per: Option<WavePer>,
    /// Failed devices that a wave tolerates; one more halts the rollout [default: 0]
    #[arg(long, value_name = "COUNT")]
    pub max_failures: Option<u32>,
    /// How long a wave must stay confirmed before the next one starts [default: 0s]
    #[arg(long, value_parser = parse_seconds, value_name = "TIME")]
    pub bake: Option<u32>,
    /// How long a device has to confirm before it counts as failed [default: 15m]
    #[arg(long, value_parser = parse_seconds, value_name = "TIME")]
    pub confirm_timeout: Option<u32>,
    /// Tell no device before, such as 2026-02-01T02:00:00Z
    #[arg(long, value_name = "WHEN")]
    pub start_at: Option<jiff::Timestamp>,
    /// Devices fetch the release at once and switch not before, such as 2026-02-07T02:00:00Z
    #[arg(long, value_name = "WHEN")]
    pub activate_at: Option<jiff::Timestamp>,
    /// Devices switch in these hours alone, such as `sat-sun 02:00-05:00`
    #[arg(long, value_name = "HOURS")]
    pub activate_in: Option<Windows>,
    /// Devices fetch in these hours alone, such as `22:00-05:00`
    #[arg(long, value_name = "HOURS")]
    pub download_in: Option<Windows>,
    /// The time zone of those hours, such as Europe/Berlin [default: each device's own]
    #[arg(long, value_name = "ZONE")]
    pub time_zone: Option<String>,
    /// What may be fetched over metered links: allow, defer, or `small-only BYTES`
    /// [default: allow]
    #[arg(long, value_name = "WHAT")]
    pub metered: Option<Metered>,
    /// Tell no device meanwhile; may be given several times
    #[arg(long, value_parser = parse_freeze, value_name = "FROM/UNTIL")]
    pub freeze: Vec<Freeze>,
    /// Devices that update at once, at most
    #[arg(long, value_name = "COUNT")]
    pub max_updating: Option<u32>,
    /// Devices of each site that update at once, at most
    #[arg(long, value_name = "COUNT")]
    pub max_updating_per_site: Option<u32>,
    /// Bytes a second with which one device fetches, at most, such as 500kB
    #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
    pub max_rate: Option<u64>,
    /// Bytes a second with which all devices of a site fetch together, at most, such as 2MB
    #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
    pub max_site_rate: Option<u64>,
    /// Devices of a site that fetch at a time, each with its share of that [default: 1]
    #[arg(long, value_name = "COUNT")]
    pub max_site_downloads: Option<u32>,
    /// Another operator must agree before this wave, from 1; may be given several times
    #[arg(long, value_name = "WAVE")]
    pub approve_before: Vec<u32>,
    /// A device not heard of for so long holds no wave up, and is told later; 0s: none is
    /// [default: 7d]
    #[arg(long, value_parser = parse_seconds, value_name = "TIME")]
    pub away_after: Option<u32>,
    /// Whether a device that was told and never asked counts as failed or is left behind: fail or
    /// leave [default: fail]
    #[arg(long, value_parser = parse_unheard, value_name = "WHAT")]
    pub unheard: Option<Unheard>,
    /// A device that a rule (hours, a metered link) still holds up so long after it was told holds
    /// no wave up any more, and switches when the rule lets it [default: waits for as long as it takes]
    #[arg(long, value_parser = parse_seconds, value_name = "TIME")]
    pub held_after: Option<u32>,
    /// Let the next wave start only when a wave is shown to be no worse in use
    #[arg(long)]
    pub wave_gate: bool,
    /// A loss to exclude (default: errors=2%, first_token=25%, token_time=25%); repeatable
    #[arg(long, requires = "wave_gate", value_parser = parse_allowance, value_name = "METRIC=LOSS")]
    pub wave_gate_allow: Vec<(Metric, u32)>,
    /// Go on after this time if no harm was found, though a loss is not excluded
    #[arg(long, requires = "wave_gate", value_parser = parse_seconds, value_name = "TIME")]
    pub wave_gate_patience: Option<u32>,
}

/// Wave sizes (a type of its own, since clap treats a bare `Vec` as a repeated option).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waves(pub Vec<WaveSize>);

fn parse_waves(given: &str) -> Result<Waves, String> {
    let waves: Result<Vec<WaveSize>, _> = given.split(',').map(str::parse).collect();
    waves.map(Waves).map_err(|error| format!("{error}; waves look like 1,25%,rest"))
}

fn parse_per(given: &str) -> Result<WavePer, String> {
    match given {
        "fleet" => Ok(WavePer::Fleet),
        "class" => Ok(WavePer::Class),
        "site" => Ok(WavePer::Site),
        _ => Err(format!("`{given}` is none of fleet, class and site")),
    }
}

fn parse_unheard(given: &str) -> Result<Unheard, String> {
    match given {
        "fail" => Ok(Unheard::Fail),
        "leave" => Ok(Unheard::Leave),
        _ => Err(format!("`{given}` is neither fail nor leave")),
    }
}

fn parse_freeze(given: &str) -> Result<Freeze, String> {
    let moment = |text: &str| text.trim().parse().ok();
    given
        .split_once('/')
        .and_then(|(from, until)| {
            let (from, until) = (moment(from)?, moment(until)?);
            Some(Freeze { from, until, reason: String::new() })
        })
        .ok_or_else(|| {
            format!("`{given}` is no freeze: write 2026-12-20T00:00:00Z/2026-12-27T00:00:00Z")
        })
}

fn parse_seconds(given: &str) -> Result<u32, String> {
    u32::try_from(units::parse_seconds(given)?).map_err(|_| format!("`{given}` is out of range"))
}

/// `errors=2%` or `first_token=25%`, in thousandths.
fn parse_allowance(given: &str) -> Result<(Metric, u32), String> {
    let (metric, loss) = given
        .split_once('=')
        .ok_or_else(|| format!("`{given}` is no allowed loss: write it as errors=2%"))?;
    let metric: Metric = metric.trim().parse()?;
    let loss = loss.trim();
    let percent = loss.strip_suffix('%').unwrap_or(loss).parse::<f64>();
    let per_mille = percent.map(|percent| (percent * 10.0).round()).unwrap_or(f64::NAN);
    if !(1.0..=10_000.0).contains(&per_mille) {
        return Err(format!("`{loss}` is no loss between 0.1% and 1000%"));
    }
    Ok((metric, per_mille as u32))
}

impl PolicyArgs {
    fn gate_policy(&self) -> GatePolicy {
        let usual = GatePolicy::default();
        let allow = match self.wave_gate_allow.is_empty() {
            true => usual.allow,
            false => self.wave_gate_allow.iter().copied().collect(),
        };
        GatePolicy { allow, patience_s: self.wave_gate_patience, ..usual }
    }

    /// As the hub wants it: the policy file, and the options over it.
    pub fn policy(&self) -> Result<RolloutPolicy> {
        let mut policy = match &self.policy {
            None => RolloutPolicy::default(),
            Some(path) => {
                let shown = path.display();
                let text = std::fs::read_to_string(path)
                    .user(|| format!("read the policy file {shown}"))?;
                toml::from_str(&text).map_err(|error| {
                    Failure::user(format!("policy file {shown}: {error}"))
                        .hint("docs/rollouts.md shows every key")
                })?
            }
        };
        fn set<T: Clone>(target: &mut T, given: Option<&T>) {
            if let Some(given) = given {
                *target = given.clone();
            }
        }
        set(&mut policy.selector, self.to.as_ref());
        set(&mut policy.waves, self.waves.as_ref().map(|waves| &waves.0));
        set(&mut policy.per, self.per.as_ref());
        set(&mut policy.max_failures, self.max_failures.as_ref());
        set(&mut policy.bake_s, self.bake.as_ref());
        set(&mut policy.confirm_timeout_s, self.confirm_timeout.as_ref());
        policy.schedule.start_at = self.start_at.or(policy.schedule.start_at);
        policy.schedule.freezes.extend(self.freeze.iter().cloned());
        policy.schedule.activate_at = self.activate_at.or(policy.schedule.activate_at);
        set(&mut policy.schedule.activate_in, self.activate_in.as_ref());
        set(&mut policy.schedule.download_in, self.download_in.as_ref());
        if self.time_zone.is_some() {
            policy.schedule.time_zone.clone_from(&self.time_zone);
        }
        set(&mut policy.limits.metered, self.metered.as_ref());
        policy.limits.updating = self.max_updating.or(policy.limits.updating);
        policy.limits.updating_per_site =
            self.max_updating_per_site.or(policy.limits.updating_per_site);
        let limits = &mut policy.limits;
        limits.device_bytes_per_s = self.max_rate.or(limits.device_bytes_per_s);
        limits.site_bytes_per_s = self.max_site_rate.or(limits.site_bytes_per_s);
        limits.site_downloads = self.max_site_downloads.or(limits.site_downloads);
        let steps = self.approve_before.iter().map(|wave| ApprovalStep { wave: *wave, by: vec![] });
        policy.approvals.extend(steps);
        if self.wave_gate {
            policy.gate = Some(self.gate_policy());
        }
        set(&mut policy.stragglers.away_after_s, self.away_after.as_ref());
        set(&mut policy.stragglers.unheard, self.unheard.as_ref());
        set(&mut policy.stragglers.held_after_s, self.held_after.as_ref());
        Ok(policy)
    }
}

impl Rollout {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let hub = session.hub()?;
        match self {
            Self::Start { model, version, policy, watch } => {
                let rollout = start(&hub, model, version, policy.policy()?).await?;
                if watch {
                    return finish(session, &follow(session, &hub, &rollout.id).await?);
                }
                session.out.show(&rollout, || status(&rollout))
            }
            Self::Plan { model, version, id, channel, policy } => {
                let plan: RolloutPlan = match (id, model, version) {
                    (None, Some(model), Some(version)) if channel.is_some() => {
                        let what = format!("plan the promotion of {model} {version}");
                        let path = format!("/v1/releases/{model}/{version}/promote/plan");
                        let body = channel.map(|to| NewPromotion { to, force: None });
                        hub.call(Method::POST, &path, &body, &what).await?
                    }
                    (None, Some(model), Some(version)) => {
                        let what = format!("plan a rollout of {model} {version}");
                        let policy = policy.policy()?;
                        let body = NewRollout { model, version, policy, promotion: None };
                        hub.call(Method::POST, "/v1/rollouts/plan", &body, &what).await?
                    }
                    (id, ..) => {
                        let id = named(&hub, id).await?;
                        let what = format!("show what the rollout {id} will do");
                        hub.get(&format!("/v1/rollouts/{id}/plan"), &what).await?
                    }
                };
                session.out.show(&plan, || plan::text(&plan))
            }
            Self::List => {
                let mut rollouts = all(&hub).await?;
                rollouts.sort_by_key(|rollout| std::cmp::Reverse(rollout.created_at));
                session.out.show(&rollouts, || {
                    let rows = rollouts.iter().map(|rollout| {
                        vec![
                            rollout.id.to_string(),
                            format!("{} {}", rollout.asked.model, rollout.asked.version),
                            rollout.asked.policy.selector.to_string(),
                            super::word(&rollout.state),
                            tally(rollout),
                            super::time(rollout.created_at),
                        ]
                    });
                    table(&["id", "release", "to", "state", "devices", "created"], rows)
                })
            }
            Self::Status { id, watch } => {
                let id = named(&hub, id).await?;
                if watch {
                    return finish(session, &follow(session, &hub, &id).await?);
                }
                let rollout = get(&hub, &id).await?;
                session.out.show(&rollout, || status(&rollout))
            }
            Self::Why { id } => {
                let rollout = find(&hub, id).await?;
                session.out.show(&rollout.decisions, || why(&rollout))
            }
            Self::Pause { id } => act(session, &hub, id, "pause").await,
            Self::Resume { id } => act(session, &hub, id, "resume").await,
            Self::Approve { id, wave } => {
                let id = named(&hub, id).await?;
                let path = format!("/v1/rollouts/{id}/approve");
                let what = format!("approve wave {wave} of the rollout {id}");
                let body = NewApproval { wave };
                let rollout: RolloutFacts = hub.call(Method::POST, &path, &body, &what).await?;
                session.out.show(&rollout, || status(&rollout))
            }
            Self::Abort { id } => act(session, &hub, id, "abort").await,
            Self::Rollback { id } => act(session, &hub, id, "rollback").await,
        }
    }
}

/// Creates a rollout.
pub async fn start(
    hub: &Hub,
    model: ModelName,
    version: Version,
    policy: RolloutPolicy,
) -> Result<RolloutFacts> {
    let what = format!("roll {model} {version} out");
    let body = NewRollout { model, version, policy, promotion: None };
    hub.call(Method::POST, "/v1/rollouts", &body, &what).await
}

async fn all(hub: &Hub) -> Result<Vec<RolloutFacts>> {
    hub.list("/v1/rollouts", "list the rollouts").await
}

async fn get(hub: &Hub, id: &RolloutId) -> Result<RolloutFacts> {
    hub.get(&format!("/v1/rollouts/{id}"), &format!("show the rollout {id}")).await
}

/// The rollout that is meant: the newest, unless one is named.
pub async fn find(hub: &Hub, id: Option<RolloutId>) -> Result<RolloutFacts> {
    get(hub, &named(hub, id).await?).await
}

/// The rollout that is meant: the one given, else the newest.
async fn named(hub: &Hub, id: Option<RolloutId>) -> Result<RolloutId> {
    match id {
        Some(id) => Ok(id),
        None => {
            let newest = all(hub).await?.into_iter().max_by_key(|rollout| rollout.created_at);
            newest.map(|rollout| rollout.id).ok_or_else(|| {
                Failure::user("there is no rollout yet").hint("slm ship model.gguf --to all")
            })
        }
    }
}

async fn act(session: &Session, hub: &Hub, id: Option<RolloutId>, verb: &str) -> Result<()> {
    let id = named(hub, id).await?;
    hub.act(
        Method::POST,
        &format!("/v1/rollouts/{id}/{verb}"),
        &format!("{verb} the rollout {id}"),
    )
    .await?;
    let rollout = get(hub, &id).await?;
    session.out.show(&rollout, || status(&rollout))
}

/// Prints each change of a rollout until it is over or halted.
/// Ctrl-C leaves it running and says how to look again.
pub async fn follow(session: &Session, hub: &Hub, id: &RolloutId) -> Result<RolloutFacts> {
    let say = |line: String| session.progress.say(line);
    let mut told_decisions = 0;
    let mut told_devices = std::collections::BTreeMap::new();
    let mut known = false;
    let mut silent_since: Option<Instant> = None;
    let stage = session.progress.stage(format!("rollout {id}"));
    loop {
        let answer = match tokio::time::timeout(FOLLOW_TIMEOUT, get(hub, id)).await {
            Ok(answer) => answer,
            Err(_) => Err(Failure::user("the hub does not answer")),
        };
        match answer {
            // The hub may be restarting or the network down: rollouts live in the hub's database
            // and on the devices, not in this connection.
            Err(failure) => {
                let patient = silent_since.is_none_or(|at| at.elapsed() < FOLLOW_PATIENCE);
                if !(known && patient) {
                    return Err(failure);
                }
                if silent_since.is_none() {
                    say(format!("  … {}; trying again", failure.line()));
                    silent_since = Some(Instant::now());
                }
            }
            Ok(rollout) => {
                known = true;
                if let Some(at) = silent_since.take() {
                    say(format!(
                        "  … the hub answers again after {}",
                        units::duration(at.elapsed())
                    ));
                }
                for decision in rollout.decisions.iter().skip(told_decisions) {
                    say(format!("  → {}", decision.what));
                    for line in &decision.because {
                        say(format!("      {line}"));
                    }
                }
                told_decisions = told_decisions.max(rollout.decisions.len());
                for device in &rollout.devices {
                    let line = outcome(&device.outcome);
                    let before = told_devices.insert(device.device.clone(), line.clone());
                    let was_pending = before.is_none() && device.outcome == Outcome::Pending;
                    if before.as_ref() != Some(&line) && !was_pending {
                        let variant =
                            device.variant.as_ref().map(|v| format!(" ({v})")).unwrap_or_default();
                        say(format!("  • {}{variant}: {line}", device.name));
                    }
                }
                stage.note(&rollout.waiting_for);
                if rollout.state.is_final() || rollout.state == RolloutState::Halted {
                    return Ok(rollout);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_INTERVAL) => {}
            _ = tokio::signal::ctrl_c() => {
                return Err(Failure::user(format!("stopped looking; the rollout {id} goes on"))
                    .hint(format!("slm rollout status {id} --watch")));
            }
        }
    }
}

/// Shows where a rollout ended; anything but completion is a failure of the command.
pub fn finish(session: &Session, rollout: &RolloutFacts) -> Result<()> {
    session.out.show(rollout, || status(rollout))?;
    let id = &rollout.id;
    match rollout.state {
        RolloutState::Completed => Ok(()),
        RolloutState::Halted => {
            let failure = Failure::user(format!("the rollout {id} was halted"));
            Err(failure.exit(Exit::Gate).hint(format!("slm rollout why {id}")))
        }
        state => Err(Failure::user(format!("the rollout {id} is {}", super::word(&state)))
            .hint(format!("slm rollout why {id}"))),
    }
}

fn tally(rollout: &RolloutFacts) -> String {
    let total = rollout.total();
    let mut text = format!("{}/{} confirmed", total.confirmed, total.devices());
    if total.failed > 0 {
        text.push_str(&format!(", {} failed", total.failed));
    }
    text
}

/// A rollout as text.
pub fn status(rollout: &RolloutFacts) -> String {
    let mut text = fields(&[
        ("rollout", rollout.id.to_string()),
        ("release", format!("{} {}", rollout.asked.model, rollout.asked.version)),
        ("to", rollout.asked.policy.selector.to_string()),
        ("state", super::word(&rollout.state)),
        ("devices", tally(rollout)),
        ("wave", format!("{} of {}", rollout.current_wave + 1, rollout.waves)),
        ("waits for", or_nothing(&rollout.waiting_for)),
    ]);
    text.push_str("\n\n");
    let rows = rollout.devices.iter().map(|device| {
        vec![
            (device.wave + 1).to_string(),
            device.name.clone(),
            device.variant.as_ref().map_or_else(|| "none".to_owned(), ToString::to_string),
            outcome(&device.outcome),
            device.fit.clone(),
        ]
    });
    text.push_str(&table(&[">wave", "device", "variant", "state", "why this variant"], rows));
    let more = rollout.total().devices().saturating_sub(rollout.devices.len() as u64);
    if more > 0 {
        text.push_str(&format!("\nand {more} more devices"));
    }
    text
}

fn or_nothing(text: &str) -> String {
    if text.is_empty() { "nothing".to_owned() } else { text.to_owned() }
}

/// Every decision with its evidence.
pub fn why(rollout: &RolloutFacts) -> String {
    let mut lines = vec![format!(
        "rollout {} of {} {}: {}",
        rollout.id,
        rollout.asked.model,
        rollout.asked.version,
        super::word(&rollout.state)
    )];
    for decision in &rollout.decisions {
        lines.push(format!("{}  {}", super::time(decision.at), decision.what));
        lines.extend(decision.because.iter().map(|line| format!("    {line}")));
    }
    for device in &rollout.devices {
        if let Outcome::Failed { failure: slmops_api::device::Failure::Probes { results } } =
            &device.outcome
        {
            lines.push(format!("probes on {}:", device.name));
            for result in results {
                lines.push(format!(
                    "    {} {}: {} (at least {:.3})",
                    if result.passed { "passed" } else { "FAILED" },
                    result.name,
                    result.value.map_or_else(|| "no value".to_owned(), |v| format!("{v:.3}")),
                    result.floor
                ));
            }
        }
    }
    if !rollout.waiting_for.is_empty() {
        lines.push(format!("now it waits for {}", rollout.waiting_for));
    }
    lines.join("\n")
}

/// An outcome in words.
pub fn outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Pending => "not told yet".to_owned(),
        Outcome::Updating => "updating".to_owned(),
        Outcome::Confirmed => "confirmed".to_owned(),
        Outcome::Failed { failure } => {
            format!("failed: {}", super::device::failure_text(failure))
        }
        Outcome::NoFit { smallest_bytes, budget_bytes } => format!(
            "no variant fits: smallest needs {}, device offers {}",
            units::bytes(*smallest_bytes),
            units::bytes(*budget_bytes)
        ),
        Outcome::Quarantined => "left out: this model failed here before".to_owned(),
        Outcome::Away => "away: takes it when it comes back".to_owned(),
        Outcome::Recalled => "told to keep what it had: aborted before it confirmed".to_owned(),
    }
}

/// Prints the evidence of a halted rollout on stderr, for commands that go on.
pub fn print_why(rollout: &RolloutFacts) -> Result<()> {
    print(&why(rollout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waves_are_read_and_nonsense_is_refused() {
        assert_eq!(
            parse_waves("1,25%,rest"),
            Ok(Waves(vec![WaveSize::Count(1), WaveSize::Percent(25), WaveSize::Rest]))
        );
        for bad in ["", "0", "101%", "0%", "1,,rest", "all", "-1"] {
            assert!(parse_waves(bad).is_err(), "{bad}");
        }
        for bad in ["", "2026-01-01", "2026-01-01T00:00:00Z", "/", "now/then"] {
            assert!(parse_freeze(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn options_win_over_the_policy_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.toml");
        let text = include_str!("../../../../testdata/policy.toml");
        std::fs::write(&file, text).unwrap();
        let args = PolicyArgs {
            policy: Some(file.clone()),
            waves: Some(parse_waves("2").unwrap()),
            max_updating: Some(7),
            ..PolicyArgs::default()
        };
        let policy = args.policy().unwrap();
        assert_eq!(policy.waves, [WaveSize::Count(2)]);
        assert_eq!(policy.limits.updating, Some(7));
        assert_eq!(policy.limits.updating_per_site, Some(2));
        assert_eq!(policy.selector.to_string(), "class=small");
        assert_eq!((policy.per, policy.bake_s), (WavePer::Site, 3600));
        assert_eq!(policy.approvals[0].by, ["ann", "bob"]);
        assert_eq!(policy.schedule.freezes[0].reason, "holidays");
        assert_eq!(policy.stragglers.unheard, Unheard::Leave);
        assert_eq!(policy.schedule.activate_in.to_string(), "sat,sun 02:00-05:00");
        assert_eq!(policy.limits.metered, Metered::SmallOnly { max_bytes: 50_000_000 });
        // What the documentation shows is this very file.
        let docs = include_str!("../../../../docs/rollouts.md");
        assert!(docs.contains(text), "docs/rollouts.md and testdata/policy.toml differ");
        for (bad, why) in [
            ("selecter = 'all'", "unknown field"),
            ("waves = ['0']", "a wave is a number"),
            ("schedule.start_at = 'soon'", "soon"),
            ("schedule.activate_in = 'caturday'", "are no hours"),
            ("limits.metered = 'perhaps'", "none of `allow`"),
        ] {
            std::fs::write(&file, bad).unwrap();
            let args = PolicyArgs { policy: Some(file.clone()), ..PolicyArgs::default() };
            let line = args.policy().unwrap_err().line();
            assert!(line.contains("policy.toml") && line.contains(why), "{line}");
        }
    }
}
