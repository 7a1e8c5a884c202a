//! Model files that are made of one that is here and a delta: beside it, or in its place.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use reqwest::StatusCode;
use slmops_agent_core::{Blob, FetchError, Obstacle};
use slmops_api::ModelName;
use slmops_api::delta::{Delta, Fallback};
use slmops_artifact::Digest;
use tokio::sync::{OwnedMutexGuard, mpsc};

use super::flow::{Flow, Part};
use super::patch::{self, End, Made, Patch, Recipe};
use super::replace::{Replacement, Unchanged};
use super::{Downloads, QUEUED_PIECES, Remote, blocking, check, continues_at, network, next};
use crate::durable;
use crate::hub::HubError;
use crate::peers::read_pieces;
use crate::state::wait_cause;

/// Frames of one delta that are got from the whole file because they came out wrong, at most; then
/// all the rest is.
const MAX_WRONG_FRAMES: u32 = 16;
/// Milliseconds between two looks at how far a file in the making is.
const LOOK_INTERVAL_MS: u64 = 200;

/// Where bytes of a delta are read.
#[derive(Clone, Copy)]
pub(super) enum Origin<'a> {
    At(Remote<'a>),
    /// They are here.
    Disk,
}

/// A part of a blob as it comes; it ends early where something breaks.
type Pieces = stream::BoxStream<'static, Bytes>;

/// Why a delta did not give its file.
pub(super) enum Refusal {
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

impl Downloads {
    pub(super) fn falls_back(&self, delta: &Delta, cause: Fallback) {
        tracing::warn!(
            "the delta {} does not do ({}); the rest of the model itself is needed",
            delta.blob.short(),
            crate::words::fallback(cause)
        );
        self.note(|transfer| transfer.fallback = Some(cause));
    }

