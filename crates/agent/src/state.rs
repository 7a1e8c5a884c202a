//! The state folder: lock, ledger, blobs, counters. Everything but the ledger can be rebuilt.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use slmops_agent_core::{LEDGER_VERSION, Ledger, LedgerError, MAX_LEDGER_BYTES};
use slmops_api::delta::Transfer;
use slmops_api::device::{Telemetry, WaitCause};
use slmops_api::evidence::Evidence;
use slmops_artifact::Digest;

use crate::durable::{self, Access};
use crate::error::AgentError;

const LOCK_FILE: &str = "agent.lock";
const LEDGER_FILE: &str = "ledger.json";
const SEQUENCE_FILE: &str = "sequence";
const TELEMETRY_FILE: &str = "telemetry.json";
const EVIDENCE_FILE: &str = "evidence.json";
const TRANSFER_FILE: &str = "transfer.json";
const STATUS_FILE: &str = "status.json";
/// Who may use the local endpoint; anybody who reaches it without this file.
pub const ENDPOINT_KEYS_FILE: &str = "endpoint-keys.toml";
const BLOBS_FOLDER: &str = "blobs";
const PARTIAL_FOLDER: &str = "partial";
const CHANGING_FOLDER: &str = "changing";
/// Sequence numbers reserved by one write, so that a report costs no write.
const SEQUENCE_BLOCK: u64 = 1_000;
/// The longest small file, in bytes.
const MAX_SMALL_BYTES: u64 = 64 << 10;
/// The longest status file, in bytes.
const MAX_STATUS_BYTES: u64 = 8 << 20;

/// A device's folder.
#[derive(Clone, Debug)]
pub struct StateFolder {
    root: PathBuf,
}

