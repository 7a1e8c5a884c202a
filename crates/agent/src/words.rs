//! The agent's state in words.

use slmops_api::delta::{Fallback, Transfer};
use slmops_api::device::{DesiredModel, Failure, InstalledModel, Phase, WaitCause};
use slmops_api::probe::ProbeResult;

use crate::units;

/// `smollm2 1.0.0 (q4_k_m)`.
pub fn model(model: &InstalledModel) -> String {
    format!("{} {} ({})", model.model, model.version, model.variant)
}

/// Why a delta was not used, or not for all of it.
pub fn fallback(cause: Fallback) -> &'static str {
    match cause {
        Fallback::Missing => "the hub does not have it",
        Fallback::Unreadable => "it cannot be read, or is about other files",
        Fallback::NoBase => "the model that it changes is not here",
        Fallback::DamagedBase => "the model that it changes is damaged on this disk",
        Fallback::DamagedDelta => "the delta itself is damaged",
        Fallback::WrongResult => "what came out is not what was signed",
        Fallback::NotInPlace => "the old model cannot be changed by it where it lies",
    }
}

/// How a model came here: `3.1 MB of deltas for a model of 98 MB`.
pub fn transfer(transfer: &Transfer) -> String {
    let mut parts = Vec::new();
    if transfer.peer_bytes > 0 {
        parts.push(format!("{} from its site", units::size(transfer.peer_bytes)));
    }
    if transfer.delta_bytes > 0 {
        parts.push(format!("{} of deltas", units::size(transfer.delta_bytes)));
    }
    if transfer.adapter_bytes > 0 {
        parts.push(format!("{} of an adapter", units::size(transfer.adapter_bytes)));
    }
    if transfer.whole_bytes > 0 {
        parts.push(format!("{} of the file itself", units::size(transfer.whole_bytes)));
    }
    let of = units::size(transfer.size_bytes);
    let mut text = format!("{} for a model of {of}", parts.join(" and "));
    if transfer.gave_up.is_some() {
        text += ", in the place of the one before";
    }
    if let Some(cause) = transfer.fallback {
        text += &format!("; a delta did not do: {}", fallback(cause));
    }
    text
}

/// The same of what is desired.
pub fn wanted(model: &DesiredModel) -> String {
    format!("{} {} ({})", model.model, model.version, model.variant)
}

/// A phase in one line. `wanted` is what the hub asks for, `left` how long a download still takes.
pub fn phase(
    phase: &Phase,
    wanted: Option<&DesiredModel>,
    left: Option<std::time::Duration>,
) -> String {
    let name = wanted.map_or_else(|| "the model".to_owned(), self::wanted);
    match phase {
        Phase::Idle => "idle: nothing new is wanted".to_owned(),
        Phase::Downloading { done_bytes, total_bytes } => {
            let left = left.map(|left| format!(", {} left", units::duration(left)));
            format!(
                "downloading {name}: {} of {}{}",
                units::size(*done_bytes),
                units::size(*total_bytes),
                left.unwrap_or_default()
            )
        }
        Phase::Downloaded => format!("downloaded {name}, checking it"),
        Phase::Verified => format!("{name} is genuine, loading it beside the model that serves"),
        Phase::Staged => format!("{name} is loaded, its probes are running"),
        Phase::Activated => format!("{name} answers now, last probes through the live endpoint"),
        Phase::Confirmed => format!("confirmed {name}: all probes passed on this device"),
        Phase::RolledBack { failure } => {
            format!("{name} failed here and was taken back: {}", self::failure(failure))
        }
        Phase::Prestaged { cause, until } => {
            format!("{name} is here and genuine; it {}{}", wait(*cause), self::until(*until))
        }
        Phase::Waiting { cause, until } if cause.is_rule() => {
            format!("{name} {}{}", wait(*cause), self::until(*until))
        }
        Phase::Waiting { cause, .. } => format!("waiting, {}", wait(*cause)),
    }
}

/// What is waited for.
pub fn wait(cause: WaitCause) -> &'static str {
    match cause {
        WaitCause::Network => "the hub does not answer; trying again by itself",
        WaitCause::DiskFull => "the disk is full; free some space, it goes on by itself",
        WaitCause::Storage => "the state folder cannot be used; trying again by itself",
        WaitCause::Held => "waits: the rollout is held at the hub",
        WaitCause::NotBefore => "waits for its time",
        WaitCause::Hours => "waits for its hours",
        WaitCause::Clock => {
            "waits: it has a time, and this device does not know what time it is until the hub answers"
        }
        WaitCause::Metered => "waits for a link that is not metered",
    }
}

fn until(until: Option<jiff::Timestamp>) -> String {
    until.map_or_else(String::new, |at| format!(", until {}", at.strftime("%Y-%m-%d %H:%M:%S UTC")))
}

/// Why a model failed.
pub fn failure(failure: &Failure) -> String {
    match failure {
        Failure::Probes { results } => {
            let failed: Vec<String> =
                results.iter().filter(|result| !result.passed).map(probe).collect();
            format!("{} of {} probes failed: {}", failed.len(), results.len(), failed.join("; "))
        }
        Failure::Load => "the engine cannot load it".to_owned(),
        Failure::Crash => "its worker crashed".to_owned(),
        Failure::Signature => "no trusted publisher signed it".to_owned(),
        Failure::Digest => "a file is missing or damaged at the source".to_owned(),
        Failure::Package => "its package cannot be understood".to_owned(),
        Failure::Configuration { settings } => {
            format!("the engine does not follow the configuration: {}", settings.join(", "))
        }
        Failure::Memory { measured_bytes, budget_bytes } => format!(
            "it takes {}, the owner allows {}",
            units::size(*measured_bytes),
            units::size(*budget_bytes)
        ),
        Failure::Timeout => "it was not confirmed in time".to_owned(),
        Failure::Worse { metric } => format!("the gate found it worse in {metric}"),
    }
}

/// One probe's result.
pub fn probe(result: &ProbeResult) -> String {
    match result.value {
        Some(value) => format!("{} {value:.3} (floor {:.3})", result.name, result.floor),
        None => format!("{} gave no value", result.name),
    }
}
