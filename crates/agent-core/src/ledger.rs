//! All that survives a crash. Everything else a device knows can be rebuilt.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use slmops_api::delta::MAX_CHAIN;
use slmops_api::device::{DesiredModel, DesiredState, Failure, InstalledModel, Rejection};
use slmops_api::probe::{MAX_PROBES, ProbeResult};
use slmops_api::runtime::RuntimeConfig;
use slmops_artifact::Digest;

/// The version of the ledger's format.
pub const LEDGER_VERSION: u32 = 1;
/// The largest ledger that is read, in bytes.
pub const MAX_LEDGER_BYTES: usize = 4 << 20;
/// The most rejections that are remembered; the oldest go first.
pub const MAX_REJECTED: usize = 32;

/// A file of a package, by digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// Its digest, also its name on disk.
    pub digest: Digest,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// The files of a signed package that a device needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    /// Digest of the manifest that names them.
    pub manifest: Digest,
    /// `model.gguf`.
    pub weights: Blob,
    /// `probes.json`.
    pub probes: Blob,
    /// `adapter.gguf`: a LoRA adapter that is applied to the weights, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<Blob>,
}

impl Package {
    /// The bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.weights.size_bytes.saturating_add(self.small_bytes())
    }

    /// The bytes of all files but the weights.
    pub fn small_bytes(&self) -> u64 {
        self.small().fold(0, |bytes, blob| bytes.saturating_add(blob.size_bytes))
    }

    /// All files but the weights.
    pub fn small(&self) -> impl Iterator<Item = Blob> + use<> {
        [self.probes].into_iter().chain(self.adapter)
    }

    /// The files, small ones first, so that a wrong one is found early.
    pub fn blobs(&self) -> impl Iterator<Item = Blob> + use<> {
        self.small().chain([self.weights])
    }
}

/// A verified model and how it is run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// The model.
    pub model: InstalledModel,
    /// Its files.
    pub package: Package,
    /// How it is run.
    pub runtime: RuntimeConfig,
}

impl Deployment {
    /// Whether this is what `model` and `runtime` ask for.
    pub fn is(&self, model: &DesiredModel, runtime: &RuntimeConfig) -> bool {
        self.model.manifest == model.manifest
            && self.model.weights == model.weights
            && self.runtime == *runtime
    }
}

/// A deployment on its way, written before its worker is started and before it is activated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Candidate {
    /// What.
    pub deployment: Deployment,
    /// The generation that names it.
    pub generation: u64,
    /// How often staging it was started. Many without a verdict mean that it takes the device down.
    pub attempts: u32,
    /// Whether its probes passed on the staged worker: only then it may be activated.
    pub probed: bool,
}

/// Deltas that are kept for devices of the same site that are still on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOn {
    /// The model file that they lead to: they are kept as long as the ledger names that.
    pub to: Digest,
    /// Their digests; at most [`MAX_CHAIN`].
    pub deltas: Vec<Digest>,
}

/// What a rejection covers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "scope", rename_all = "snake_case")]
pub enum Scope {
    /// The manifest, however it is run.
    Manifest,
    /// The manifest in this runtime configuration: another one may work.
    Runtime {
        /// The configuration.
        runtime: RuntimeConfig,
    },
    /// The manifest in its generation: the hub may ask again.
    Generation,
}

/// Something that failed here and is not tried again.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rejected {
    /// What and why.
    #[serde(flatten)]
    pub rejection: Rejection,
    /// How far the rejection goes.
    #[serde(flatten)]
    pub scope: Scope,
}

/// How the newest generation ended on this device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Its model was confirmed.
    Confirmed,
    /// Its model failed and the device went back.
    RolledBack {
        /// Why.
        failure: Failure,
    },
}

/// What a device must not forget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Format: [`LEDGER_VERSION`].
    pub version: u32,
    /// The newest generation seen. Never falls.
    pub generation: u64,
    /// What the hub said in it, so that a device keeps to it over restarts and without the hub.
    #[serde(default)]
    pub desired: Option<DesiredState>,
    /// How that generation ended, if it has.
    #[serde(default)]
    pub outcome: Option<Outcome>,
    /// The newest confirmed deployment: loaded at boot.
    #[serde(default)]
    pub current: Option<Deployment>,
    /// The probe results that confirmed it.
    #[serde(default)]
    pub probes: Vec<ProbeResult>,
    /// The confirmed deployment before, kept for going back.
    #[serde(default)]
    pub previous: Option<Deployment>,
    /// The confirmed deployment before, where its file was given up to make room: going back means
    /// fetching it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_up: Option<Deployment>,
    /// What the newest model was made from, where the site may have that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed_on: Option<HandedOn>,
    /// What is on its way.
    #[serde(default)]
    pub candidate: Option<Candidate>,
    /// What failed here, oldest first; at most [`MAX_REJECTED`].
    #[serde(default)]
    pub rejected: Vec<Rejected>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            version: LEDGER_VERSION,
            generation: 0,
            desired: None,
            outcome: None,
            current: None,
            probes: Vec::new(),
            previous: None,
            given_up: None,
            handed_on: None,
            candidate: None,
            rejected: Vec::new(),
        }
    }
}