    /// Changes a model file where it lies into the last one of `route`; false where that does not do.
    pub(super) async fn replace_all(
        &self,
        name: &ModelName,
        route: &[Delta],
        peers: &[String],
        flow: &mut Flow<'_>,
        mut progress: impl FnMut(u64),
    ) -> Result<bool, FetchError> {
        for delta in route {
            match self.replace(name, delta, peers, flow, &mut progress).await {
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

    /// Changes a model file by a delta where it lies, going on where an earlier attempt ended. The
    /// delta comes from peers as far as they give it: its header, which has the hash of each frame,
    /// is the hub's.
    async fn replace(
        &self,
        name: &ModelName,
        delta: &Delta,
        peers: &[String],
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), Refusal> {
        let hub = Remote::Hub(name);
        let Some((guard, header)) = self.begin_delta(Origin::At(hub), delta, flow).await? else {
            return Ok(());
        };
        let (state, wanted) = (self.state.clone(), delta.clone());
        let mut made = blocking(move || Replacement::open(&state, &wanted, &header)).await?;
        let mut remotes = peers.iter().map(|peer| Remote::Peer(peer));
        let mut from = remotes.next().unwrap_or(hub);
        while let Some(run) = made.run() {
            let range = run.payloads;
            let origin = Origin::At(from);
            let pieces = match (self.pieces(origin, delta.blob, range.clone()).await, from) {
                (Ok(pieces), _) => pieces,
                (Err(refusal), Remote::Peer(_)) => {
                    if is_busy(&refusal) && self.waits_for_peers(delta.to) {
                        return Err(refusal);
                    }
                    from = remotes.next().unwrap_or(hub);
                    continue;
                }
                (Err(refusal), Remote::Hub(_)) => return Err(refusal),
            };
            flow.part = part_of(origin);
            let left = range.end - range.start;
            let end;
            (made, end) =
                self.feed(pieces, left, made, &guard, flow, progress, Replacement::apply).await?;
            match (end, from) {
                (End::Complete, _) => {}
                (_, Remote::Peer(_)) => from = remotes.next().unwrap_or(hub),
                (End::Cut, _) => return Err(cut(&delta.blob)),
                // The base was right: it is the delta.
                (End::WrongFrame, _) => return Err(Refusal::Fallback(Fallback::DamagedDelta)),
            }
        }
        let (state, wanted) = (self.state.clone(), delta.clone());
        blocking(move || made.finish(&state, &wanted)).await?;
        drop(guard);
        Ok(())
    }

    /// Makes a model file by a delta that stays, for devices of the same site.
    pub(super) async fn patch_kept(
        &self,
        name: &ModelName,
        delta: &Delta,
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), Refusal> {
        flow.part = Part::Delta;
        match self.blob(name, delta_blob(delta), flow, &mut *progress).await {
            Ok(()) => {}
            Err(FetchError::Missing) => return Err(Refusal::Fallback(Fallback::Missing)),
            Err(FetchError::Digest) => return Err(Refusal::Fallback(Fallback::DamagedDelta)),
            Err(error) => return Err(Refusal::Fetch(error)),
        }
        let mut done = |bytes| progress(delta.bytes + bytes);
        self.patch(Origin::Disk, name, delta, flow, &mut done).await
    }

    /// Makes a model file by a delta from one that is here, going on where an earlier attempt ended.
    pub(super) async fn patch(
        &self,
        from: Origin<'_>,
        name: &ModelName,
        delta: &Delta,
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
    ) -> Result<(), Refusal> {
        let Some((guard, header)) = self.begin_delta(from, delta, flow).await? else {
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
            flow.part = part_of(from);
            let end;
            let range = made.payloads();
            let left = range.end - range.start;
            let pieces = self.pieces(from, delta.blob, range).await?;
            (made, end) =
                self.feed(pieces, left, made, &guard, flow, progress, Patch::apply).await?;
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
            let left = range.end - range.start;
            let pieces = self.pieces(Origin::At(Remote::Hub(name)), delta.to, range).await?;
            (made, end) =
                self.feed(pieces, left, made, &guard, flow, progress, Patch::replace).await?;
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
        from: Origin<'_>,
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
        Ok(Some((guard, self.delta_header(from, delta, flow).await?)))
    }

    /// The first bytes of a delta.
    async fn delta_header(
        &self,
        from: Origin<'_>,
        delta: &Delta,
        flow: &mut Flow<'_>,
    ) -> Result<Vec<u8>, Refusal> {
        flow.part = part_of(from);
        let mut pieces = self.pieces(from, delta.blob, 0..delta.header_bytes).await?;
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

    /// A part of a blob, as it comes from there.
    async fn pieces(
        &self,
        from: Origin<'_>,
        blob: Digest,
        range: Range<u64>,
    ) -> Result<Pieces, Refusal> {
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        let start = range.start;
        let remote = match from {
            Origin::At(remote) => remote,
            Origin::Disk => {
                let path = self.state.blob(blob);
                let file = blocking(move || File::open(path)).await?;
                let read = read_pieces(file, range);
                let pieces =
                    stream::unfold(read, async |mut read| Some((read.recv().await?.ok()?, read)));
                return Ok(pieces.boxed());
            }
        };
        let response = self.ask(remote, blob, range).await.map_err(refusal)?;
        // A server that knows no ranges would send what is not asked for.
        if !continues_at(&response, start) {
            return Err(Refusal::Fallback(Fallback::Unreadable));
        }
        let pieces = stream::unfold(response.bytes_stream(), async |mut pieces| {
            Some((pieces.next().await?.ok()?, pieces))
        });
        Ok(pieces.boxed())
    }

    /// Gives up to `left` bytes of a blob, as they come, to `work` on a thread of its own.
    #[expect(clippy::too_many_arguments, reason = "each is another thing of one download")]
    async fn feed<T: Made + Send + 'static>(
        &self,
        pieces: Pieces,
        mut left: u64,
        mut made: T,
        guard: &Arc<OwnedMutexGuard<()>>,
        flow: &mut Flow<'_>,
        progress: &mut impl FnMut(u64),
        work: fn(&mut T, mpsc::Receiver<Bytes>) -> io::Result<End>,
    ) -> Result<(T, End), Refusal> {
        let mut pieces = Some(pieces);
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
}

/// Whether somebody said when to come again.
fn is_busy(refusal: &Refusal) -> bool {
    match refusal {
        Refusal::Fetch(FetchError::Obstacle(obstacle)) => obstacle.retry_after_ms.is_some(),
        _ => false,
    }
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

/// A delta as a file.
pub(super) fn delta_blob(delta: &Delta) -> Blob {
    Blob { digest: delta.blob, size_bytes: delta.bytes }
}

/// What bytes of a delta are part of that come from there.
fn part_of(from: Origin<'_>) -> Part {
    match from {
        Origin::At(Remote::Hub(_)) => Part::Delta,
        Origin::At(Remote::Peer(_)) => Part::Peer,
        Origin::Disk => Part::Here,
    }
}
