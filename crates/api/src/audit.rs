//! The audit log (hash-chained) and the people and programs whose acts it records.

use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;

use crate::TokenId;

/// One entry. `hash` covers every other field, among them the hash of the entry before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditEntry {
    /// Position, from 1, without gaps.
    pub sequence: u64,
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub at: jiff::Timestamp,
    /// Who: `token NAME`, `device ID` or `hub`.
    pub actor: String,
    /// What, such as `rollout.create`.
    pub action: String,
    /// Upon which object.
    pub object: String,
    /// Details; never a secret.
    #[schema(value_type = Object)]
    pub details: serde_json::Value,
    /// Hash of the entry before; of nothing (all zeros) for the first.
    #[schema(value_type = String)]
    pub previous: Digest,
    /// SHA-256 of this entry's canonical JSON without `hash`.
    #[schema(value_type = String)]
    pub hash: Digest,
}

impl AuditEntry {
    /// What `hash` must be: SHA-256 over the compact JSON array
    /// `[sequence, at, actor, action, object, details, previous]`.
    pub fn computed_hash(&self) -> Digest {
        let fields = serde_json::json!([
            self.sequence,
            self.at,
            self.actor,
            self.action,
            self.object,
            self.details,
            self.previous
        ]);
        Digest::of(fields.to_string().as_bytes())
    }
}

/// What `GET /v1/audit/verify` found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct AuditVerdict {
    /// The chain holds up to this entry, as far as it was checked.
    pub entries: u64,
    /// Hash of that one.
    #[schema(value_type = String)]
    pub head: Digest,
    /// Entries up to this one were checked before, and not again.
    #[serde(default)]
    pub from: u64,
    /// The first broken entry and what is wrong with it; absent when the chain holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
    /// There is more to check: `?cursor=…` goes on from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}

/// What a token's holder may do; each role may do all that the one before may.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Read everything but secrets.
    Viewer,
    /// Publish releases, run rollouts, invite devices, edit blueprints.
    Operator,
    /// Manage tokens, publisher keys and device revocation.
    Admin,
}

/// `GET /v1/whoami`: whose token a call carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Identity {
    /// The token's name.
    pub name: String,
    /// What it may do.
    pub role: Role,
}

/// An operator token without its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Token {
    /// Its id.
    pub id: TokenId,
    /// A name for people.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// When it was made.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: jiff::Timestamp,
    /// When it stops working, if ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires_at: Option<jiff::Timestamp>,
}

/// `POST /v1/tokens`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NewToken {
    /// A name for people.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// Seconds until it stops working; never if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_s: Option<u64>,
}

/// A new token with its secret, shown once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct CreatedToken {
    /// The token.
    pub token: Token,
    /// What goes into `Authorization: Bearer …`.
    pub secret: String,
}
