//! Making a model file out of the one that is here where it lies, by a delta, while that comes in:
//! for disks that have no room for both.
//!
//! The old file first gets another name, so that nobody takes it for what it was. It and its journal
//! are all that a later attempt needs, after a power cut too.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use slmops_api::delta::{Delta, Fallback};
use slmops_artifact::Digest;
use slmops_delta::{Course, DeltaError, Rewrite, Run};
use tokio::sync::mpsc;

use super::patch::{End, Made};
use crate::durable;
use crate::state::StateFolder;

/// Bytes that stay free for the ledger and for everyone else while a file is changed.
const RESERVE_BYTES: u64 = 4 << 20;

/// A model file that is changed where it lies.
pub struct Replacement {
    rewrite: Rewrite<File, File>,
    /// Bytes of the new file that are there.
    written: Arc<AtomicU64>,
    to_bytes: u64,
}

/// Why nothing is changed.
pub enum Unchanged {
    /// This delta does not do.
    Fallback(Fallback),
    /// The disk said no.
    Disk(io::Error),
}

impl From<io::Error> for Unchanged {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

impl Replacement {
    /// Begins with the file that the delta changes, or goes on with it.
    ///
    /// # Errors
    /// [`Unchanged`].
    pub fn open(state: &StateFolder, delta: &Delta, header: &[u8]) -> Result<Self, Unchanged> {
        let course = Course::of(header).map_err(|error| unchanged(delta, error))?;
        let says = course.header();
        let said = (says.from, says.to, says.to_bytes, says.delta_bytes(), says.header_bytes());
        let wanted = (delta.from, delta.to, delta.to_bytes, delta.bytes, delta.header_bytes);
        if said != wanted {
            tracing::warn!("the delta {} is about other files", delta.blob.short());
            return Err(Unchanged::Fallback(Fallback::Unreadable));
        }
        let (path, journal_path) = state.changing(delta.to);
        if !path.exists() {
            let old = state.blob(delta.from);
            check_base(&old, says.from, says.from_bytes)?;
            remove(&state.partial(delta.to))?;
            remove(&journal_path)?;
            let growth = course.file_bytes() - says.from_bytes;
            let needed = course.journal_bytes() + growth;
            if state.free_bytes() < needed.saturating_add(RESERVE_BYTES) {
                return Err(Unchanged::Fallback(Fallback::NotInPlace));
            }
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            std::fs::rename(&old, &path)?;
            durable::sync_parent(&path)?;
            durable::sync_parent(&old)?;
        }
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let file = open(&path)?;
        let mut options = OpenOptions::new();
        let journal = options.create(true).truncate(false).read(true).write(true);
        let journal = journal.open(&journal_path)?;
        durable::sync_parent(&journal_path)?;
        let to_bytes = delta.to_bytes;
        let rewrite = Rewrite::new(course, file, journal).map_err(|it| unchanged(delta, it))?;
        let replacement = Self { rewrite, written: Arc::default(), to_bytes };
        replacement.note();
        Ok(replacement)
    }

    /// What is to be fetched next; none once the file is made.
    pub fn run(&self) -> Option<Run> {
        self.rewrite.run()
    }

    /// Makes all steps of [`Replacement::run`], with their payloads from `pieces`.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn apply(&mut self, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<End> {
        let steps = self.run().map_or(0, |run| run.steps);
        let mut payload: Vec<u8> = Vec::new();
        for _ in 0..steps {
            let needed = self.rewrite.needed_bytes();
            while payload.len() < needed {
                match pieces.blocking_recv() {
                    Some(piece) => payload.extend_from_slice(&piece),
                    None => return Ok(End::Cut),
                }
            }
            match self.rewrite.step(&payload[..needed]) {
                Ok(()) => {}
                Err(DeltaError::Storage(error)) => return Err(error),
                Err(error) => {
                    tracing::debug!("{error}");
                    return Ok(End::WrongFrame);
                }
            }
            payload.drain(..needed);
            self.note();
        }
        Ok(End::Complete)
    }

    /// Puts the finished file where models are, if it is what was promised.
    ///
    /// # Errors
    /// [`Unchanged`]; a wrong file stays where it is.
    pub fn finish(self, state: &StateFolder, delta: &Delta) -> Result<(), Unchanged> {
        self.rewrite.finish().map_err(|error| unchanged(delta, error))?;
        let ((path, journal), new) = (state.changing(delta.to), state.blob(delta.to));
        std::fs::rename(&path, &new)?;
        durable::sync_parent(&new)?;
        durable::sync_parent(&path)?;
        remove(&journal)?;
        Ok(())
    }

    fn note(&self) {
        let (done, of) = self.rewrite.progress();
        self.written.store(self.to_bytes.saturating_sub(of - done), Ordering::Relaxed);
    }
}

impl Made for Replacement {
    fn written(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.written)
    }
}

fn unchanged(delta: &Delta, error: DeltaError) -> Unchanged {
    let fallback = match error {
        DeltaError::Storage(error) => return Unchanged::Disk(error),
        DeltaError::Entangled(_) | DeltaError::Journal => Fallback::NotInPlace,
        DeltaError::Base { .. } => Fallback::NoBase,
        DeltaError::Result { .. } => Fallback::WrongResult,
        _ => Fallback::Unreadable,
    };
    tracing::warn!("the delta {} cannot be used: {error}", delta.blob.short());
    Unchanged::Fallback(fallback)
}

/// Nothing can be taken back once the old file is changed: so it must be the right one.
fn check_base(path: &Path, digest: Digest, size_bytes: u64) -> Result<(), Unchanged> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Unchanged::Fallback(Fallback::NoBase));
        }
        file => file?,
    };
    match Digest::of_reader(file)? == (digest, size_bytes) {
        true => Ok(()),
        false => Err(Unchanged::Fallback(Fallback::DamagedBase)),
    }
}

/// Deletes what is left of it, and of the model that it was to be made from.
///
/// # Errors
/// Whatever the disk says.
pub fn discard(state: &StateFolder, from: Digest, to: Digest) -> io::Result<()> {
    let (path, journal) = state.changing(to);
    [state.blob(from), path, journal].iter().try_for_each(|path| remove(path))
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
