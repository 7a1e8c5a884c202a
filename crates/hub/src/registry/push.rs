//! Writing manifests, and removing manifests and blobs.

use axum::body::Body;
use axum::http::{Response as HttpResponse, StatusCode, header};
use axum::response::Response;
use http_body_util::BodyExt as _;
use slmops_artifact::Digest;

use super::error::RegistryError;
use super::index::{self, StoredManifest};
use super::manifest::{MAX_MANIFEST_BYTES, Parsed};
use super::name::{Reference, RepositoryName};
use super::{CONTENT_DIGEST, Call, Change, OnChange, Registry, Result, value};
use crate::blobs::{BlobError, IDLE_TIMEOUT};
use crate::db::Tx;

impl Registry {
    pub(super) async fn put_manifest(
        &self,
        call: &Call<'_>,
        name: RepositoryName,
        reference: Reference,
        body: &mut Body,
    ) -> Result<Response> {
        let content = collect(body).await?;
        let digest = Digest::of(&content);
        if let Reference::Digest(asked) = &reference
            && *asked != digest
        {
            let message = format!("the manifest has digest {digest}, it was pushed as {asked}");
            return Err(RegistryError::digest_invalid(message));
        }
        let content_type = call.parts.headers.get(header::CONTENT_TYPE);
        let parsed = Parsed::read(&content, content_type.and_then(|value| value.to_str().ok()))?;
        let subject = parsed.subject;

        let object = object(&name, &reference);
        let actor = call.actor.clone();
        let change = Change { actor, action: "registry.push", object, digest: Some(digest) };
        let (repository, on_change) = (name.clone(), self.inner.on_change.clone());
        let media_type = parsed.media_type.clone();
        self.inner
            .db
            .write(move |tx| {
                let repository = index::find_or_make(tx, &repository)?;
                let manifest = StoredManifest { digest, media_type, content };
                index::put_manifest(tx, repository, &manifest, &parsed)?;
                if let Reference::Tag(tag) = &reference {
                    index::put_tag(tx, repository, tag, &digest)?;
                }
                tell(tx, on_change.as_ref(), &change)
            })
            .await?;

        let mut response = HttpResponse::builder()
            .status(StatusCode::CREATED)
            .header(header::LOCATION, format!("/v2/{name}/manifests/{digest}"))
            .header(CONTENT_DIGEST, digest.to_string());
        if let Some(subject) = subject {
            response = response.header("oci-subject", value(&subject.to_string()));
        }
        Ok(response.body(Body::empty()).expect("checked headers"))
    }

    pub(super) async fn delete_manifest(
        &self,
        call: &Call<'_>,
        name: RepositoryName,
        reference: Reference,
    ) -> Result<Response> {
        let digest = match &reference {
            Reference::Digest(digest) => Some(*digest),
            Reference::Tag(_) => None,
        };
        let (actor, object) = (call.actor.clone(), object(&name, &reference));
        let change = Change { actor, action: "registry.delete", object, digest };
        let on_change = self.inner.on_change.clone();
        self.inner
            .db
            .write(move |tx| {
                let repository = index::find(tx, &name)?
                    .ok_or_else(|| RegistryError::name_unknown(name.as_str()))?;
                index::remove_manifest(tx, repository, &reference)?;
                tell(tx, on_change.as_ref(), &change)
            })
            .await?;
        Ok(accepted())
    }

    pub(super) async fn delete_blob(
        &self,
        call: &Call<'_>,
        name: RepositoryName,
        digest: Digest,
    ) -> Result<Response> {
        let (actor, object) = (call.actor.clone(), format!("{name}@{digest}"));
        let change = Change { actor, action: "registry.delete", object, digest: Some(digest) };
        let registry = self.clone();
        // In a task of its own: row and bytes go together even if the client goes away.
        let work = tokio::spawn(async move {
            let inner = &*registry.inner;
            let on_change = inner.on_change.clone();
            let unused = inner
                .db
                .write(move |tx| {
                    let repository = index::find(tx, &name)?
                        .ok_or_else(|| RegistryError::name_unknown(name.as_str()))?;
                    let unused = index::remove_blob(tx, repository, &digest)?;
                    tell(tx, on_change.as_ref(), &change)?;
                    Ok::<_, RegistryError>(unused)
                })
                .await?;
            if unused {
                registry.remove_if_unused(digest).await?;
            }
            Ok::<_, RegistryError>(())
        });
        work.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        Ok(accepted())
    }
}

fn tell(tx: &Tx<'_>, on_change: Option<&OnChange>, change: &Change) -> Result<()> {
    on_change.map_or(Ok(()), |tell| tell(tx, change)).map_err(RegistryError::Observer)
}

fn object(name: &RepositoryName, reference: &Reference) -> String {
    match reference {
        Reference::Tag(tag) => format!("{name}:{tag}"),
        Reference::Digest(digest) => format!("{name}@{digest}"),
    }
}

fn accepted() -> Response {
    let response = HttpResponse::builder().status(StatusCode::ACCEPTED);
    response.body(Body::empty()).expect("no headers")
}

/// The whole body of a manifest.
async fn collect(body: &mut Body) -> Result<Vec<u8>> {
    let mut content = Vec::new();
    loop {
        let frame = tokio::time::timeout(IDLE_TIMEOUT, body.frame()).await;
        let frame = match frame {
            Ok(None) => return Ok(content),
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(error))) => Err(BlobError::Interrupted { reason: error.to_string() })?,
            Err(_) => Err(BlobError::Interrupted { reason: "nothing came".to_owned() })?,
        };
        if let Some(piece) = frame.data_ref() {
            if content.len() + piece.len() > MAX_MANIFEST_BYTES {
                return Err(RegistryError::manifest_too_large(MAX_MANIFEST_BYTES));
            }
            content.extend_from_slice(piece);
        }
    }
}
