//! The statistics of the gate between two waves.
//!
//! Two questions, two methods, both with the device as the unit. *Is it worse?* is answered by an
//! e-value that needs nothing but the random choice of canaries (`assignment.rs`); it halts. *Is it
//! surely not much worse?* is answered by a confidence bound from the spread between devices; it
//! promotes. Both may be asked at any number of looks. Start reading at [`look`]. Where there are too few
//! devices for either, each is compared with itself: [`replayed`].

mod assignment;
mod replay;
mod weights;

pub use replay::replayed;

#[cfg(test)]
mod tests;

use slmops_api::evidence::EvidenceCounts;
use slmops_api::gate::{GatePolicy, Metric, MetricReading};

/// The chance that some look's bound is below the true loss.
const BOUND_ALPHA: f64 = 0.05;
/// The fewest devices of an arm from whose spread a bound is made.
const LEAST_DEVICES: usize = 5;
/// Seconds between the first looks.
pub const FIRST_LOOKS_S: u32 = 300;
/// Later looks come after this share of the time since the comparison began.
const LATER_LOOKS: u32 = 4;
/// How many looks are foreseen: 64 later ones are a million times as late.
const LOOKS_AHEAD: u32 = 64;

/// One device in a comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Compared {
    /// What it counted of the model before.
    pub before: EvidenceCounts,
    /// What it counted since the comparison began.
    pub after: EvidenceCounts,
}

/// Devices of one class: those that got the release, and those that might as well have.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stratum {
    /// Devices with the release.
    pub canaries: Vec<Compared>,
    /// Devices without it.
    pub controls: Vec<Compared>,
}

/// Seconds from one look to the next, `elapsed_s` after the comparison began.
pub fn next_look_in_s(elapsed_s: u32) -> u32 {
    FIRST_LOOKS_S.max(elapsed_s / LATER_LOOKS)
}

/// The share of the chance of error that is spent at a look, from 1; over all looks it sums to 1.
fn share_of_look(look: u32) -> f64 {
    let look = f64::from(look);
    1.0 / (look * (look + 1.0))
}

/// What the `look`-th look (from 1) finds, metric by metric, of which `earlier` holds the readings
/// of the look before. A metric of which nothing was counted is left out.
///
/// Each look's e-value has the mean 1 if the release changes nothing, and counts with the share of
/// its look: the sum over all looks, which only grows, has a mean of at most 1, so that the chance
/// that it ever reaches 1/α is at most α (Markov).
pub fn look(
    policy: &GatePolicy,
    strata: &[Stratum],
    look: u32,
    earlier: &[MetricReading],
) -> Vec<MetricReading> {
    let read = |metric: Metric| {
        let before = earlier.iter().find(|reading| reading.metric == metric).copied();
        read(policy, strata, metric, look, before)
    };
    // What is replayed is compared with no other device: see `replayed`.
    let compared = Metric::ALL.into_iter().filter(|metric| *metric != Metric::Replay);
    compared.filter_map(read).collect()
}

/// The evidence for harm over all metrics: their e-values' mean, in which those count 0 whose loss
/// does not look greater than is allowed. Those that the policy names weigh half of it together: what
/// is asked for is found sooner, and each metric more that can halt costs them nothing.
pub fn harm(policy: &GatePolicy, readings: &[MetricReading]) -> f64 {
    let named = policy.allow.len();
    let others = Metric::ALL.len() - named;
    let weight = |metric: Metric| match policy.allow.contains_key(&metric) {
        true if others > 0 => 0.5 / named as f64,
        false if named > 0 => 0.5 / others as f64,
        _ => 1.0 / Metric::ALL.len() as f64,
    };
    let harmful = readings.iter().filter(|reading| reading.loss > reading.allowed);
    harmful.fold(0.0, |sum, reading| sum + weight(reading.metric) * reading.e_value)
}

