//! Blobs by digest, in an object store: streamed in and out, never whole in memory.
//! It never knows what a blob means or who may have it: the registry does.
//! Start reading at [`Blobs::stage`], then [`Blobs::commit`] and [`Blobs::get`].
//!
//! Bytes first go to a staging file, where they can be resumed after a crash. Only when their digest
//! is right are they synchronised to the disk and moved to their place in one step, so a blob that
//! can be found is whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::{DerefMut, Range};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use jiff::Timestamp;
use object_store::local::LocalFileSystem;
use object_store::path::Path as StorePath;
use object_store::{
    GetOptions, GetRange, GetResultPayload, MultipartUpload, ObjectMeta, ObjectStore,
};
use slmops_artifact::Digest;
use slmops_artifact::digest::Hasher;
use tokio::task::JoinSet;

use crate::durable;

mod s3;
#[cfg(test)]
pub(crate) mod tests;

pub use s3::S3;

/// The largest blob, in bytes.
pub const MAX_BLOB_BYTES: u64 = 64 << 30;
/// How long the next bytes of a stream may take.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes gathered before they are written and hashed in one go.
const WRITE_BATCH_BYTES: usize = 1 << 20;
/// Bytes read from a file at once.
const READ_CHUNK_BYTES: usize = 256 << 10;
/// Bytes of one part sent to a remote store: S3 takes 10,000 of them at most, each of 5 MiB or more.
const PART_BYTES: u64 = 8 << 20;
/// Parts on their way to a remote store at the same time.
const PARTS_AT_ONCE: usize = 2;
/// A blob that is no newer is not on its way to a repository any more, in seconds.
const SETTLED_S: i64 = 3600;
/// The folder of blobs in the hub's data folder.
const BLOB_FOLDER: &str = "blobs";
/// The folder of staging files beside it; on the same file system, so that a rename is enough.
const STAGING_FOLDER: &str = "uploads";
/// The object that says whose blobs these are, in a store that others could use as well.
const OWNER_OBJECT: &str = "slmops-hub";
/// The longest content of that.
const MAX_OWNER_BYTES: u64 = 1024;
/// The longest name of a staging file.
const MAX_STAGED_NAME_BYTES: usize = 64;
/// What the staging files of [`Blobs::put`] start with.
const OWN_PREFIX: &str = "put-";

/// Why bytes could not be kept or found.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// There is no such blob.
    #[error("blob {0} is not here")]
    NotFound(Digest),
    /// The bytes are others than was said.
    #[error("the bytes have digest {found}, expected {expected}")]
    Mismatch {
        /// As was said.
        expected: Digest,
        /// As they are.
        found: Digest,
    },
    /// More bytes than are allowed.
    #[error("more than {limit_bytes} bytes")]
    TooLarge {
        /// The limit.
        limit_bytes: u64,
    },
    /// The sender went away or fell silent. What came until then is kept in the staging file.
    #[error("the sender stopped: {reason}")]
    Interrupted {
        /// How.
        reason: String,
    },
    /// No room is left. What was committed before is safe.
    #[error(
        "the disk that holds the hub's blobs is full\nhint: free some space on the hub; an upload can be resumed"
    )]
    DiskFull,
    /// A file operation failed.
    #[error("{operation} {}: {source}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The place of blobs cannot be used as it is written.
    #[error(
        "the place of blobs cannot be used: {reason}\nhint: write --blobs s3://BUCKET/PREFIX, and give region, endpoint and credentials by environment variables; see docs/configuration.md"
    )]
    Address {
        /// What is wrong with it.
        reason: String,
    },
    /// Another hub keeps its blobs there.
    #[error(
        "{place} holds the blobs of another hub ({owner})\nhint: give this hub a prefix of its own; or, if its database is that hub's, delete the object `{OWNER_OBJECT}` there"
    )]
    Owned {
        /// Where.
        place: String,
        /// What the mark says.
        owner: String,
    },
    /// The object store lets this hub not do what it needs.
    #[error(
        "{operation}: the blob store refuses: {reason}\nhint: check the access key, its secret and this machine's clock, and that the key may list the bucket and read, write and delete objects in it"
    )]
    Denied {
        /// What was tried.
        operation: &'static str,
        /// The store's own word for it.
        reason: String,
        /// The cause.
        source: object_store::Error,
    },
    /// The bucket does not exist.
    #[error("bucket `{bucket}` does not exist\nhint: make it first; the hub makes none")]
    NoBucket {
        /// Which one.
        bucket: String,
        /// The cause.
        source: object_store::Error,
    },
    /// The object store cannot be reached, or says that it cannot answer.
    #[error(
        "{operation}: the blob store cannot be reached, or cannot answer now\nhint: is it up, and its endpoint right? What was sent to the hub is kept and can be completed again"
    )]
    Unreachable {
        /// What was tried.
        operation: &'static str,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The object store failed.
    #[error("{operation} in the blob store")]
    Store {
        /// What was tried.
        operation: &'static str,
        /// The cause.
        source: object_store::Error,
    },
}

