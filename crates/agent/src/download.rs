//! Getting blobs: resumed where an earlier attempt ended, hashed as they arrive, bounded by their
//! declared size, and in place only once they are whole and on the disk. A model file is made from
//! one that is here where deltas lead from it; where they do not do, the rest is got whole.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_RANGE, RANGE, RETRY_AFTER};
use slmops_agent_core::{Blob, FetchError, Obstacle, Package, VerifyError};
use slmops_api::ModelName;
use slmops_api::delta::{Delta, Fallback, Transfer};
use slmops_api::device::{DISK_RESERVE_BYTES, WaitCause};
use slmops_artifact::Digest;
use slmops_artifact::digest::Hasher;
use tokio::sync::{OwnedMutexGuard, mpsc};

use crate::durable;
use crate::hub::{DeviceHub, HubError};
use crate::patch::{self, End, Made, Patch, Recipe};
use crate::replace::{self, Replacement, Unchanged};
use crate::state::{StateFolder, wait_cause};

/// Pieces between the network and the disk, at most.
const QUEUED_PIECES: usize = 16;
/// Milliseconds that a download may stand still.
const STALL_TIMEOUT_MS: u64 = 60_000;
/// Seconds of a rate that may come at once after a pause of the network.
const BURST_S: f64 = 0.25;
/// Times that bytes which are not what their digest says are asked for.
const ATTEMPTS: u32 = 2;
/// Frames of one delta that are got from the whole file because they came out wrong, at most; then
/// all the rest is.
const MAX_WRONG_FRAMES: u32 = 16;
/// Milliseconds to reach a device of the same site, and to its answer.
const PEER_CONNECT_MS: u64 = 2_000;
const PEER_ANSWER_MS: u64 = 10_000;
/// How long peers that serve others are waited for before the hub is asked.
const BUSY_PEERS: Duration = Duration::from_secs(600);
/// How often what was fetched is written down while more comes in.
const NOTE_INTERVAL: Duration = Duration::from_secs(5);
/// Milliseconds between two looks at how far a file in the making is.
const LOOK_INTERVAL_MS: u64 = 200;

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
    /// Deltas from a file that is here, one after the other.
    pub route: &'a [Delta],
    /// Devices of the same site that have them.
    pub peers: &'a [String],
    /// A model file that goes to make room for them.
    pub gives_up: Option<Digest>,
}

/// Who is asked for a blob.
#[derive(Clone, Copy)]
enum Origin<'a> {
    Hub(&'a ModelName),
    Peer(&'a reqwest::Url),
}

/// What bytes that come in are part of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// A delta.
    Delta,
    /// The model file itself.
    Whole,
    /// The model file, from a device of the same site.
    Peer,
    /// A small file.
    Other,
}

/// The bytes of one download as they come in: counted, and held back to a rate.
struct Flow<'a> {
    downloads: &'a Downloads,
    bucket: Option<Bucket>,
    part: Part,
    noted: Instant,
}

impl Flow<'_> {
    async fn take(&mut self, bytes: u64) {
        if self.part != Part::Peer {
            self.downloads.received_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        self.downloads.note(|transfer| match self.part {
            Part::Delta => transfer.delta_bytes += bytes,
            Part::Whole => transfer.whole_bytes += bytes,
            Part::Peer => transfer.peer_bytes += bytes,
            Part::Other => {}
        });
        if self.noted.elapsed() >= NOTE_INTERVAL {
            self.noted = Instant::now();
            self.downloads.save_transfer();
        }
        if let Some(bucket) = &mut self.bucket {
            bucket.take(bytes).await;
        }
    }
}

impl Drop for Flow<'_> {
    fn drop(&mut self) {
        // Whatever ended it: what was fetched is counted over restarts.
        self.downloads.save_transfer();
    }
}

