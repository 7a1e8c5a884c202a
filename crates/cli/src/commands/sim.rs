//! `slm sim`: what a rollout policy would do to a fleet, in virtual time.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use slmops_api::device::Device;
use slmops_api::gate::Metric;
use slmops_api::model::Release;
use slmops_api::rollout::RolloutState;
use slmops_api::{ModelName, VariantName};
use slmops_sim::{
    Ailment, FaultSpec, FleetSpec, GroupSpec, Health, LinkSpec, Report, RolloutReport, RolloutSpec,
    Scenario, Time, VariantSpec,
};

use super::Session;
use super::rollout::PolicyArgs;
use crate::error::{Context, Exit, Failure, Result};
use crate::output::{fields, table};
use crate::units;

/// The longest fleet or saved run that is read, in bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024 * 1024;
/// The heading of options about the run itself.
const RUN: &str = "The run";
/// Where a fleet file comes from.
const FLEET_HINT: &str = "docs/simulator.md shows a fleet file with every key";
/// Devices if nothing says how many.
const DEVICES: u32 = 1_000;

/// Simulate.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    long_about = "Show what a rollout policy would do to a fleet: the hub's planner and the agent's \
                  state machine, exactly as they ship, in virtual time over simulated links, disks \
                  and engines. A day of a thousand devices takes seconds; the same options give the \
                  same run. Every number is modelled, not measured.",
    after_help = "Examples:
  $ slm sim --devices 10000 --hours 24 --waves 10,10%,rest --bake 30m
  $ slm sim --bandwidth 2Mbit --site-bandwidth 20Mbit --waves 1%,rest      slow shops
  $ slm sim --bad fails-probes --waves 5,rest                              who gets a bad release?
  $ slm sim --bad-in-use 5 --waves 5%,rest --wave-gate                     and one that fails in use?
  $ slm sim --faults 0.5 --max-failures 20 --settle                        and when much goes wrong?
  $ slm sim --from-hub --release smollm2-135m-instruct@1.1.0 --svg plan.svg
  $ slm sim --fleet shops.toml --save run.txt && slm sim replay run.txt

A fleet file (docs/simulator.md has all of it):
  [[groups]]
  devices = 400
  class = \"small\"
  site = \"north\"
  memory_budget_bytes = 260_000_000
  link = { bits_per_s = 8_000_000, site_bits_per_s = 50_000_000, latency_ms = 40 }

Exit codes: 0 every rollout completed; 1 one did not within the hours, or a wrong option;
2 an invariant did not hold (a bug of ours); 3 a rollout was halted."
)]
pub struct Sim {
    /// Run a saved run instead
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    spec: Box<SpecArgs>,
    #[command(flatten)]
    results: ResultArgs,
    /// Save the run, with each fault at its moment, as a text for `slm sim replay`
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    save: Option<PathBuf>,
}

/// What to do with a saved run.
#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a saved run again: the same events, one by one
    #[command(
        after_help = "Examples:\n  $ slm sim replay run.txt --why\n  $ slm sim replay failing.txt --shrink small.txt\n\nExit codes are those of `slm sim`."
    )]
    Replay {
        /// The file that `--save`, or a failing run, has written
        file: PathBuf,
        /// If an invariant does not hold: the fewest operations that still show it, into this file
        #[arg(long, value_name = "FILE")]
        shrink: Option<PathBuf>,
        #[command(flatten)]
        results: ResultArgs,
    },
}

/// What is shown.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Results")]
struct ResultArgs {
    /// Print every decision with its evidence too
    #[arg(long)]
    why: bool,
    /// Write the chart of confirmed devices as an SVG image
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What is simulated.
#[derive(Debug, clap::Args)]
struct SpecArgs {
    #[command(flatten)]
    fleet: FleetArgs,
    /// Virtual hours [default: 24]
    #[arg(long, value_name = "COUNT", help_heading = RUN)]
    hours: Option<u32>,
    /// Where all chance comes from [default: 1]
    #[arg(long, value_name = "NUMBER", help_heading = RUN)]
    seed: Option<u64>,
    /// Go on without faults when the hours are over, until the fleet has come to rest
    #[arg(long, help_heading = RUN)]
    settle: bool,
    #[command(flatten, next_help_heading = "The policy (as of `slm rollout start`)")]
    policy: Box<PolicyArgs>,
    /// How long it takes somebody to approve a wave that waits for that [default: 0s]
    #[arg(long, value_name = "TIME", value_parser = units::parse_seconds)]
    approve_after: Option<u64>,
    #[command(flatten)]
    release: ReleaseArgs,
    #[command(flatten)]
    traffic: TrafficArgs,
    #[command(flatten)]
    link: LinkArgs,
    #[command(flatten)]
    faults: FaultArgs,
}

#[derive(Debug, clap::Args)]
#[group(multiple = false)]
#[command(next_help_heading = "The fleet")]
struct FleetArgs {
    /// So many devices of two classes at four sites [default: 1000]
    #[arg(long, value_name = "COUNT")]
    devices: Option<u32>,
    /// Groups, links, variants, rollouts and faults from a TOML file; options go before it
    #[arg(long, value_name = "FILE")]
    fleet: Option<PathBuf>,
    /// The devices of your hub: their classes, sites and memory
    #[arg(long)]
    from_hub: bool,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "The release")]
