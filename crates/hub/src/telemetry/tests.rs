use super::*;

fn sketch(values: impl IntoIterator<Item = f64>) -> Sketch {
    let mut sketch = Sketch::default();
    values.into_iter().for_each(|value| sketch.add(value, 1));
    sketch
}

fn near(found: Option<f64>, wanted: f64) {
    let found = found.expect("something was counted");
    // Half a bucket: 2^(1/16) is 1.044.
    assert!((found / wanted - 1.0).abs() < 0.05, "{found} instead of {wanted}");
}

#[test]
fn quantiles_are_right_to_a_twentieth() {
    for scale in [1e-6, 0.3, 1.0, 77.0, 1e12] {
        let all = sketch((1..=1000).map(|number| f64::from(number) * scale));
        near(all.quantile(0.05), 50.0 * scale);
        near(all.quantile(0.5), 500.0 * scale);
        near(all.quantile(0.95), 950.0 * scale);
        near(all.quantile(0.0), scale);
        near(all.quantile(1.0), 1000.0 * scale);
    }
    assert_eq!(Sketch::default().quantiles(), None);
}

#[test]
fn sketches_merge_to_that_of_all_values_in_any_order() {
    let (low, high) = (1..400, 400..=1000);
    let all = sketch((1..=1000).map(f64::from));
    let (low, high) = (sketch(low.map(f64::from)), sketch(high.map(f64::from)));
    for (mut one, other) in [(low.clone(), &high), (high.clone(), &low)] {
        one.merge(other);
        assert_eq!(one, all);
    }
}

#[test]
fn nonsense_is_not_counted_and_nothing_overflows() {
    let mut sketch = sketch([f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 1e300]);
    assert_eq!(sketch.0.len(), 1);
    near(sketch.quantile(0.5), MAX_VALUE);
    for _ in 0..3 {
        sketch.add(1.0, u64::MAX);
        sketch.add(2.0, u64::MAX);
    }
    near(sketch.quantile(0.25), 1.0);
    near(sketch.quantile(0.75), 2.0);
    let mut twice = sketch.clone();
    twice.merge(&sketch);
    near(twice.quantile(0.75), 2.0);
}
