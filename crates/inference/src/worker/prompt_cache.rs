//! Sequences on the disk: what a prompt's tokens became in the engine's memory, kept over the end of the
//! process. Nothing in the folder is trusted: a file counts only if all of it is what was written.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use slmops_artifact::{Digest, digest::Hasher};

use super::protocol::PromptCache;
use crate::llama::Token;

/// How a file begins: what it is, and in which version.
const MAGIC: &[u8; 16] = b"slmops prefix 1\n";
/// The ending of a file's name.
const ENDING: &str = "prefix";
/// The beginning of the name of one that is being written.
const PARTIAL: &str = ".prefix-";
/// After how long one that is being written is given up.
const PARTIAL_LEFT: Duration = Duration::from_secs(600);
/// Bytes before the tokens: what it is, the key, how many tokens, how many bytes of state.
const HEADER_BYTES: usize = 16 + 32 + 4 + 8;
/// The most files that are known at the same time.
const MAX_FILES: usize = 4096;
/// The part of a file that must be of use for it to be read: one token in so many.
const LEAST_READ_PART: usize = 16;
/// The time in which as many bytes may be written as the folder may hold.
const REFILL: Duration = Duration::from_secs(3600);

/// A folder of sequences.
pub(super) struct PromptStore {
    folder: PathBuf,
    limit_bytes: u64,
    known: Vec<Known>,
    writer: Option<(SyncSender<Sequence>, JoinHandle<()>)>,
    budget: Budget,
}

/// A file that is there, as far as one knows.
struct Known {
    path: PathBuf,
    key: Digest,
    tokens: Vec<Token>,
}

/// What is written.
struct Sequence {
    path: PathBuf,
    key: Digest,
    tokens: Vec<Token>,
    state: Vec<u8>,
}

/// Bytes that may be written: the whole folder's worth at the start and each hour.
struct Budget {
    limit_bytes: f64,
    left_bytes: f64,
    at: Instant,
}

impl Budget {
    fn take(&mut self, bytes: u64) -> bool {
        let refilled = self.at.elapsed().as_secs_f64() / REFILL.as_secs_f64() * self.limit_bytes;
        self.left_bytes = (self.left_bytes + refilled).min(self.limit_bytes);
        self.at = Instant::now();
        let bytes = bytes as f64;
        let enough = bytes <= self.left_bytes;
        self.left_bytes -= if enough { bytes } else { 0.0 };
        enough
    }
}

