//! What a device's numbers say: how much likelier they are if it has a worse release.

use slmops_api::evidence::EvidenceCounts;
use slmops_api::gate::Metric;

use super::{Compared, LEAST_DEVICES};

/// By how much a worse release multiplies the rate of events, or the odds of being among the
/// devices that grew worse the most.
pub(super) const STRENGTHS: [f64; 4] = [1.5, 2.5, 5.0, 12.0];
/// What all devices together had before counts, for one device, as much as this exposure of its own.
const PRIOR_EXPOSURE: f64 = 50.0;

/// One device's numbers of one metric.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Sample {
    /// Events and what they are out of, before and after.
    Count { before: (f64, f64), after: (f64, f64) },
    /// The logarithm of after over before; more is worse.
    Ratio(f64),
}

/// The devices' numbers; of ratios, only the devices that have one.
pub(super) fn samples(devices: &[Compared], metric: Metric) -> Vec<Sample> {
    devices.iter().filter_map(|device| sample(device, metric)).collect()
}

fn sample(device: &Compared, metric: Metric) -> Option<Sample> {
    let Compared { before, after } = device;
    let count = |of: fn(&EvidenceCounts) -> (f64, f64)| {
        Some(Sample::Count { before: of(before), after: of(after) })
    };
    let ratio = |of: fn(&EvidenceCounts) -> Option<f64>| {
        Some(Sample::Ratio(of(after)? - of(before)?)).filter(Sample::is_finite)
    };
    match metric {
        Metric::Errors => count(|c| (c.errors as f64, (c.answered + c.errors) as f64)),
        Metric::Crashes => count(|c| (c.crashes as f64, c.serving_s / 3_600.0)),
        Metric::Empty => count(|c| (c.empty as f64, c.answered as f64)),
        Metric::Truncated => count(|c| (c.truncated as f64, c.answered as f64)),
        Metric::Repetition => count(|c| (c.repetitive as f64, c.answered as f64)),
        Metric::Refusals => count(|c| (c.refusals as f64, c.answered as f64)),
        Metric::InvalidJson => count(|c| (c.invalid_json as f64, c.json as f64)),
        Metric::ThumbsDown => {
            count(|c| (c.thumbs_down as f64, (c.thumbs_up + c.thumbs_down) as f64))
        }
        Metric::Entropy => ratio(|c| {
            (c.entropy_tokens > 0).then(|| (c.entropy_nats / c.entropy_tokens as f64).ln())
        }),
        Metric::FirstToken => {
            ratio(|c| (c.first_tokens > 0).then(|| c.first_token_ln_ms / c.first_tokens as f64))
        }
        Metric::TokenTime => {
            ratio(|c| (c.decoded_tokens > 0).then(|| (c.decode_ms / c.decoded_tokens as f64).ln()))
        }
        Metric::Memory => {
            ratio(|c| (c.peak_memory_bytes > 0).then(|| (c.peak_memory_bytes as f64).ln()))
        }
        Metric::Replay => None,
    }
}

impl Sample {
    fn is_finite(&self) -> bool {
        match self {
            Self::Count { .. } => true,
            Self::Ratio(ratio) => ratio.is_finite(),
        }
    }

    fn ratio(&self) -> f64 {
        match self {
            Self::Count { .. } => 0.0,
            Self::Ratio(ratio) => *ratio,
        }
    }
}

/// The logarithms of the weights of a stratum's devices, canaries and controls alike: they depend
/// on all numbers, and not on who is a canary.
pub(super) fn log_weights(samples: &[Sample], strength: f64) -> Vec<f64> {
    match samples.first() {
        Some(Sample::Count { .. }) => count_weights(samples, strength),
        Some(Sample::Ratio(_)) => ratio_weights(samples, strength),
        None => Vec::new(),
    }
}