/// A token bucket: what is read over the rate is waited for before more is read, so that the sender
/// is held back by the connection's own flow control.
pub(crate) struct Bucket {
    rate_bytes_per_s: u64,
    /// Bytes that may be read now; below zero they were read too early.
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    pub(crate) fn new(rate_bytes_per_s: u64) -> Self {
        Self { rate_bytes_per_s: rate_bytes_per_s.max(1), tokens: 0.0, filled: Instant::now() }
    }

    /// Takes out `bytes` that were read, and waits until the bucket is even again.
    pub(crate) async fn take(&mut self, bytes: u64) {
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

/// Why a delta did not give its file.
enum Refusal {
    /// It will not.
    Fallback(Fallback),
    /// Something is in the way of everything.
    Fetch(FetchError),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        tracing::warn!("cannot write the model: {error}");
        Self::Fetch(FetchError::Obstacle(Obstacle::new(wait_cause(&error))))
    }
}

impl From<Unchanged> for Refusal {
    fn from(unchanged: Unchanged) -> Self {
        match unchanged {
            Unchanged::Fallback(cause) => Self::Fallback(cause),
            Unchanged::Disk(error) => error.into(),
        }
    }
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
        let state = self.state.clone();
        if blocking(move || check(&state, weights).is_ok()).await {
            return Ok(());
        }
        {
            let mut transfer = self.transfer.lock().unwrap_or_else(PoisonError::into_inner);
            if transfer.as_ref().is_none_or(|known| known.weights != weights.digest) {
                *transfer = Some(Transfer {
                    weights: weights.digest,
                    size_bytes: weights.size_bytes,
                    delta_bytes: 0,
                    whole_bytes: 0,
                    peer_bytes: 0,
                    fallback: None,
                    gave_up: None,
                });
            }
        }
        let mut route = sources.route;
        if let Some(base) = sources.gives_up {
            self.note(|transfer| transfer.gave_up = Some(base));
            if self.replace_all(name, route, &mut flow, |bytes| progress(bytes, total)).await? {
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
            route = &[];
        }
        flow.part = Part::Peer;
        let mut busy = None;
        for peer in sources.peers {
            match self
                .take_from_peer(peer, weights, &mut flow, |bytes| progress(bytes, total))
                .await
            {
                Peer::Gave => {
                    progress(total, total);
                    return Ok(());
                }
                Peer::Busy(obstacle) => busy = Some(obstacle),
                Peer::Failed => {}
            }
        }
        // Those who are served now will serve others: over the site's line it would come again.
        if let Some(obstacle) = busy.filter(|_| self.waits_for_peers(weights.digest)) {
            return Err(FetchError::Obstacle(obstacle));
        }
        // What is made on the way counts as well: it takes its time.
        let made: u64 = route.iter().map(|delta| delta.to_bytes).sum();
        let total = probes.size_bytes + made.max(weights.size_bytes);
        let mut before = probes.size_bytes;
        for delta in route {
            flow.part = Part::Delta;
            match self.patch(name, delta, &mut flow, |bytes| progress(before + bytes, total)).await
            {
                Ok(()) => before += delta.to_bytes,
                Err(Refusal::Fetch(error)) => return Err(error),
                Err(Refusal::Fallback(cause)) => {
                    self.falls_back(delta, cause);
                    break;
                }
            }
        }
        flow.part = Part::Whole;
        let before = total - weights.size_bytes;
        self.blob(name, weights, &mut flow, |bytes| progress(before + bytes, total)).await?;
        progress(total, total);
        Ok(())
    }

    fn falls_back(&self, delta: &Delta, cause: Fallback) {
        tracing::warn!(
            "the delta {} does not do ({}); getting the rest of the model itself",
            delta.blob.short(),
            crate::words::fallback(cause)
        );
        self.note(|transfer| transfer.fallback = Some(cause));
    }