impl BlobError {
    pub(crate) fn file(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| match is_full(&source) {
            true => Self::DiskFull,
            false => Self::File { operation, path: path.to_owned(), source },
        }
    }

    fn store(operation: &'static str) -> impl FnOnce(object_store::Error) -> Self {
        move |source| {
            let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&source);
            while let Some(error) = cause {
                if error.downcast_ref::<io::Error>().is_some_and(is_full) {
                    return Self::DiskFull;
                }
                cause = error.source();
            }
            match source {
                object_store::Error::PermissionDenied { .. }
                | object_store::Error::Unauthenticated { .. } => {
                    Self::Denied { operation, reason: refusal(&source), source }
                }
                source if is_away(&source) => {
                    Self::Unreachable { operation, source: source.into() }
                }
                source => Self::Store { operation, source },
            }
        }
    }
}

/// Whether S3 gave no answer, or one that says that it cannot now (5xx). The types that tell are
/// not public; what was asked wrongly (4xx) says so in words.
fn is_away(error: &object_store::Error) -> bool {
    let object_store::Error::Generic { store: "S3", source } = error else { return false };
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&**source);
    while let Some(error) = cause {
        if error.to_string().contains("non-2xx status code: 4") {
            return false;
        }
        cause = error.source();
    }
    true
}

/// What S3 says in its answer: `SignatureDoesNotMatch` and such (Amazon S3 API Reference, "Error
/// responses").
fn refusal(error: &object_store::Error) -> String {
    let text = error.to_string();
    let code = text.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
    code.map_or_else(|| "no reason given".to_owned(), |(code, _)| code.to_owned())
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A store of blobs. Clones share it.
#[derive(Clone, Debug)]
pub struct Blobs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Arc<dyn ObjectStore>,
    /// The same for reading blobs: a reader may take as long as it likes.
    readers: Arc<dyn ObjectStore>,
    /// Where the store's files are, if they are files here: then a commit is a rename.
    local: Option<PathBuf>,
    staging: PathBuf,
}

/// A blob being read.
pub struct BlobReader {
    /// The whole blob's size in bytes.
    pub size_bytes: u64,
    /// The bytes that `stream` yields.
    pub range: Range<u64>,
    /// The bytes, in order. Ends with an error if the blob turns out shorter than it was.
    pub stream: BoxStream<'static, Result<Bytes, BlobError>>,
}

/// A blob in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobEntry {
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size_bytes: u64,
}

