//! The table of crates, and the rules of the cores.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

/// A name in the first column of the table, its dependencies in the last.
fn table_of(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let rows = text.lines().filter(|line| line.starts_with("| `"));
    let mut table = BTreeMap::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, .., dependencies] = &cells[..] else { continue };
        let plain = |cell: &str| cell.replace('`', "");
        let dependencies = plain(dependencies)
            .split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty() && *name != "none")
            .map(str::to_owned)
            .collect();
        table.insert(plain(name), dependencies);
    }
    table
}

#[test]
fn the_crate_table_is_what_cargo_sees() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(&root)
        .output()
        .expect("cargo runs");
    let metadata: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let ours = |name: &str| name.strip_prefix("slmops-").map(str::to_owned);
    let mut real = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("packages") {
        let Some(name) = package["name"].as_str().and_then(ours) else { continue };
        let dependencies: BTreeSet<String> = package["dependencies"]
            .as_array()
            .expect("dependencies")
            .iter()
            .filter(|dependency| dependency["kind"].is_null())
            .filter_map(|dependency| dependency["name"].as_str().and_then(ours))
            .collect();
        real.insert(name, dependencies);
    }
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md");
    let section = text.split("## Crates").nth(1).expect("a section `## Crates`");
    let section = section.split("\n## ").next().unwrap_or(section);
    assert_eq!(table_of(section), real, "mend the table in ARCHITECTURE.md, or the dependency");
}

/// Shared by the cores: no clock, file, socket, thread or randomness of their own.
#[test]
fn the_cores_do_no_io() {
    const FORBIDDEN: [&str; 8] = [
        "std::fs",
        "std::net",
        "std::thread",
        "std::process",
        "SystemTime",
        "Instant::now",
        "Timestamp::now",
        "rand::rng",
    ];
    for core in ["agent-core", "fleet-core"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(core).join("src");
        let mut folders = vec![folder];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(&folder).expect("a folder of sources") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                    continue;
                }
                let text = std::fs::read_to_string(&path).expect("a source file");
                for word in FORBIDDEN {
                    assert!(!text.contains(word), "{} uses {word}", path.display());
                }
            }
        }
    }
}