/// The folder is this process's while this lives.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateFolder {
    /// The folder at `root`, made if it is not there, readable by its owner alone.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn create(root: &Path) -> Result<Self, AgentError> {
        for folder in [PARTIAL_FOLDER, CHANGING_FOLDER] {
            let path = root.join(BLOBS_FOLDER).join(folder);
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .map_err(AgentError::file("make folder", &path))?;
        }
        Ok(Self { root: root.to_owned() })
    }

    /// The folder at `root`, as it is.
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Its path.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Takes the folder for this process. The system gives it back when the process ends, however
    /// it ends.
    ///
    /// # Errors
    /// [`AgentError::Locked`] while another agent has it.
    pub fn lock(&self) -> Result<StateLock, AgentError> {
        let path = self.root.join(LOCK_FILE);
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(AgentError::file("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let pid = self.locked_by();
                return Err(AgentError::Locked { path: self.root.clone(), pid });
            }
            Err(TryLockError::Error(error)) => return Err(AgentError::file("lock", &path)(error)),
        }
        // For the other agent's message only.
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| write!(file, "{}", std::process::id()));
        Ok(StateLock { _file: file })
    }

    /// The process that has the folder; `None` if none has.
    pub fn locked_by(&self) -> Option<u32> {
        let mut file = File::open(self.root.join(LOCK_FILE)).ok()?;
        if file.try_lock_shared().is_ok() {
            return None;
        }
        let mut text = String::new();
        (&mut file).take(20).read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }

    // --- the ledger

    /// The newest whole ledger: the one before where the newest is torn or garbled, an empty one
    /// where there is none. Says in words what it found.
    ///
    /// # Errors
    /// A disk that cannot be read, or a ledger of a newer agent: going on would forget it.
    pub fn load_ledger(&self) -> Result<Ledger, AgentError> {
        let path = self.root.join(LEDGER_FILE);
        let limit = MAX_LEDGER_BYTES as u64;
        let mut found_any = false;
        for path in [path.clone(), durable::with_suffix(&path, ".previous")] {
            let bytes = match durable::read(&path, limit) {
                Ok(None) => continue,
                Ok(Some(bytes)) => bytes,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => Vec::new(),
                Err(error) => return Err(AgentError::file("read", &path)(error)),
            };
            found_any = true;
            match Ledger::parse(&bytes) {
                Ok(ledger) => return Ok(ledger),
                Err(LedgerError::Version { found }) if found > LEDGER_VERSION => {
                    return Err(AgentError::NewerLedger { path, found });
                }
                Err(error) => tracing::warn!("{} is damaged: {error}", path.display()),
            }
        }
        if found_any {
            tracing::warn!("no whole ledger is left; starting with an empty one");
        }
        Ok(Ledger::default())
    }

    /// Makes a ledger durable. The one before stays beside it.
    ///
    /// # Errors
    /// Whatever the disk says; then the one before is in force.
    pub fn save_ledger(&self, ledger: &Ledger) -> io::Result<()> {
        let path = self.root.join(LEDGER_FILE);
        let previous = durable::with_suffix(&path, ".previous");
        let spare = durable::with_suffix(&path, ".spare");
        match std::fs::remove_file(&spare) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let newest = durable::read(&path, MAX_LEDGER_BYTES as u64).ok().flatten();
        if newest.is_some_and(|bytes| Ledger::parse(&bytes).is_ok()) {
            // A second name for the current content; renaming it keeps `previous` whole at any
            // moment. Some file systems have no links: then there is no second copy.
            let kept =
                std::fs::hard_link(&path, &spare).and_then(|()| std::fs::rename(&spare, &previous));
            if let Err(error) = kept {
                tracing::debug!("keep {}: {error}", previous.display());
            }
        }
        durable::replace(&path, &ledger.to_bytes(), Access::Secret)
    }

    // --- blobs

    /// Where a whole blob lies.
    pub fn blob(&self, digest: Digest) -> PathBuf {
        self.root.join(BLOBS_FOLDER).join(digest.hex())
    }

    /// Where a blob grows.
    pub fn partial(&self, digest: Digest) -> PathBuf {
        self.root.join(BLOBS_FOLDER).join(PARTIAL_FOLDER).join(digest.hex())
    }

    /// Where another file becomes this blob, and its journal.
    pub fn changing(&self, digest: Digest) -> (PathBuf, PathBuf) {
        let path = self.root.join(BLOBS_FOLDER).join(CHANGING_FOLDER).join(digest.hex());
        let journal = durable::with_suffix(&path, ".journal");
        (path, journal)
    }

    /// Deletes every blob that is not in `keep`, whole or partial; says how many bytes that freed.
    pub fn collect(&self, keep: &BTreeSet<Digest>) -> u64 {
        let keep: BTreeSet<String> = keep.iter().map(Digest::hex).collect();
        let blobs = self.root.join(BLOBS_FOLDER);
        let mut freed_bytes = 0;
        for folder in [blobs.join(PARTIAL_FOLDER), blobs.join(CHANGING_FOLDER), blobs] {
            let Ok(files) = std::fs::read_dir(&folder) else { continue };
            for file in files.flatten() {
                let name = file.file_name().to_string_lossy().into_owned();
                let Ok(metadata) = file.metadata() else { continue };
                let digest = name.split('.').next().unwrap_or_default();
                if metadata.is_file() && !keep.contains(digest) {
                    match std::fs::remove_file(file.path()) {
                        Ok(()) => freed_bytes += metadata.len(),
                        Err(error) => tracing::warn!("delete {}: {error}", file.path().display()),
                    }
                }
            }
        }
        freed_bytes
    }

    /// Bytes that may still be written here.
    pub fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.root)
            .map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize))
            .unwrap_or(0)
    }

    // --- numbers

    /// The sequence numbers of reports, growing over restarts.
    pub fn sequence(&self) -> Sequence {
        let path = self.root.join(SEQUENCE_FILE);
        let bytes = durable::read(&path, MAX_SMALL_BYTES).ok().flatten().unwrap_or_default();
        let next = std::str::from_utf8(&bytes).ok().and_then(|text| text.trim().parse().ok());
        let next: u64 = next.unwrap_or(1);
        Sequence { path, next, reserved: next }
    }

    /// The counters as they were last saved.
    pub fn load_telemetry(&self) -> Telemetry {
        let path = self.root.join(TELEMETRY_FILE);
        let bytes = durable::read(&path, MAX_SMALL_BYTES).ok().flatten().unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Saves the counters. Losing the latest ones is harmless.
    pub fn save_telemetry(&self, telemetry: &Telemetry) {
        self.save_numbers(TELEMETRY_FILE, telemetry);
    }

    /// What was last saved to be counted of a model.
    pub fn load_evidence(&self) -> Option<Evidence> {
        let path = self.root.join(EVIDENCE_FILE);
        let bytes = durable::read(&path, MAX_SMALL_BYTES).ok().flatten()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Saves what is counted of the running model. Losing the latest numbers is harmless.
    pub fn save_evidence(&self, evidence: &Evidence) {
        self.save_numbers(EVIDENCE_FILE, evidence);
    }

    /// How the model file that was got last came here, as far as it was saved.
    pub fn load_transfer(&self) -> Option<Transfer> {
        let path = self.root.join(TRANSFER_FILE);
        let bytes = durable::read(&path, MAX_SMALL_BYTES).ok().flatten()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// Saves how a model file comes here. Losing the latest numbers is harmless.
    pub fn save_transfer(&self, transfer: &Transfer) {
        self.save_numbers(TRANSFER_FILE, transfer);
    }

    fn save_numbers(&self, name: &str, numbers: &impl serde::Serialize) {
        let path = self.root.join(name);
        let bytes = serde_json::to_vec(numbers).unwrap_or_default();
        if let Err(error) = durable::replace(&path, &bytes, Access::Secret) {
            tracing::debug!("write {}: {error}", path.display());
        }
    }

    /// Writes what `slm-agent status` shows. Not durable: it is true while the process runs.
    pub fn write_status(&self, bytes: &[u8]) {
        let path = self.root.join(STATUS_FILE);
        let temporary = durable::with_suffix(&path, ".new");
        let written =
            std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, &path));
        if let Err(error) = written {
            tracing::debug!("write {}: {error}", path.display());
        }
    }

    /// What the running agent last wrote.
    pub fn read_status(&self) -> Option<Vec<u8>> {
        durable::read(&self.root.join(STATUS_FILE), MAX_STATUS_BYTES).ok().flatten()
    }
}

