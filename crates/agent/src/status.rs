//! What `slm-agent status` shows: what the running agent wrote, or what its ledger says.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use slmops_agent_core::{Ledger, Millis, Outcome, Status};
use slmops_api::DeviceId;
use slmops_api::device::{DesiredModel, DeviceFacts, InstalledModel, Phase, Rejection, Telemetry};
use slmops_api::probe::ProbeResult;

use crate::identity::Identity;
use crate::{units, words};

/// A device's state for its owner.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StatusFile {
    /// The device.
    pub device: DeviceId,
    /// Its hub.
    pub hub: String,
    /// The agent's process; absent when none runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Where the local endpoint answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// Whether the hub answered last time.
    pub hub_answers: bool,
    /// The newest generation.
    pub generation: u64,
    /// How far the device is with it; absent while it loads its model at start, and where no agent
    /// runs and it is not done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// What the hub wants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<DesiredModel>,
    /// Why, in the hub's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The model that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<InstalledModel>,
    /// The model kept for going back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<InstalledModel>,
    /// The model that was given up to make room: none answers until another one is here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<InstalledModel>,
    /// What failed here.
    #[serde(default)]
    pub rejected: Vec<Rejection>,
    /// The probe results of the running model.
    #[serde(default)]
    pub probes: Vec<ProbeResult>,
    /// Seconds until what is in the way is tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_in_s: Option<u64>,
    /// Counters since the device joined.
    pub telemetry: Telemetry,
    /// What the device is.
    pub facts: Option<DeviceFacts>,
}

impl StatusFile {
    /// The state of a running agent.
    pub fn new(
        identity: &Identity,
        facts: &DeviceFacts,
        status: &Status,
        telemetry: Telemetry,
        now: Millis,
    ) -> Self {
        let snapshot = status.snapshot.clone();
        let retry_in_s = status.retry_at.map(|at| at.0.saturating_sub(now.0).div_ceil(1_000));
        let mut file = Self {
            pid: Some(std::process::id()),
            endpoint: facts.endpoint.clone(),
            hub_answers: status.hub_answers == Some(true),
            wanted: status.wanted.clone(),
            reason: status.reason.clone(),
            given_up: status.given_up.clone(),
            retry_in_s,
            telemetry,
            facts: Some(facts.clone()),
            ..Self::empty(identity)
        };
        if let Some(snapshot) = snapshot {
            file.generation = snapshot.generation;
            file.phase = Some(snapshot.phase);
            file.running = snapshot.running;
            file.previous = snapshot.previous;
            file.rejected = snapshot.rejected;
            file.probes = snapshot.probes;
        }
        file
    }

    /// What a ledger says while no agent runs.
    pub fn at_rest(identity: &Identity, ledger: &Ledger, telemetry: Telemetry) -> Self {
        let wanted = ledger.desired.as_ref().and_then(|desired| desired.model.clone());
        let phase = match &ledger.outcome {
            Some(Outcome::Confirmed) => Some(Phase::Confirmed),
            Some(Outcome::RolledBack { failure }) => {
                Some(Phase::RolledBack { failure: failure.clone() })
            }
            None => wanted.is_none().then_some(Phase::Idle),
        };
        Self {
            generation: ledger.generation,
            wanted,
            reason: ledger.desired.as_ref().map(|desired| desired.reason.clone()),
            phase,
            running: ledger.current.as_ref().map(|current| current.model.clone()),
            previous: ledger.previous.as_ref().map(|previous| previous.model.clone()),
            given_up: ledger.without().map(|given_up| given_up.model.clone()),
            rejected: ledger.rejected.iter().map(|entry| entry.rejection.clone()).collect(),
            probes: ledger.probes.clone(),
            telemetry,
            ..Self::empty(identity)
        }
    }

    fn empty(identity: &Identity) -> Self {
        Self {
            device: identity.device.clone(),
            hub: identity.url.to_string(),
            pid: None,
            endpoint: None,
            hub_answers: false,
            generation: 0,
            phase: None,
            wanted: None,
            reason: None,
            running: None,
            previous: None,
            given_up: None,
            rejected: Vec::new(),
            probes: Vec::new(),
            retry_in_s: None,
            telemetry: Telemetry::default(),
            facts: None,
        }
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let mut line = |label: &str, value: String| {
            let _ = writeln!(text, "{label:<10} {value}");
        };
        let running = self.running.as_ref().map(words::model);
        line("device", self.device.to_string());
        let agent = match (self.pid, self.hub_answers) {
            (None, _) => "not running".to_owned(),
            (Some(pid), true) => format!("running (process {pid}), connected to {}", self.hub),
            (Some(pid), false) => {
                format!("running (process {pid}), {} does not answer", self.hub)
            }
        };
        line("agent", agent);
        match (self.pid, running) {
            (Some(_), Some(running)) => {
                let endpoint = self.endpoint.as_deref().unwrap_or_default();
                line("serves", format!("{running} at {endpoint}/v1"));
            }
            (Some(_), None) => line("serves", "nothing yet".to_owned()),
            (None, Some(running)) => line("would serve", running),
            (None, None) => line("would serve", "nothing yet".to_owned()),
        }
        let state = match &self.phase {
            Some(phase) => words::phase(phase, self.wanted.as_ref(), None),
            None if self.pid.is_some() => "loading the model that served last".to_owned(),
            None => match &self.wanted {
                Some(wanted) => format!("on its way to {}", words::wanted(wanted)),
                None => "idle".to_owned(),
            },
        };
        line("state", format!("{state} (generation {})", self.generation));
        if let Some(seconds) = self.retry_in_s {
            line("retry", format!("in {seconds} s"));
        }
        if let Some(reason) = &self.reason {
            line("because", reason.clone());
        }
        if let Some(previous) = &self.previous {
            line("previous", words::model(previous));
        }
        if let Some(given_up) = &self.given_up {
            let model = words::model(given_up);
            line("gave up", format!("{model}, to make room: no model answers meanwhile"));
        }
        for rejection in &self.rejected {
            let failure = words::failure(&rejection.failure);
            line("rejected", format!("{}: {failure}", rejection.manifest.short()));
        }
        let passed = self.probes.iter().filter(|probe| probe.passed).count();
        if !self.probes.is_empty() {
            line("probes", format!("{passed} of {} passed", self.probes.len()));
        }
        let telemetry = &self.telemetry;
        if let Some(transfer) = &telemetry.transfer {
            line("fetched", words::transfer(transfer));
        }
        line(
            "use",
            format!(
                "{} requests, {} errors, {} tokens generated, worker uses {}",
                telemetry.requests,
                telemetry.errors,
                telemetry.generated_tokens,
                units::size(telemetry.worker_memory_bytes)
            ),
        );
        text
    }
}
