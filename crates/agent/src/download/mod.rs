//! Getting blobs: resumed where an earlier attempt ended, hashed as they arrive, bounded by their
//! declared size, and in place only once they are whole and on the disk. A model file is made from
//! one that is here where deltas lead from it; where they do not do, the rest is got whole.

mod deltas;
mod flow;
mod patch;
mod replace;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE, RETRY_AFTER};
use slmops_agent_core::{Blob, FetchError, Obstacle, Package, VerifyError};
use slmops_api::ModelName;
use slmops_api::delta::{Delta, Transfer};
use slmops_api::device::{DISK_RESERVE_BYTES, WaitCause};
use slmops_artifact::Digest;
use slmops_artifact::digest::Hasher;
use tokio::sync::{OwnedMutexGuard, mpsc};

use crate::durable;
use crate::hub::{DeviceHub, HubError};
use crate::state::{StateFolder, wait_cause};
use deltas::{Origin, Refusal, delta_blob};
pub(crate) use flow::Bucket;
use flow::{Flow, Part};

/// Pieces between the network and the disk, at most.
const QUEUED_PIECES: usize = 16;
/// Milliseconds that a download may stand still.
const STALL_TIMEOUT_MS: u64 = 60_000;
/// Times that bytes which are not what their digest says are asked for.
const ATTEMPTS: u32 = 2;
/// Milliseconds to reach a device of the same site, and to its answer.
const PEER_CONNECT_MS: u64 = 2_000;
const PEER_ANSWER_MS: u64 = 10_000;
/// How long peers that serve others are waited for before the hub is asked.
const BUSY_PEERS: Duration = Duration::from_secs(600);

/// Gets blobs into a state folder. At most one task writes a blob at a time.
pub struct Downloads {
    state: StateFolder,
    hub: Arc<DeviceHub>,
    writers: Mutex<BTreeMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
    received_bytes: AtomicU64,
    /// How the model file that was got last came here.
    transfer: Mutex<Option<Transfer>>,
    /// For devices of the same site, which speak plain HTTP.
    peers: reqwest::Client,
    /// The weights that peers had no time for, and since when.
    busy_since: Mutex<Option<(Digest, Instant)>>,
}

/// What came of asking a device of the same site.
enum Peer {
    Gave,
    /// It serves as many as it may.
    Busy(Obstacle),
    Failed,
}

/// What weights may be got from, besides the hub's whole file.
#[derive(Clone, Copy, Default)]
pub struct Sources<'a> {
    /// Whether they are thought to be here.
    pub has_weights: bool,
    /// Deltas from a file that is here, one after the other.
    pub route: &'a [Delta],
    /// Devices of the same site that have them.
    pub peers: &'a [String],
    /// A model file that goes to make room for them.
    pub gives_up: Option<Digest>,
    /// Whether deltas are kept for devices of the same site, where there is room for them.
    pub hands_on: bool,
}

