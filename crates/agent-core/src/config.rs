//! The core's limits, each with its unit.

use std::ops::Add;

/// Milliseconds since some fixed moment of this process; it only grows. Never the time of day.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

impl Add<u64> for Millis {
    type Output = Self;
    fn add(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

/// How patient the core is. All durations are in milliseconds of [`Millis`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Memory that a model may use, in bytes.
    pub memory_budget_bytes: u64,
    /// Seconds that the hub may hold a poll open.
    pub poll_wait_s: u32,
    /// The least time from the start of one poll to the start of the next.
    pub poll_interval_ms: u64,
    /// The first delay after a failure that is nobody's fault; doubles each time.
    pub backoff_base_ms: u64,
    /// The longest such delay.
    pub backoff_cap_ms: u64,
    /// The least time between two reports that differ in download progress alone.
    pub progress_interval_ms: u64,
    /// How long an answer of the hub may take (beyond the time that a poll is held open).
    pub answer_timeout_ms: u64,
    /// How long a download may stand still.
    pub stall_timeout_ms: u64,
    /// How long a device waits at the hub's word for a better source, all together.
    pub source_wait_ms: u64,
    /// How long reading and hashing local files may take.
    pub verify_timeout_ms: u64,
    /// How long replaying a package's prompts on two versions may take, at most; never more than a
    /// quarter of the time that a device has to confirm.
    pub replay_limit_ms: u64,
    /// How long one write of the ledger may take.
    pub save_timeout_ms: u64,
    /// How long loading a model that the ledger names may take, at boot or when going back.
    pub restore_timeout_ms: u64,
    /// How long a model is watched for a crash loop after it was activated or loaded at boot.
    pub watch_ms: u64,
    /// Crashes by the model's own fault within that time that make a crash loop.
    pub crash_limit: u32,
    /// Times that staging one candidate may be started without reaching a verdict.
    pub attempt_limit: u32,
    /// Times that a file may be missing at the source before the package counts as broken.
    pub missing_limit: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            memory_budget_bytes: u64::MAX,
            poll_wait_s: 25,
            poll_interval_ms: 1_000,
            backoff_base_ms: 1_000,
            backoff_cap_ms: 120_000,
            progress_interval_ms: 1_000,
            answer_timeout_ms: 60_000,
            stall_timeout_ms: 120_000,
            source_wait_ms: 3_600_000,
            verify_timeout_ms: 900_000,
            replay_limit_ms: 60_000,
            save_timeout_ms: 60_000,
            restore_timeout_ms: 300_000,
            watch_ms: 600_000,
            crash_limit: 3,
            attempt_limit: 8,
            missing_limit: 3,
        }
    }
}
