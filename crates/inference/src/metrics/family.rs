//! What is counted, as monitoring systems take it: families of points, told apart by attributes. Their
//! names, units and attributes are OpenTelemetry's; [`super::prometheus`] and [`super::otlp`] write them.

use std::time::SystemTime;

/// The attributes of a point. No value is ever text of a prompt or an answer.
pub(crate) type Attributes = Vec<(&'static str, String)>;

/// One metric.
pub(crate) struct Family {
    pub(crate) name: &'static str,
    pub(super) help: &'static str,
    /// In the Unified Code for Units of Measure: `s`, `By`, `{token}`.
    pub(super) unit: &'static str,
    pub(super) kind: Kind,
    pub(crate) points: Vec<Point>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It only grows.
    Counter,
    Gauge,
    Histogram,
}

/// One value of a metric.
pub(crate) struct Point {
    pub(crate) attributes: Attributes,
    /// When its count began.
    pub(super) since: SystemTime,
    pub(crate) value: Reading,
}

pub(crate) enum Reading {
    Number(f64),
    Histogram(Histogram),
}

/// Counts at fixed upper bounds.
#[derive(Clone)]
pub(crate) struct Histogram {
    pub(super) bounds: &'static [f64],
    /// One for each bound, and one for what is above the last.
    pub(crate) counts: Vec<u64>,
    pub(crate) sum: f64,
}

impl Histogram {
    pub(super) fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    /// Adds a value that was seen so many times.
    pub(super) fn add(&mut self, value: f64, times: u64) {
        let above = self.bounds.len();
        let place = self.bounds.iter().position(|bound| value <= *bound).unwrap_or(above);
        self.counts[place] += times;
        self.sum += value * times as f64;
    }

    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

impl Family {
    /// A metric of one number.
    pub(crate) fn number(
        kind: Kind,
        name: &'static str,
        unit: &'static str,
        help: &'static str,
        since: SystemTime,
        value: f64,
    ) -> Self {
        let point = Point { attributes: Vec::new(), since, value: Reading::Number(value) };
        Self { name, help, unit, kind, points: vec![point] }
    }
}