impl PromptStore {
    /// Opens the folder, or makes it; removes what is damaged in it.
    ///
    /// # Errors
    /// It cannot be made or read, or is open to others.
    pub(super) fn open(settings: &PromptCache) -> io::Result<Self> {
        let folder = settings.folder.clone();
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let metadata = fs::metadata(&folder)?;
        let owner = rustix::process::geteuid().as_raw();
        if metadata.mode() & 0o077 != 0 || metadata.uid() != owner {
            let message = "others may read or change what is in it\nhint: chmod 700 it";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, message));
        }
        let mut known = Vec::new();
        for path in files(&folder, PARTIAL)? {
            if is_older(&path, PARTIAL_LEFT) {
                let _ = fs::remove_file(path);
            }
        }
        for path in files(&folder, ENDING)? {
            match read_head(&path) {
                Ok((key, tokens)) if known.len() < MAX_FILES => {
                    known.push(Known { path, key, tokens });
                }
                Ok(_) => {}
                Err(cause) => discard(&path, &cause),
            }
        }
        let (sender, received) = sync_channel::<Sequence>(0);
        let (place, limit_bytes) = (folder.clone(), settings.limit_bytes);
        let thread =
            std::thread::Builder::new().name("prompt-cache".to_owned()).spawn(move || {
                for sequence in received {
                    if let Err(error) = write(&place, limit_bytes, &sequence) {
                        eprintln!("prompt cache: write {}: {error}", sequence.path.display());
                    }
                }
            })?;
        let limit = limit_bytes as f64;
        let budget = Budget { limit_bytes: limit, left_bytes: limit, at: Instant::now() };
        Ok(Self { folder, limit_bytes, known, writer: Some((sender, thread)), budget })
    }

    /// How many of the tokens are in some file, from the first one on.
    pub(super) fn covered(&self, key: &Digest, tokens: &[Token]) -> usize {
        self.of(key).map(|(_, known)| shared(&known.tokens, tokens)).max().unwrap_or(0)
    }

    fn of(&self, key: &Digest) -> impl Iterator<Item = (usize, &Known)> {
        self.known.iter().enumerate().filter(move |(_, known)| known.key == *key)
    }

    /// The file that has the most of these tokens, with at most `limit` of its own and not much beside
    /// them: how many of them it has, and its place.
    pub(super) fn find(
        &self,
        key: &Digest,
        tokens: &[Token],
        limit: usize,
    ) -> Option<(usize, usize)> {
        let fitting = self.of(key).filter_map(|(place, known)| {
            let (length, shared) = (known.tokens.len(), shared(&known.tokens, tokens));
            (length <= limit && shared >= length / LEAST_READ_PART)
                .then_some((shared, length, place))
        });
        // Of two that have as many, the shorter one is read faster.
        let best = fitting.max_by_key(|(shared, length, _)| (*shared, std::cmp::Reverse(*length)));
        best.map(|(shared, _, place)| (shared, place))
    }

    /// The tokens and the state in a file; absent where it is not what was written, and then gone.
    pub(super) fn load(&mut self, place: usize) -> Option<(Vec<Token>, Vec<u8>)> {
        let known = &self.known[place];
        match read(known) {
            Ok(state) => {
                // What was used last stays longest.
                let _ =
                    File::open(&known.path).and_then(|file| file.set_modified(SystemTime::now()));
                Some((known.tokens.clone(), state))
            }
            Err(cause) => {
                if cause.kind() != io::ErrorKind::NotFound {
                    discard(&known.path, &cause);
                }
                self.known.swap_remove(place);
                None
            }
        }
    }

    /// Removes a file that the engine does not take.
    pub(super) fn forget(&mut self, place: usize) {
        let known = self.known.swap_remove(place);
        discard(&known.path, &io::Error::other("the engine does not take it"));
    }

    /// Whether a sequence of so many bytes may be written now; then it counts as written.
    pub(super) fn may_write(&mut self, state_bytes: u64) -> bool {
        state_bytes < self.limit_bytes && self.budget.take(state_bytes)
    }

    /// Whether a sequence of so many bytes has room at all.
    pub(super) fn has_room(&self, state_bytes: u64) -> bool {
        state_bytes < self.limit_bytes
    }

    /// Writes a sequence, beside the engine; waits only for one that is being written. Files of which it
    /// is a continuation go.
    pub(super) fn save(&mut self, key: Digest, tokens: Vec<Token>, state: Vec<u8>) {
        let replaced = |known: &Known| known.key == key && tokens.starts_with(&known.tokens);
        for known in self.known.extract_if(.., |known| replaced(known)) {
            let _ = fs::remove_file(known.path);
        }
        let path = self.folder.join(format!("{}.{ENDING}", name(&key, &tokens)));
        if self.known.len() < MAX_FILES {
            self.known.push(Known { path: path.clone(), key, tokens: tokens.clone() });
        }
        if let Some((writer, _)) = &self.writer {
            let _ = writer.send(Sequence { path, key, tokens, state });
        }
    }
}

impl Drop for PromptStore {
    /// Waits for what is being written.
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.writer.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}

fn shared(held: &[Token], tokens: &[Token]) -> usize {
    held.iter().zip(tokens).take_while(|(held, token)| held == token).count()
}

fn bytes_of(tokens: &[Token]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

fn name(key: &Digest, tokens: &[Token]) -> String {
    let mut hasher = Hasher::default();
    hasher.update(key.as_bytes());
    hasher.update(&bytes_of(tokens));
    hasher.finish().0.hex()
}

fn discard(path: &Path, cause: &io::Error) {
    eprintln!("prompt cache: removed {}: {cause}", path.display());
    let _ = fs::remove_file(path);
}

fn is_older(path: &Path, limit: Duration) -> bool {
    let modified = fs::symlink_metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > limit))
}

/// The folder's files of one kind: by the beginning or the ending of their names.
fn files(folder: &Path, kind: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = name.starts_with(PARTIAL);
        let whole = !partial && path.extension().is_some_and(|ending| ending == ENDING);
        if if kind == PARTIAL { partial } else { whole } {
            found.push(path);
        }
    }
    Ok(found)
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A regular file, opened, and its length.
fn open(path: &Path) -> io::Result<(File, u64)> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(damaged("it is no file"));
    }
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