impl Blobs {
    /// Blobs as files in `folder` (the hub's data folder).
    ///
    /// # Errors
    /// If the folders cannot be made.
    pub fn open(folder: &Path) -> Result<Self, BlobError> {
        let root = folder.join(BLOB_FOLDER);
        let staging = folder.join(STAGING_FOLDER);
        for folder in [&root, &staging] {
            fs::create_dir_all(folder).map_err(BlobError::file("make folder", folder))?;
        }
        durable::sync_folder(folder).map_err(BlobError::file("synchronise", folder))?;
        let root = root.canonicalize().map_err(BlobError::file("find", &root))?;
        let store = LocalFileSystem::new_with_prefix(&root).map_err(BlobError::store("open"))?;
        let store: Arc<dyn ObjectStore> = Arc::new(store);
        let readers = Arc::clone(&store);
        Ok(Self { inner: Arc::new(Inner { store, readers, local: Some(root), staging }) })
    }

    /// Blobs in an S3-compatible store, marked as those of `owner`; bytes on their way in are staged
    /// in `folder` (the hub's data folder). Reads and writes a mark there, so that what does not
    /// work is said at once.
    ///
    /// # Errors
    /// A store that cannot be reached, refuses, or holds the blobs of another owner; a folder that
    /// cannot be made.
    pub async fn open_s3(place: &S3, owner: &str, folder: &Path) -> Result<Self, BlobError> {
        let staging = folder.join(STAGING_FOLDER);
        fs::create_dir_all(&staging).map_err(BlobError::file("make folder", &staging))?;
        let [store, readers] = place.stores()?;
        let mark = StorePath::from(OWNER_OBJECT);
        match store.get(&mark).await {
            Ok(found) if found.meta.size > MAX_OWNER_BYTES => {
                let owner = "its mark is none of a hub".to_owned();
                return Err(BlobError::Owned { place: place.to_string(), owner });
            }
            Ok(found) => {
                let found = found.bytes().await.map_err(BlobError::store("open"))?;
                let found = String::from_utf8_lossy(&found).trim().to_owned();
                if found != owner {
                    return Err(BlobError::Owned { place: place.to_string(), owner: found });
                }
            }
            Err(object_store::Error::NotFound { .. }) => {
                let text = Bytes::from(format!("{owner}\n"));
                store.put(&mark, text.into()).await.map_err(|error| match error {
                    source @ object_store::Error::NotFound { .. } => {
                        BlobError::NoBucket { bucket: place.bucket().to_owned(), source }
                    }
                    other => BlobError::store("open")(other),
                })?;
            }
            Err(error) => return Err(BlobError::store("open")(error)),
        }
        Ok(Self { inner: Arc::new(Inner { store, readers, local: None, staging }) })
    }

