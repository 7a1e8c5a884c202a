//! Reading: blobs, manifests, tags, referrers and the catalogue.

use axum::body::Body;
use axum::http::{Method, Response as HttpResponse, StatusCode, header};
use axum::response::Response;
use serde_json::json;
use slmops_artifact::Digest;

use super::error::RegistryError;
use super::manifest::{INDEX_MEDIA_TYPE, Index};
use super::name::{Reference, RepositoryName};
use super::{CONTENT_DIGEST, Call, MAX_PAGE, Registry, Result, index, range, value};
use crate::blobs::BlobError;
use crate::db::Tx;

impl Registry {
    pub(super) async fn get_blob(
        &self,
        call: &Call<'_>,
        name: RepositoryName,
        digest: Digest,
    ) -> Result<Response> {
        if self.blob_size(&name, &digest).await?.is_none() {
            return Err(RegistryError::blob_unknown(&digest));
        }
        // The store is asked, too: a client that hears "not here" sends the bytes again.
        let Some(size_bytes) = self.inner.blobs.size(&digest).await? else {
            tracing::error!(repository = %name, %digest, "the bytes of a blob are lost");
            return Err(BlobError::NotFound(digest).into());
        };
        let etag = format!("\"{digest}\"");
        let mut response = HttpResponse::builder()
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .header(header::ACCEPT_RANGES, "bytes")
            .header(header::ETAG, &etag)
            .header(CONTENT_DIGEST, digest.to_string());
        if call.parts.method == Method::HEAD {
            response = response.header(header::CONTENT_LENGTH, size_bytes);
            return Ok(response.body(Body::empty()).expect("checked headers"));
        }
        let asked = range::requested(&call.parts.headers, size_bytes, &etag)?;
        if let Some(part) = &asked {
            let range = format!("bytes {}-{}/{size_bytes}", part.start, part.end - 1);
            response =
                response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, range);
        }
        let reader = self.inner.blobs.get(&digest, asked).await?;
        let length = reader.range.end - reader.range.start;
        let response = response.header(header::CONTENT_LENGTH, length);
        Ok(response.body(Body::from_stream(reader.stream)).expect("checked headers"))
    }

    pub(super) async fn get_manifest(
        &self,
        call: &Call<'_>,
        name: RepositoryName,
        reference: Reference,
    ) -> Result<Response> {
        let found = self.manifest(&name, &reference).await?;
        let found = found.ok_or_else(|| RegistryError::manifest_unknown(&reference))?;
        let response = HttpResponse::builder()
            .header(header::CONTENT_TYPE, found.media_type)
            .header(header::CONTENT_LENGTH, found.content.len())
            .header(header::ETAG, format!("\"{}\"", found.digest))
            .header(CONTENT_DIGEST, found.digest.to_string());
        let body = match call.parts.method == Method::HEAD {
            true => Body::empty(),
            false => found.content.into(),
        };
        Ok(response.body(body).expect("checked headers"))
    }

    pub(super) async fn get_tags(&self, call: &Call<'_>, name: RepositoryName) -> Result<Response> {
        let limit = page_size(call)?;
        let after = call.params.last.clone().unwrap_or_default();
        let repository = name.clone();
        let read = move |tx: &Tx<'_>| match index::find(tx, &repository)? {
            Some(found) => index::tags(tx, found, &after, limit + 1),
            None => Err(RegistryError::name_unknown(repository.as_str())),
        };
        let mut tags = self.inner.db.read(read).await?;
        let next = cut(&mut tags, limit).map(|last| format!("n={limit}&last={last}"));
        let body = json!({ "name": name.as_str(), "tags": tags });
        Ok(listing("application/json", &body, &format!("/v2/{name}/tags/list"), next))
    }

    pub(super) async fn get_catalogue(&self, call: &Call<'_>) -> Result<Response> {
        let limit = page_size(call)?;
        let after = call.params.last.clone().unwrap_or_default();
        let read = move |tx: &Tx<'_>| index::catalogue(tx, &after, limit + 1);
        let mut names = self.inner.db.read(read).await?;
        let next = cut(&mut names, limit).map(|last| format!("n={limit}&last={last}"));
        let body = json!({ "repositories": names });
        Ok(listing("application/json", &body, "/v2/_catalog", next))
    }

    /// distribution-spec 1.1, "Listing Referrers": an empty list, and never 404, where there are
    /// none.
    pub(super) async fn get_referrers(
        &self,
        call: &Call<'_>,
        name: RepositoryName,
        subject: Digest,
    ) -> Result<Response> {
        let limit = page_size(call)?;
        let after = call.params.last.clone().unwrap_or_default();
        let kind = call.params.artifact_type.clone().filter(|kind| !kind.is_empty());
        let (repository, wanted) = (name.clone(), kind.clone());
        let read = move |tx: &Tx<'_>| match index::find(tx, &repository)? {
            Some(found) => {
                index::referrers(tx, found, &subject, wanted.as_deref(), &after, limit + 1)
            }
            None => Ok(Vec::new()),
        };
        let mut manifests = self.inner.db.read(read).await?;
        let next = cut(&mut manifests, limit).map(|last| {
            let kind = kind.as_deref().map(|kind| format!("&artifactType={}", encode(kind)));
            format!("n={limit}&last={}{}", last.digest, kind.unwrap_or_default())
        });
        let body = Index { schema_version: 2, media_type: INDEX_MEDIA_TYPE.to_owned(), manifests };
        let path = format!("/v2/{name}/referrers/{subject}");
        let mut response = listing(INDEX_MEDIA_TYPE, &body, &path, next);
        if kind.is_some() {
            response.headers_mut().insert("oci-filters-applied", value("artifactType"));
        }
        Ok(response)
    }
}

fn page_size(call: &Call<'_>) -> Result<u32> {
    let Some(text) = &call.params.n else { return Ok(MAX_PAGE) };
    // More digits than fit are more than the bound.
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match digits {
        true => Ok(text.parse().unwrap_or(MAX_PAGE).min(MAX_PAGE)),
        false => Err(RegistryError::size_invalid("`n` is not a number")),
    }
}

/// Cuts a page that was read with one entry too many; the last entry of it if more follow.
/// A page of nothing has no next one (distribution-spec 1.1, "Listing Tags").
fn cut<T>(page: &mut Vec<T>, limit: u32) -> Option<&T> {
    let limit = limit as usize;
    let more = page.len() > limit;
    page.truncate(limit);
    page.last().filter(|_| more)
}

fn listing(
    media_type: &str,
    body: &impl serde::Serialize,
    path: &str,
    next: Option<String>,
) -> Response {
    let mut response = HttpResponse::builder().header(header::CONTENT_TYPE, media_type);
    if let Some(query) = next {
        response = response.header(header::LINK, format!("<{path}?{query}>; rel=\"next\""));
    }
    let body = serde_json::to_vec(body).expect("lists of strings always serialise");
    response.body(body.into()).expect("checked headers")
}

/// Percent-encodes a query value (RFC 3986, section 2.3).
fn encode(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes()
        .map(|byte| match plain(byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        })
        .collect()
}