struct ReleaseArgs {
    /// The variants of a release in your hub, instead of those of SmolLM2-135M
    #[arg(long, value_name = "MODEL@VERSION")]
    release: Option<ReleaseRef>,
    /// A variant by its size; may be repeated, the best first
    #[arg(long, value_name = "NAME=SIZE", conflicts_with = "release")]
    variant: Vec<VariantRef>,
    /// Deltas from the release before, of this share of each variant's size
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    delta: Option<f64>,
    /// An adapter of this size on the release before, instead of other model files
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes, conflicts_with = "delta")]
    adapter: Option<u64>,
    /// What is wrong with the release, and on which share of the devices
    #[arg(
        long,
        value_name = "WHAT[=SHARE]",
        long_help = "What is wrong with the release, and on which share of the devices (all if absent): \
                     fails-probes, fails-live-probe, does-not-load, crashes-on-load, crash-loops, \
                     too-large, ignores-configuration, bad-signature or wrong-bytes"
    )]
    bad: Option<Bad>,
    /// How many times as many requests fail with the release, though its probes pass
    #[arg(
        long,
        value_name = "[METRIC=]FACTOR",
        conflicts_with = "bad",
        long_help = "How many times as many requests fail with the release, though its probes pass. \
                     With a metric of --wave-gate-allow, such as first_token=1.5, that grows instead"
    )]
    bad_in_use: Option<BadInUse>,
    /// When the rollout is created, from the beginning
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = units::parse_seconds)]
    at: u64,
}

#[derive(Debug, clap::Args)]
#[command(
    next_help_heading = "Users (for --wave-gate; they differ, and have a busy time of the day)"
)]
struct TrafficArgs {
    /// Requests of a typical device in an hour [default: 8]
    #[arg(long, value_name = "COUNT")]
    requests_per_hour: Option<f64>,
    /// The share of them that fails before any release [default: 2%]
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    error_rate: Option<f64>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Links (of every device, instead of those of the fleet)")]
struct LinkArgs {
    /// What one device can pull
    #[arg(long, value_name = "RATE", value_parser = units::parse_bits)]
    bandwidth: Option<u64>,
    /// What the devices of one site can pull together
    #[arg(long, value_name = "RATE", value_parser = units::parse_bits)]
    site_bandwidth: Option<u64>,
    /// What the devices of one site carry between themselves: they get models from each other
    #[arg(long, value_name = "RATE", value_parser = units::parse_bits)]
    peers: Option<u64>,
    /// What all devices can pull from the hub together [default: 1Gbit]
    #[arg(long, value_name = "RATE", value_parser = units::parse_bits)]
    hub_bandwidth: Option<u64>,
    /// From a device to the hub, one way
    #[arg(long, value_name = "MILLISECONDS")]
    latency: Option<u32>,
    /// Requests or replies that are lost
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    loss: Option<f64>,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Faults")]
struct FaultArgs {
    /// Every kind of fault, so often for each device and day
    #[arg(long, value_name = "RATE")]
    faults: Option<f64>,
    /// One kind, such as power-cuts=2 or hub-crashes=0.5, for each device (or hub) and day
    #[arg(long, value_name = "KIND=RATE")]
    fault: Vec<FaultRate>,
}

#[derive(Clone, Debug)]
struct ReleaseRef(ModelName, semver::Version);

impl std::str::FromStr for ReleaseRef {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let wrong = || format!("`{given}` is no release: write MODEL@VERSION");
        let (model, version) = given.rsplit_once('@').ok_or_else(wrong)?;
        Ok(Self(model.parse().map_err(|_| wrong())?, version.parse().map_err(|_| wrong())?))
    }
}

#[derive(Clone, Debug)]
struct VariantRef(VariantName, u64);

impl std::str::FromStr for VariantRef {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let wrong = || format!("`{given}` is no variant: write NAME=SIZE, such as q4_k_m=105MB");
        let (name, size) = given.split_once('=').ok_or_else(wrong)?;
        Ok(Self(name.parse().map_err(|_| wrong())?, units::parse_bytes(size)?))
    }
}