/// Who is asked for a blob.
#[derive(Clone, Copy)]
enum Remote<'a> {
    Hub(&'a ModelName),
    /// A device of the same site.
    Peer(&'a str),
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
        let transfer = Mutex::new(state.load_transfer());
        let peers = reqwest::Client::builder()
            .connect_timeout(Duration::from_millis(PEER_CONNECT_MS))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .expect("a client of constant settings is made");
        Self {
            state,
            hub,
            writers,
            received_bytes: AtomicU64::new(0),
            transfer,
            peers,
            busy_since: Mutex::default(),
        }
    }

    /// Bytes received since the process started.
    pub fn received_bytes(&self) -> u64 {
        self.received_bytes.load(Ordering::Relaxed)
    }

    /// How the model file that was got last came here.
    pub fn transfer(&self) -> Option<Transfer> {
        self.transfer.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, change: impl FnOnce(&mut Transfer)) {
        let mut transfer = self.transfer.lock().unwrap_or_else(PoisonError::into_inner);
        transfer.as_mut().map(change);
    }

    /// A record of how this package comes here; that of an earlier attempt at it goes on.
    fn begin_transfer(&self, package: &Package) {
        let (weights, adapter) = (package.weights, package.adapter.map(|blob| blob.digest));
        let mut transfer = self.transfer.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |known: &Transfer| (known.weights, known.adapter) == (weights.digest, adapter);
        if !transfer.as_ref().is_some_and(same) {
            *transfer = Some(Transfer::new(weights.digest, weights.size_bytes, adapter));
        }
    }

    fn save_transfer(&self) {
        if let Some(transfer) = self.transfer() {
            self.state.save_transfer(&transfer);
        }
    }

    /// Gets every file of a package, its weights from `sources` as far as they do, with at most so
    /// many bytes a second; `progress` hears how many bytes are here, and of how many.
    ///
    /// # Errors
    /// As [`FetchError`] says.
    pub async fn package(
        &self,
        name: &ModelName,
        package: &Package,
        sources: Sources<'_>,
        max_rate_bytes_per_s: Option<u64>,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<(), FetchError> {
        let bucket = max_rate_bytes_per_s.map(Bucket::new);
        let mut flow = Flow { downloads: self, bucket, part: Part::Other, noted: Instant::now() };
        let (probes, weights) = (package.probes, package.weights);
        let total = package.total_bytes();
        self.blob(name, probes, &mut flow, |bytes| progress(bytes, total)).await?;
        let has_weights = self.has(weights).await;
        let has_adapter = match package.adapter {
            Some(adapter) => self.has(adapter).await,
            None => true,
        };
        if has_weights && has_adapter {
            return Ok(());
        }
        self.begin_transfer(package);
        if let Some(adapter) = package.adapter {
            flow.part = Part::Adapter;
            let done = |bytes| progress(probes.size_bytes + bytes, total);
            self.blob(name, adapter, &mut flow, done).await?;
            flow.part = Part::Other;
        }
        if has_weights {
            return Ok(());
        }
        if sources.has_weights {
            return Err(FetchError::Deltas);
        }
        let small_bytes = package.small_bytes();
        let route = sources.route;
        if let Some(base) = sources.gives_up {
            self.note(|transfer| transfer.gave_up = Some(base));
            let done = |bytes| progress(bytes, total);
            if self.replace_all(name, route, sources.peers, &mut flow, done).await? {
                progress(total, total);
                return Ok(());
            }
            let state = self.state.clone();
            let targets = route.iter().map(|delta| delta.to).chain([weights.digest]);
            let targets: Vec<Digest> = targets.collect();
            let discarded = blocking(move || {
                targets.iter().try_for_each(|to| replace::discard(&state, base, *to))
            });
            discarded
                .await
                .map_err(|error| FetchError::Obstacle(Obstacle::new(wait_cause(&error))))?;
            if !route.is_empty() {
                return Err(FetchError::Deltas);
            }
        }
        // What is made on the way, and what it is made from where that is kept, count as well.
        let keeps = sources.hands_on && self.has_room_for(route);
        let kept: u64 = route.iter().map(|delta| delta.bytes).filter(|_| keeps).sum();
        let made: u64 = route.iter().map(|delta| delta.to_bytes).sum();
        let total = small_bytes + (kept + made).max(weights.size_bytes);
        let mut before = small_bytes;
        // Little before much, and everything before the site's line.
        let deltas = route.iter().map(delta_blob).filter(|_| keeps).collect();
        for blobs in [deltas, vec![weights]] {
            let is_model = blobs == [weights];
            let mut done = |bytes| progress(before + bytes, total);
            match self.take_from_peers(sources.peers, &blobs, &mut flow, &mut done).await {
                Peer::Gave if is_model => {
                    progress(total, total);
                    return Ok(());
                }
                Peer::Gave => break,
                // Those who are served now will serve others: over the site's line it would come
                // again.
                Peer::Busy(obstacle) if self.waits_for_peers(weights.digest) => {
                    return Err(FetchError::Obstacle(obstacle));
                }
                Peer::Busy(_) | Peer::Failed => {}
            }
        }
        for delta in route {
            let mut done = |bytes| progress(before + bytes, total);
            let made = match keeps {
                true => self.patch_kept(name, delta, &mut flow, &mut done).await,
                false => {
                    self.patch(Origin::At(Remote::Hub(name)), name, delta, &mut flow, &mut done)
                        .await
                }
            };
            match made {
                Ok(()) => before += delta.to_bytes + if keeps { delta.bytes } else { 0 },
                Err(Refusal::Fetch(error)) => return Err(error),
                Err(Refusal::Fallback(cause)) => {
                    self.falls_back(delta, cause);
                    return Err(FetchError::Deltas);
                }
            }
        }
        flow.part = Part::Whole;
        let before = total - weights.size_bytes;
        self.blob(name, weights, &mut flow, |bytes| progress(before + bytes, total)).await?;
        progress(total, total);
        Ok(())
    }

    /// Whether peers that serve others are still waited for, counted from the first time.
    fn waits_for_peers(&self, weights: Digest) -> bool {
        let mut since = self.busy_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.take_if(|(of, _)| *of != weights);
        since.get_or_insert_with(|| (weights, Instant::now())).1.elapsed() < BUSY_PEERS
    }

    /// Gets files from devices of the same site, each from the first that gives it. Those that came
    /// stay, also where another one does not come.
    async fn take_from_peers(
        &self,
        peers: &[String],
        blobs: &[Blob],
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
    ) -> Peer {
        flow.part = Part::Peer;
        let mut before = 0;
        for blob in blobs {
            let mut got = Peer::Failed;
            for peer in peers {
                let done = &mut |bytes| progress(before + bytes);
                match self.take_from_peer(peer, *blob, flow, done).await {
                    Peer::Failed => {}
                    Peer::Busy(obstacle) => got = Peer::Busy(obstacle),
                    Peer::Gave => {
                        got = Peer::Gave;
                        break;
                    }
                }
            }
            match got {
                Peer::Gave => before += blob.size_bytes,
                other => return other,
            }
        }
        if blobs.is_empty() { Peer::Failed } else { Peer::Gave }
    }

    async fn take_from_peer(
        &self,
        peer: &str,
        blob: Blob,
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
    ) -> Peer {
        let guard = self.writer(blob.digest).lock_owned().await;
        let state = self.state.clone();
        if blocking(move || state.blob(blob.digest).exists() && check(&state, blob).is_ok()).await {
            return Peer::Gave;
        }
        match self.attempt(Remote::Peer(peer), blob, guard, flow, progress).await {
            Ok(()) => Peer::Gave,
            // Only an answer says when to come again.
            Err(Problem::Fetch(FetchError::Obstacle(obstacle)))
                if obstacle.retry_after_ms.is_some() =>
            {
                Peer::Busy(obstacle)
            }
            Err(_) => {
                tracing::info!("{peer} does not give {}", blob.digest.short());
                Peer::Failed
            }
        }
    }

    /// Whether a file is here and whole.
    async fn has(&self, blob: Blob) -> bool {
        let state = self.state.clone();
        blocking(move || check(&state, blob).is_ok()).await
    }

    /// Whether deltas fit beside what is made of them.
    fn has_room_for(&self, route: &[Delta]) -> bool {
        let bytes = route.iter().map(|delta| delta.bytes.saturating_add(delta.to_bytes));
        self.check_room(bytes.fold(0, u64::saturating_add)).is_ok()
    }

    /// Asks for a part of a blob.
    async fn ask(
        &self,
        remote: Remote<'_>,
        blob: Digest,
        range: Range<u64>,
    ) -> Result<reqwest::Response, HubError> {
        match remote {
            Remote::Hub(name) => self.hub.blob(name, blob, range).await,
            Remote::Peer(peer) => ask_peer(&self.peers, peer, blob, range).await,
        }
    }

    fn writer(&self, digest: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut writers = self.writers.lock().unwrap_or_else(PoisonError::into_inner);
        writers.retain(|_, writer| Arc::strong_count(writer) > 1);
        Arc::clone(writers.entry(digest).or_default())
    }

    async fn blob(
        &self,
        name: &ModelName,
        blob: Blob,
        flow: &mut Flow<'_>,
        mut progress: impl FnMut(u64),
    ) -> Result<(), FetchError> {
        let writer = self.writer(blob.digest);
        for attempt in 1..=ATTEMPTS {
            let guard = Arc::clone(&writer).lock_owned().await;
            if self.has(blob).await {
                return Ok(());
            }
            match self.attempt(Remote::Hub(name), blob, guard, flow, &mut progress).await {
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
        from: Remote<'_>,
        blob: Blob,
        guard: OwnedMutexGuard<()>,
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), Problem> {
        let state = self.state.clone();
        let (mut file, mut hasher, mut have) = blocking(move || resume(&state, blob)).await?;
        self.check_room(blob.size_bytes - have).map_err(Problem::Fetch)?;
        let response = match self.ask(from, blob.digest, have..blob.size_bytes).await {
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
        loop {
            let Some(piece) = next(&mut pieces).await.and_then(Result::ok) else { break };
            let received = piece.len() as u64;
            have += received;
            if have > blob.size_bytes || sender.send(piece).await.is_err() {
                break;
            }
            progress(have);
            flow.take(received).await;
        }
        drop(sender);
        let (digest, written) =
            writing.await.map_err(|error| Problem::from(io::Error::other(error)))??;
        if written < blob.size_bytes && have <= blob.size_bytes {
            // Cut off, or ended early: what is here stays for the next attempt.
            tracing::debug!("{} ended after {written} bytes", blob.digest.short());
            return Err(Problem::Fetch(network()));
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

    /// Whether so many bytes more may be written.
    fn check_room(&self, bytes: u64) -> Result<(), FetchError> {
        let needed = bytes.saturating_add(DISK_RESERVE_BYTES);
        match needed.saturating_sub(self.state.free_bytes()) {
            0 => Ok(()),
            short_bytes => Err(FetchError::NoRoom { short_bytes }),
        }
    }

    fn discard(&self, digest: Digest) {
        let path = self.state.partial(digest);
        if let Err(error) = std::fs::remove_file(&path) {
            tracing::debug!("delete {}: {error}", path.display());
        }
    }
}

async fn ask_peer(
    client: &reqwest::Client,
    peer: &str,
    digest: Digest,
    range: Range<u64>,
) -> Result<reqwest::Response, HubError> {
    let url = peer_url(peer, digest).ok_or(HubError::Answer("names no device of the site"))?;
    let (start, last) = (range.start, range.end.saturating_sub(1));
    let request = client.get(url).header(RANGE, format!("bytes={start}-{last}"));
    let answer = tokio::time::timeout(Duration::from_millis(PEER_ANSWER_MS), request.send());
    let response = answer.await.map_err(|_| HubError::Answer("did not come in time"))??;
    let status = response.status();
    if status == StatusCode::SERVICE_UNAVAILABLE {
        let after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after_ms = after.and_then(|text| text.parse::<u64>().ok()).map(|s| s * 1000);
        let detail = "it serves others".to_owned();
        return Err(HubError::Status { status, detail, hint: None, retry_after_ms });
    }
    Ok(response.error_for_status()?)
}

/// Where a device of the site has a file: an address in plain HTTP, and nothing else.
fn peer_url(peer: &str, digest: Digest) -> Option<reqwest::Url> {
    let address: std::net::SocketAddr = peer.strip_prefix("http://")?.parse().ok()?;
    format!("http://{address}/blobs/{digest}").parse().ok()
}

fn network() -> FetchError {
    FetchError::Obstacle(Obstacle::new(WaitCause::Network))
}

/// The next piece of an answer; none when it ends or stands still.
async fn next<T>(pieces: &mut (impl futures_util::Stream<Item = T> + Unpin)) -> Option<T> {
    let next = tokio::time::timeout(Duration::from_millis(STALL_TIMEOUT_MS), pieces.next());
    next.await.ok()?
}

/// Hashes the files of a package on disk. Damaged ones are deleted.
///
/// # Errors
/// As [`VerifyError`] says.
pub fn verify(state: &StateFolder, package: &Package) -> Result<(), VerifyError> {
    package.blobs().try_for_each(|blob| check(state, blob))
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