    /// What tells this folder from every other one, made when it is first asked for; empty for a store
    /// that is no folder.
    ///
    /// # Errors
    /// If it cannot be read or made.
    pub fn identity(&self) -> Result<String, BlobError> {
        let Some(root) = &self.inner.local else { return Ok(String::new()) };
        let path = root.join(OWNER_OBJECT);
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let id = hex::encode(rand::random::<[u8; 8]>());
                durable::write_secret(&path, id.as_bytes())
                    .map_err(BlobError::file("write", &path))?;
                Ok(format!("folder {} ({id})", root.display()))
            }
            Ok(id) => Ok(format!("folder {} ({id})", root.display())),
            Err(error) => Err(BlobError::file("read", &path)(error)),
        }
    }

    /// Opens the staging file `name`, with what an earlier attempt left in it (which is read and
    /// hashed again). `name` is 1 to 64 of a-z, 0-9 and `-`; one owner at a time.
    ///
    /// # Errors
    /// If the file cannot be opened or read.
    pub async fn stage(&self, name: &str) -> Result<Staged, BlobError> {
        let path = self.staged_path(name);
        blocking(move || Staged::open(path)).await
    }

    /// The bytes in the staging file `name`; 0 if there is none.
    ///
    /// # Errors
    /// If the file cannot be looked at.
    pub async fn staged_bytes(&self, name: &str) -> Result<u64, BlobError> {
        let path = self.staged_path(name);
        blocking(move || match fs::metadata(&path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(BlobError::file("look at", &path)(error)),
        })
        .await
    }

    /// Removes the staging file `name`, if it is there.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub async fn discard(&self, name: &str) -> Result<(), BlobError> {
        let path = self.staged_path(name);
        blocking(move || remove_if_there(&path)).await
    }

    /// The names of all staging files.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub async fn staged(&self) -> Result<Vec<String>, BlobError> {
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            let failed = |error| BlobError::file("list", &inner.staging)(error);
            let entries = fs::read_dir(&inner.staging).map_err(failed)?;
            let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
            let names: io::Result<Vec<String>> = names.collect();
            names.map_err(failed)
        })
        .await
    }

    fn staged_path(&self, name: &str) -> PathBuf {
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        assert!(
            (1..=MAX_STAGED_NAME_BYTES).contains(&name.len()) && name.bytes().all(good),
            "staging names are made by the hub"
        );
        self.inner.staging.join(name)
    }

    /// Makes a blob of what is staged, if its digest is `expected` (any, if absent). When this
    /// returns `Ok`, the blob is on the disk and the staging file is gone. `staged` may be a lock
    /// guard; it comes back with the result.
    ///
    /// Cancellation safe: the blob is whole or not there.
    pub async fn commit<G>(
        &self,
        staged: G,
        expected: Option<Digest>,
    ) -> (G, Result<BlobEntry, BlobError>)
    where
        G: DerefMut<Target = Staged> + Send + 'static,
    {
        let inner = Arc::clone(&self.inner);
        let (mut staged, checked) = with_staged(staged, move |staged| {
            staged.check_open()?;
            let (found, size_bytes) = staged.hasher.clone().finish();
            if let Some(expected) = expected.filter(|expected| *expected != found) {
                return Err(BlobError::Mismatch { expected, found });
            }
            if let Some(root) = &inner.local {
                staged.move_to(&root.join(location(&found).as_ref()))?;
            }
            Ok(BlobEntry { digest: found, size_bytes })
        })
        .await;
        let result = match checked {
            Ok(entry) if self.inner.local.is_none() => {
                let sent = self.send(&staged.path, &entry.digest).await;
                staged.committed |= sent.is_ok();
                sent.map(|()| entry)
            }
            other => other,
        };
        (staged, result)
    }

    /// Copies a staging file to a remote store, then removes it.
    async fn send(&self, path: &Path, digest: &Digest) -> Result<(), BlobError> {
        let failed = |error| BlobError::store("write a blob")(error);
        let file = File::open(path).map_err(BlobError::file("open", path))?;
        let length = file.metadata().map_err(BlobError::file("look at", path))?.len();
        let (file, place) = (Arc::new(file), location(digest));
        if length <= PART_BYTES {
            let whole = read_part(&file, path, 0..length).await?;
            self.inner.store.put(&place, whole.into()).await.map_err(failed)?;
        } else {
            let mut upload = self.inner.store.put_multipart(&place).await.map_err(failed)?;
            let sent = send_parts(&mut *upload, &file, path, length).await;
            if let Err(error) = sent {
                // What is not taken back costs money until the bucket's own rules remove it.
                if let Err(error) = upload.abort().await {
                    tracing::warn!(%digest, %error, "parts of an upload stay in the blob store");
                }
                return Err(error);
            }
        }
        let path = path.to_owned();
        blocking(move || remove_if_there(&path)).await
    }

    /// Stages and commits everything `stream` yields; for bytes that need not be resumed.
    ///
    /// # Errors
    /// A wrong digest, more than [`MAX_BLOB_BYTES`], a full disk, or a failing stream; nothing is
    /// left behind.
    pub async fn put<S>(&self, stream: S, expected: Option<Digest>) -> Result<BlobEntry, BlobError>
    where
        S: Stream<Item = Result<Bytes, BlobError>> + Unpin,
    {
        let name = format!("{OWN_PREFIX}{}", hex::encode(rand::random::<[u8; 16]>()));
        let staged = Box::new(self.stage(&name).await?);
        let (staged, received) = append(staged, stream, MAX_BLOB_BYTES).await;
        let result = match received {
            Ok(_) => self.commit(staged, expected).await.1,
            Err(error) => Err(error),
        };
        if result.is_err() {
            self.discard(&name).await?;
        }
        result
    }

    /// Takes a blob over from another folder on the same file system without copying it; whether
    /// that was possible. Both then share the bytes, which neither ever changes.
    ///
    /// # Errors
    /// A folder that cannot be made or synchronised.
    pub async fn link(&self, from: &Self, digest: &Digest) -> Result<bool, BlobError> {
        let (Some(to), Some(from)) = (&self.inner.local, &from.inner.local) else {
            return Ok(false);
        };
        let place = location(digest);
        let (to, from) = (to.join(place.as_ref()), from.join(place.as_ref()));
        blocking(move || {
            let folder = to.parent().expect("a blob lies in a folder");
            fs::create_dir_all(folder).map_err(BlobError::file("make folder", folder))?;
            if fs::hard_link(&from, &to).is_err() {
                return Ok(false);
            }
            durable::sync_folder(folder).map_err(BlobError::file("synchronise", folder))?;
            Ok(true)
        })
        .await
    }

    /// Opens a blob, or the part of it in `range` (which must lie inside it).
    ///
    /// # Errors
    /// [`BlobError::NotFound`], or a failing store.
    pub async fn get(
        &self,
        digest: &Digest,
        range: Option<Range<u64>>,
    ) -> Result<BlobReader, BlobError> {
        // An empty range cannot be asked of a store.
        let range = range.filter(|range| !range.is_empty());
        let options = GetOptions { range: range.map(GetRange::Bounded), ..Default::default() };
        let place = location(digest);
        let asked = self.inner.readers.get_opts(&place, options);
        let found = answered("read a blob", asked).await?.map_err(|error| match error {
            object_store::Error::NotFound { .. } => BlobError::NotFound(*digest),
            other => BlobError::store("read a blob")(other),
        })?;
        let (size_bytes, range) = (found.meta.size, found.range.clone());
        let stream = match found.payload {
            GetResultPayload::File(file, path) => read_file(file, path, range.clone()).boxed(),
            GetResultPayload::Stream(stream) => {
                let pieces = stream::try_unfold(stream, async |mut stream| {
                    let piece = answered("read a blob", stream.try_next()).await?;
                    let piece = piece.map_err(BlobError::store("read a blob"))?;
                    Ok(piece.map(|piece| (piece, stream)))
                });
                pieces.boxed()
            }
        };
        Ok(BlobReader { size_bytes, range, stream })
    }

    /// A whole blob of at most `limit_bytes`, its digest checked.
    ///
    /// # Errors
    /// As [`Blobs::get`], and [`BlobError::TooLarge`] or [`BlobError::Mismatch`].
    pub async fn read(&self, digest: &Digest, limit_bytes: usize) -> Result<Bytes, BlobError> {
        let mut reader = self.get(digest, None).await?;
        let limit = limit_bytes as u64;
        if reader.size_bytes > limit {
            return Err(BlobError::TooLarge { limit_bytes: limit });
        }
        let mut bytes = Vec::new();
        while let Some(piece) = reader.stream.try_next().await? {
            if bytes.len() + piece.len() > limit_bytes {
                return Err(BlobError::TooLarge { limit_bytes: limit });
            }
            bytes.extend_from_slice(&piece);
        }
        match Digest::of(&bytes) {
            found if found == *digest => Ok(bytes.into()),
            found => Err(BlobError::Mismatch { expected: *digest, found }),
        }
    }

    /// A blob as a file on this machine: its own one, or a copy that goes with the answer. Its bytes
    /// are not checked.
    ///
    /// # Errors
    /// As [`Blobs::get`], and a disk without room for the copy.
    pub async fn file(&self, digest: &Digest) -> Result<BlobFile, BlobError> {
        if let Some(root) = &self.inner.local {
            if self.size(digest).await?.is_none() {
                return Err(BlobError::NotFound(*digest));
            }
            return Ok(BlobFile::Own(root.join(location(digest).as_ref())));
        }
        let name = format!("{OWN_PREFIX}{}", hex::encode(rand::random::<[u8; 16]>()));
        let path = self.staged_path(&name);
        let made = File::create_new(&path).map_err(BlobError::file("make", &path))?;
        let copy = tempfile::TempPath::try_from_path(path.clone())
            .map_err(BlobError::file("make", &path))?;
        let mut reader = self.get(digest, None).await?;
        let mut file = made;
        while let Some(piece) = reader.stream.try_next().await? {
            let path = path.clone();
            file = blocking(move || {
                file.write_all(&piece).map_err(BlobError::file("write", &path))?;
                Ok(file)
            })
            .await?;
        }
        Ok(BlobFile::Copy(copy))
    }

    /// The size of a blob in bytes, if it is here.
    ///
    /// # Errors
    /// A failing store.
    pub async fn size(&self, digest: &Digest) -> Result<Option<u64>, BlobError> {
        match self.inner.store.head(&location(digest)).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(BlobError::store("look up a blob")(error)),
        }
    }

    /// Every blob; objects whose place names no digest are left out.
    pub fn list(&self) -> BoxStream<'static, Result<BlobEntry, BlobError>> {
        self.list_until(i64::MAX)
    }

    /// Every blob that was written until then.
    fn list_until(&self, second: i64) -> BoxStream<'static, Result<BlobEntry, BlobError>> {
        let listed = self.inner.store.list(None);
        let entries = listed.filter_map(move |found| {
            let entry = match found {
                Err(error) => Some(Err(BlobError::store("list blobs")(error))),
                Ok(meta) if meta.last_modified.timestamp() > second => None,
                Ok(meta) => entry_of(&meta).map(Ok),
            };
            std::future::ready(entry)
        });
        entries.boxed()
    }

    /// The same, but in a store that other hubs use as well for those that were written a while ago:
    /// what is new may be about to be given to a repository.
    pub fn list_settled(&self) -> BoxStream<'static, Result<BlobEntry, BlobError>> {
        let settled =
            Timestamp::now().as_second() - i64::from(self.inner.local.is_none()) * SETTLED_S;
        self.list_until(settled)
    }

    /// Removes a blob; one that is not there is no error.
    ///
    /// # Errors
    /// A failing store.
    pub async fn delete(&self, digest: &Digest) -> Result<(), BlobError> {
        match self.inner.store.delete(&location(digest)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(BlobError::store("delete a blob")(error)),
        }
    }
}

