//! Which class a device belongs to.

use std::collections::BTreeMap;

use slmops_api::ClassName;
use slmops_api::device::DeviceFacts;
use slmops_api::model::DeviceClass;

use crate::words::bytes;

/// The label by which an operator puts a device into a class by name.
pub const CLASS_LABEL: &str = "class";

/// The class of devices in a fleet that has no classes at all.
const UNCLASSIFIED: &str = "unclassified";

/// A device's class and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Classification {
    /// The class.
    pub class: ClassName,
    /// Why, in words.
    pub why: String,
}

/// Finds the class of a device: the one that its label names, else the one with the greatest
/// `min_memory_bytes` that its memory budget reaches, else the one that asks for the least.
pub fn classify(
    facts: &DeviceFacts,
    labels: &BTreeMap<String, String>,
    classes: &[DeviceClass],
) -> Classification {
    if let Some(label) = labels.get(CLASS_LABEL)
        && let Some(class) = classes.iter().find(|class| class.name.as_str() == label)
    {
        let why = format!("its label class={label} names it");
        return Classification { class: class.name.clone(), why };
    }
    let budget = facts.memory_budget_bytes;
    let reached = classes
        .iter()
        .filter(|class| class.min_memory_bytes <= budget)
        .max_by(|a, b| (a.min_memory_bytes, &b.name).cmp(&(b.min_memory_bytes, &a.name)));
    if let Some(class) = reached {
        let why = format!(
            "its memory budget of {} reaches the {} that the class asks for",
            bytes(budget),
            bytes(class.min_memory_bytes)
        );
        return Classification { class: class.name.clone(), why };
    }
    match classes.iter().min_by_key(|class| (class.min_memory_bytes, &class.name)) {
        Some(class) => Classification {
            class: class.name.clone(),
            why: format!(
                "its memory budget of {} reaches no class; this one asks for the least ({})",
                bytes(budget),
                bytes(class.min_memory_bytes)
            ),
        },
        None => Classification {
            class: UNCLASSIFIED.parse().expect("a constant name is a name"),
            why: "the fleet has no classes".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    fn check(budget_mib: u64, label: Option<&str>, expected: &str) {
        let classes = [
            testing::class("large", 256),
            testing::class("medium", 192),
            testing::class("small", 96),
        ];
        let labels = label.map(|name| (CLASS_LABEL.to_owned(), name.to_owned())).into_iter();
        let found = classify(&testing::facts(budget_mib), &labels.collect(), &classes);
        assert_eq!(found.class.as_str(), expected, "{}", found.why);
    }

    #[test]
    fn budget_decides() {
        check(300, None, "large");
        check(256, None, "large");
        check(255, None, "medium");
        check(100, None, "small");
        check(1, None, "small");
    }

    #[test]
    fn label_wins_where_it_names_a_class() {
        check(300, Some("small"), "small");
        check(300, Some("unheard-of"), "large");
    }

    #[test]
    fn fleet_without_classes() {
        let found = classify(&testing::facts(10), &BTreeMap::new(), &[]);
        assert_eq!(found.class.as_str(), "unclassified");
    }
}
