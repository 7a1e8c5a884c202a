//! Numbers in words, the same everywhere.

use jiff::Timestamp;
use slmops_api::orders::{Exclusion, Orders, Pin};

/// A moment: `2026-01-31 02:00:00 UTC`.
pub fn clock(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// A pin: `pinned to m 1.0.0 by token ann: the reason`.
pub fn pin(pin: &Pin) -> String {
    format!("pinned to {} {} by {}: {}", pin.model, pin.version, pin.by, pin.reason)
}

/// An exclusion: `excluded by token ann: the reason`.
pub fn exclusion(exclusion: &Exclusion) -> String {
    format!("excluded by {}: {}", exclusion.by, exclusion.reason)
}

/// What operators decided about a device, a line for each decision.
pub fn orders(orders: &Orders) -> Vec<String> {
    orders.pin.iter().map(pin).chain(orders.exclusion.iter().map(exclusion)).collect()
}

/// A size in MB (10^6 bytes), whole from 10 MB on: `141 MB`, `9.4 MB`, `812 kB`.
pub fn bytes(size: u64) -> String {
    let mega = size as f64 / 1e6;
    if mega >= 10.0 {
        format!("{mega:.0} MB")
    } else if mega >= 1.0 {
        format!("{mega:.1} MB")
    } else {
        format!("{:.0} kB", size as f64 / 1e3)
    }
}

/// `1 device`, `2 devices`.
pub fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

/// A duration in its two largest units: `45 s`, `2 min 5 s`, `1 h 3 min`.
pub fn seconds(total: i64) -> String {
    let total = total.max(0);
    match (total / 3600, total / 60 % 60, total % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, 0) => format!("{m} min"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, 0, _) => format!("{h} h"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

/// At most `limit` names joined by commas, then how many more there are.
pub fn list<T: AsRef<str>>(names: &[T], limit: usize) -> String {
    let shown: Vec<&str> = names.iter().take(limit).map(AsRef::as_ref).collect();
    match names.len().saturating_sub(limit) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}
