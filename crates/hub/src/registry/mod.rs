//! The hub's own OCI registry: distribution-spec 1.1, pull and push, resumable, with referrers.
//! It never interprets a model package: it keeps bytes by digest and knows which need which.
//! Start reading at [`router`], then `uploads.rs` for how bytes come in.
//!
//! Order of writing, so that a kill at any moment leaves nothing half: bytes are synchronised and in
//! place before a repository has the blob, and a repository has every blob before a manifest names
//! it. What is left over by a kill is invisible and removed by [`Registry::sweep`].

mod error;
mod index;
mod manifest;
mod name;
mod pull;
mod push;
mod range;
mod uploads;

use std::collections::BTreeMap;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody as _};
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use http_body_util::BodyExt as _;
use serde::Deserialize;
use slmops_api::audit::Role;
use slmops_artifact::{Digest, package};
use tokio::runtime::Handle;
use tokio_util::io::ReaderStream;

pub use self::error::RegistryError;
pub use self::index::{SCHEMA, StoredManifest};
use self::manifest::Parsed;
pub use self::manifest::{Descriptor, MAX_DESCRIPTORS, MAX_MANIFEST_BYTES};
use self::name::Target;
pub use self::name::{MAX_REPOSITORY_BYTES, MAX_TAG_BYTES, Reference, RepositoryName};
use self::uploads::Sessions;
pub use self::uploads::{MAX_UPLOADS, UPLOAD_EXPIRES_AFTER};
use crate::auth::{Auth, AuthError, Caller};
use crate::blobs::{self, BlobFile, Blobs};
use crate::db::{Database, Tx};

#[cfg(test)]
mod tests;

/// Entries on one page of a listing, where the client asks for more or says nothing.
pub const MAX_PAGE: u32 = 1000;

/// Bytes of a layer of its own that the hub reads at once.
const LAYER_PIECE_BYTES: usize = 256 << 10;

/// Bytes of a refused request that are read and dropped, so that the client reads the answer
/// instead of finding its connection closed.
const DRAIN_BYTES: u64 = 8 << 20;
/// How long that may take.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Something that happened to a repository, in the words of the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Who, such as `token ci`.
    pub actor: String,
    /// `registry.push` or `registry.delete`.
    pub action: &'static str,
    /// `REPOSITORY:TAG` or `REPOSITORY@DIGEST`.
    pub object: String,
    /// The manifest or blob.
    pub digest: Option<Digest>,
}

/// Any error of an [`OnChange`].
pub type ObserverError = Box<dyn std::error::Error + Send + Sync>;

/// Told of each change inside the transaction that makes it; an error undoes the change.
pub type OnChange = Arc<dyn Fn(&Tx<'_>, &Change) -> Result<(), ObserverError> + Send + Sync>;

/// The registry. Clones share it.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    db: Database,
    blobs: Blobs,
    auth: Auth,
    sessions: Sessions,
    on_change: Option<OnChange>,
}

/// The registry's routes: `/v2/…`. They bound their own bodies, so no body limit may be laid around
/// them; and they answer `HEAD`, so none may be derived.
pub fn router(registry: Registry) -> Router {
    Router::new()
        .route("/v2", any(serve))
        .route("/v2/", any(serve))
        .route("/v2/{*path}", any(serve_path))
        .with_state(registry)
}

async fn serve(State(registry): State<Registry>, request: Request) -> Response {
    registry.respond(Ok(None), request).await
}

async fn serve_path(
    State(registry): State<Registry>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Response {
    let path = path
        .map(|Path(path)| Some(path))
        .map_err(|_| RegistryError::name_invalid("the path is not UTF-8"));
    registry.respond(path, request).await
}

/// What queries may say; every call reads the fields it knows.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Params {
    digest: Option<String>,
    mount: Option<String>,
    from: Option<String>,
    n: Option<String>,
    last: Option<String>,
    artifact_type: Option<String>,
}

/// A request with its caller checked.
struct Call<'a> {
    parts: &'a Parts,
    params: Params,
    actor: String,
}