/// Numbers that never repeat, even after a crash.
#[derive(Debug)]
pub struct Sequence {
    path: PathBuf,
    next: u64,
    reserved: u64,
}

impl Sequence {
    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        if self.next >= self.reserved {
            let reserved = self.next.saturating_add(SEQUENCE_BLOCK);
            match durable::replace(&self.path, reserved.to_string().as_bytes(), Access::Secret) {
                Ok(()) => self.reserved = reserved,
                // The number is used all the same; only a restart before the disk mends repeats it.
                Err(error) => tracing::debug!("write {}: {error}", self.path.display()),
            }
        }
        let number = self.next;
        self.next = self.next.saturating_add(1);
        number
    }
}

/// What an IO error means for the device.
pub fn wait_cause(error: &io::Error) -> WaitCause {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => WaitCause::DiskFull,
        _ => WaitCause::Storage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> (tempfile::TempDir, StateFolder) {
        let temporary = tempfile::tempdir().unwrap();
        let state = StateFolder::create(&temporary.path().join("state")).unwrap();
        (temporary, state)
    }

    #[test]
    fn a_second_agent_is_told_who_has_the_folder() {
        let (_temporary, state) = folder();
        let lock = state.lock().unwrap();
        let error = state.lock().unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.contains("hint:"), "{error}");
        assert_eq!(state.locked_by(), Some(std::process::id()));
        drop(lock);
        assert_eq!(state.locked_by(), None);
        state.lock().unwrap();
    }

    #[test]
    fn a_damaged_ledger_gives_way_to_the_one_before() {
        let (_temporary, state) = folder();
        assert_eq!(state.load_ledger().unwrap(), Ledger::default());
        for generation in [1, 2, 3] {
            state.save_ledger(&Ledger { generation, ..Ledger::default() }).unwrap();
        }
        assert_eq!(state.load_ledger().unwrap().generation, 3);
        let path = state.root().join(LEDGER_FILE);
        let whole = std::fs::read(&path).unwrap();
        let huge = vec![b'['; MAX_LEDGER_BYTES + 1];
        for damaged in [&whole[..whole.len() / 2], b"", b"\0\0\0\0", &huge] {
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(state.load_ledger().unwrap().generation, 2);
        }
        // The damaged one does not push the good one out.
        std::fs::write(&path, b"torn").unwrap();
        state.save_ledger(&Ledger { generation: 9, ..Ledger::default() }).unwrap();
        std::fs::write(&path, b"torn").unwrap();
        assert_eq!(state.load_ledger().unwrap().generation, 2);
        std::fs::write(&path, br#"{"version": 99, "generation": 1}"#).unwrap();
        assert!(state.load_ledger().unwrap_err().to_string().contains("hint:"));
        std::fs::write(&path, b"torn").unwrap();
        std::fs::write(durable::with_suffix(&path, ".previous"), b"x").unwrap();
        assert_eq!(state.load_ledger().unwrap(), Ledger::default());
    }

    #[test]
    fn a_ledger_that_cannot_be_written_leaves_the_one_before() {
        let (_temporary, state) = folder();
        state.save_ledger(&Ledger { generation: 4, ..Ledger::default() }).unwrap();
        // A folder in the way of the temporary file stands for a disk that takes no more.
        std::fs::create_dir(state.root().join("ledger.json.new")).unwrap();
        assert!(state.save_ledger(&Ledger { generation: 5, ..Ledger::default() }).is_err());
        assert_eq!(state.load_ledger().unwrap().generation, 4);
    }

    #[test]
    fn sequence_numbers_grow_over_restarts() {
        let (_temporary, state) = folder();
        let mut last = 0;
        for _ in 0..3 {
            let mut sequence = state.sequence();
            for _ in 0..SEQUENCE_BLOCK + 5 {
                let next = sequence.next_number();
                assert!(next > last, "{next} after {last}");
                last = next;
            }
        }
    }

    #[test]
    fn only_named_blobs_are_kept() {
        let (_temporary, state) = folder();
        let (kept, dropped) = (Digest::of(b"kept"), Digest::of(b"dropped"));
        for digest in [kept, dropped] {
            std::fs::write(state.blob(digest), b"12345").unwrap();
            std::fs::write(state.partial(digest), b"123").unwrap();
            let (changing, journal) = state.changing(digest);
            std::fs::write(changing, b"12").unwrap();
            std::fs::write(journal, b"1").unwrap();
        }
        let paths = |digest| {
            let (changing, journal) = state.changing(digest);
            [state.blob(digest), state.partial(digest), changing, journal]
        };
        assert_eq!(state.collect(&BTreeSet::from([kept])), 11);
        assert!(paths(kept).iter().all(|path| path.exists()));
        assert!(!paths(dropped).iter().any(|path| path.exists()));
        assert!(state.free_bytes() > 0);
    }
}
