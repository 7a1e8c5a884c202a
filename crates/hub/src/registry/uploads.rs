//! How blobs come in: in one piece or in chunks, resumed after a lost connection or a restart, or
//! mounted from another repository (distribution-spec 1.1, "Pushing blobs").

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Response as HttpResponse, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http_body_util::BodyStream;
use jiff::{SignedDuration, Timestamp};
use slmops_artifact::Digest;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as AsyncMutex, OwnedMappedMutexGuard, OwnedMutexGuard};

use super::error::{RegistryError, received};
use super::name::{RepositoryName, parse_digest};
use super::{CONTENT_DIGEST, Call, Registry, Result, index, range};
use crate::blobs::{self, BlobError, MAX_BLOB_BYTES, Staged};
use crate::db::Tx;

/// Unfinished uploads in all repositories together.
pub const MAX_UPLOADS: u32 = 1000;
/// An upload that was begun so long ago and never finished is forgotten.
pub const UPLOAD_EXPIRES_AFTER: SignedDuration = SignedDuration::from_hours(7 * 24);

/// Uploads whose file is kept open with its running digest; one more is closed and, when it goes
/// on, read and hashed again.
const MAX_OPEN: usize = 128;
/// How long a request waits for another that writes to the same upload. A client that reconnects
/// may be faster than its old connection is noticed to be dead.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);

/// Uploads in progress, by id.
#[derive(Default)]
pub(super) struct Sessions {
    open: Mutex<HashMap<String, Slot>>,
}

/// An upload's file, opened by the first who needs it. Who holds the lock is the only writer.
type Slot = Arc<AsyncMutex<Option<Staged>>>;
type Guard = OwnedMappedMutexGuard<Option<Staged>, Staged>;

