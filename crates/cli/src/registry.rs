//! Pushing to and pulling from an OCI registry (distribution-spec 1.1), the hub's own.

use std::path::Path;

use bytes::Bytes;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Method, Response, StatusCode, Url};
use slmops_api::ModelName;
use slmops_artifact::Digest;
use slmops_artifact::package::MANIFEST_MEDIA_TYPE;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use crate::client::{Hub, bounded};
use crate::error::{Context, Failure, Result};

/// Bytes that one PATCH carries.
const CHUNK_BYTES: usize = 8 * 1024 * 1024;
/// How often one upload is taken up again after the connection broke.
const MAX_RESUMPTIONS: u32 = 10;

/// One repository of the hub's registry.
pub struct Repository<'a> {
    hub: &'a Hub,
    name: &'a ModelName,
}

impl<'a> Repository<'a> {
    /// The repository of a model line.
    pub fn new(hub: &'a Hub, name: &'a ModelName) -> Self {
        Self { hub, name }
    }

    fn path(&self, rest: &str) -> String {
        format!("/v2/{}/{rest}", self.name)
    }

    /// Whether the registry holds a blob (distribution-spec, "Checking if content exists").
    pub async fn has(&self, digest: Digest) -> Result<bool> {
        let request = self.hub.request(Method::HEAD, &self.path(&format!("blobs/{digest}")));
        let what = format!("look for the blob {}", digest.short());
        Ok(self.hub.find(request, &what).await?.is_some())
    }

    /// Pushes a file in chunks unless the registry holds it; says how many bytes travelled.
    /// A broken connection is taken up where the registry says it stopped.
    pub async fn push_file(
        &self,
        path: &Path,
        digest: Digest,
        mut on_progress: impl FnMut(u64, u64),
    ) -> Result<u64> {
        if self.has(digest).await? {
            return Ok(0);
        }
        let read = || format!("read `{}`", path.display());
        let mut file = tokio::fs::File::open(path).await.user(read)?;
        let total = file.metadata().await.user(read)?.len();
        let what = format!("push `{}`", path.display());
        let mut place = self.begin(&what).await?;
        let mut sent = 0_u64;
        let mut resumptions = 0;
        on_progress(0, total);
        while sent < total {
            let length = usize::try_from(total - sent).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
            let mut chunk = vec![0; length];
            file.read_exact(&mut chunk).await.user(read)?;
            let request = self
                .hub
                .request(Method::PATCH, place.as_str())
                .header(CONTENT_TYPE, "application/octet-stream")
                .header(CONTENT_RANGE, format!("{sent}-{}", sent + length as u64 - 1))
                .body(Bytes::from(chunk));
            match self.hub.send(request, &what).await {
                Ok(response) => {
                    place = self.location(&response, &what)?;
                    sent += length as u64;
                }
                Err(failure) if resumptions < MAX_RESUMPTIONS => {
                    resumptions += 1;
                    tracing::info!("{}; taking it up again", failure.line());
                    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                    sent = match self.received(&place, &what).await {
                        Ok(received) => received.min(total),
                        // The hub may be restarting: the next round asks again.
                        Err(_) => sent,
                    };
                    file.seek(std::io::SeekFrom::Start(sent)).await.user(read)?;
                }
                Err(failure) => return Err(failure),
            }
            on_progress(sent, total);
        }
        self.end(place, digest, Bytes::new(), &what).await?;
        Ok(total)
    }

    /// Pushes a small blob unless the registry holds it; says how many bytes travelled.
    pub async fn push_bytes(&self, bytes: Vec<u8>) -> Result<u64> {
        let digest = Digest::of(&bytes);
        if self.has(digest).await? {
            return Ok(0);
        }
        let what = format!("push the blob {}", digest.short());
        let place = self.begin(&what).await?;
        let length = bytes.len() as u64;
        self.end(place, digest, Bytes::from(bytes), &what).await?;
        Ok(length)
    }