type Result<T, E = RegistryError> = std::result::Result<T, E>;

impl Registry {
    /// A registry over `db` (opened with [`SCHEMA`]) and `blobs`, for callers whom `auth` knows.
    pub fn new(db: Database, blobs: Blobs, auth: Auth) -> Self {
        Self::with_observer(db, blobs, auth, None)
    }

    /// As [`Registry::new`], with someone to tell of each change.
    pub fn with_observer(
        db: Database,
        blobs: Blobs,
        auth: Auth,
        on_change: Option<OnChange>,
    ) -> Self {
        let sessions = Sessions::default();
        Self { inner: Arc::new(Inner { db, blobs, auth, sessions, on_change }) }
    }

    /// A manifest, if the repository has it.
    ///
    /// # Errors
    /// A failing database.
    pub async fn manifest(
        &self,
        repository: &RepositoryName,
        reference: &Reference,
    ) -> Result<Option<StoredManifest>> {
        let (repository, reference) = (repository.clone(), reference.clone());
        let read = move |tx: &Tx<'_>| match index::find(tx, &repository)? {
            Some(repository) => index::manifest(tx, repository, &reference),
            None => Ok(None),
        };
        self.inner.db.read(read).await
    }

    /// Manifests whose subject is `subject`, of one type if given, at most [`MAX_PAGE`].
    ///
    /// # Errors
    /// A failing database.
    pub async fn referrers(
        &self,
        repository: &RepositoryName,
        subject: Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>> {
        let (repository, kind) = (repository.clone(), artifact_type.map(str::to_owned));
        let read = move |tx: &Tx<'_>| match index::find(tx, &repository)? {
            Some(repository) => {
                index::referrers(tx, repository, &subject, kind.as_deref(), "", MAX_PAGE)
            }
            None => Ok(Vec::new()),
        };
        self.inner.db.read(read).await
    }

    /// A whole blob of a repository, of at most `limit_bytes`, its digest checked.
    ///
    /// # Errors
    /// A blob that is not there, too large or damaged.
    pub async fn blob(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
        limit_bytes: usize,
    ) -> Result<Bytes> {
        if self.blob_size(repository, digest).await?.is_none() {
            return Err(RegistryError::blob_unknown(digest));
        }
        Ok(self.inner.blobs.read(digest, limit_bytes).await?)
    }

    /// The size in bytes of a blob that the repository has.
    ///
    /// # Errors
    /// A failing database.
    pub async fn blob_size(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<Option<u64>> {
        let (repository, digest) = (repository.clone(), *digest);
        let read = move |tx: &Tx<'_>| match index::find(tx, &repository)? {
            Some(repository) => index::blob_size(tx, repository, &digest),
            None => Ok(None),
        };
        self.inner.db.read(read).await
    }

    /// A blob of a repository as a file on this machine. Its bytes are not checked.
    ///
    /// # Errors
    /// A blob that is not there, or a failing store.
    pub async fn blob_file(
        &self,
        repository: &RepositoryName,
        digest: &Digest,
    ) -> Result<BlobFile> {
        if self.blob_size(repository, digest).await?.is_none() {
            return Err(RegistryError::blob_unknown(digest));
        }
        Ok(self.inner.blobs.file(digest).await?)
    }

    /// Attaches something that the hub made to a manifest, as a referrer of it with one layer: the
    /// file `layer`. Returns the layer's digest. The same again changes nothing.
    ///
    /// # Errors
    /// A manifest that is not there, or a failing database or store.
    pub async fn attach(
        &self,
        repository: &RepositoryName,
        subject: Digest,
        media_type: &str,
        annotations: BTreeMap<String, String>,
        layer: &FilePath,
    ) -> Result<Digest> {
        let reference = Reference::Digest(subject);
        let found = self.manifest(repository, &reference).await?;
        let found = found.ok_or_else(|| RegistryError::manifest_unknown(subject))?;
        let blobs = &self.inner.blobs;
        let unreadable = |source| blobs::BlobError::file("read", layer)(source);
        let file = tokio::fs::File::open(layer).await.map_err(unreadable)?;
        let pieces = ReaderStream::with_capacity(file, LAYER_PIECE_BYTES).map_err(unreadable);
        let empty = futures_util::stream::iter([Ok(Bytes::from_static(package::EMPTY_CONFIG))]);
        let entries = [blobs.put(empty, None).await?, blobs.put(pieces, None).await?];
        let [_, made] = &entries;
        let made = made.clone();
        let descriptor = |kind: &str, digest: Digest, size: u64| serde_json::json!({ "mediaType": kind, "digest": digest, "size": size });
        let content = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": package::MANIFEST_MEDIA_TYPE,
            "artifactType": media_type,
            "config": descriptor(
                package::EMPTY_MEDIA_TYPE,
                Digest::of(package::EMPTY_CONFIG),
                package::EMPTY_CONFIG.len() as u64,
            ),
            "layers": [descriptor(media_type, made.digest, made.size_bytes)],
            "subject": descriptor(&found.media_type, subject, found.content.len() as u64),
            "annotations": annotations,
        });
        let content = serde_json::to_vec(&content).expect("a manifest is always JSON");
        let parsed = Parsed::read(&content, None)?;
        let manifest = StoredManifest {
            digest: Digest::of(&content),
            media_type: parsed.media_type.clone(),
            content,
        };
        let change = Change {
            actor: "hub".to_owned(),
            action: "registry.push",
            object: format!("{repository}@{}", manifest.digest),
            digest: Some(manifest.digest),
        };
        let (repository, on_change) = (repository.clone(), self.inner.on_change.clone());
        let blobs = blobs.clone();
        let write = move |tx: &Tx<'_>| {
            let repository = index::find_or_make(tx, &repository)?;
            if index::manifest(tx, repository, &reference)?.is_none() {
                return Err(RegistryError::manifest_unknown(subject));
            }
            for entry in &entries {
                // As at the end of an upload: another hub may have removed it as unused.
                if Handle::current().block_on(blobs.size(&entry.digest))?.is_none() {
                    return Err(RegistryError::blob_unknown(&entry.digest));
                }
                index::add_blob(tx, repository, &entry.digest, entry.size_bytes)?;
            }
            index::put_manifest(tx, repository, &manifest, &parsed)?;
            on_change.map_or(Ok(()), |tell| tell(tx, &change)).map_err(RegistryError::Observer)
        };
        self.inner.db.write(write).await?;
        Ok(made.digest)
    }

    /// Removes what kills and forgotten uploads left behind: expired uploads, staging files without
    /// an upload, and bytes that no repository has. To be called at start, before serving.
    ///
    /// # Errors
    /// A failing database or store.
    pub async fn sweep(&self) -> Result<()> {
        let blobs = &self.inner.blobs;
        self.expire_uploads().await?;
        for name in blobs.staged().await?.iter().filter(|name| blobs::is_own(name)) {
            blobs.discard(name).await?;
        }
        let mut listed = blobs.list_settled();
        while let Some(entry) = listed.try_next().await? {
            let digest = entry.digest;
            let known = move |tx: &Tx<'_>| index::blob_size_anywhere(tx, &digest);
            if self.inner.db.read(known).await?.is_none() {
                tracing::info!(%digest, size_bytes = entry.size_bytes, "removing unused bytes");
                self.remove_if_unused(digest).await?;
            }
        }
        Ok(())
    }

    /// Removes the bytes of a blob that no repository has. In a transaction: no repository of any hub
    /// gets it meanwhile, and whoever gives it to one afterwards finds that the bytes are gone.
    async fn remove_if_unused(&self, digest: Digest) -> Result<()> {
        let blobs = self.inner.blobs.clone();
        let remove = move |tx: &Tx<'_>| {
            if index::blob_size_anywhere(tx, &digest)?.is_none() {
                Handle::current().block_on(blobs.delete(&digest))?;
            }
            Ok(())
        };
        self.inner.db.write(remove).await
    }

    async fn respond(&self, path: Result<Option<String>>, request: Request) -> Response {
        let (parts, mut body) = request.into_parts();
        let result = match path {
            Ok(path) => self.answer(path.as_deref(), &parts, &mut body).await,
            Err(error) => Err(error),
        };
        let mut response = result.unwrap_or_else(RegistryError::into_response);
        if response.status().is_client_error() || response.status().is_server_error() {
            drain(&mut body).await;
        }
        let headers = response.headers_mut();
        headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        response
    }

    async fn answer(&self, path: Option<&str>, parts: &Parts, body: &mut Body) -> Result<Response> {
        let caller = self.inner.auth.caller(parts).await?;
        let reads = parts.method == Method::GET || parts.method == Method::HEAD;
        let Some(path) = path else {
            return match reads {
                true => Ok((StatusCode::OK, axum::Json(serde_json::json!({}))).into_response()),
                false => Err(RegistryError::unsupported()),
            };
        };
        let target = Target::parse(path)?;
        require(&caller, &parts.method, &target)?;
        let Query(params) = Query::<Params>::try_from_uri(&parts.uri)
            .map_err(|_| RegistryError::name_invalid("the query cannot be read"))?;
        let call = Call { parts, params, actor: caller.actor() };
        match (parts.method.as_str(), target) {
            ("GET" | "HEAD", Target::Catalogue) => self.get_catalogue(&call).await,
            ("GET" | "HEAD", Target::Tags(name)) => self.get_tags(&call, name).await,
            ("GET" | "HEAD", Target::Referrers(name, digest)) => {
                self.get_referrers(&call, name, digest).await
            }
            ("GET" | "HEAD", Target::Manifest(name, reference)) => {
                self.get_manifest(&call, name, reference).await
            }
            ("PUT", Target::Manifest(name, reference)) => {
                self.put_manifest(&call, name, reference, body).await
            }
            ("DELETE", Target::Manifest(name, reference)) => {
                self.delete_manifest(&call, name, reference).await
            }
            ("GET" | "HEAD", Target::Blob(name, digest)) => {
                self.get_blob(&call, name, digest).await
            }
            ("DELETE", Target::Blob(name, digest)) => self.delete_blob(&call, name, digest).await,
            ("POST", Target::Uploads(name)) => self.begin_upload(&call, name, body).await,
            ("GET" | "HEAD", Target::Upload(name, id)) => self.upload_status(name, id).await,
            ("PATCH", Target::Upload(name, id)) => self.upload_chunk(&call, name, id, body).await,
            ("PUT", Target::Upload(name, id)) => self.finish_upload(&call, name, id, body).await,
            ("DELETE", Target::Upload(name, id)) => self.cancel_upload(name, id).await,
            _ => Err(RegistryError::unsupported()),
        }
    }
}