fn read(
    policy: &GatePolicy,
    strata: &[Stratum],
    metric: Metric,
    look: u32,
    earlier: Option<MetricReading>,
) -> Option<MetricReading> {
    let so_far = earlier.map_or(0.0, |reading| reading.e_value);
    let Some(difference) = difference(strata, metric) else { return earlier };
    let allowed = policy.allowed(metric);
    // Ratios are compared by their logarithms.
    let (whole, on_scale): (fn(f64) -> f64, f64) = match metric.is_count() {
        true => (|loss| loss, allowed),
        false => (f64::exp_m1, allowed.ln_1p()),
    };
    let bound = difference.error.map(|error| difference.loss + quantile(look) * error);
    let room = on_scale - difference.loss;
    let hours: f64 = strata.iter().flat_map(|stratum| &stratum.canaries).map(served_h).sum();
    let device_hours_needed = match (bound, difference.error) {
        (Some(bound), Some(error)) if bound > on_scale && room > 0.0 => {
            times_needed(look, error / room).map(|times| hours * (times - 1.0))
        }
        _ => None,
    };
    Some(MetricReading {
        metric,
        e_value: so_far + share_of_look(look) * e_value(strata, metric),
        canaries: if metric.is_count() { difference.canaries } else { difference.canaries.exp() },
        controls: if metric.is_count() { difference.controls } else { difference.controls.exp() },
        loss: whole(difference.loss),
        loss_at_most: bound.map(whole),
        allowed,
        device_hours_needed,
    })
}

fn served_h(device: &Compared) -> f64 {
    device.after.serving_s / 3_600.0
}

/// How many standard errors the bound of a look lies above the loss: a bound of the tail of the
/// normal distribution, P(Z > z) ≤ exp(-z²/2) / 2.
fn quantile(look: u32) -> f64 {
    quantile_of(share_of_look(look))
}

/// The same for a share of the chance of error.
fn quantile_of(share: f64) -> f64 {
    (-2.0 * (2.0 * BOUND_ALPHA * share).ln()).sqrt()
}

/// How many times as much time it takes until a standard error that is now `error` (of the room up
/// to what is allowed) is small enough, at the look that finds it so. None if that is out of sight.
fn times_needed(look: u32, error: f64) -> Option<f64> {
    let wait_s = |elapsed_s: f64| f64::from(FIRST_LOOKS_S).max(elapsed_s / f64::from(LATER_LOOKS));
    let mut elapsed_s = 0.0;
    for _ in 0..look {
        elapsed_s += wait_s(elapsed_s);
    }
    let so_far_s = elapsed_s;
    (look + 1..=look + LOOKS_AHEAD).find_map(|later| {
        elapsed_s += wait_s(elapsed_s);
        let times = elapsed_s / so_far_s;
        (quantile(later) * error <= times.sqrt()).then_some(times)
    })
}

/// The e-value of one look: strata are drawn from independently, so that theirs multiply; the mean
/// over several strengths of the effect is one again.
fn e_value(strata: &[Stratum], metric: Metric) -> f64 {
    let of = |strength: f64| {
        let stratum = |stratum: &Stratum| {
            let canaries = weights::samples(&stratum.canaries, metric);
            let controls = weights::samples(&stratum.controls, metric);
            let number = canaries.len();
            let all: Vec<_> = canaries.into_iter().chain(controls).collect();
            assignment::log_e_value(&weights::log_weights(&all, strength), number)
        };
        strata.iter().map(stratum).sum::<f64>().exp()
    };
    let strengths = weights::STRENGTHS;
    strengths.into_iter().map(of).sum::<f64>() / strengths.len() as f64
}

/// How much worse canaries are than controls.
struct Difference {
    canaries: f64,
    controls: f64,
    /// Their difference, stratum by stratum, weighed by the canaries in each; less by what their
    /// numbers before let expect.
    loss: f64,
    /// Its standard error, from the spread between devices.
    error: Option<f64>,
}

fn difference(strata: &[Stratum], metric: Metric) -> Option<Difference> {
    let (mut canaries, mut controls, mut loss, mut total) = (0.0, 0.0, 0.0, 0.0);
    let mut variance = Some(0.0);
    for stratum in strata {
        let ours = weights::samples(&stratum.canaries, metric);
        let number = ours.len();
        let mut all = ours;
        all.extend(weights::samples(&stratum.controls, metric));
        let expected = weights::expected(&all);
        let (ours, theirs) = (
            weights::arm(&all[..number], &expected[..number]),
            weights::arm(&all[number..], &expected[number..]),
        );
        let (Some(ours), Some(theirs)) = (ours, theirs) else { continue };
        loss += ours.weight * (ours.beyond - theirs.beyond);
        canaries += ours.weight * ours.mean;
        controls += ours.weight * theirs.mean;
        let both = ours.variance.zip(theirs.variance).map(|(ours, theirs)| ours + theirs);
        variance = variance.zip(both).map(|(sum, both)| sum + ours.weight * ours.weight * both);
        total += ours.weight;
    }
    (total > 0.0).then(|| Difference {
        canaries: canaries / total,
        controls: controls / total,
        loss: loss / total,
        error: variance.map(|variance| variance.sqrt() / total),
    })
}
