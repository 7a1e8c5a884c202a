//! Making variants of a model: the F16 reference, and quantised files for device classes.
//! It never measures (that is `evaluate`) and never leaves a half-written file at its target.
//! Start reading at [`quantise()`] and [`reference()`]; [`damage()`] is for rehearsals only.
#![forbid(unsafe_code)]

mod damage;
mod error;
mod onto;
mod quantise;
mod reference;
mod space;

pub use damage::{DAMAGE_KEY, Damage, damage};
pub use error::OptimizeError;
pub use onto::quantise_onto;
pub use quantise::{check_file_type, file_types, quantise};
pub use reference::reference;

use slmops_inference::child::Job;

/// What a program that makes variants must be able to do as a child process
/// (see [`slmops_inference::child::run_if_child`]).
pub const JOBS: &[Job] = &[Job { name: quantise::JOB, run: quantise::run }];

/// How far an operation is, in tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Progress {
    /// Tensors done.
    pub done: u64,
    /// Tensors in all.
    pub total: u64,
}

/// The versions of the tools that make variants, for a lineage.
pub fn tools() -> std::collections::BTreeMap<String, String> {
    let engine = slmops_inference::llama::engine_version();
    let (name, version) = engine.split_once(' ').unwrap_or((&engine, "unknown"));
    std::collections::BTreeMap::from([
        (name.to_owned(), version.to_owned()),
        ("slmops".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
    ])
}
