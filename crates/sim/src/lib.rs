//! The shipping `agent-core` and `fleet-core` under virtual time, with injected faults.
//! It never touches a real clock, disk or network: the same specification gives the same run.
//! Start reading at [`simulate`], then `run.rs` (the schedule) and `watch.rs` (the invariants).
//!
//! ```
//! use slmops_sim::{FleetSpec, simulate};
//!
//! // What does this rollout do to 60 devices in 6 hours?
//! let spec = FleetSpec::new(60, 6, 1);
//! let report = simulate(&spec)?;
//! let rollout = &report.rollouts[0];
//! assert_eq!(rollout.state_words(), "completed");
//! assert_eq!(rollout.confirmed(), 60);
//! assert!(report.violations.is_empty());
//! println!("{}", rollout.chart());
//! # Ok::<(), slmops_sim::SpecError>(())
//! ```
#![forbid(unsafe_code)]

mod catalog;
mod chart;
mod device;
mod faults;
mod hub;
mod link;
mod network;
mod operation;
mod queue;
mod report;
mod run;
mod scenario;
mod shrink;
mod spec;
mod time;
mod traffic;
mod watch;

pub use operation::{
    Action, EffectKind, HubWork, Moment, Operation, OperatorCommand, ParseOperationError,
};
pub use report::{GroupReport, Point, Report, RolloutReport, Violation, WaveReport};
#[doc(hidden)]
pub use run::{Manner, Sabotage};
pub use scenario::{ParseScenarioError, Scenario};
pub use shrink::shrink;
#[doc(hidden)]
pub use shrink::shrink_as;
pub use spec::{
    Ailment, FaultSpec, FleetSpec, GroupSpec, Health, LinkSpec, MAX_DEVICES, MAX_HOURS,
    OfflineHours, RolloutSpec, SpecError, TrafficSpec, VariantSpec,
};
pub use time::{ParseTimeError, Time};

/// Simulates a fleet: draws its faults from its seed and runs its hours.
///
/// # Errors
/// [`SpecError`] when the specification is out of bounds.
pub fn simulate(spec: &FleetSpec) -> Result<Report, SpecError> {
    Scenario::of(spec)?.run()
}
