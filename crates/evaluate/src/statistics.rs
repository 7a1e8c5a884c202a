//! Confidence intervals at 95 %: of a mean, of a proportion, and of paired differences.

use slmops_api::report::Estimate;

/// The 97.5 % point of the standard normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// The 97.5 % points of Student's t for 1 to 30 degrees of freedom
/// (NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2).
const T_975: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];

/// The mean of `samples` with Student's t interval.
///
/// One sample has no spread to judge by: its interval is unbounded in effect (`±f64::MAX`), which
/// stays a number in JSON. No samples give the same around zero.
pub fn mean(samples: &[f64]) -> Estimate {
    let n = samples.len();
    let mean = if n == 0 { 0.0 } else { samples.iter().sum::<f64>() / n as f64 };
    if n < 2 {
        return Estimate { mean, low: f64::MIN, high: f64::MAX, samples: n as u32 };
    }
    let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
    let standard_error = (squares / (n - 1) as f64 / n as f64).sqrt();
    let half = t_975(n - 1) * standard_error;
    Estimate { mean, low: mean - half, high: mean + half, samples: n as u32 }
}

/// The mean of the differences `left - right`, pair by pair, with Student's t interval.
/// Both slices have the same length (the caller checked); spare samples are ignored.
pub fn paired_mean(left: &[f64], right: &[f64]) -> Estimate {
    let differences: Vec<f64> = left.iter().zip(right).map(|(l, r)| l - r).collect();
    mean(&differences)
}

/// The share of `right` among `all` with Wilson's score interval (E. B. Wilson, "Probable
/// inference, the law of succession, and statistical inference", JASA 22, 1927).
pub fn proportion(right: u32, all: u32) -> Estimate {
    if all == 0 {
        return Estimate { mean: 0.0, low: 0.0, high: 1.0, samples: 0 };
    }
    let n = f64::from(all);
    let p = f64::from(right) / n;
    let centre = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    let (low, high) = ((centre - half).clamp(0.0, p), (centre + half).clamp(p, 1.0));
    Estimate { mean: p, low, high, samples: all }
}

/// By how much the share of `true` in `baseline` exceeds that in `candidate`, item by item: the
/// paired score interval with continuity-corrected correlation (R. G. Newcombe, "Improved
/// confidence intervals for the difference between binomial proportions based on paired data",
/// Statistics in Medicine 17, 1998, method 10). Positive is a loss.
pub fn paired_proportions(baseline: &[bool], candidate: &[bool]) -> Estimate {
    let (mut both, mut only_baseline, mut only_candidate, mut neither) = (0_u32, 0_u32, 0_u32, 0);
    for pair in baseline.iter().zip(candidate) {
        match pair {
            (true, true) => both += 1,
            (true, false) => only_baseline += 1,
            (false, true) => only_candidate += 1,
            (false, false) => neither += 1,
        }
    }
    let all = both + only_baseline + only_candidate + neither;
    if all == 0 {
        return Estimate { mean: 0.0, low: -1.0, high: 1.0, samples: 0 };
    }
    let first = proportion(both + only_baseline, all);
    let second = proportion(both + only_candidate, all);
    let [a, b, c, d] = [both, only_baseline, only_candidate, neither].map(f64::from);
    let margins = (a + b) * (c + d) * (a + c) * (b + d);
    let phi = if margins == 0.0 {
        0.0
    } else {
        let product = a * d - b * c;
        let corrected =
            if product > 0.0 { (product - f64::from(all) / 2.0).max(0.0) } else { product };
        corrected / margins.sqrt()
    };
    let difference = first.mean - second.mean;
    let side = |left: f64, right: f64| {
        (left * left - 2.0 * phi * left * right + right * right).max(0.0).sqrt()
    };
    let low = difference - side(first.mean - first.low, second.high - second.mean);
    let high = difference + side(second.mean - second.low, first.high - first.mean);
    Estimate { mean: difference, low: low.max(-1.0), high: high.min(1.0), samples: all }
}

/// The value below which a share `q` (0 to 1) of `values` lies; 0 without values. Sorts `values`.
pub fn quantile(values: &mut [f32], q: f64) -> f32 {
    values.sort_by(f32::total_cmp);
    let index = (values.len() as f64 * q).ceil() as usize;
    values.get(index.saturating_sub(1).min(values.len().wrapping_sub(1))).copied().unwrap_or(0.0)
}

/// The 97.5 % point of Student's t. Above 30 degrees of freedom by the expansion in Abramowitz and
/// Stegun, "Handbook of Mathematical Functions", 26.7.5, good to four digits there.
fn t_975(degrees: usize) -> f64 {
    if let Some(value) = degrees.checked_sub(1).and_then(|index| T_975.get(index)) {
        return *value;
    }
    let v = degrees as f64;
    let g1 = (Z.powi(3) + Z) / 4.0;
    let g2 = (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / 96.0;
    Z + g1 / v + g2 / (v * v)
}

#[cfg(test)]
mod tests;
