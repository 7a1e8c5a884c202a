//! Getting blobs: resumed where an earlier attempt ended, hashed as they arrive, bounded by their
//! declared size, and in place only once they are whole and on the disk.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use reqwest::StatusCode;
use reqwest::header::CONTENT_RANGE;
use slmops_agent_core::{Blob, FetchError, Obstacle, Package, VerifyError};
use slmops_api::ModelName;
use slmops_api::device::WaitCause;
use slmops_artifact::Digest;
use slmops_artifact::digest::Hasher;
use tokio::sync::mpsc;

use crate::durable;
use crate::hub::DeviceHub;
use crate::state::{StateFolder, wait_cause};

/// Bytes that stay free for the ledger and for everyone else on the device.
const DISK_RESERVE_BYTES: u64 = 16 << 20;
/// Pieces between the network and the disk, at most.
const QUEUED_PIECES: usize = 16;
/// Milliseconds that a download may stand still.
const STALL_TIMEOUT_MS: u64 = 60_000;
/// Seconds of a rate that may come at once after a pause of the network.
const BURST_S: f64 = 0.25;
/// Times that bytes which are not what their digest says are asked for.
const ATTEMPTS: u32 = 2;

/// Gets blobs into a state folder. At most one task writes a blob at a time.
pub struct Downloads {
    state: StateFolder,
    hub: Arc<DeviceHub>,
    writers: Mutex<BTreeMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    received_bytes: AtomicU64,
}

/// A token bucket: what is read over the rate is waited for before more is read, so that the sender
/// is held back by the connection's own flow control.
struct Bucket {
    rate_bytes_per_s: u64,
    /// Bytes that may be read now; below zero they were read too early.
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn new(rate_bytes_per_s: u64) -> Self {
        Self { rate_bytes_per_s: rate_bytes_per_s.max(1), tokens: 0.0, filled: Instant::now() }
    }

    /// Takes out `bytes` that were read, and waits until the bucket is even again.
    async fn take(&mut self, bytes: u64) {
        let rate = self.rate_bytes_per_s as f64;
        let passed_s = self.filled.elapsed().as_secs_f64();
        self.filled = Instant::now();
        // What the network did not bring is made up for, but not for longer than this.
        self.tokens = (self.tokens + passed_s * rate).min(rate * BURST_S) - bytes as f64;
        if self.tokens < 0.0 {
            tokio::time::sleep(Duration::from_secs_f64(-self.tokens / rate)).await;
        }
    }
}

enum Problem {
    Wrong,
    Fetch(FetchError),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        tracing::warn!("cannot write the download: {error}");
        Self::Fetch(FetchError::Obstacle(Obstacle::new(wait_cause(&error))))
    }
}

impl Downloads {
    /// Downloads from `hub` into `state`.
    pub fn new(state: StateFolder, hub: Arc<DeviceHub>) -> Self {
        let writers = Mutex::default();
        Self { state, hub, writers, received_bytes: AtomicU64::new(0) }
    }

    /// Bytes received since the process started.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    /// Gets every file of a package, with at most so many bytes a second; `progress` hears the bytes
    /// of all files that are here.
    ///
    /// # Errors
    /// As [`FetchError`] says.
    pub async fn package(
        &self,
        name: &ModelName,
        package: &Package,
        max_rate_bytes_per_s: Option<u64>,
        mut progress: impl FnMut(u64),
    ) -> Result<(), FetchError> {
        let mut before = 0;
        let mut bucket = max_rate_bytes_per_s.map(Bucket::new);
        for blob in package.blobs() {
            self.blob(name, blob, &mut bucket, |bytes| progress(before + bytes)).await?;
            before += blob.size_bytes;
            progress(before);
        }
        Ok(())
    }

    async fn blob(
        &self,
        name: &ModelName,
        blob: Blob,
        bucket: &mut Option<Bucket>,
        mut progress: impl FnMut(u64),
    ) -> Result<(), FetchError> {
        let writer = {
            let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
            writers.retain(|_, writer| Arc::strong_count(writer) > 1);
            Arc::clone(writers.entry(blob.digest).or_default())
        };
        for attempt in 1..=ATTEMPTS {
            let guard = Arc::clone(&writer).lock_owned().await;
            let state = self.state.clone();
            let whole = blocking(move || check(&state, blob).is_ok()).await;
            if whole {
                return Ok(());
            }
            match self.attempt(name, blob, guard, bucket, &mut progress).await {
                Ok(()) => return Ok(()),
                Err(Problem::Fetch(error)) => return Err(error),
                Err(Problem::Wrong) => tracing::warn!(
                    "{} arrived damaged (attempt {attempt} of {ATTEMPTS}), thrown away",
                    blob.digest.short()
                ),
            }
        }
        Err(FetchError::Digest)
    }

