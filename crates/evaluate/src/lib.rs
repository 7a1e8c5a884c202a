//! Measuring a model: perplexity, KL divergence, task suites, speed and memory, each report bound
//! to the digests of what was measured. It never changes a model and never decides a rollout.
//! Start reading at [`suite`] (what is asked), then [`evaluation`] and [`gate`] (what it means).
#![forbid(unsafe_code)]

pub mod distributions;
pub mod evaluation;
pub mod gate;
pub mod machine;
pub mod probes;
pub mod quality;
pub mod render;
pub mod runtime;
pub mod statistics;
pub mod suite;

pub use evaluation::{Evaluation, EvaluationError, Progress, Stage};

use slmops_inference::child::Job;

/// What a program that evaluates must be able to do as a child process, beside being a worker
/// (see [`slmops_inference::child::run_if_child`]).
pub const JOBS: &[Job] = &[Job { name: quality::JOB, run: quality::run }];