#[derive(Clone, Copy, Debug)]
struct Bad(Ailment, f64);

impl std::str::FromStr for Bad {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let (name, share) = given.split_once('=').unwrap_or((given, "1"));
        let known = Ailment::ALL.into_iter().find(|known| kebab(&super::word(known)) == name);
        let ailment = known.ok_or_else(|| {
            let names = Ailment::ALL.map(|known| kebab(&super::word(&known)));
            format!("`{name}` is none of {}", names.join(", "))
        })?;
        Ok(Self(ailment, parse_share(share)?))
    }
}

#[derive(Clone, Copy, Debug)]
struct BadInUse(Metric, f64);

impl std::str::FromStr for BadInUse {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let (metric, factor) = match given.split_once('=') {
            Some((metric, factor)) => (metric.trim().parse()?, factor),
            None => (Metric::Errors, given),
        };
        let factor = factor.trim().parse::<f64>().ok().filter(|factor| *factor > 0.0);
        let wrong = || format!("`{given}` is no factor: write 5, or first_token=1.5");
        Ok(Self(metric, factor.ok_or_else(wrong)?))
    }
}

fn kebab(words: &str) -> String {
    words.replace(' ', "-")
}

#[derive(Clone, Debug)]
struct FaultRate(String, f64);

impl std::str::FromStr for FaultRate {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let wrong = || format!("`{given}` is no fault: write KIND=RATE, such as power-cuts=2");
        let (kind, rate) = given.split_once('=').ok_or_else(wrong)?;
        let rate = rate.parse().map_err(|_| wrong())?;
        let one = Self(kind.replace('-', "_"), rate);
        one.add_to(FaultSpec::default()).map(|_| one)
    }
}

impl FaultRate {
    fn add_to(&self, spec: FaultSpec) -> Result<FaultSpec, String> {
        let mut rates = serde_json::to_value(spec).map_err(|error| error.to_string())?;
        rates[&self.0] = self.1.into();
        // serde names the kinds that there are.
        serde_json::from_value(rates).map_err(|error| error.to_string().replace('_', "-"))
    }
}

fn parse_share(given: &str) -> Result<f64, String> {
    let (number, scale) = match given.strip_suffix('%') {
        Some(number) => (number, 100.0),
        None => (given, 1.0),
    };
    let share = number.parse::<f64>().map(|number| number / scale).ok();
    share
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| format!("`{given}` is no share: write 0.25 or 25%"))
}

impl Sim {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        match self.verb {
            None => {
                let spec = self.spec.spec(session).await?;
                let scenario = Scenario::of(&spec).user(|| "read the options".to_owned())?;
                if let Some(path) = &self.save {
                    write(path, &scenario.to_string())?;
                }
                let report = simulate(session, &scenario).await?;
                show(session, &scenario, &report, &self.results)?;
                verdict(session, &scenario, &report, None)
            }
            Some(Verb::Replay { file, shrink, results }) => {
                let text = read(&file, "`slm sim --save FILE` writes one")?;
                let scenario: Scenario =
                    text.parse().user(|| format!("read the saved run `{}`", file.display()))?;
                let report = simulate(session, &scenario).await?;
                show(session, &scenario, &report, &results)?;
                if let (Some(path), false) = (&shrink, report.violations.is_empty()) {
                    let stage = session.progress.stage("shrink the run");
                    let small = blocking(move || slmops_sim::shrink(&scenario)).await?;
                    if let Some((small, violation)) = small {
                        write(
                            path,
                            &format!("# at {}: {}\n{small}", violation.at, violation.what),
                        )?;
                        stage.done(format!("{} operations", small.operations.len()));
                    }
                    return verdict_of(&report, &shrink_hint(path));
                }
                verdict(session, &scenario, &report, Some(&file))
            }
        }
    }
}