    async fn attempt(
        &self,
        name: &ModelName,
        blob: Blob,
        guard: tokio::sync::OwnedMutexGuard<()>,
        bucket: &mut Option<Bucket>,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), Problem> {
        let state = self.state.clone();
        let (mut file, mut hasher, mut have) = blocking(move || resume(&state, blob)).await?;
        let needed = (blob.size_bytes - have).saturating_add(DISK_RESERVE_BYTES);
        if self.state.free_bytes() < needed {
            let full = Obstacle::new(WaitCause::DiskFull);
            return Err(Problem::Fetch(FetchError::Obstacle(full)));
        }
        let network = || Problem::Fetch(FetchError::Obstacle(Obstacle::new(WaitCause::Network)));
        let response = match self.hub.blob(name, blob.digest, have).await {
            Ok(response) => response,
            Err(error) if error.is(StatusCode::NOT_FOUND) => {
                return Err(Problem::Fetch(FetchError::Missing));
            }
            Err(error) if error.is(StatusCode::RANGE_NOT_SATISFIABLE) => {
                self.discard(blob.digest);
                return Err(Problem::Wrong);
            }
            Err(error) => {
                return Err(Problem::Fetch(FetchError::Obstacle(error.obstacle())));
            }
        };
        if have > 0 && !continues_at(&response, have) {
            // The server starts over.
            file.set_len(0)?;
            (hasher, have) = (Hasher::default(), 0);
            file = reopen(&self.state, blob.digest)?;
        }

        // One thread writes and hashes while the network goes on. It keeps the guard: a cancelled
        // download must not write beside its successor.
        let (sender, receiver) = mpsc::channel(QUEUED_PIECES);
        let writing = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            write_all(file, hasher, receiver)
        });
        let mut pieces = response.bytes_stream();
        let mut broken = false;
        loop {
            let next = tokio::time::timeout(Duration::from_millis(STALL_TIMEOUT_MS), pieces.next());
            let piece = match next.await {
                Ok(Some(Ok(piece))) => piece,
                Ok(None) => break,
                Ok(Some(Err(_))) | Err(_) => {
                    broken = true;
                    break;
                }
            };
            let received = piece.len() as u64;
            self.received_bytes.fetch_add(received, Ordering::Relaxed);
            have += received;
            if have > blob.size_bytes || sender.send(piece).await.is_err() {
                break;
            }
            progress(have);
            if let Some(bucket) = bucket {
                bucket.take(received).await;
            }
        }
        drop(sender);
        let (digest, written) =
            writing.await.map_err(|error| Problem::from(io::Error::other(error)))??;
        if written < blob.size_bytes && have <= blob.size_bytes {
            // Cut off, or ended early: what is here stays for the next attempt.
            if !broken {
                tracing::warn!("{} ended after {written} bytes", blob.digest.short());
            }
            return Err(network());
        }
        if have > blob.size_bytes || digest != blob.digest {
            self.discard(blob.digest);
            return Err(Problem::Wrong);
        }
        let (from, to) = (self.state.partial(blob.digest), self.state.blob(blob.digest));
        blocking(move || {
            std::fs::rename(from, &to)?;
            durable::sync_parent(&to)
        })
        .await?;
        Ok(())
    }

    fn discard(&self, digest: Digest) {
        let path = self.state.partial(digest);
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::debug!("delete {}: {error}", path.display());
        }
    }
}

/// Hashes the files of a package on disk. Damaged ones are deleted.
///
/// # Errors
/// As [`VerifyError`] says.
pub fn verify(state: &StateFolder, package: &Package) -> Result<(), VerifyError> {
    package.blobs().into_iter().try_for_each(|blob| check(state, blob))
}

/// Hashes one file on disk. A damaged one is deleted.
///
/// # Errors
/// As [`VerifyError`] says.
pub fn check(state: &StateFolder, blob: Blob) -> Result<(), VerifyError> {
    let path = state.blob(blob.digest);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(VerifyError::Damaged),
        Err(error) => return Err(VerifyError::Obstacle(Obstacle::new(wait_cause(&error)))),
    };
    // A bit of the disk that cannot be read is a damaged file as well.
    let found = file.metadata().and_then(|metadata| match metadata.len() == blob.size_bytes {
        true => Digest::of_reader(file),
        false => Ok((Digest::of(b""), metadata.len())),
    });
    if found.is_ok_and(|found| found == (blob.digest, blob.size_bytes)) {
        return Ok(());
    }
    tracing::warn!("{} is damaged on the disk, thrown away", blob.digest.short());
    let _ = std::fs::remove_file(&path);
    Err(VerifyError::Damaged)
}

/// Opens what an earlier attempt left, and hashes it.
fn resume(state: &StateFolder, blob: Blob) -> io::Result<(File, Hasher, u64)> {
    let path = state.partial(blob.digest);
    let mut file =
        OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path)?;
    if file.metadata()?.len() >= blob.size_bytes {
        file.set_len(0)?;
    }
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 1 << 20];
    let mut have = 0;
    loop {
        match io::Read::read(&mut file, &mut buffer)? {
            0 => return Ok((file, hasher, have)),
            read => {
                hasher.update(&buffer[..read]);
                have += read as u64;
            }
        }
    }
}

fn reopen(state: &StateFolder, digest: Digest) -> io::Result<File> {
    OpenOptions::new().create(true).truncate(true).write(true).open(state.partial(digest))
}

/// Whether a partial answer (RFC 9110, section 14.4) continues where we stand.
fn continues_at(response: &reqwest::Response, offset_bytes: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| range.starts_with(&format!("bytes {offset_bytes}-")))
}

fn write_all(
    mut file: File,
    mut hasher: Hasher,
    mut pieces: mpsc::Receiver<Bytes>,
) -> io::Result<(Digest, u64)> {
    while let Some(piece) = pieces.blocking_recv() {
        file.write_all(&piece)?;
        hasher.update(&piece);
    }
    file.sync_all()?;
    Ok(hasher.finish())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("file work does not panic")
}