/// Reading is for everyone with a token, devices too; writing is for operators; removing what
/// devices may need is for admins.
fn require(caller: &Caller, method: &Method, target: &Target) -> Result<()> {
    let upload = matches!(target, Target::Upload(..) | Target::Uploads(_));
    let needed = match method.as_str() {
        "GET" | "HEAD" if !upload => Role::Viewer,
        "DELETE" if !upload => Role::Admin,
        _ => Role::Operator,
    };
    match caller {
        Caller::Operator(operator) => operator.require(needed)?,
        Caller::Device(_) if needed == Role::Viewer => {}
        Caller::Device(_) => {
            Err(AuthError::WrongKind { needed: "operators", given: "devices" })?;
        }
    }
    Ok(())
}

/// Reads and drops a bounded rest of a request.
async fn drain(body: &mut Body) {
    if body.size_hint().lower() > DRAIN_BYTES {
        return;
    }
    let rest = async {
        let mut dropped = 0;
        while let Some(Ok(frame)) = body.frame().await {
            dropped += frame.data_ref().map_or(0, |data| data.len() as u64);
            if dropped > DRAIN_BYTES {
                return;
            }
        }
    };
    // What is not read in time is not read.
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, rest).await;
}

/// A header value made of names and digests, which were checked.
fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("checked names and digests are header values")
}