    /// Changes a model file where it lies into the last one of `route`; false where that does not do.
    async fn replace_all(
        &self,
        name: &ModelName,
        route: &[Delta],
        flow: &mut Flow<'_>,
        mut progress: impl FnMut(u64),
    ) -> Result<bool, FetchError> {
        flow.part = Part::Delta;
        for delta in route {
            match self.replace(name, delta, flow, &mut progress).await {
                Ok(()) => {}
                Err(Refusal::Fetch(error)) => return Err(error),
                Err(Refusal::Fallback(cause)) => {
                    self.falls_back(delta, cause);
                    return Ok(false);
                }
            }
        }
        Ok(!route.is_empty())
    }

    /// Changes a model file by a delta where it lies, going on where an earlier attempt ended.
    async fn replace(
        &self,
        name: &ModelName,
        delta: &Delta,
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), Refusal> {
        let Some((guard, header)) = self.begin_delta(name, delta, flow).await? else {
            return Ok(());
        };
        let (state, wanted) = (self.state.clone(), delta.clone());
        let mut made = blocking(move || Replacement::open(&state, &wanted, &header)).await?;
        while let Some(run) = made.run() {
            let end;
            (made, end) = self
                .feed(
                    name,
                    delta.blob,
                    run.payloads,
                    made,
                    &guard,
                    flow,
                    progress,
                    Replacement::apply,
                )
                .await?;
            match end {
                End::Complete => {}
                End::Cut => return Err(cut(&delta.blob)),
                // The base was right: it is the delta.
                End::WrongFrame => return Err(Refusal::Fallback(Fallback::DamagedDelta)),
            }
        }
        let (state, wanted) = (self.state.clone(), delta.clone());
        blocking(move || made.finish(&state, &wanted)).await?;
        drop(guard);
        Ok(())
    }

    /// Whether peers that serve others are still waited for, counted from the first time.
    fn waits_for_peers(&self, weights: Digest) -> bool {
        let mut since = self.busy_since.lock().unwrap_or_else(PoisonError::into_inner);
        since.take_if(|(of, _)| *of != weights);
        since.get_or_insert_with(|| (weights, Instant::now())).1.elapsed() < BUSY_PEERS
    }

    /// Gets a file from a device of the same site. What came of it stays for others.
    async fn take_from_peer(
        &self,
        peer: &str,
        weights: Blob,
        flow: &mut Flow<'_>,
        mut progress: impl FnMut(u64),
    ) -> Peer {
        let Some(url) = peer_url(peer, weights.digest) else { return Peer::Failed };
        let guard = self.writer(weights.digest).lock_owned().await;
        match self.attempt(Origin::Peer(&url), weights, guard, flow, &mut progress).await {
            Ok(()) => Peer::Gave,
            // Only an answer says when to come again.
            Err(Problem::Fetch(FetchError::Obstacle(obstacle)))
                if obstacle.retry_after_ms.is_some() =>
            {
                Peer::Busy(obstacle)
            }
            Err(_) => {
                tracing::info!("{peer} does not give {}", weights.digest.short());
                Peer::Failed
            }
        }
    }

