//! What devices count in use, added up: how a report becomes counts, and how counts become one.
//! `store/telemetry.rs` keeps the counts. Start reading at [`Counts::of`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use slmops_api::device::DeviceReport;
use slmops_api::evidence::{Evidence, EvidenceCounts};
use slmops_api::telemetry::{Quantiles, TelemetryPoint};
use slmops_api::{ClassName, SiteName};
use tokio::sync::watch;

use crate::engine::stopped;
use crate::store::Store;

#[cfg(test)]
mod tests;

/// How often old counts are looked for.
const TIDY_EVERY: Duration = Duration::from_secs(3600);
/// Buckets of a sketch for each doubling of the value: neighbours differ by 2^(1/8), 9 %.
const BUCKETS_PER_OCTAVE: f64 = 8.0;
/// Values are counted as if they were no greater.
const MAX_VALUE: f64 = (1_u64 << 53) as f64;

/// Whose counts are added up together, besides what they ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The device's class.
    pub class: ClassName,
    /// Its site, if it has one.
    pub site: Option<SiteName>,
}

/// How long counts are kept, in seconds. Hours become days, and days are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Hours.
    pub hours_s: u64,
    /// Days.
    pub days_s: u64,
}

impl Default for Keep {
    /// A fortnight of hours, and thirteen months of days.
    fn default() -> Self {
        Self { hours_s: 14 * 24 * 3600, days_s: 400 * 24 * 3600 }
    }
}

/// How often each value was seen, by buckets that grow with it (the logarithmic mapping of DDSketch,
/// Masson, Rim & Lee 2019, section 2.1), so that a quantile is right to 5 % whatever was counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Sketch(BTreeMap<i16, u64>);

impl Sketch {
    fn add(&mut self, value: f64, times: u64) {
        if times == 0 || !value.is_finite() || value <= 0.0 {
            return;
        }
        // Within ±53 octaves, which the bound of the value and the smallest one of use keep to.
        let bucket = (value.clamp(1e-9, MAX_VALUE).log2() * BUCKETS_PER_OCTAVE).floor() as i16;
        let count = self.0.entry(bucket).or_default();
        *count = count.saturating_add(times);
    }

    fn merge(&mut self, other: &Self) {
        for (bucket, times) in &other.0 {
            let count = self.0.entry(*bucket).or_default();
            *count = count.saturating_add(*times);
        }
    }

    fn quantile(&self, share: f64) -> Option<f64> {
        let total: u128 = self.0.values().map(|count| u128::from(*count)).sum();
        let rank = (share * total as f64).ceil().max(1.0) as u128;
        let mut below = 0;
        for (bucket, count) in &self.0 {
            below += u128::from(*count);
            if below >= rank {
                return Some(((f64::from(*bucket) + 0.5) / BUCKETS_PER_OCTAVE).exp2());
            }
        }
        None
    }

    fn quantiles(&self) -> Option<Quantiles> {
        Some(Quantiles {
            p05: self.quantile(0.05)?,
            p50: self.quantile(0.5)?,
            p95: self.quantile(0.95)?,
        })
    }
}

/// Counts of some devices over some time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    reports: u64,
    answered: u64,
    errors: u64,
    crashes: u64,
    decoded_tokens: u64,
    tokens_per_s: Sketch,
    first_token_ms: Sketch,
    memory_bytes: Sketch,
}

impl Counts {
    /// What a report counts beyond the one before it, of the model that runs. None if nothing runs.
    pub fn of(before: Option<&DeviceReport>, report: &DeviceReport) -> Option<Self> {
        let running = report.running.as_ref()?;
        let about = |report: &DeviceReport| -> Option<EvidenceCounts> {
            let Evidence { manifest, counts, .. } = report.evidence.as_ref()?;
            (*manifest == running.manifest).then_some(*counts)
        };
        let mut counts = Self { reports: 1, ..Self::default() };
        // What has told nothing of it yet counts as a report alone.
        let Some(all) = about(report) else { return Some(counts) };
        // Counters run from when the device began to serve this manifest. Those that fell began anew.
        let new = match before.and_then(about).filter(|before| before.serving_s <= all.serving_s) {
            Some(before) => all.since(&before),
            None => all,
        };
        (counts.answered, counts.errors, counts.crashes) = (new.answered, new.errors, new.crashes);
        counts.decoded_tokens = new.decoded_tokens;
        let seconds = new.decode_ms / 1e3;
        counts.tokens_per_s.add(new.decoded_tokens as f64 / seconds, new.first_tokens.max(1));
        let mean_ln_ms = new.first_token_ln_ms / new.first_tokens as f64;
        counts.first_token_ms.add(mean_ln_ms.exp(), new.first_tokens);
        counts.memory_bytes.add(all.peak_memory_bytes as f64, 1);
        Some(counts)
    }

    /// Both together.
    pub fn merge(&mut self, other: &Self) {
        let add = |sum: &mut u64, count: u64| *sum = sum.saturating_add(count);
        add(&mut self.reports, other.reports);
        add(&mut self.answered, other.answered);
        add(&mut self.errors, other.errors);
        add(&mut self.crashes, other.crashes);
        add(&mut self.decoded_tokens, other.decoded_tokens);
        self.tokens_per_s.merge(&other.tokens_per_s);
        self.first_token_ms.merge(&other.first_token_ms);
        self.memory_bytes.merge(&other.memory_bytes);
    }

    /// As the API shows them.
    pub fn shown(&self, start: Timestamp) -> TelemetryPoint {
        TelemetryPoint {
            start,
            reports: self.reports,
            answered: self.answered,
            errors: self.errors,
            crashes: self.crashes,
            decoded_tokens: self.decoded_tokens,
            tokens_per_s: self.tokens_per_s.quantiles(),
            first_token_ms: self.first_token_ms.quantiles(),
            memory_bytes: self.memory_bytes.quantiles(),
        }
    }
}

/// Makes days of old hours and removes old days, until `stop` turns true. Every hub does: what one has
/// done, another one finds done.
pub async fn tidy(store: Arc<dyn Store>, keep: Keep, mut stop: watch::Receiver<bool>) {
    let mut every = tokio::time::interval(TIDY_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stopped(&mut stop) => return,
            _ = every.tick() => {}
        }
        loop {
            match store.fold_telemetry(Timestamp::now(), keep).await {
                Ok(more) if more && !*stop.borrow() => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "cannot tidy old telemetry; trying again in an hour");
                    break;
                }
            }
        }
    }
}