/// Sends a file in parts and makes an object of them.
async fn send_parts(
    upload: &mut dyn MultipartUpload,
    file: &Arc<File>,
    path: &Path,
    length: u64,
) -> Result<(), BlobError> {
    let failed = |error| BlobError::store("write a blob")(error);
    let mut parts: JoinSet<object_store::Result<()>> = JoinSet::new();
    let mut start = 0;
    while start < length {
        let end = length.min(start + PART_BYTES);
        let part = read_part(file, path, start..end).await?;
        if parts.len() >= PARTS_AT_ONCE {
            let sent = parts.join_next().await.expect("there are some");
            sent.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
                .map_err(failed)?;
        }
        parts.spawn(upload.put_part(part.into()));
        start = end;
    }
    while let Some(sent) = parts.join_next().await {
        sent.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
            .map_err(failed)?;
    }
    upload.complete().await.map_err(failed)?;
    Ok(())
}

/// Reads a part of a file into memory.
async fn read_part(file: &Arc<File>, path: &Path, range: Range<u64>) -> Result<Bytes, BlobError> {
    let (file, path) = (Arc::clone(file), path.to_owned());
    blocking(move || {
        let length = usize::try_from(range.end - range.start).expect("a part is small");
        let mut buffer = vec![0; length];
        file.read_exact_at(&mut buffer, range.start).map_err(BlobError::file("read", &path))?;
        Ok(buffer.into())
    })
    .await
}

