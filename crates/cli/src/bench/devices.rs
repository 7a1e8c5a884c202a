//! Simulated devices: they speak the real protocol with keys and tokens of their own, and report as
//! an agent does, without a model behind it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::StatusCode;
use slmops_api::DeviceId;
use slmops_api::device::{
    Challenge, ChallengeRequest, DesiredState, DeviceFacts, DeviceReport, DeviceToken,
    DeviceTokenRequest, InstalledModel, Phase, TOKEN_CONTEXT, Telemetry,
};
use slmops_api::runtime::EffectiveConfig;
use slmops_artifact::signing::PrivateKey;

use super::wire::{Answer, Call, Wire};
use crate::error::Result;

/// One device.
pub struct Device {
    /// Its id in the fleet.
    pub id: DeviceId,
    key: PrivateKey,
    facts: DeviceFacts,
    token: Option<String>,
    /// What it was told last.
    desired: Option<Box<DesiredState>>,
    running: Option<Box<InstalledModel>>,
    sequence: u64,
}

/// What a poll brought.
pub enum Polled {
    /// Nothing new.
    Unchanged,
    /// Something to do.
    News,
    /// No answer of use.
    Refused(Answer),
}

impl Device {
    /// A device that has joined as `id`.
    pub fn new(id: DeviceId, key: PrivateKey, facts: DeviceFacts) -> Self {
        Self { id, key, facts, token: None, desired: None, running: None, sequence: 0 }
    }

    /// Forgets its token, as if it had expired.
    pub fn forget_token(&mut self) {
        self.token = None;
    }

    /// Gets a token with its key. The refusal, if it is refused.
    pub async fn sign_in(&mut self, wire: &mut Wire) -> Result<Option<Answer>> {
        let asked = ChallengeRequest { device: self.id.clone() };
        let answer = wire.call(Call::post("/v1/device/challenge", None, &asked)).await?;
        let Ok(Challenge { challenge }) = serde_json::from_slice(&answer.body) else {
            return Ok(Some(answer));
        };
        let text = format!("{TOKEN_CONTEXT}\n{}\n{challenge}", self.id);
        let signature = STANDARD.encode(self.key.sign(text.as_bytes()));
        let asked = DeviceTokenRequest { device: self.id.clone(), challenge, signature };
        let answer = wire.call(Call::post("/v1/device/token", None, &asked)).await?;
        let Ok(DeviceToken { token, .. }) = serde_json::from_slice(&answer.body) else {
            return Ok(Some(answer));
        };
        self.token = Some(token);
        Ok(None)
    }

    /// Asks what to be, with the tag of what it knows.
    pub async fn poll(&mut self, wire: &mut Wire) -> Result<Polled> {
        let mut call = Call::get("/v1/device/desired", self.token.as_deref());
        call.etag = self.desired.as_ref().map(|desired| format!("\"g{}\"", desired.generation));
        let answer = wire.call(call).await?;
        Ok(match answer.status {
            StatusCode::NOT_MODIFIED => Polled::Unchanged,
            StatusCode::OK => match serde_json::from_slice::<DesiredState>(&answer.body) {
                Ok(desired) => {
                    let before = self.desired.as_ref().and_then(|told| told.model.as_ref());
                    let news = desired.model.is_some() && desired.model.as_ref() != before;
                    self.desired = Some(Box::new(desired));
                    if news { Polled::News } else { Polled::Unchanged }
                }
                Err(_) => Polled::Refused(answer),
            },
            _ => Polled::Refused(answer),
        })
    }

    /// Sends a report; when `phase` is `Confirmed`, the model that it was told runs from then on.
    pub async fn report(&mut self, wire: &mut Wire, phase: Phase) -> Result<Answer> {
        self.sequence += 1;
        let told = self.desired.as_ref().and_then(|desired| desired.model.as_ref());
        if let (Phase::Confirmed, Some(told)) = (&phase, told) {
            self.running = Some(Box::new(InstalledModel {
                model: told.model.clone(),
                version: told.version.clone(),
                variant: told.variant.clone(),
                manifest: told.manifest,
                weights: told.weights,
            }));
        }
        let runtime = self.desired.as_ref().map(|desired| desired.runtime.clone());
        let effective = runtime.filter(|_| self.running.is_some()).map(|asked| EffectiveConfig {
            context_tokens: asked.context_tokens,
            parallel: asked.parallel,
            threads: self.facts.cores,
            batch_tokens: asked.batch_tokens,
            kv_type: asked.kv_type,
            flash_attention: asked.flash_attention,
            queue_limit: asked.queue_limit,
            idle_after_s: asked.idle_after_s,
            engine: self.facts.engine.clone(),
        });
        let report = DeviceReport {
            sequence: self.sequence,
            generation: self.desired.as_ref().map_or(0, |desired| desired.generation),
            phase,
            running: self.running.as_deref().cloned(),
            previous: None,
            rejected: vec![],
            probes: vec![],
            effective,
            telemetry: Telemetry { requests: self.sequence, ..Telemetry::default() },
            evidence: None,
            facts: self.facts.clone(),
        };
        wire.call(Call::post("/v1/device/report", self.token.as_deref(), &report)).await
    }
}