impl SpecArgs {
    async fn spec(&self, session: &Session) -> Result<FleetSpec> {
        let hours = self.hours.unwrap_or(24);
        let seed = self.seed.unwrap_or(1);
        let mut spec = match (&self.fleet.fleet, self.fleet.from_hub) {
            (Some(path), _) => {
                let mut spec: FleetSpec = toml::from_str(&read(path, FLEET_HINT)?)
                    .user(|| format!("read the fleet `{}`", path.display()))
                    .map_err(|failure| failure.hint(FLEET_HINT))?;
                spec.hours = self.hours.unwrap_or(spec.hours);
                spec.seed = self.seed.unwrap_or(spec.seed);
                spec
            }
            (None, true) => {
                let devices: Vec<Device> =
                    session.hub()?.list("/v1/devices", "list the devices").await?;
                let groups = groups(devices);
                if groups.is_empty() {
                    return Err(Failure::user("the hub has no device yet")
                        .hint("`slm device invite`, or simulate with --devices"));
                }
                FleetSpec { groups, rollouts: vec![], ..FleetSpec::new(1, hours, seed) }
            }
            (None, false) => {
                let devices = self.fleet.devices.unwrap_or(DEVICES);
                FleetSpec { rollouts: vec![], ..FleetSpec::new(devices, hours, seed) }
            }
        };
        spec.settle |= self.settle;
        self.release.apply(session, &mut spec).await?;
        if spec.rollouts.is_empty() {
            let health = match (self.release.bad, self.release.bad_in_use) {
                (Some(Bad(ailment, share)), _) => Health::Bad { ailment, share },
                (None, Some(BadInUse(metric, factor))) => Health::WorseInUse { metric, factor },
                (None, None) => Health::Good,
            };
            let version = self.release.release.as_ref().map(|it| it.1.clone());
            spec.rollouts.push(RolloutSpec {
                at: Time(self.release.at * 1_000),
                version: version.unwrap_or(semver::Version::new(1, 1, 0)),
                policy: self.policy.policy()?,
                health,
            });
        } else if self.release.bad.is_some() || self.release.bad_in_use.is_some() {
            return Err(Failure::user(
                "the fleet file has rollouts of its own: --bad and --bad-in-use have none",
            )
            .hint("write `health = { bad = { ailment = \"fails_probes\", share = 1.0 } }` there"));
        }
        self.link.apply(&mut spec);
        let traffic = &mut spec.traffic;
        traffic.requests_per_hour =
            self.traffic.requests_per_hour.unwrap_or(traffic.requests_per_hour);
        traffic.error_rate = self.traffic.error_rate.unwrap_or(traffic.error_rate);
        spec.approve_after = self.approve_after.map_or(spec.approve_after, |s| Time(s * 1_000));
        if let Some(rate) = self.faults.faults {
            spec.faults = FaultSpec::every(rate);
        }
        for rate in &self.faults.fault {
            spec.faults = rate.add_to(spec.faults).map_err(Failure::user)?;
        }
        Ok(spec)
    }
}

impl ReleaseArgs {
    async fn apply(&self, session: &Session, spec: &mut FleetSpec) -> Result<()> {
        if let Some(ReleaseRef(model, version)) = &self.release {
            let what = format!("show the release {model} {version}");
            let path = format!("/v1/releases/{model}/{version}");
            let release: Release = session.hub()?.get(&path, &what).await?;
            spec.model = model.clone();
            spec.variants = release
                .release
                .variants
                .into_iter()
                .map(|variant| VariantSpec {
                    name: variant.name,
                    size_bytes: variant.size_bytes,
                    delta_bytes: None,
                    adapter_bytes: None,
                    kl_divergence: variant.report.kl_divergence.mean,
                    shape: Some(variant.shape),
                })
                .collect();
        }
        if !self.variant.is_empty() {
            let variant = |(place, VariantRef(name, size_bytes)): (usize, &VariantRef)| {
                // The planner prefers the variant that loses least.
                let kl_divergence = place as f64 / 100.0;
                let name = name.clone();
                let size_bytes = *size_bytes;
                VariantSpec {
                    name,
                    size_bytes,
                    delta_bytes: None,
                    adapter_bytes: None,
                    kl_divergence,
                    shape: None,
                }
            };
            spec.variants = self.variant.iter().enumerate().map(variant).collect();
        }
        for variant in &mut spec.variants {
            variant.adapter_bytes = self.adapter.or(variant.adapter_bytes);
        }
        if let Some(share) = self.delta {
            for variant in &mut spec.variants {
                variant.delta_bytes = Some((variant.size_bytes as f64 * share).ceil() as u64);
            }
        }
        Ok(())
    }
}