/// The header and the tokens of a file whose length is what they say, and how long its state is.
fn read_beginning(mut file: &File, length: u64) -> io::Result<(Digest, Vec<u8>, usize)> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).map_err(|_| damaged("it is too short"))?;
    let (magic, rest) = header.split_at(MAGIC.len());
    let (key, rest) = rest.split_at(32);
    let (count, state) = rest.split_at(4);
    if magic != MAGIC {
        return Err(damaged("it is nothing that was written here"));
    }
    let count = u64::from(u32::from_le_bytes(count.try_into().expect("4 bytes")));
    let state = u64::from_le_bytes(state.try_into().expect("8 bytes"));
    let wanted = (HEADER_BYTES as u64 + 32 + 4 * count).checked_add(state);
    if wanted != Some(length) {
        return Err(damaged("its length is not what it says"));
    }
    let size = |bytes: u64| usize::try_from(bytes).map_err(|_| damaged("it is too long"));
    let mut tokens = vec![0; size(4 * count)?];
    file.read_exact(&mut tokens)?;
    let key = <[u8; 32]>::try_from(key).expect("32 bytes");
    Ok((key.into(), [&header[..], &tokens].concat(), size(state)?))
}

fn tokens_of(beginning: &[u8]) -> Vec<Token> {
    let (tokens, _) = beginning[HEADER_BYTES..].as_chunks();
    tokens.iter().map(|token| Token::from_le_bytes(*token)).collect()
}

fn read_head(path: &Path) -> io::Result<(Digest, Vec<Token>)> {
    let (file, length) = open(path)?;
    let (key, beginning, _) = read_beginning(&file, length)?;
    Ok((key, tokens_of(&beginning)))
}

/// The state in a file, if all of the file is as it was written.
fn read(known: &Known) -> io::Result<Vec<u8>> {
    let (mut file, length) = open(&known.path)?;
    let (key, beginning, state) = read_beginning(&file, length)?;
    if key != known.key || tokens_of(&beginning) != known.tokens {
        return Err(damaged("it is another one than before"));
    }
    let mut bytes = vec![0; state];
    file.read_exact(&mut bytes)?;
    let mut digest = [0; 32];
    file.read_exact(&mut digest)?;
    let mut hasher = Hasher::default();
    hasher.update(&beginning);
    hasher.update(&bytes);
    match hasher.finish().0 == Digest::from(digest) {
        true => Ok(bytes),
        false => Err(damaged("its digest is another one")),
    }
}

/// Makes room and writes: beside the place and then renamed, so that no half of one is ever found. A file
/// that a power cut left without its bytes is found out by its digest.
fn write(folder: &Path, limit_bytes: u64, sequence: &Sequence) -> io::Result<()> {
    let Sequence { path, key, tokens, state } = sequence;
    let count = u32::try_from(tokens.len()).map_err(|_| damaged("too many tokens"))?;
    let mut beginning = [&MAGIC[..], key.as_bytes(), &count.to_le_bytes()].concat();
    beginning.extend_from_slice(&(state.len() as u64).to_le_bytes());
    beginning.extend(bytes_of(tokens));
    make_room(folder, limit_bytes, (beginning.len() + state.len() + 32) as u64)?;
    let mut hasher = Hasher::default();
    hasher.update(&beginning);
    hasher.update(state);
    let only_ours = fs::Permissions::from_mode(0o600);
    let mut file =
        tempfile::Builder::new().prefix(PARTIAL).permissions(only_ours).tempfile_in(folder)?;
    for part in [&beginning, state, &hasher.finish().0.as_bytes()[..]] {
        file.write_all(part)?;
    }
    file.persist(path).map_err(|refused| refused.error)?;
    Ok(())
}

/// Removes those that were not used for longest until so many bytes more are within the limit.
fn make_room(folder: &Path, limit_bytes: u64, wanted_bytes: u64) -> io::Result<()> {
    let there = |path: PathBuf| {
        let metadata = fs::symlink_metadata(&path).ok()?;
        Some((metadata.modified().ok()?, metadata.len(), path))
    };
    let mut all: Vec<_> = files(folder, ENDING)?.into_iter().filter_map(there).collect();
    all.sort();
    let mut total: u64 = all.iter().map(|(_, length, _)| length).sum();
    for (_, length, path) in all {
        if total + wanted_bytes <= limit_bytes {
            break;
        }
        fs::remove_file(path)?;
        total -= length;
    }
    match total + wanted_bytes <= limit_bytes {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::StorageFull, "it is larger than the cache")),
    }
}
