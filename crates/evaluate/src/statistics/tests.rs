use super::*;

/// SplitMix64 (Steele, Lea and Flood, 2014): a generator small enough to be part of a test.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        let (u, v) = (1.0 - self.uniform(), self.uniform());
        (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()
    }
}

/// The share of `runs` in which the interval that `draw` returns holds `truth`.
fn coverage(truth: f64, runs: u32, mut draw: impl FnMut() -> Estimate) -> f64 {
    let hits = (0..runs).filter(|_| {
        let estimate = draw();
        (estimate.low..=estimate.high).contains(&truth)
    });
    hits.count() as f64 / f64::from(runs)
}

#[test]
fn a_mean_interval_covers_the_truth_in_95_of_100_cases() {
    let mut random = Random(1);
    for n in [3, 16, 40] {
        let share = coverage(0.5, 4000, || {
            let samples: Vec<f64> = (0..n).map(|_| 0.5 + random.normal()).collect();
            mean(&samples)
        });
        // Three standard errors of a coverage estimate over 4000 runs are 0.0103.
        assert!((share - 0.95).abs() < 0.0105, "{n} samples: {share}");
    }
}

#[test]
fn a_skewed_metric_is_still_covered_nearly_as_often() {
    // Per-chunk divergences are positive with a long tail: log-normal is the hard case.
    let mut random = Random(2);
    let truth = (0.25_f64 / 2.0).exp();
    let share = coverage(truth, 4000, || {
        let samples: Vec<f64> = (0..16).map(|_| (0.5 * random.normal()).exp()).collect();
        mean(&samples)
    });
    assert!(share > 0.91, "{share}");
}

#[test]
fn paired_proportions_cover_the_true_loss() {
    let mut random = Random(3);
    for (both, lost, gained) in [(0.85, 0.05, 0.05), (0.70, 0.20, 0.02), (0.30, 0.30, 0.05)] {
        let share = coverage(lost - gained, 3000, || {
            let (mut baseline, mut candidate) = (Vec::new(), Vec::new());
            for _ in 0..24 {
                let u = random.uniform();
                baseline.push(u < both + lost);
                candidate.push(u < both || (both + lost..both + lost + gained).contains(&u));
            }
            paired_proportions(&baseline, &candidate)
        });
        assert!(share > 0.935, "{both} {lost} {gained}: {share}");
    }
}

#[test]
fn newcombes_published_example_is_met() {
    // Newcombe 1998, table II, method 10: e=36 f=12 g=2 h=0 gives -0.0569 … 0.3404 around 0.2
    // for cells 36, 12, 2, 0 and n=50.
    let cells = [(true, true, 36), (true, false, 12), (false, true, 2), (false, false, 0)];
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for (one, two, count) in cells {
        first.extend(std::iter::repeat_n(one, count));
        second.extend(std::iter::repeat_n(two, count));
    }
    let estimate = paired_proportions(&first, &second);
    assert!((estimate.mean - 0.2).abs() < 1e-9);
    assert!((estimate.low - 0.0569).abs() < 5e-4, "{estimate:?}");
    assert!((estimate.high - 0.3404).abs() < 5e-4, "{estimate:?}");
}

#[test]
fn extreme_samples_stay_numbers() {
    for estimate in [mean(&[]), mean(&[1.0]), proportion(0, 0), paired_proportions(&[], &[])] {
        assert!(estimate.low < estimate.high, "{estimate:?}");
        let json = serde_json::to_string(&estimate).unwrap();
        assert!(!json.contains("null"), "{json}");
    }
    let all = proportion(24, 24);
    assert!(all.high == 1.0 && all.low > 0.8 && all.low < 0.9, "{all:?}");
    let same = paired_proportions(&[true; 24], &[true; 24]);
    assert!(same.mean == 0.0 && same.high > 0.05 && same.high < 0.2, "{same:?}");
    assert_eq!(quantile(&mut [], 0.99), 0.0);
    assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 0.5), 2.0);
    assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 1.0), 3.0);
}

#[test]
fn t_quantiles_join_without_a_step() {
    assert!((t_975(31) - 2.0395).abs() < 1e-3);
    assert!((t_975(100) - 1.9840).abs() < 1e-3);
    assert!((t_975(1_000_000) - Z).abs() < 1e-5);
}
