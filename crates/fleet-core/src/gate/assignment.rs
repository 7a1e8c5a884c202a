//! The e-value of a random assignment.
//!
//! Which devices are canaries is drawn at random. If the release changes nothing, a device's
//! numbers are what they are whether it was drawn or not, so that each set of as many devices was
//! as likely to be the canaries as the set that was drawn. An alternative that weighs each device
//! with `f` makes the drawn set `S` as likely as its product of weights, among all sets of that
//! size; the likelihood ratio of the two,
//!
//! ```text
//!          product of f over S
//! E = ----------------------------------------------
//!      mean of that product over all sets of size |S|
//! ```
//!
//! has the mean 1 over the draw, whatever the numbers are: devices may differ, drift, and move
//! together. It is the conditional likelihood ratio of Fisher's noncentral hypergeometric
//! distribution (Harkness 1965) and an e-value in the sense of Vovk and Wang (2021). Weights may
//! depend on the numbers of all devices, but not on who is a canary.

/// Halvings of the interval in which the tilt is sought.
const MAX_HALVINGS: u32 = 60;

/// The logarithm of the e-value of one stratum, from the logarithms of its devices' weights, of
/// which the first `canaries` are the canaries'. 0 where there is nothing to compare with.
pub(super) fn log_e_value(log_weights: &[f64], canaries: usize) -> f64 {
    let devices = log_weights.len();
    if canaries == 0 || canaries == devices {
        return 0.0;
    }
    let drawn: f64 = log_weights[..canaries].iter().sum();
    drawn - log_mean_product(log_weights, canaries)
}

/// The logarithm of the mean, over all subsets of size `size`, of the product of their weights.
///
/// The elementary symmetric polynomial behind it is the chance that as many independent events
/// occur, whose odds are the weights times a common tilt (Chen and Liu 1997): a sum of positive
/// terms, and far from underflow where the tilt makes `size` events the expected number.
fn log_mean_product(log_weights: &[f64], size: usize) -> f64 {
    let tilt = tilt_for(log_weights, size);
    let mut chances = vec![0.0; size + 1];
    chances[0] = 1.0;
    let mut log_none = 0.0;
    for (seen, log_weight) in log_weights.iter().enumerate() {
        let log_odds = log_weight + tilt;
        let chance = logistic(log_odds);
        let otherwise = logistic(-log_odds);
        log_none += log_add_one_exp(log_odds);
        for occurred in (1..=size.min(seen + 1)).rev() {
            chances[occurred] = chances[occurred] * otherwise + chances[occurred - 1] * chance;
        }
        chances[0] *= otherwise;
    }
    chances[size].ln() + log_none - size as f64 * tilt - log_choose(log_weights.len(), size)
}

/// A tilt by which about `size` events are expected. Any gives the same result but for rounding.
fn tilt_for(log_weights: &[f64], size: usize) -> f64 {
    let most = log_weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let least = log_weights.iter().copied().fold(f64::INFINITY, f64::min);
    let even = (size as f64 / (log_weights.len() - size) as f64).ln();
    let (mut low, mut high) = (even - most, even - least);
    for _ in 0..MAX_HALVINGS {
        let tilt = f64::midpoint(low, high);
        let (mut expected, mut variance) = (0.0, 0.0);
        for log_weight in log_weights {
            let chance = logistic(log_weight + tilt);
            expected += chance;
            variance += chance * (1.0 - chance);
        }
        let off = expected - size as f64;
        if off * off <= variance {
            return tilt;
        }
        match off > 0.0 {
            true => high = tilt,
            false => low = tilt,
        }
    }
    f64::midpoint(low, high)
}

fn logistic(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn log_add_one_exp(x: f64) -> f64 {
    if x > 0.0 { x + (-x).exp().ln_1p() } else { x.exp().ln_1p() }
}

/// ln of the binomial coefficient, as a sum: the numbers are small and the result is exact to
/// rounding.
fn log_choose(n: usize, k: usize) -> f64 {
    let k = k.min(n - k);
    (0..k).map(|i| ((n - i) as f64 / (i + 1) as f64).ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subsets(devices: usize, size: usize) -> Vec<Vec<usize>> {
        (0_u32..1 << devices)
            .filter(|set| set.count_ones() as usize == size)
            .map(|set| (0..devices).filter(|i| set & (1 << i) != 0).collect())
            .collect()
    }

    /// Against the definition: all subsets, one by one.
    #[test]
    fn it_is_what_counting_gives_and_its_mean_is_one() {
        let weights: [f64; 8] = [0.3, -1.2, 4.0, 0.0, 0.0, 2.5, -7.0, 1.1];
        for size in 0..=weights.len() {
            let sets = subsets(weights.len(), size);
            let product = |set: &Vec<usize>| set.iter().map(|i| weights[*i]).sum::<f64>().exp();
            let mean = sets.iter().map(product).sum::<f64>() / sets.len() as f64;
            let mut total = 0.0;
            for set in &sets {
                let rest = (0..weights.len()).filter(|i| !set.contains(i));
                let order: Vec<f64> = set.iter().copied().chain(rest).map(|i| weights[i]).collect();
                let got = log_e_value(&order, size).exp();
                let wanted = product(set) / mean;
                // Rounding of some hundred operations.
                assert!((got / wanted - 1.0).abs() < 1e-12, "{set:?}: {got} and {wanted}");
                total += got;
            }
            assert!((total / sets.len() as f64 - 1.0).abs() < 1e-12, "{size}: {total}");
        }
    }

    #[test]
    fn extreme_weights_neither_overflow_nor_underflow() {
        let mut weights = vec![0.0; 1000];
        weights[..50].fill(400.0);
        let log_e = log_e_value(&weights, 50);
        // The drawn set has almost all the weight there is: the e-value is the number of sets.
        assert!((log_e - log_choose(1000, 50)).abs() < 1e-6, "{log_e}");
        weights.reverse();
        let log_e = log_e_value(&weights, 50);
        assert!(log_e.is_finite() && log_e < -1_000.0, "{log_e}");
        assert_eq!(log_e_value(&[1.0, 2.0], 2), 0.0);
        assert_eq!(log_e_value(&[1.0, 2.0], 0), 0.0);
    }

    /// 60 devices of which 12 are drawn, 9 of them among the 20 with an event, odds ratio 3: the
    /// ratio of the two densities of Fisher's noncentral hypergeometric distribution, by exact
    /// binomial coefficients (Python's `math.comb`).
    #[test]
    fn it_is_the_ratio_of_hypergeometric_densities() {
        assert!((log_choose(60, 12) - 27.967_035_279_775).abs() < 1e-9);
        let with = 3.0_f64.ln();
        let mut weights = vec![0.0; 60];
        weights[..9].fill(with);
        weights[12..23].fill(with);
        let got = log_e_value(&weights, 12);
        assert!((got - 4.117_825_392_463).abs() < 1e-9, "{got}");
    }
}