    /// Makes a model file by a delta from one that is here, going on where an earlier attempt ended.
    async fn patch(
        &self,
        name: &ModelName,
        delta: &Delta,
        flow: &mut Flow<'_>,
        mut progress: impl FnMut(u64),
    ) -> Result<(), Refusal> {
        let Some((guard, header)) = self.begin_delta(name, delta, flow).await? else {
            return Ok(());
        };
        let (state, expected) = (self.state.clone(), delta.clone());
        let recipe = blocking(move || Recipe::new(&expected, &header, &state.blob(expected.from)));
        let recipe = Arc::new(recipe.await.map_err(Refusal::Fallback)?);
        let (state, with, to) = (self.state.clone(), Arc::clone(&recipe), delta.to);
        let mut made = blocking(move || {
            let path = state.partial(to);
            let mut options = OpenOptions::new();
            let file = options.create(true).truncate(false).read(true).write(true).open(path)?;
            Patch::resume(with, file)
        })
        .await?;
        let written = made.written();
        self.check_room(delta.to_bytes - written.load(Ordering::Relaxed))
            .map_err(Refusal::Fetch)?;
        let mut wrong_frames = 0;
        let damage = loop {
            flow.part = Part::Delta;
            let end;
            let (blob, range) = (delta.blob, made.payloads());
            (made, end) = self
                .feed(name, blob, range, made, &guard, flow, &mut progress, Patch::apply)
                .await?;
            match end {
                End::Complete => break None,
                End::Cut => return Err(cut(&delta.blob)),
                End::WrongFrame => {}
            }
            wrong_frames += 1;
            if wrong_frames > MAX_WRONG_FRAMES {
                break Some(());
            }
            // The frame's own bytes do as well.
            flow.part = Part::Whole;
            let end;
            let range = made.next_output();
            (made, end) = self
                .feed(name, delta.to, range, made, &guard, flow, &mut progress, Patch::replace)
                .await?;
            if let End::Cut = end {
                return Err(cut(&delta.to));
            }
        };
        if wrong_frames > 0 {
            let with = Arc::clone(&recipe);
            let cause = match blocking(move || with.is_base_right()).await {
                true => Fallback::DamagedDelta,
                false => Fallback::DamagedBase,
            };
            tracing::warn!(
                "{wrong_frames} frames of the delta {} came out wrong: {}",
                delta.blob.short(),
                crate::words::fallback(cause)
            );
            self.note(|transfer| transfer.fallback = Some(cause));
            if damage.is_some() {
                return Err(Refusal::Fallback(cause));
            }
        }
        let digest = blocking(move || made.finish()).await?;
        if digest != delta.to {
            self.discard(delta.to);
            return Err(Refusal::Fallback(Fallback::WrongResult));
        }
        let (from, to) = (self.state.partial(delta.to), self.state.blob(delta.to));
        blocking(move || {
            std::fs::rename(from, &to)?;
            durable::sync_parent(&to)
        })
        .await?;
        drop(guard);
        Ok(())
    }

    /// The right to write what a delta makes, and the delta's header; absent where that is here already.
    async fn begin_delta(
        &self,
        name: &ModelName,
        delta: &Delta,
        flow: &mut Flow<'_>,
    ) -> Result<Option<(Arc<OwnedMutexGuard<()>>, Vec<u8>)>, Refusal> {
        let guard = Arc::new(self.writer(delta.to).lock_owned().await);
        let (state, blob) =
            (self.state.clone(), Blob { digest: delta.to, size_bytes: delta.to_bytes });
        if blocking(move || state.blob(blob.digest).exists() && check(&state, blob).is_ok()).await {
            return Ok(None);
        }
        if !patch::is_header_length(delta.header_bytes) {
            return Err(Refusal::Fallback(Fallback::Unreadable));
        }
        Ok(Some((guard, self.delta_header(name, delta, flow).await?)))
    }

    /// The first bytes of a delta.
    async fn delta_header(
        &self,
        name: &ModelName,
        delta: &Delta,
        flow: &mut Flow<'_>,
    ) -> Result<Vec<u8>, Refusal> {
        let range = 0..delta.header_bytes;
        let response = self.hub.blob(name, delta.blob, range.clone()).await.map_err(refusal)?;
        let mut pieces = response.bytes_stream();
        let mut header = Vec::new();
        while (header.len() as u64) < delta.header_bytes {
            match next(&mut pieces).await {
                Some(piece) => {
                    flow.take(piece.len() as u64).await;
                    header.extend_from_slice(&piece);
                }
                None => return Err(cut(&delta.blob)),
            }
        }
        header.truncate(delta.header_bytes as usize);
        Ok(header)
    }

