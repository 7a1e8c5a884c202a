//! The owner's record of everything that left the device: when, where to, which fields, and every
//! value that changed since it was last sent. What merely repeats itself is counted. Bounded: two
//! files, the older one is dropped.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::durable;

/// The file in the state folder.
pub const OUTBOX_FILE: &str = "outbox.log";
/// The most bytes of one of the two files.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Seconds after which a call that repeats itself is noted again.
const REPEAT_S: u64 = 3_600;
/// The most bytes of one entry.
const MAX_ENTRY_BYTES: usize = 16 << 10;

/// The record. Writing to it never fails what is recorded.
pub struct Outbox {
    path: PathBuf,
    last: Mutex<BTreeMap<String, Last>>,
}

struct Last {
    fields: BTreeMap<String, String>,
    written: Instant,
    /// Times that the same was sent since.
    repeats: u64,
}

impl Outbox {
    /// The record in a state folder.
    pub fn open(folder: &Path) -> Self {
        Self { path: folder.join(OUTBOX_FILE), last: Mutex::new(BTreeMap::new()) }
    }

    /// Notes that `body` was sent to `endpoint`.
    pub fn sent(&self, endpoint: &str, body: &Value) {
        let mut fields = BTreeMap::new();
        flatten(String::new(), body, &mut fields);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let before = last.get_mut(endpoint);
        let mut line = entry(endpoint, &fields, before.as_ref().map(|before| &before.fields));
        if let Some(before) = before {
            let soon = before.written.elapsed() < Duration::from_secs(REPEAT_S);
            if before.fields == fields && soon {
                before.repeats += 1;
                return;
            }
            if before.repeats > 0 {
                line = format!("{line} (the one before {} times more)", before.repeats);
            }
        }
        let written = Instant::now();
        last.insert(endpoint.to_owned(), Last { fields, written, repeats: 0 });
        let at = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
        if let Err(error) = self.append(&format!("{at} {line}\n")) {
            tracing::debug!("cannot write {}: {error}", self.path.display());
        }
    }

    fn append(&self, line: &str) -> std::io::Result<()> {
        let mut file: File = OpenOptions::new().create(true).append(true).open(&self.path)?;
        if file.metadata()?.len() + line.len() as u64 > MAX_FILE_BYTES {
            std::fs::rename(&self.path, durable::with_suffix(&self.path, ".old"))?;
            file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        }
        file.write_all(line.as_bytes())
    }
}

/// All entries of a state folder, oldest first.
///
/// # Errors
/// Whatever the disk says.
pub fn read(folder: &Path) -> std::io::Result<Vec<String>> {
    let path = folder.join(OUTBOX_FILE);
    let mut entries = Vec::new();
    for path in [durable::with_suffix(&path, ".old"), path] {
        if let Some(bytes) = durable::read(&path, 2 * MAX_FILE_BYTES)? {
            entries.extend(String::from_utf8_lossy(&bytes).lines().map(str::to_owned));
        }
    }
    Ok(entries)
}

fn entry(
    endpoint: &str,
    fields: &BTreeMap<String, String>,
    before: Option<&BTreeMap<String, String>>,
) -> String {
    let changed = fields
        .iter()
        .filter(|(key, value)| before.is_none_or(|before| before.get(*key) != Some(*value)))
        .map(|(key, value)| format!("{key}={value}"))
        .collect::<Vec<_>>();
    let same = fields.len() - changed.len();
    let mut line = format!("{endpoint}: ");
    match (fields.len(), same) {
        (0, _) => line.push_str("nothing but the request itself"),
        (_, 0) => line.push_str(&changed.join(" ")),
        (_, same) if changed.is_empty() => line.push_str(&format!("{same} fields as before")),
        (_, same) => line.push_str(&format!("{} (and {same} fields as before)", changed.join(" "))),
    }
    if line.len() > MAX_ENTRY_BYTES {
        let end = (0..=MAX_ENTRY_BYTES).rev().find(|end| line.is_char_boundary(*end));
        line.truncate(end.unwrap_or(0));
        line.push_str(" … (cut)");
    }
    line
}

fn flatten(key: String, value: &Value, fields: &mut BTreeMap<String, String>) {
    let inner = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
    match value {
        Value::Null => {}
        Value::Object(members) => {
            for (name, value) in members {
                flatten(inner(name), value, fields);
            }
        }
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => {
            for (index, value) in items.iter().enumerate() {
                flatten(inner(&index.to_string()), value, fields);
            }
        }
        Value::String(text) => {
            fields.insert(key, text.replace('\n', "\\n"));
        }
        other => {
            fields.insert(key, other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn shows_what_changed_and_stays_small() {
        let folder = tempfile::tempdir().unwrap();
        let outbox = Outbox::open(folder.path());
        let report = json!({"sequence": 1, "phase": "idle", "facts": {"cores": 2, "cpu": "x\ny"}});
        outbox.sent("POST /v1/device/report", &report);
        let report = json!({"sequence": 2, "phase": "idle", "facts": {"cores": 2, "cpu": "x\ny"}});
        outbox.sent("POST /v1/device/report", &report);
        outbox.sent("POST /v1/device/report", &report);
        outbox.sent("GET /v1/device/desired", &Value::Null);
        let report = json!({"sequence": 3, "phase": "idle", "facts": {"cores": 2, "cpu": "x\ny"}});
        outbox.sent("POST /v1/device/report", &report);
        let entries = read(folder.path()).unwrap();
        let words: Vec<&str> = entries.iter().map(|line| line.split_once(' ').unwrap().1).collect();
        assert_eq!(
            words,
            [
                r"POST /v1/device/report: facts.cores=2 facts.cpu=x\ny phase=idle sequence=1",
                "POST /v1/device/report: sequence=2 (and 3 fields as before)",
                "GET /v1/device/desired: nothing but the request itself",
                "POST /v1/device/report: sequence=3 (and 3 fields as before) \
                 (the one before 1 times more)",
            ]
        );
        for round in 0..200 {
            outbox.sent("POST /v1/x", &json!({ "long": format!("{round}{}", "é".repeat(20_000)) }));
        }
        let bytes: u64 = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum();
        assert!(bytes <= 2 * MAX_FILE_BYTES, "{bytes}");
        assert!(read(folder.path()).unwrap().len() > 20);
    }
}