/// Why some bytes are not a ledger.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// More bytes than any ledger has.
    #[error("read ledger: {bytes} bytes, more than the {MAX_LEDGER_BYTES} that a ledger can have")]
    TooLarge {
        /// How many.
        bytes: usize,
    },
    /// Torn or garbled.
    #[error("read ledger")]
    Garbled(#[source] serde_json::Error),
    /// Written by another version of the agent.
    #[error(
        "read ledger: format {found}, this agent reads {LEDGER_VERSION}\n  hint: run the agent that wrote it, or a newer one"
    )]
    Version {
        /// The format found.
        found: u32,
    },
    /// More entries than any ledger has.
    #[error("read ledger: {what}: {found} entries, more than {most}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many.
        found: usize,
        /// How many there can be.
        most: usize,
    },
}

impl Ledger {
    /// Reads what [`Ledger::to_bytes`] wrote.
    ///
    /// # Errors
    /// When the bytes are not a whole ledger of this version within its bounds.
    pub fn parse(bytes: &[u8]) -> Result<Self, LedgerError> {
        if bytes.len() > MAX_LEDGER_BYTES {
            return Err(LedgerError::TooLarge { bytes: bytes.len() });
        }
        let ledger: Self = serde_json::from_slice(bytes).map_err(LedgerError::Garbled)?;
        if ledger.version != LEDGER_VERSION {
            return Err(LedgerError::Version { found: ledger.version });
        }
        let bounds = [
            ("rejected", ledger.rejected.len(), MAX_REJECTED),
            ("probes", ledger.probes.len(), MAX_PROBES),
            ("handed_on", ledger.handed_on.as_ref().map_or(0, |it| it.deltas.len()), MAX_CHAIN),
        ];
        for (what, found, most) in bounds {
            if found > most {
                return Err(LedgerError::TooMany { what, found, most });
            }
        }
        Ok(ledger)
    }

    /// The ledger as JSON for people and for [`Ledger::parse`].
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a ledger is always JSON");
        bytes.push(b'\n');
        bytes
    }

    /// The rejection that covers this, if one does.
    pub fn refuses(
        &self,
        manifest: Digest,
        runtime: &RuntimeConfig,
        generation: u64,
    ) -> Option<&Rejected> {
        self.rejected.iter().rev().find(|rejected| {
            rejected.rejection.manifest == manifest
                && match &rejected.scope {
                    Scope::Manifest => true,
                    Scope::Runtime { runtime: failed } => failed == runtime,
                    Scope::Generation => rejected.rejection.generation == generation,
                }
        })
    }

    /// What was given up and not replaced yet: the device has no model.
    pub fn without(&self) -> Option<&Deployment> {
        self.given_up.as_ref().filter(|_| self.current.is_none())
    }

    /// The files of everything that the ledger names, with what is handed on to the site.
    pub fn blobs(&self) -> BTreeSet<Digest> {
        let candidate = self.candidate.as_ref().map(|candidate| &candidate.deployment);
        let named = [self.current.as_ref(), self.previous.as_ref(), candidate, self.without()];
        let blobs = named.into_iter().flatten().flat_map(|named| named.package.blobs());
        let mut digests: BTreeSet<Digest> = blobs.map(|blob| blob.digest).collect();
        if let Some(handed_on) = &self.handed_on
            && self.share_bytes_per_s().is_some()
            && digests.contains(&handed_on.to)
        {
            digests.extend(&handed_on.deltas);
        }
        digests
    }

    /// Bytes a second of models for devices of the same site; none if they get none.
    pub(crate) fn share_bytes_per_s(&self) -> Option<u64> {
        self.desired.as_ref()?.rules.share_bytes_per_s
    }

    /// The package with this manifest, if the ledger still names it: its signature was checked.
    pub(crate) fn package(&self, manifest: Digest) -> Option<Package> {
        let candidate = self.candidate.as_ref().map(|candidate| &candidate.deployment);
        let named = [self.current.as_ref(), self.previous.as_ref(), candidate];
        let found = named.into_iter().flatten().find(|named| named.package.manifest == manifest);
        found.map(|named| named.package)
    }

    pub(crate) fn reject(&mut self, rejection: Rejection, scope: Scope) {
        self.rejected.retain(|old| {
            !(old.rejection.manifest == rejection.manifest
                && (old.scope == scope || scope == Scope::Manifest))
        });
        if self.rejected.len() >= MAX_REJECTED {
            self.rejected.drain(..=self.rejected.len() - MAX_REJECTED);
        }
        self.rejected.push(Rejected { rejection, scope });
        // What failed is not kept for going back to.
        let refused = |named: &Deployment| {
            self.refuses(named.model.manifest, &named.runtime, u64::MAX).is_some()
        };
        let refuses_previous = self.previous.as_ref().is_some_and(refused);
        let refuses_given_up = self.given_up.as_ref().is_some_and(refused);
        self.previous.take_if(|_| refuses_previous);
        self.given_up.take_if(|_| refuses_given_up);
    }
}