    /// Gives a part of a blob, as it comes, to `work` on a thread of its own.
    #[expect(clippy::too_many_arguments, reason = "each is another thing of one download")]
    async fn feed<T: Made + Send + 'static>(
        &self,
        name: &ModelName,
        blob: Digest,
        range: std::ops::Range<u64>,
        mut made: T,
        guard: &Arc<OwnedMutexGuard<()>>,
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
        work: fn(&mut T, mpsc::Receiver<Bytes>) -> io::Result<End>,
    ) -> Result<(T, End), Refusal> {
        let mut left = range.end - range.start;
        let mut pieces = match left {
            0 => None,
            _ => {
                let response = self.hub.blob(name, blob, range.clone()).await.map_err(refusal)?;
                // A server that knows no ranges would send what is not asked for.
                if !continues_at(&response, range.start) {
                    return Err(Refusal::Fallback(Fallback::Unreadable));
                }
                Some(response.bytes_stream())
            }
        };
        let written = made.written();
        let (sender, receiver) = mpsc::channel(QUEUED_PIECES);
        // It keeps the guard: a cancelled download must not write beside its successor.
        let guard = Arc::clone(guard);
        let mut working = tokio::task::spawn_blocking(move || {
            let _guard = guard;
            let end = work(&mut made, receiver);
            (made, end)
        });
        let mut sender = Some(sender);
        let look = Duration::from_millis(LOOK_INTERVAL_MS);
        let (made, end) = loop {
            progress(written.load(Ordering::Relaxed));
            let Some(stream) = pieces.as_mut().filter(|_| left > 0) else {
                sender = None;
                match tokio::time::timeout(look, &mut working).await {
                    Ok(done) => break done.map_err(io::Error::other)?,
                    Err(_) => continue,
                }
            };
            let Some(piece) = next(stream).await else {
                pieces = None;
                continue;
            };
            flow.take(piece.len() as u64).await;
            left = left.saturating_sub(piece.len() as u64);
            let sent = match &sender {
                Some(sender) => sender.send(piece).await.is_ok(),
                None => false,
            };
            if !sent {
                // It has found something wrong, and wants no more.
                pieces = None;
            }
        };
        progress(written.load(Ordering::Relaxed));
        Ok((made, end?))
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
            let state = self.state.clone();
            let whole = blocking(move || check(&state, blob).is_ok()).await;
            if whole {
                return Ok(());
            }
            match self.attempt(Origin::Hub(name), blob, guard, flow, &mut progress).await {
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
        from: Origin<'_>,
        blob: Blob,
        guard: OwnedMutexGuard<()>,
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), Problem> {
        let state = self.state.clone();
        let (mut file, mut hasher, mut have) = blocking(move || resume(&state, blob)).await?;
        self.check_room(blob.size_bytes - have).map_err(Problem::Fetch)?;
        let asked = match from {
            Origin::Hub(name) => self.hub.blob(name, blob.digest, have..blob.size_bytes).await,
            Origin::Peer(url) => ask_peer(&self.peers, url, have).await,
        };
        let response = match asked {
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
            let Some(piece) = next(&mut pieces).await else { break };
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
    url: &reqwest::Url,
    have: u64,
) -> Result<reqwest::Response, HubError> {
    let request = client.get(url.clone()).header(RANGE, format!("bytes={have}-"));
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

/// A blob that ended too early.
fn cut(blob: &Digest) -> Refusal {
    tracing::debug!("{} ended too early", blob.short());
    Refusal::Fetch(network())
}

fn refusal(error: HubError) -> Refusal {
    if error.is(StatusCode::NOT_FOUND) {
        return Refusal::Fallback(Fallback::Missing);
    }
    if error.is(StatusCode::RANGE_NOT_SATISFIABLE) {
        return Refusal::Fallback(Fallback::Unreadable);
    }
    Refusal::Fetch(FetchError::Obstacle(error.obstacle()))
}

/// The next piece of an answer; none when it ends, breaks or stands still.
async fn next(
    pieces: &mut (impl futures_util::Stream<Item = reqwest::Result<Bytes>> + Unpin),
) -> Option<Bytes> {
    let next = tokio::time::timeout(Duration::from_millis(STALL_TIMEOUT_MS), pieces.next());
    next.await.ok()??.ok()
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