    /// Pushes a manifest under a digest or tag.
    pub async fn push_manifest(&self, reference: &str, manifest: Vec<u8>) -> Result<()> {
        let what = format!("push the manifest {reference}");
        let request = self
            .hub
            .request(Method::PUT, &self.path(&format!("manifests/{reference}")))
            .header(CONTENT_TYPE, MANIFEST_MEDIA_TYPE)
            .body(manifest);
        self.hub.send(request, &what).await.map(|_| ())
    }

    /// Pulls a manifest and checks it against its digest.
    pub async fn manifest(&self, digest: Digest) -> Result<Vec<u8>> {
        let what = format!("pull the manifest {}", digest.short());
        let request = self.hub.request(Method::GET, &self.path(&format!("manifests/{digest}")));
        let request = request.header(reqwest::header::ACCEPT, MANIFEST_MEDIA_TYPE);
        let bytes = bounded(self.hub.send(request, &what).await?, &what).await?;
        checked(bytes, digest)
    }

    /// Pulls a small blob and checks it against its digest.
    pub async fn blob(&self, digest: Digest) -> Result<Vec<u8>> {
        let what = format!("pull the blob {}", digest.short());
        let request = self.hub.request(Method::GET, &self.path(&format!("blobs/{digest}")));
        let bytes = bounded(self.hub.send(request, &what).await?, &what).await?;
        checked(bytes, digest)
    }

    async fn begin(&self, what: &str) -> Result<Url> {
        let request = self.hub.request(Method::POST, &self.path("blobs/uploads/"));
        let response = self.hub.send(request.header(CONTENT_LENGTH, 0), what).await?;
        self.location(&response, what)
    }

    async fn end(&self, mut place: Url, digest: Digest, body: Bytes, what: &str) -> Result<()> {
        place.query_pairs_mut().append_pair("digest", &digest.to_string());
        let request = self
            .hub
            .request(Method::PUT, place.as_str())
            .header(CONTENT_TYPE, "application/octet-stream")
            .body(body);
        self.hub.send(request, what).await.map(|_| ())
    }

    /// How many bytes of an upload the registry has (distribution-spec, "Pushing a blob in chunks").
    async fn received(&self, place: &Url, what: &str) -> Result<u64> {
        let response = self.hub.send(self.hub.request(Method::GET, place.as_str()), what).await?;
        let range = response.headers().get(RANGE).and_then(|range| range.to_str().ok());
        let end = range.and_then(|range| range.rsplit('-').next()).and_then(|end| end.parse().ok());
        match (response.status(), end) {
            // An empty upload is told as `0-0`: byte 0 is then sent again, which the registry refuses
            // only if it has it; asking once more after that gives the same answer, so count it as none.
            (_, None | Some(0)) => Ok(0),
            (StatusCode::NO_CONTENT, Some(end)) => Ok(u64::saturating_add(end, 1)),
            (_, Some(end)) => Ok(u64::saturating_add(end, 1)),
        }
    }

    /// Where an upload goes on; never anywhere but the hub, since the token goes along.
    fn location(&self, response: &Response, what: &str) -> Result<Url> {
        let base = Url::parse(self.hub.url()).internal(|| "read the hub's URL".to_owned())?;
        let given = response.headers().get(LOCATION).and_then(|place| place.to_str().ok());
        let place = given.and_then(|place| base.join(place).ok());
        match place {
            Some(place) if place.origin() == base.origin() => Ok(place),
            _ => Err(Failure::internal(format!("{what}: the registry names no place on this hub"))),
        }
    }
}

fn checked(bytes: Vec<u8>, digest: Digest) -> Result<Vec<u8>> {
    let found = Digest::of(&bytes);
    if found == digest {
        return Ok(bytes);
    }
    Err(Failure::internal(format!("pulled {found} where {digest} was asked for"))
        .hint("the hub's storage is damaged: restore it from a backup"))
}