impl Sessions {
    fn slot(&self, id: &str) -> Slot {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= MAX_OPEN && !open.contains_key(id) {
            // Nobody can get at a slot that is only in the table while the table is locked.
            open.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        Arc::clone(open.entry(id.to_owned()).or_default())
    }

    fn close(&self, id: &str) {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

impl Registry {
    pub(super) async fn begin_upload(
        &self,
        call: &Call<'_>,
        name: RepositoryName,
        body: &mut Body,
    ) -> Result<Response> {
        if let Some(mount) = &call.params.mount {
            let digest = parse_digest(mount)?;
            let from = call.params.from.as_deref().map(str::parse).transpose()?;
            if self.mount(&name, from, digest).await? {
                return Ok(created(&name, &digest));
            }
        }
        // The whole blob may come with the first request.
        if let Some(digest) = &call.params.digest {
            let digest = parse_digest(digest)?;
            let id = self.begin(&name).await?;
            let result = self.receive_all(call, &name, &id, digest, body).await;
            if result.is_err() {
                self.forget(&id).await?;
            }
            return result;
        }
        let id = self.begin(&name).await?;
        Ok(progress(StatusCode::ACCEPTED, &name, &id, 0))
    }

    /// Gives `name` a blob that repository `from` (any, if absent) has; whether it did.
    async fn mount(
        &self,
        name: &RepositoryName,
        from: Option<RepositoryName>,
        digest: Digest,
    ) -> Result<bool> {
        let name = name.clone();
        let mount = move |tx: &Tx<'_>| {
            let size = match &from {
                None => index::blob_size_anywhere(tx, &digest)?,
                Some(from) => match index::find(tx, from)? {
                    Some(from) => index::blob_size(tx, from, &digest)?,
                    None => None,
                },
            };
            let Some(size) = size else { return Ok(false) };
            let repository = index::find_or_make(tx, &name)?;
            index::add_blob(tx, repository, &digest, size)?;
            Ok::<_, RegistryError>(true)
        };
        self.inner.db.write(mount).await
    }

    async fn begin(&self, name: &RepositoryName) -> Result<String> {
        let id = hex::encode(rand::random::<[u8; 16]>());
        let mut tried_expiry = false;
        loop {
            let (name, new) = (name.clone(), id.clone());
            let begin = move |tx: &Tx<'_>| {
                if index::count_uploads(tx)? >= MAX_UPLOADS {
                    return Err(RegistryError::too_many_uploads(MAX_UPLOADS));
                }
                let repository = index::find_or_make(tx, &name)?;
                index::add_upload(tx, repository, &new, Timestamp::now().as_second())
            };
            match self.inner.db.write(begin).await {
                Ok(()) => return Ok(id),
                Err(RegistryError::Refused { status: StatusCode::TOO_MANY_REQUESTS, .. })
                    if !tried_expiry =>
                {
                    tried_expiry = true;
                    self.expire_uploads().await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) async fn upload_status(&self, name: RepositoryName, id: String) -> Result<Response> {
        self.check_upload(&name, &id).await?;
        let length = self.inner.blobs.staged_bytes(&id).await?;
        Ok(progress(StatusCode::NO_CONTENT, &name, &id, length))
    }

    pub(super) async fn upload_chunk(
        &self,
        call: &Call<'_>,
        name: RepositoryName,
        id: String,
        body: &mut Body,
    ) -> Result<Response> {
        let guard = self.lock(&name, &id).await?;
        let guard = self.receive(guard, &call.parts.headers, &name, &id, body).await?;
        Ok(progress(StatusCode::ACCEPTED, &name, &id, guard.len_bytes()))
    }

    pub(super) async fn finish_upload(
        &self,
        call: &Call<'_>,
        name: RepositoryName,
        id: String,
        body: &mut Body,
    ) -> Result<Response> {
        let digest = call.params.digest.as_deref();
        let digest = digest.ok_or_else(|| RegistryError::digest_invalid("`digest` is missing"))?;
        self.receive_all(call, &name, &id, parse_digest(digest)?, body).await
    }

    pub(super) async fn cancel_upload(&self, name: RepositoryName, id: String) -> Result<Response> {
        let _guard = self.lock(&name, &id).await?;
        self.forget(&id).await?;
        let response = HttpResponse::builder().status(StatusCode::NO_CONTENT);
        Ok(response.body(Body::empty()).expect("no headers"))
    }

    /// Takes the last bytes of an upload and makes a blob of it.
    async fn receive_all(
        &self,
        call: &Call<'_>,
        name: &RepositoryName,
        id: &str,
        digest: Digest,
        body: &mut Body,
    ) -> Result<Response> {
        let guard = self.lock(name, id).await?;
        let guard = self.receive(guard, &call.parts.headers, name, id, body).await?;
        let (registry, repository, upload) = (self.clone(), name.clone(), id.to_owned());
        // In a task of its own: bytes and row come together even if the client goes away.
        let work =
            tokio::spawn(async move { registry.complete(guard, repository, upload, digest).await });
        work.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        Ok(created(name, &digest))
    }

    async fn complete(
        &self,
        guard: Guard,
        name: RepositoryName,
        id: String,
        digest: Digest,
    ) -> Result<()> {
        let (_guard, committed) = self.inner.blobs.commit(guard, Some(digest)).await;
        let entry = match committed {
            Ok(entry) => entry,
            Err(error @ BlobError::Mismatch { .. }) => {
                // More bytes cannot make it right.
                self.forget(&id).await?;
                return Err(error.into());
            }
            Err(error) => return Err(error.into()),
        };
        let (upload, blobs) = (id.clone(), self.inner.blobs.clone());
        let added = self
            .inner
            .db
            .write(move |tx| {
                // No repository had it until now, so another hub may have removed it as unused.
                if Handle::current().block_on(blobs.size(&entry.digest))?.is_none() {
                    return Err(RegistryError::upload_unknown(&upload));
                }
                let repository = index::find_or_make(tx, &name)?;
                index::add_blob(tx, repository, &entry.digest, entry.size_bytes)?;
                index::remove_upload(tx, &upload)
            })
            .await;
        self.inner.sessions.close(&id);
        added
    }

    /// Takes a chunk, which must start where the upload stands.
    async fn receive(
        &self,
        guard: Guard,
        headers: &HeaderMap,
        name: &RepositoryName,
        id: &str,
        body: &mut Body,
    ) -> Result<Guard> {
        let stands_at = guard.len_bytes();
        let chunk = range::chunk(headers)?;
        let room = MAX_BLOB_BYTES - stands_at.min(MAX_BLOB_BYTES);
        let mut limit = room;
        if let Some(chunk) = &chunk {
            if chunk.start != stands_at {
                let location = upload_location(name, id);
                return Err(RegistryError::OutOfOrder { asked: chunk.start, stands_at, location });
            }
            limit = limit.min(chunk.end - chunk.start);
        }
        // What is announced wrong or too large is not taken at all.
        let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        if let Some(announced) = announced.and_then(|text| text.parse::<u64>().ok()) {
            if announced > room {
                return Err(BlobError::TooLarge { limit_bytes: MAX_BLOB_BYTES }.into());
            }
            check_length(chunk.as_ref(), announced)?;
        }
        let (guard, added) = blobs::append(guard, pieces(body), limit).await;
        match added {
            Ok(added) => check_length(chunk.as_ref(), added)?,
            Err(BlobError::TooLarge { .. }) if limit < room => {
                check_length(chunk.as_ref(), limit + 1)?
            }
            Err(error) => return Err(error.into()),
        }
        Ok(guard)
    }

    /// The right to write to an upload, with its file open.
    async fn lock(&self, name: &RepositoryName, id: &str) -> Result<Guard> {
        // Asked before as well, so that a made-up id opens no slot.
        self.check_upload(name, id).await?;
        let slot = self.inner.sessions.slot(id).lock_owned();
        let mut slot = tokio::time::timeout(BUSY_TIMEOUT, slot)
            .await
            .map_err(|_| RegistryError::upload_busy())?;
        // Whoever held the lock before may have finished or cancelled it.
        if let Err(error) = self.check_upload(name, id).await {
            self.inner.sessions.close(id);
            return Err(error);
        }
        if slot.is_none() {
            *slot = Some(self.inner.blobs.stage(id).await?);
        }
        Ok(OwnedMutexGuard::map(slot, |staged| staged.as_mut().expect("it was just opened")))
    }

    async fn check_upload(&self, name: &RepositoryName, id: &str) -> Result<()> {
        let (name, upload) = (name.clone(), id.to_owned());
        let check = move |tx: &Tx<'_>| match index::find(tx, &name)? {
            Some(repository) => index::has_upload(tx, repository, &upload),
            None => Ok(false),
        };
        match self.inner.db.read(check).await? {
            true => Ok(()),
            false => Err(RegistryError::upload_unknown(id)),
        }
    }

    /// Ends an upload without a blob. The row goes first: then nobody finds the file any more.
    async fn forget(&self, id: &str) -> Result<()> {
        let upload = id.to_owned();
        self.inner.db.write(move |tx| index::remove_upload(tx, &upload)).await?;
        self.inner.sessions.close(id);
        Ok(self.inner.blobs.discard(id).await?)
    }

    /// Forgets old uploads, and removes staging files that belong to none.
    pub(super) async fn expire_uploads(&self) -> Result<()> {
        let before_s = (Timestamp::now() - UPLOAD_EXPIRES_AFTER).as_second();
        // Files first: an upload that begins meanwhile has a row before it has a file.
        let files = self.inner.blobs.staged().await?;
        let known = self
            .inner
            .db
            .write(move |tx| {
                index::expire_uploads(tx, before_s)?;
                index::uploads(tx)
            })
            .await?;
        let left = |file: &&String| !known.contains(*file) && !blobs::is_own(file);
        for file in files.iter().filter(left) {
            tracing::info!(upload = file, "removed what was left of an upload");
            self.inner.sessions.close(file);
            self.inner.blobs.discard(file).await?;
        }
        Ok(())
    }
}

fn check_length(chunk: Option<&std::ops::Range<u64>>, length: u64) -> Result<()> {
    match chunk {
        Some(chunk) if chunk.end - chunk.start != length => Err(RegistryError::size_invalid(
            format!("Content-Range names {} bytes, the body has others", chunk.end - chunk.start),
        )),
        _ => Ok(()),
    }
}

/// The pieces of a request's body.
fn pieces(body: &mut Body) -> impl Stream<Item = Result<Bytes, BlobError>> + Unpin {
    let pieces = BodyStream::new(body).filter_map(|frame| {
        let piece = match frame {
            Ok(frame) => frame.into_data().ok().map(Ok),
            Err(error) => Some(Err(BlobError::Interrupted { reason: error.to_string() })),
        };
        std::future::ready(piece)
    });
    Box::pin(pieces)
}

fn upload_location(name: &RepositoryName, id: &str) -> String {
    format!("/v2/{name}/blobs/uploads/{id}")
}

fn progress(status: StatusCode, name: &RepositoryName, id: &str, length: u64) -> Response {
    HttpResponse::builder()
        .status(status)
        .header(header::LOCATION, upload_location(name, id))
        .header(header::RANGE, received(length))
        .header("docker-upload-uuid", id)
        .body(Body::empty())
        .expect("checked headers")
}

fn created(name: &RepositoryName, digest: &Digest) -> Response {
    HttpResponse::builder()
        .status(StatusCode::CREATED)
        .header(header::LOCATION, format!("/v2/{name}/blobs/{digest}"))
        .header(CONTENT_DIGEST, digest.to_string())
        .body(Body::empty())
        .expect("checked headers")
}
