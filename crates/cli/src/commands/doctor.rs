//! `slm doctor`.

use std::path::Path;

use serde::Serialize;
use slmops_api::audit::AuditVerdict;

use super::Session;
use crate::client::Hub;
use crate::error::{Failure, Result};
use crate::units;

/// Less free disk than this is worth a word.
const ENOUGH_DISK_BYTES: u64 = 4_000_000_000;
/// Less available memory than this is worth a word.
const ENOUGH_MEMORY_BYTES: u64 = 1_000_000_000;
/// A clock that is further from the hub's than this is worth a word.
const MAX_CLOCK_SKEW_S: i64 = 60;
/// No clock of this program's users stands before its own release.
const EARLIEST_CLOCK: &str = "2025-01-01T00:00:00Z";

/// Look at this machine and the hub.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  $ slm doctor\n\nExit code 1 if anything is wrong.")]
pub struct Doctor {}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    Good,
    Note,
    Wrong,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    health: Health,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, health: Health::Good, found: found.into(), hint: None }
    }

    fn note(what: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what, health: Health::Note, found: found.into(), hint: Some(hint.into()) }
    }

    fn wrong(what: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what, health: Health::Wrong, found: found.into(), hint: Some(hint.into()) }
    }
}

impl Doctor {
    pub(crate) async fn run(self, session: &Session) -> Result<()> {
        let mut findings = vec![
            processor(),
            memory(),
            disk(session.home.folder()),
            home(session),
            device_program(),
        ];
        findings.extend(hub(session).await);
        session.out.show(&findings, || {
            let lines: Vec<String> = findings
                .iter()
                .map(|finding| {
                    let sign = match finding.health {
                        Health::Good => "✓",
                        Health::Note => "!",
                        Health::Wrong => "✗",
                    };
                    let hint = finding.hint.as_ref().map(|hint| format!("\n    hint: {hint}"));
                    format!(
                        "{sign} {}: {}{}",
                        finding.what,
                        finding.found,
                        hint.unwrap_or_default()
                    )
                })
                .collect();
            lines.join("\n")
        })?;
        let wrong = findings.iter().filter(|finding| finding.health == Health::Wrong).count();
        if wrong > 0 {
            return Err(Failure::user(format!("{wrong} of {} checks failed", findings.len())));
        }
        Ok(())
    }
}

/// The engine is compiled for the instruction sets that its build chose; older processors lack them.
fn processor() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let arch = std::env::consts::ARCH;
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let model = field("model name").unwrap_or_else(|| arch.to_owned());
    let found = format!("{model}, {cores} cores");
    if arch == "x86_64" {
        let flags = field("flags").unwrap_or_default();
        let has = |flag: &str| flags.split(' ').any(|one| one == flag);
        let missing: Vec<&str> =
            ["avx2", "fma", "f16c", "bmi2"].into_iter().filter(|flag| !has(flag)).collect();
        if !missing.is_empty() && !flags.is_empty() {
            return Finding::wrong(
                "processor",
                format!("{found}, without {}", missing.join(" ")),
                "this build of the engine needs them: models cannot run here",
            );
        }
    }
    Finding::good("processor", found)
}