impl LinkArgs {
    fn apply(&self, spec: &mut FleetSpec) {
        for group in &mut spec.groups {
            let link = &mut group.link;
            link.bits_per_s = self.bandwidth.unwrap_or(link.bits_per_s);
            link.site_bits_per_s = self.site_bandwidth.or(link.site_bits_per_s);
            link.lan_bits_per_s = self.peers.or(link.lan_bits_per_s);
            link.latency_ms = self.latency.unwrap_or(link.latency_ms);
            link.loss = self.loss.unwrap_or(link.loss);
        }
        spec.hub_bits_per_s = self.hub_bandwidth.or(spec.hub_bits_per_s);
    }
}

/// Devices of a real fleet, by what they have in common.
fn groups(devices: Vec<Device>) -> Vec<GroupSpec> {
    let mut groups: Vec<GroupSpec> = Vec::new();
    for device in devices.into_iter().filter(|device| !device.revoked) {
        let budget = device.facts.memory_budget_bytes;
        let same = |group: &&mut GroupSpec| {
            group.class == device.class
                && group.site == device.site
                && group.memory_budget_bytes == budget
                && group.time_zone == device.facts.time_zone
                && group.link.metered == device.facts.metered
        };
        match groups.iter_mut().find(same) {
            Some(group) => group.devices += 1,
            None => groups.push(GroupSpec {
                devices: 1,
                class: device.class,
                site: device.site,
                memory_budget_bytes: budget,
                time_zone: device.facts.time_zone,
                disk_bytes: None,
                replace_in_place: false,
                link: LinkSpec { metered: device.facts.metered, ..LinkSpec::default() },
            }),
        }
    }
    groups.sort_by(|a, b| (&a.class, &a.site).cmp(&(&b.class, &b.site)));
    groups
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.internal(|| "simulate".to_owned())
}

async fn simulate(session: &Session, scenario: &Scenario) -> Result<Report> {
    let spec = &scenario.spec;
    let what = format!("simulate {} devices for {} h", spec.devices(), spec.hours);
    let stage = session.progress.stage(what);
    let scenario = scenario.clone();
    let report = blocking(move || scenario.run()).await?;
    let report = report.user(|| "read the options".to_owned())?;
    stage.done(format!("{} events, seed {}", report.events, report.seed));
    Ok(report)
}

/// Reads a file; `hint` says where one comes from.
fn read(path: &Path, hint: &str) -> Result<String> {
    let what = || format!("read `{}`", path.display());
    let with_hint = |failure: Failure| failure.hint(hint);
    let size = std::fs::metadata(path).user(what).map_err(with_hint)?.len();
    if size > MAX_FILE_BYTES {
        return Err(Failure::user(format!(
            "`{}` is longer than {MAX_FILE_BYTES} bytes",
            path.display()
        )));
    }
    std::fs::read_to_string(path).user(what).map_err(with_hint)
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).user(|| format!("write `{}`", path.display()))
}

// --- results

fn show(session: &Session, scenario: &Scenario, report: &Report, args: &ResultArgs) -> Result<()> {
    if let Some(path) = &args.svg {
        write(path, &report.svg())?;
    }
    session.out.show(report, || text(scenario, report, args.why))
}

fn text(scenario: &Scenario, report: &Report, why: bool) -> String {
    let mut parts = Vec::new();
    for (rollout, spec) in report.rollouts.iter().zip(&scenario.spec.rollouts) {
        parts.push(rollout_text(rollout, spec));
        if why {
            parts.push(decisions(rollout));
        }
    }
    let mut end = vec![
        ("moved in all", units::bytes(report.bytes_moved)),
        ("numbers", "modelled, not measured".to_owned()),
    ];
    if report.shared_bytes > 0 {
        end.insert(1, ("between peers", units::bytes(report.shared_bytes)));
    }
    if let Some(at) = report.settled_at {
        end.insert(0, ("at rest", at.to_string()));
    }
    parts.push(fields(&end));
    for violation in &report.violations {
        parts.push(format!("INVARIANT BROKEN at {}: {}", violation.at, violation.what));
    }
    parts.join("\n\n")
}