/// How many events each device of a stratum should have by now: by its own rate before (drawn to the
/// stratum's), times what the whole stratum has now over what it had. Of ratios, nothing.
pub(super) fn expected(samples: &[Sample]) -> Vec<f64> {
    let counts = samples.iter().map(|sample| match sample {
        Sample::Count { before, after } => (*before, *after),
        Sample::Ratio(_) => ((0.0, 0.0), (0.0, 0.0)),
    });
    let counts: Vec<_> = counts.collect();
    let events: f64 = counts.iter().map(|(before, _)| before.0).sum();
    let exposure: f64 = counts.iter().map(|(before, _)| before.1).sum();
    // Half an event, so that none before does not mean never.
    let usual = (events + 0.5) / (exposure + PRIOR_EXPOSURE);
    let expected: Vec<f64> = counts
        .iter()
        .map(|((events, exposure), after)| {
            after.1 * (events + usual * PRIOR_EXPOSURE) / (exposure + PRIOR_EXPOSURE)
        })
        .collect();
    let events_now: f64 = counts.iter().map(|(_, after)| after.0).sum();
    let expected_now: f64 = expected.iter().sum();
    let shift = if expected_now > 0.0 { events_now / expected_now } else { 0.0 };
    expected.into_iter().map(|expected| expected * shift).collect()
}

/// Likelihood ratios of Poisson counts: `strength` times the expected number against that number.
fn count_weights(samples: &[Sample], strength: f64) -> Vec<f64> {
    let weigh = |(sample, expected): (&Sample, f64)| match sample {
        Sample::Count { after, .. } => after.0 * strength.ln() - (strength - 1.0) * expected,
        Sample::Ratio(_) => 0.0,
    };
    samples.iter().zip(expected(samples)).map(weigh).collect()
}

/// `strength` for a device that grew worse by more than the median of its stratum.
fn ratio_weights(samples: &[Sample], strength: f64) -> Vec<f64> {
    let mut sorted: Vec<f64> = samples.iter().map(Sample::ratio).collect();
    sorted.sort_by(f64::total_cmp);
    let median = sorted[(sorted.len() - 1) / 2];
    let weigh = |sample: &Sample| if sample.ratio() > median { strength.ln() } else { 0.0 };
    samples.iter().map(weigh).collect()
}

/// One arm of a stratum.
pub(super) struct Arm {
    /// Events per exposure, or the mean of the ratios' logarithms.
    pub mean: f64,
    /// The same beyond what was expected of these devices: what differs before the release is no loss
    /// (Deng, Xu, Kohavi and Walker 2013).
    pub beyond: f64,
    /// The variance of `beyond`, from the spread between devices; of too few there is none.
    pub variance: Option<f64>,
    /// Its exposure, or its number of devices.
    pub weight: f64,
}

/// What an arm shows; nothing where nothing was counted.
pub(super) fn arm(samples: &[Sample], expected: &[f64]) -> Option<Arm> {
    // A mean is a rate whose exposure is one for each device.
    let values = samples.iter().map(|sample| match sample {
        Sample::Count { after, .. } => *after,
        Sample::Ratio(ratio) => (*ratio, 1.0),
    });
    let counted = values.zip(expected).filter(|((_, exposure), _)| *exposure > 0.0);
    let (mut sum, mut weight, mut pairs) = (0.0, 0.0, Vec::with_capacity(samples.len()));
    for ((value, exposure), expected) in counted {
        sum += value;
        weight += exposure;
        pairs.push((value - expected, exposure));
    }
    if pairs.is_empty() {
        return None;
    }
    let beyond = pairs.iter().map(|(value, _)| value).sum::<f64>() / weight;
    let number = pairs.len() as f64;
    // The variance of a ratio estimate (Cochran 1977, 6.4).
    let squares: f64 =
        pairs.iter().map(|(value, exposure)| (value - beyond * exposure).powi(2)).sum::<f64>()
            * number
            / (number - 1.0).max(1.0);
    // Rare events: never surer than one event more would leave it.
    let least = if matches!(samples.first(), Some(Sample::Count { .. })) { sum + 1.0 } else { 0.0 };
    let variance = squares.max(least) / (weight * weight);
    let mean = sum / weight;
    Some(Arm { mean, beyond, variance: (pairs.len() >= LEAST_DEVICES).then_some(variance), weight })
}