fn memory() -> Finding {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| -> Option<u64> {
        let line = info.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let (Some(total), Some(available)) = (kib("MemTotal:"), kib("MemAvailable:")) else {
        return Finding::note("memory", "unknown", "/proc/meminfo cannot be read");
    };
    let (total, available) = (total * 1024, available * 1024);
    let found = format!("{} available of {}", units::bytes(available), units::bytes(total));
    if available < ENOUGH_MEMORY_BYTES {
        return Finding::note(
            "memory",
            found,
            "measuring models needs about 1 GB and more for large ones",
        );
    }
    Finding::good("memory", found)
}

fn disk(folder: &Path) -> Finding {
    let there = folder.ancestors().find(|folder| folder.exists()).unwrap_or(folder);
    match rustix::fs::statvfs(there) {
        Err(error) => {
            Finding::wrong("disk", error.to_string(), format!("look at {}", there.display()))
        }
        Ok(stat) => {
            let free = stat.f_bavail * stat.f_frsize;
            let found = format!("{} free in {}", units::bytes(free), there.display());
            if free < ENOUGH_DISK_BYTES {
                return Finding::note(
                    "disk",
                    found,
                    "a ship keeps a 16-bit copy and every variant; set SLM_HOME to a larger disk",
                );
            }
            Finding::good("disk", found)
        }
    }
}

fn home(session: &Session) -> Finding {
    let folder = session.home.folder();
    if !folder.exists() {
        return Finding::note(
            "home",
            format!("{} is not there yet", folder.display()),
            "slm up makes it",
        );
    }
    match rustix::fs::access(folder, rustix::fs::Access::WRITE_OK) {
        Ok(()) => Finding::good("home", folder.display().to_string()),
        Err(error) => Finding::wrong(
            "home",
            format!("{} cannot be written: {error}", folder.display()),
            "mend its permissions, or set SLM_HOME",
        ),
    }
}

fn device_program() -> Finding {
    let beside = std::env::current_exe().ok().map(|exe| exe.with_file_name("slm-agent"));
    match beside.filter(|path| path.exists()) {
        Some(path) => Finding::good("device program", path.display().to_string()),
        None => Finding::note(
            "device program",
            "slm-agent is not next to this program",
            "it is needed on devices and for the demo: make build",
        ),
    }
}

async fn hub(session: &Session) -> Vec<Finding> {
    let earliest: jiff::Timestamp = EARLIEST_CLOCK.parse().unwrap_or_default();
    let clock = if jiff::Timestamp::now() < earliest {
        Finding::wrong(
            "clock",
            format!("{} lies in the past", jiff::Timestamp::now()),
            "set it; certificates and tokens depend on it",
        )
    } else {
        Finding::good("clock", "plausible")
    };
    let hub = match session.hub() {
        Ok(hub) => hub,
        Err(failure) => {
            let (message, hint) = failure.told();
            return vec![clock, Finding::note("hub", message, hint.unwrap_or_default())];
        }
    };
    let response =
        hub.send(hub.request(reqwest::Method::GET, "/v1/classes"), "reach the hub").await;
    let response = match response {
        Ok(response) => response,
        Err(failure) => {
            let (message, hint) = failure.told();
            return vec![clock, Finding::wrong("hub", message, hint.unwrap_or_default())];
        }
    };
    let mut findings = vec![clock_against(&response).unwrap_or(clock)];
    findings.push(Finding::good("hub", format!("{} answers and knows this token", hub.url())));
    findings.push(audit(&hub).await);
    findings.push(key(session));
    findings
}

/// Compares with the hub's clock (RFC 9110, section 6.6.1, `Date`), where it tells.
fn clock_against(response: &reqwest::Response) -> Option<Finding> {
    let date = response.headers().get(reqwest::header::DATE)?.to_str().ok()?;
    let theirs = jiff::fmt::rfc2822::parse(date).ok()?.timestamp();
    let skew = theirs.as_second() - jiff::Timestamp::now().as_second();
    Some(if skew.abs() > MAX_CLOCK_SKEW_S {
        Finding::wrong(
            "clock",
            format!("{skew} s from the hub's"),
            "set the clock of this machine or of the hub",
        )
    } else {
        Finding::good("clock", "agrees with the hub's")
    })
}

async fn audit(hub: &Hub) -> Finding {
    match super::audit::verify(hub, false).await {
        Ok(AuditVerdict { broken: None, entries, .. }) => {
            Finding::good("audit log", format!("{entries} entries, unbroken"))
        }
        Ok(AuditVerdict { broken: Some(broken), .. }) => {
            Finding::wrong("audit log", broken, "slm audit verify")
        }
        Err(failure) => Finding::note("audit log", failure.line(), "this token may not read it"),
    }
}

fn key(session: &Session) -> Finding {
    if session.home.has_key(crate::home::DEFAULT_KEY) {
        Finding::good("publisher key", "there is one")
    } else {
        Finding::note(
            "publisher key",
            "none on this machine",
            "needed to release models: slm key create",
        )
    }
}
