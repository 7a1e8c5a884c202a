//! Making a model file from another one and a delta, while the delta comes in.
//!
//! The new file grows in the same place as a whole download, frame by frame in order, so what is
//! there is always the beginning of the file: after a power cut the frames that are whole are kept,
//! each is known by its hash, and where a delta does not do the rest is got from the file itself.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use slmops_api::delta::{Delta, Fallback};
use slmops_artifact::digest::Hasher;
use slmops_artifact::{Digest, MappedFile};
use slmops_delta::{Header, MAX_HEADER_BYTES};
use tokio::sync::mpsc;

/// Bytes that are read or written at once.
const PIECE_BYTES: usize = 1 << 20;

/// A delta's header and the file that it changes.
pub struct Recipe {
    header: Header,
    old: MappedFile,
}

/// A model file in the making: where it stands, always at the beginning of a frame.
pub struct Patch {
    recipe: Arc<Recipe>,
    file: File,
    hasher: Hasher,
    next: usize,
    /// Bytes that are there.
    written: Arc<AtomicU64>,
}

/// Why [`Patch::apply`] came to an end.
#[derive(Debug)]
pub enum End {
    /// Every frame is there.
    Complete,
    /// No more payload came.
    Cut,
    /// The next frame came out wrong: the old file is damaged there, or the delta is.
    WrongFrame,
}

/// A file that is made step by step.
pub trait Made {
    /// Bytes that are there; grows while frames are applied.
    fn written(&self) -> Arc<AtomicU64>;
}

impl Made for Patch {
    fn written(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.written)
    }
}

impl Recipe {
    /// Puts together what a delta says and the file at `old`.
    ///
    /// # Errors
    /// [`Fallback`] where they do not go together, or are not what `expected` says.
    pub fn new(expected: &Delta, header: &[u8], old: &Path) -> Result<Self, Fallback> {
        let unreadable = |error| {
            tracing::warn!("the delta {} cannot be used: {error}", expected.blob.short());
            Fallback::Unreadable
        };
        let header = Header::parse(header).map_err(unreadable)?;
        let says = (header.from, header.to, header.to_bytes, header.delta_bytes());
        let wanted = (expected.from, expected.to, expected.to_bytes, expected.bytes);
        if says != wanted || header.header_bytes() != expected.header_bytes {
            tracing::warn!("the delta {} is about other files", expected.blob.short());
            return Err(Fallback::Unreadable);
        }
        let old = MappedFile::open(old).map_err(|error| {
            tracing::warn!("map {}: {error}", old.display());
            Fallback::NoBase
        })?;
        if old.len() as u64 != header.from_bytes {
            return Err(Fallback::NoBase);
        }
        Ok(Self { header, old })
    }

    /// Whether the old file is what its digest says.
    pub fn is_base_right(&self) -> bool {
        Digest::of(&self.old) == self.header.from
    }
}

/// The longest header that is fetched, in bytes.
pub fn is_header_length(bytes: u64) -> bool {
    (1..=MAX_HEADER_BYTES + 64).contains(&bytes)
}

impl Patch {
    /// Goes on with what is in `file`: as many whole frames as there are, the rest is cut off.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn resume(recipe: Arc<Recipe>, mut file: File) -> io::Result<Self> {
        let (mut hasher, mut next, mut good) = (Hasher::default(), 0, 0);
        let have = file.metadata()?.len();
        let mut buffer = vec![0; PIECE_BYTES];
        file.seek(SeekFrom::Start(0))?;
        for frame in recipe.header.frames() {
            if frame.output.end > have {
                break;
            }
            let (mut whole, mut own) = (hasher.clone(), Hasher::default());
            let mut left = (frame.output.end - frame.output.start) as usize;
            while left > 0 {
                let piece = &mut buffer[..left.min(PIECE_BYTES)];
                file.read_exact(piece)?;
                whole.update(piece);
                own.update(piece);
                left -= piece.len();
            }
            if !frame.gives(&own.finish().0) {
                break;
            }
            (hasher, next, good) = (whole, next + 1, frame.output.end);
        }
        file.set_len(good)?;
        file.seek(SeekFrom::Start(good))?;
        let written = Arc::new(AtomicU64::new(good));
        Ok(Self { recipe, file, hasher, next, written })
    }

    /// Where the payloads lie in the delta that are still needed.
    pub fn payloads(&self) -> std::ops::Range<u64> {
        let frames = &self.recipe.header.frames()[self.next..];
        let end = self.recipe.header.delta_bytes();
        frames.first().map_or(end, |frame| frame.payload.start)..end
    }

    /// Where the next frame's bytes lie in the new file.
    pub fn next_output(&self) -> std::ops::Range<u64> {
        let end = self.recipe.header.to_bytes;
        self.recipe.header.frames().get(self.next).map_or(end..end, |frame| frame.output.clone())
    }

    /// Applies frames, with their payloads from `pieces`, until all are done or something is wrong.
    /// What is written is always whole frames.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn apply(&mut self, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<End> {
        let recipe = Arc::clone(&self.recipe);
        let mut payload: Vec<u8> = Vec::new();
        while let Some(frame) = recipe.header.frames().get(self.next) {
            let needed = (frame.payload.end - frame.payload.start) as usize;
            while payload.len() < needed {
                match pieces.blocking_recv() {
                    Some(piece) => payload.extend_from_slice(&piece),
                    None => return Ok(End::Cut),
                }
            }
            let output = match recipe.header.decode(self.next, &recipe.old, &payload[..needed]) {
                Ok(output) => output,
                Err(error) => {
                    tracing::debug!("{error}");
                    return Ok(End::WrongFrame);
                }
            };
            payload.drain(..needed);
            for piece in output.chunks(PIECE_BYTES) {
                self.file.write_all(piece)?;
                self.hasher.update(piece);
                self.written.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
            if needed > 0 {
                // What cost bytes of the network is not lost with the power.
                self.file.sync_data()?;
            }
            self.next += 1;
        }
        Ok(End::Complete)
    }

    /// Takes the next frame's bytes from the new file itself, as they come.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn replace(&mut self, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<End> {
        let range = self.next_output();
        let mut hasher = self.hasher.clone();
        let mut left = range.end - range.start;
        while left > 0 {
            let Some(piece) = pieces.blocking_recv() else { break };
            let piece = &piece[..piece.len().min(usize::try_from(left).unwrap_or(usize::MAX))];
            self.file.write_all(piece)?;
            hasher.update(piece);
            self.written.fetch_add(piece.len() as u64, Ordering::Relaxed);
            left -= piece.len() as u64;
        }
        if left > 0 {
            self.file.set_len(range.start)?;
            self.file.seek(SeekFrom::Start(range.start))?;
            self.written.store(range.start, Ordering::Relaxed);
            return Ok(End::Cut);
        }
        self.file.sync_data()?;
        self.hasher = hasher;
        self.next += 1;
        Ok(End::Complete)
    }

    /// Makes what is there durable; the digest of all of it.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn finish(self) -> io::Result<Digest> {
        self.file.sync_all()?;
        Ok(self.hasher.finish().0)
    }
}