/// What comes within [`IDLE_TIMEOUT`].
async fn answered<T>(
    operation: &'static str,
    asked: impl Future<Output = T>,
) -> Result<T, BlobError> {
    tokio::time::timeout(IDLE_TIMEOUT, asked)
        .await
        .map_err(|elapsed| BlobError::Unreachable { operation, source: elapsed.into() })
}

/// Whether a staging file is one of [`Blobs::put`] or [`Blobs::file`], which nobody resumes.
pub fn is_own(name: &str) -> bool {
    name.starts_with(OWN_PREFIX)
}

/// A blob as a file; a copy is gone when this is dropped.
#[derive(Debug)]
pub enum BlobFile {
    /// The store's own file, which is never changed.
    Own(PathBuf),
    /// A copy.
    Copy(tempfile::TempPath),
}

impl BlobFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        match self {
            Self::Own(path) => path,
            Self::Copy(path) => path,
        }
    }
}

/// The blob at an object's place, if that names one.
fn entry_of(meta: &ObjectMeta) -> Option<BlobEntry> {
    let name = format!("sha256:{}", meta.location.filename()?);
    Some(BlobEntry { digest: name.parse().ok()?, size_bytes: meta.size })
}

/// `sha256/ab/ab…`: folders of at most a few hundred entries each.
fn location(digest: &Digest) -> StorePath {
    let hex = digest.hex();
    StorePath::from_iter(["sha256", &hex[..2], &hex])
}

