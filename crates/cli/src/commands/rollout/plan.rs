//! `slm rollout plan`: what would happen to whom.

use std::time::Duration;

use slmops_api::plan::{PlannedDevice, PlannedWave, RolloutPlan};
use slmops_api::rollout::Outcome;

use crate::output::{fields, table};
use crate::units;

/// Devices listed for each wave, at most; `--output json` has all.
const DEVICES_SHOWN: usize = 20;

/// A plan as text.
pub fn text(plan: &RolloutPlan) -> String {
    let devices: usize = plan.waves.iter().map(|wave| wave.devices.len()).sum();
    let mut head = vec![
        ("release", format!("{} {}", plan.asked.model, plan.asked.version)),
        ("to", plan.asked.policy.selector.to_string()),
        ("devices", format!("{devices} get it, {} left out", plan.left_out.len())),
        ("transfer", format!("{} at most", units::bytes(plan.transfer_bytes))),
        ("time", time(plan.expected_s)),
    ];
    if let Some(id) = &plan.rollout {
        head.insert(0, ("rollout", id.to_string()));
        head.push(("waits for", super::or_nothing(&plan.waiting_for)));
    }
    let halted: Vec<String> = plan.supersedes.iter().map(ToString::to_string).collect();
    if !halted.is_empty() {
        head.push(("replaces", format!("the halted rollout {}", halted.join(", "))));
    }
    let mut text = fields(&head);
    for note in &plan.notes {
        text.push_str(&format!("\nnote: {note}"));
    }
    for wave in &plan.waves {
        text.push_str("\n\n");
        text.push_str(&wave_text(wave));
    }
    if !plan.left_out.is_empty() {
        text.push_str("\n\nLeft out:\n");
        let rows = plan.left_out.iter().take(DEVICES_SHOWN);
        let rows = rows.map(|left_out| vec![left_out.name.clone(), left_out.why.clone()]);
        text.push_str(&table(&["device", "why"], rows));
        text.push_str(&more(plan.left_out.len()));
    }
    if plan.rollout.is_none() {
        text.push_str(
            "\n\nNothing of this has happened; `slm rollout start` with the same options does it.",
        );
    }
    text
}

fn time(expected_s: Option<u64>) -> String {
    match expected_s {
        Some(seconds) => format!(
            "about {}, if all goes well and nothing is waited for",
            units::duration(Duration::from_secs(seconds))
        ),
        None => "unknown: no device has taken a release in a rollout yet".to_owned(),
    }
}

fn wave_text(wave: &PlannedWave) -> String {
    let expected = match wave.expected_s {
        Some(seconds) => format!(", about {}", units::duration(Duration::from_secs(seconds))),
        None => String::new(),
    };
    let mut text = format!(
        "Wave {}: {} device{}, {} at most{expected}",
        wave.wave,
        wave.devices.len(),
        if wave.devices.len() == 1 { "" } else { "s" },
        units::bytes(wave.transfer_bytes)
    );
    for wait in &wave.waits {
        text.push_str(&format!("\n  waits for {wait}"));
    }
    text.push('\n');
    let rows = wave.devices.iter().take(DEVICES_SHOWN).map(row);
    text.push_str(&table(&["device", "class", "site", "variant", ">transfer", "state"], rows));
    text.push_str(&more(wave.devices.len()));
    text
}

fn row(device: &PlannedDevice) -> Vec<String> {
    vec![
        device.name.clone(),
        device.class.to_string(),
        device.site.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
        device.variant.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
        match device.transfer_bytes {
            0 => "none".to_owned(),
            size => units::bytes(size),
        },
        match &device.outcome {
            Outcome::Updating => "told at once".to_owned(),
            Outcome::Pending => "told later".to_owned(),
            outcome => super::outcome(outcome),
        },
    ]
}

fn more(devices: usize) -> String {
    match devices.saturating_sub(DEVICES_SHOWN) {
        0 => String::new(),
        more => format!("\nand {more} more (--output json lists all)"),
    }
}
