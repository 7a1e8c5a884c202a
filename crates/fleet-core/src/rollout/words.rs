//! Rollouts in words: every verdict with its evidence.

use std::fmt::Write as _;

use slmops_api::device::{Failure, Phase, WaitCause};
use slmops_api::rollout::{Outcome, Rollout, RolloutDevice, RolloutState};

use super::{gate, state_name};
use crate::words::{bytes, clock, list};
use crate::world::FleetDevice;

/// Probes listed by name in one line, at most.
const PROBES_SHOWN: usize = 5;

/// A phase in words.
pub fn phase_words(phase: &Phase) -> String {
    let words = match phase {
        Phase::Idle => "idle",
        Phase::Downloading { .. } => "downloading",
        Phase::Downloaded => "downloaded, being verified",
        Phase::Verified => "verified, being loaded",
        Phase::Prestaged { cause, until } => {
            return format!("has it and {}{}", wait_words(*cause), until_words(*until));
        }
        Phase::Staged => "loaded beside the one that serves, being probed",
        Phase::Activated => "activated, last probe",
        Phase::Confirmed => "confirmed",
        Phase::RolledBack { .. } => "went back",
        Phase::Waiting { cause, until } => {
            return format!("{}{}", wait_words(*cause), until_words(*until));
        }
    };
    words.to_owned()
}

/// What a device waits for, in words.
pub(super) fn wait_words(cause: WaitCause) -> &'static str {
    match cause {
        WaitCause::Network => "waits for the network",
        WaitCause::DiskFull => "waits: its disk is full",
        WaitCause::Storage => "waits: its state folder cannot be written",
        WaitCause::Held => "waits: the rollout is held",
        WaitCause::NotBefore => "waits for its time (activate_at)",
        WaitCause::Hours => "waits for its hours (activate_in, download_in)",
        WaitCause::Clock => "waits: it does not know what time it is",
        WaitCause::Metered => "waits: its link is metered",
    }
}

fn until_words(until: Option<jiff::Timestamp>) -> String {
    until.map_or_else(String::new, |at| format!(", until {}", clock(at)))
}

/// A failure in words, with its numbers.
pub fn failure_words(failure: &Failure) -> String {
    match failure {
        Failure::Probes { results } => {
            let failed: Vec<String> = results
                .iter()
                .filter(|result| !result.passed)
                .map(|result| match result.value {
                    Some(value) => {
                        format!("{}: {value:.3}, floor {:.3}", result.name, result.floor)
                    }
                    None => format!("{}: no value (the engine failed)", result.name),
                })
                .collect();
            format!(
                "{} of {} probes failed ({})",
                failed.len(),
                results.len(),
                list(&failed, PROBES_SHOWN)
            )
        }
        Failure::Load => "the engine could not load the model file".to_owned(),
        Failure::Crash => "the worker died while loading, probing or soon after".to_owned(),
        Failure::Signature => {
            "signature missing, wrong, or by a key that is not trusted".to_owned()
        }
        Failure::Digest => "the bytes are not what their digest says".to_owned(),
        Failure::Package => "the manifest is not a package that the agent understands".to_owned(),
        Failure::Configuration { settings } => {
            format!("the engine did not honour {}", list(settings, PROBES_SHOWN))
        }
        Failure::Memory { measured_bytes, budget_bytes } => {
            format!(
                "measured {} of memory, budget {}",
                bytes(*measured_bytes),
                bytes(*budget_bytes)
            )
        }
        Failure::Timeout => "not confirmed in time".to_owned(),
        Failure::Worse { metric } => format!("the gate found it worse in {metric}"),
    }
}

/// One failed device as evidence: which manifest, what failed, what the device did then.
pub(super) fn failure_evidence(part: &RolloutDevice, device: Option<&FleetDevice>) -> Vec<String> {
    let Outcome::Failed { failure } = &part.outcome else { return Vec::new() };
    let variant = part.variant.as_ref().map_or("?", |variant| variant.as_str());
    let manifest = part.manifest.map_or_else(|| "?".to_owned(), |digest| digest.short());
    let mut lines =
        vec![format!("{}: {variant} ({manifest}): {}", part.name, failure_words(failure))];
    let running = device.and_then(|device| device.report.as_ref()?.running.as_ref());
    if *failure == Failure::Timeout {
        let said = device.and_then(|device| device.report.as_ref());
        let heard =
            said.map_or_else(|| "never reported".to_owned(), |report| phase_words(&report.phase));
        lines.push(format!("{}: last heard: {heard}", part.name));
    }
    match running {
        Some(running) if Some(running.manifest) != part.manifest => lines.push(format!(
            "{}: went back by itself and serves {} {} ({})",
            part.name, running.model, running.version, running.variant
        )),
        _ => {}
    }
    lines
}

fn outcome_words(part: &RolloutDevice) -> String {
    match &part.outcome {
        Outcome::Pending => "not told yet".to_owned(),
        Outcome::Updating => match part.held {
            Some(cause) => format!("updating, {}", wait_words(cause)),
            None => "updating".to_owned(),
        },
        Outcome::Confirmed => "confirmed".to_owned(),
        Outcome::Failed { failure } => format!("failed: {}", failure_words(failure)),
        Outcome::NoFit { smallest_bytes, budget_bytes } => {
            crate::fit::no_fit(*smallest_bytes, *budget_bytes)
        }
        Outcome::Quarantined => format!("quarantined: {}", part.fit),
        Outcome::Away => match part.held {
            Some(cause) => format!("waited for no longer, {}", wait_words(cause)),
            None => "away: takes it when it comes back".to_owned(),
        },
        Outcome::Recalled => "told to keep what it had: aborted before it confirmed".to_owned(),
    }
}

/// The whole story of a rollout as text: its state, every decision with its evidence, and where
/// each device stands.
pub fn why(rollout: &Rollout) -> String {
    let mut text = String::new();
    let asked = &rollout.asked;
    let _ = writeln!(
        text,
        "Rollout {} of {} {} to {}: {}",
        rollout.id,
        asked.model,
        asked.version,
        asked.policy.selector,
        state_name(rollout.state)
    );
    if !rollout.waiting_for.is_empty() {
        let _ = writeln!(text, "Waiting for {}", rollout.waiting_for);
    }
    let _ = writeln!(text, "\nDecisions");
    for decision in &rollout.decisions {
        let at = decision.at.strftime("%Y-%m-%d %H:%M:%S UTC");
        let _ = writeln!(text, "  {at}  {}", decision.what);
        for line in &decision.because {
            let _ = writeln!(text, "      - {line}");
        }
    }
    if let Some(reading) = &rollout.gate {
        let _ = writeln!(text, "\nGate of wave {}", reading.wave + 1);
        for line in gate::evidence_lines(reading) {
            let _ = writeln!(text, "  {line}");
        }
    }
    let _ = writeln!(text, "\nDevices");
    for part in &rollout.devices {
        let variant = part.variant.as_ref().map_or("-", |variant| variant.as_str());
        let told = part.generation.map(|g| format!(", generation {g}")).unwrap_or_default();
        let _ = writeln!(
            text,
            "  wave {}  {}  {variant}{told}: {}",
            part.wave + 1,
            part.name,
            outcome_words(part)
        );
    }
    let next = match rollout.state {
        RolloutState::Halted => Some(format!(
            "`slm rollout rollback {}` takes it back everywhere; ship a better version to go on",
            rollout.id
        )),
        RolloutState::Paused => Some(format!("`slm rollout resume {}` goes on", rollout.id)),
        _ => None,
    };
    if let Some(next) = next {
        let _ = writeln!(text, "\nhint: {next}");
    }
    text
}