/// Bytes on their way in, with their running digest.
pub struct Staged {
    path: PathBuf,
    file: File,
    hasher: Hasher,
    len_bytes: u64,
    /// It has become a blob; whoever waited for it must not write to that.
    committed: bool,
}

impl Staged {
    fn open(path: PathBuf) -> Result<Self, BlobError> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(BlobError::file("open", &path))?;
        let mut hasher = Hasher::default();
        let mut len_bytes = 0;
        // A device such as /dev/full has no end; what is staged is a plain file.
        let length = file.metadata().map_err(BlobError::file("look at", &path))?.len();
        let mut buffer = vec![0; READ_CHUNK_BYTES];
        while len_bytes < length {
            let read = file.read(&mut buffer).map_err(BlobError::file("read", &path))?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            len_bytes += read as u64;
        }
        Ok(Self { path, file, hasher, len_bytes, committed: false })
    }

    /// Bytes so far.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Writes `bytes` at the end. On an error nothing has been added.
    fn append(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.check_open()?;
        let write = |file: &mut File, start: u64| {
            file.seek(SeekFrom::Start(start))?;
            file.write_all(bytes)
        };
        if let Err(error) = write(&mut self.file, self.len_bytes) {
            // Half-written bytes would be taken for good ones after a restart.
            if let Err(error) = self.file.set_len(self.len_bytes) {
                tracing::warn!(path = %self.path.display(), %error, "cannot cut a staging file");
            }
            return Err(BlobError::file("write", &self.path)(error));
        }
        self.hasher.update(bytes);
        self.len_bytes += bytes.len() as u64;
        Ok(())
    }

    fn check_open(&self) -> Result<(), BlobError> {
        match self.committed {
            true => Err(BlobError::Interrupted { reason: "the upload is complete".to_owned() }),
            false => Ok(()),
        }
    }

    fn sync(&self) -> Result<(), BlobError> {
        self.file.sync_data().map_err(BlobError::file("synchronise", &self.path))
    }

    /// Synchronises the bytes, then moves them to `target` in one step.
    fn move_to(&mut self, target: &Path) -> Result<(), BlobError> {
        self.file.sync_all().map_err(BlobError::file("synchronise", &self.path))?;
        let folder = target.parent().expect("a blob lies in a folder");
        if !folder.exists() {
            fs::create_dir_all(folder).map_err(BlobError::file("make folder", folder))?;
            for above in folder.ancestors().skip(1).take(2) {
                durable::sync_folder(above).map_err(BlobError::file("synchronise", above))?;
            }
        }
        fs::rename(&self.path, target).map_err(BlobError::file("move into place", target))?;
        self.committed = true;
        durable::sync_folder(folder).map_err(BlobError::file("synchronise", folder))
    }
}

