//! One device's decisions: what to download, when to switch, when to go back, what to report.
//! It never reads a clock, a file, a socket or randomness: time, completions and a seeded
//! generator are passed in, and what must happen comes out as [`Effect`]s.
//! Start reading at [`Core::handle`], then [`Ledger`] (all that survives a crash).
#![forbid(unsafe_code)]

mod backoff;
mod config;
mod counted;
mod effect;
mod ledger;
mod machine;
mod route;

pub use backoff::MAX_RETRY_AFTER_MS;
pub use config::{Config, Millis};
pub use counted::Counted;
pub use effect::{
    Around, Death, Effect, EffectId, Event, FetchError, Loaded, Obstacle, Offer, Polled,
    ProbeError, Probed, ReplayOrder, StageError, VerifyError,
};
pub use ledger::{
    Blob, Candidate, Deployment, HandedOn, LEDGER_VERSION, Ledger, LedgerError, MAX_LEDGER_BYTES,
    MAX_REJECTED, Outcome, Package, Rejected, Scope,
};
pub use machine::{Core, Snapshot, Status};
pub use route::cheapest;