fn rollout_text(rollout: &RolloutReport, spec: &RolloutSpec) -> String {
    let ended = match rollout.ended_at {
        Some(at) => {
            let took = Time(at.0.saturating_sub(spec.at.0));
            format!("{} at {at}, after {took}", rollout.state_words())
        }
        None => rollout.state_words().to_owned(),
    };
    let mut head = vec![
        ("release", format!("{} to {}", rollout.version, spec.policy.selector)),
        ("is", ended),
    ];
    if let Some(why) = &rollout.refused {
        head.push(("because", why.clone()));
    } else if !rollout.waiting_for.is_empty() {
        head.push(("waits for", rollout.waiting_for.clone()));
    }
    head.push(("devices", tally(rollout.devices, &rollout.outcomes)));
    head.push(("moved", units::bytes(rollout.bytes_moved)));
    let mut parts = vec![fields(&head)];
    let time = |at: Option<Time>| at.map_or_else(|| "-".to_owned(), whole);
    if !rollout.waves.is_empty() {
        let rows = rollout.waves.iter().enumerate().map(|(index, wave)| {
            vec![
                (index + 1).to_string(),
                wave.devices.to_string(),
                time(wave.started_at),
                time(wave.ended_at),
            ]
        });
        parts.push(table(&[">wave", ">devices", ">started", ">all known"], rows));
    }
    let groups = rollout.groups.iter().filter(|group| group.devices > 0);
    let rows = groups.map(|group| {
        let count = |word: &str| group.outcomes.get(word).copied().unwrap_or(0);
        let site = group.site.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
        let rest = group.devices - count("confirmed") - count("failed");
        vec![
            group.class.to_string(),
            site,
            group.devices.to_string(),
            count("confirmed").to_string(),
            count("failed").to_string(),
            rest.to_string(),
            time(group.half_confirmed_at),
            time(group.last_confirmed_at),
            units::bytes(group.bytes_moved),
        ]
    });
    let header = [
        "class",
        "site",
        ">devices",
        ">confirmed",
        ">failed",
        ">other",
        ">half by",
        ">last",
        ">moved",
    ];
    parts.push(table(&header, rows));
    let failures = rollout.failures.iter().map(|(why, count)| format!("{count} failed: {why}"));
    let failures: Vec<String> = failures.collect();
    if !failures.is_empty() {
        parts.push(failures.join("\n"));
    }
    parts.push(format!("confirmed devices over time\n{}", rollout.chart().trim_end()));
    parts.join("\n\n")
}

/// To the second, so that columns stay narrow.
fn whole(at: Time) -> String {
    Time(at.0 / 1_000 * 1_000).to_string()
}

fn tally(devices: u32, outcomes: &std::collections::BTreeMap<String, u32>) -> String {
    let parts: Vec<String> =
        outcomes.iter().map(|(word, count)| format!("{count} {word}")).collect();
    format!("{devices}: {}", parts.join(", "))
}

fn decisions(rollout: &RolloutReport) -> String {
    let mut lines = Vec::new();
    for decision in &rollout.decisions {
        lines.push(format!("{}  {}", Time::at(decision.at), decision.what));
        lines.extend(decision.because.iter().map(|line| format!("    {line}")));
    }
    lines.join("\n")
}

/// What the exit code says. A run in which an invariant did not hold is kept.
fn verdict(
    session: &Session,
    scenario: &Scenario,
    report: &Report,
    saved: Option<&Path>,
) -> Result<()> {
    if report.violations.is_empty() {
        return verdict_of(report, "");
    }
    let path = match saved {
        Some(path) => path.to_owned(),
        None => {
            let path = session.home.cache("sim")?.join(format!("seed-{}.txt", report.seed));
            write(&path, &scenario.to_string())?;
            path
        }
    };
    let hint = format!(
        "this is a bug of ours, please report it with what this writes: slm sim replay {} --shrink small.txt",
        path.display()
    );
    verdict_of(report, &hint)
}

fn shrink_hint(path: &Path) -> String {
    format!("this is a bug of ours, please report it with `{}`", path.display())
}

fn verdict_of(report: &Report, hint: &str) -> Result<()> {
    if let Some(first) = report.violations.first() {
        let failure = Failure::internal(format!("at {}: {}", first.at, first.what));
        return Err(failure.hint(hint));
    }
    if let Some(halted) = report.halts().next() {
        let failure = Failure::user(format!("the rollout of {} was halted", halted.version));
        return Err(failure.exit(Exit::Gate).hint("the same with --why prints the evidence"));
    }
    let open = |rollout: &&RolloutReport| rollout.state != Some(RolloutState::Completed);
    match report.rollouts.iter().find(open) {
        Some(open) => {
            let (version, state) = (&open.version, open.state_words());
            let failure =
                format!("the rollout of {version} is {state} after {} hours", report.hours);
            Err(Failure::user(failure)
                .hint("--why prints what was decided; --hours simulates longer"))
        }
        None => Ok(()),
    }
}