/// Appends everything `stream` yields to `staged`, at most `limit_bytes` of it; the number of bytes
/// added. What was received before an error stays, and `staged.len_bytes()` tells how much. The
/// bytes are on the disk when this returns.
///
/// If the caller goes away, a write in progress is finished before `staged` (a lock guard, say) is
/// released.
pub async fn append<G, S>(
    mut staged: G,
    mut stream: S,
    limit_bytes: u64,
) -> (G, Result<u64, BlobError>)
where
    G: DerefMut<Target = Staged> + Send + 'static,
    S: Stream<Item = Result<Bytes, BlobError>> + Unpin,
{
    let mut added = 0_u64;
    let mut batch = Vec::new();
    loop {
        let next = match tokio::time::timeout(IDLE_TIMEOUT, stream.next()).await {
            Ok(next) => next,
            Err(_) => {
                let reason = format!("nothing came for {} s", IDLE_TIMEOUT.as_secs());
                Some(Err(BlobError::Interrupted { reason }))
            }
        };
        let mut outcome = None;
        match next {
            None => outcome = Some(Ok(())),
            Some(Err(error)) => outcome = Some(Err(error)),
            Some(Ok(piece)) if piece.len() as u64 > limit_bytes - added => {
                outcome = Some(Err(BlobError::TooLarge { limit_bytes }));
            }
            Some(Ok(piece)) => {
                added += piece.len() as u64;
                batch.extend_from_slice(&piece);
            }
        }
        if batch.len() >= WRITE_BATCH_BYTES || outcome.is_some() {
            let last = outcome.is_some();
            let bytes = std::mem::take(&mut batch);
            let (back, written) = with_staged(staged, move |staged| {
                staged.append(&bytes)?;
                if last {
                    staged.sync()?;
                }
                Ok(bytes)
            })
            .await;
            staged = back;
            match written {
                Ok(mut bytes) => {
                    bytes.clear();
                    batch = bytes;
                }
                Err(error) => return (staged, Err(error)),
            }
        }
        if let Some(outcome) = outcome {
            return (staged, outcome.map(|()| added));
        }
    }
}

/// Lends `staged` to a thread for blocking work.
async fn with_staged<G, T>(
    mut staged: G,
    work: impl FnOnce(&mut Staged) -> Result<T, BlobError> + Send + 'static,
) -> (G, Result<T, BlobError>)
where
    G: DerefMut<Target = Staged> + Send + 'static,
    T: Send + 'static,
{
    let done = tokio::task::spawn_blocking(move || {
        let result = work(&mut staged);
        (staged, result)
    });
    done.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BlobError> + Send + 'static,
) -> Result<T, BlobError> {
    let done = tokio::task::spawn_blocking(work);
    done.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

fn remove_if_there(path: &Path) -> Result<(), BlobError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(BlobError::file("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// The bytes of `range` of a file, read on threads for blocking work.
fn read_file(
    file: File,
    path: PathBuf,
    range: Range<u64>,
) -> BoxStream<'static, Result<Bytes, BlobError>> {
    let end = range.end;
    let read = move |(mut file, at, path): (File, u64, PathBuf)| async move {
        if at >= end {
            return Ok(None);
        }
        blocking(move || {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX);
            let mut buffer = vec![0; length.min(READ_CHUNK_BYTES)];
            file.seek(SeekFrom::Start(at)).map_err(BlobError::file("read", &path))?;
            file.read_exact(&mut buffer).map_err(BlobError::file("read", &path))?;
            let next = at + buffer.len() as u64;
            Ok(Some((Bytes::from(buffer), (file, next, path))))
        })
        .await
    };
    stream::try_unfold((file, range.start, path), read).boxed()
}
