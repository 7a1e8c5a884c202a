//! Webhooks: the audit log, event by event, to other programs.
//!
//! Each event is a CloudEvent 1.0 in structured JSON, signed after Standard Webhooks 1.0. What is
//! told is what the audit log says, so no text of users is ever among it.

use serde::{Deserialize, Serialize};

use crate::WebhookId;
use crate::audit::AuditEntry;

/// The most webhooks of one hub.
pub const MAX_WEBHOOKS: usize = 32;
/// What every type of event begins with; the action of the audit log follows.
pub const EVENT_TYPE_PREFIX: &str = "slmops.";
/// What a secret begins with (Standard Webhooks, "Signature scheme").
pub const SECRET_PREFIX: &str = "whsec_";
/// Bounds of [`WebhookRetry::attempts`].
pub const ATTEMPTS: (u32, u32) = (1, 100);
/// Bounds of [`WebhookRetry::first_delay_ms`].
pub const FIRST_DELAY_MS: (u64, u64) = (10, 3_600_000);
/// Bounds of [`WebhookRetry::max_delay_ms`].
pub const MAX_DELAY_MS: (u64, u64) = (10, 86_400_000);
/// Bounds of [`WebhookRetry::timeout_ms`].
pub const TIMEOUT_MS: (u64, u64) = (10, 60_000);

/// How long and how often a delivery is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct WebhookRetry {
    /// Attempts until a delivery is dead.
    pub attempts: u32,
    /// Milliseconds before the second attempt; doubled for each one after, less up to half by
    /// chance.
    pub first_delay_ms: u64,
    /// Milliseconds between two attempts, at most.
    pub max_delay_ms: u64,
    /// Milliseconds that the receiver has to answer.
    pub timeout_ms: u64,
}

impl Default for WebhookRetry {
    /// About eleven hours of attempts.
    fn default() -> Self {
        Self { attempts: 20, first_delay_ms: 5000, max_delay_ms: 3_600_000, timeout_ms: 10_000 }
    }
}

/// `POST /v1/webhooks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewWebhook {
    /// Where events are posted to: `https://…`, or `http://…` where nobody can listen in.
    pub url: String,
    /// Which events: actions of the audit log such as `rollout.decide`, whole kinds such as
    /// `rollout.*`, or `*`.
    pub events: Vec<String>,
    /// PEM certificates that the receiver's may descend from, instead of the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_pem: Option<String>,
    /// How long and how often.
    #[serde(default)]
    pub retry: WebhookRetry,
}

impl NewWebhook {
    /// Whether this webhook is told of an entry of the audit log.
    pub fn wants(&self, id: &WebhookId, entry: &AuditEntry) -> bool {
        if entry.action == TEST_ACTION {
            return entry.object == id.as_str();
        }
        self.events.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(start) => entry.action.starts_with(start),
            None => entry.action == *pattern,
        })
    }
}

/// The action of a test event, which goes to its webhook alone.
pub const TEST_ACTION: &str = "webhook.test";

/// A webhook as the hub shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Webhook {
    /// Its id.
    pub id: WebhookId,
    /// What was asked.
    #[serde(flatten)]
    pub asked: NewWebhook,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: jiff::Timestamp,
    /// By whom.
    pub created_by: String,
    /// Every entry of the audit log up to this one was looked at for it.
    pub cursor: u64,
    /// Events that wait to be delivered.
    pub pending: u64,
    /// Events that were given up.
    pub dead: u64,
    /// Until then the secret before the last change signs as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub previous_secret_until: Option<jiff::Timestamp>,
}

/// The longest time for which two secrets sign, in seconds: 30 days.
pub const MAX_OVERLAP_S: u64 = 30 * 24 * 3600;

/// `POST /v1/webhooks/{id}/rotate`: a new secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rotate {
    /// Seconds for which the secret of now signs as well; a day if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap_s: Option<u64>,
}

/// A webhook with its new secret, shown once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CreatedWebhook {
    /// The webhook.
    pub webhook: Webhook,
    /// `whsec_` and base64: the key of the signatures.
    pub secret: String,
}

/// How far a delivery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeliveryState {
    /// Waits for its next attempt.
    Pending,
    /// The receiver took it (2xx).
    Delivered,
    /// Given up: a dead letter. `redeliver` tries it again.
    Dead,
}

impl DeliveryState {
    /// Every state and its name.
    pub const ALL: [(&'static str, Self); 3] =
        [("pending", Self::Pending), ("delivered", Self::Delivered), ("dead", Self::Dead)];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, state)| *state == self).expect("every state has a name").0
    }
}

impl std::str::FromStr for DeliveryState {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(name, _)| *name == given).map(|(_, state)| *state);
        found.ok_or_else(|| format!("`{given}` is none of pending, delivered and dead"))
    }
}

/// One event on its way to one webhook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Delivery {
    /// The entry of the audit log that it tells.
    pub sequence: u64,
    /// The `webhook-id` that each attempt carries, so that a receiver knows a repetition.
    pub message: String,
    /// The action of the audit log.
    pub action: String,
    /// How far it is.
    pub state: DeliveryState,
    /// Attempts so far.
    pub attempts: u32,
    /// When it is tried next, while it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub next_at: Option<jiff::Timestamp>,
    /// What became of the last attempt, in words: `200`, `503`, `no answer in time`, …
    pub last: String,
}

/// `POST /v1/webhooks/{id}/redeliver`: this delivery, or all dead ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Redeliver {
    /// The entry of the audit log; all dead ones if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
}

/// How many deliveries are tried again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Redelivered {
    /// That many.
    pub deliveries: u64,
}
