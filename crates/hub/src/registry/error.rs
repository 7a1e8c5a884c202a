//! Errors as the OCI distribution specification writes them.

use axum::Json;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use slmops_artifact::Digest;

use super::ObserverError;
use crate::auth::AuthError;
use crate::blobs::BlobError;
use crate::db::DbError;

/// Why a registry call failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The specification's codes, with words of our own.
    #[error("{message}")]
    Refused {
        /// The status.
        status: StatusCode,
        /// A code of the specification's table of error codes.
        code: &'static str,
        /// What is wrong, with which object.
        message: String,
    },
    /// A chunk does not start where the upload stands.
    #[error("the chunk starts at {asked}, the upload stands at {stands_at}")]
    OutOfOrder {
        /// Where the client wanted to write.
        asked: u64,
        /// Where the upload goes on.
        stands_at: u64,
        /// The upload.
        location: String,
    },
    /// A range lies outside the blob.
    #[error("the range lies outside the blob of {size_bytes} bytes")]
    Unsatisfiable {
        /// The blob's size.
        size_bytes: u64,
    },
    /// The caller is not let in.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// The store of blobs failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The database failed.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The change could not be recorded, so it was not made.
    #[error("record the change")]
    Observer(#[source] ObserverError),
}

impl RegistryError {
    fn refused(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self::Refused { status, code, message: message.into() }
    }

    pub(super) fn name_invalid(message: impl Into<String>) -> Self {
        Self::refused(StatusCode::BAD_REQUEST, "NAME_INVALID", message)
    }

    pub(super) fn name_unknown(repository: &str) -> Self {
        let message = format!("there is no repository `{repository}`");
        Self::refused(StatusCode::NOT_FOUND, "NAME_UNKNOWN", message)
    }

    pub(super) fn digest_invalid(message: impl Into<String>) -> Self {
        Self::refused(StatusCode::BAD_REQUEST, "DIGEST_INVALID", message)
    }

    pub(super) fn size_invalid(message: impl Into<String>) -> Self {
        Self::refused(StatusCode::BAD_REQUEST, "SIZE_INVALID", message)
    }

    pub(super) fn blob_unknown(digest: &Digest) -> Self {
        let message = format!("blob {digest} is not in this repository");
        Self::refused(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", message)
    }

    pub(super) fn manifest_unknown(reference: impl std::fmt::Display) -> Self {
        let message = format!("manifest {reference} is not in this repository");
        Self::refused(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", message)
    }

    pub(super) fn manifest_invalid(message: impl Into<String>) -> Self {
        Self::refused(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
    }

    pub(super) fn manifest_too_large(limit_bytes: usize) -> Self {
        let message = format!("a manifest has at most {limit_bytes} bytes");
        Self::refused(StatusCode::PAYLOAD_TOO_LARGE, "MANIFEST_INVALID", message)
    }

    pub(super) fn reference_unknown(what: &str, digest: &Digest) -> Self {
        let message = format!(
            "the manifest names {what} {digest}, which is not in this repository: push it first"
        );
        Self::refused(StatusCode::NOT_FOUND, "MANIFEST_BLOB_UNKNOWN", message)
    }

    pub(super) fn upload_unknown(id: &str) -> Self {
        let message = format!(
            "there is no upload `{id}` in this repository: it is complete, was cancelled or has expired"
        );
        Self::refused(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", message)
    }

    pub(super) fn upload_invalid(message: impl Into<String>) -> Self {
        Self::refused(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", message)
    }

    pub(super) fn upload_busy() -> Self {
        let message =
            "another request is writing to this upload: wait for it, or cancel the upload";
        Self::refused(StatusCode::CONFLICT, "BLOB_UPLOAD_INVALID", message)
    }

    pub(super) fn too_many_uploads(limit: u32) -> Self {
        let message = format!("{limit} uploads are unfinished: complete or cancel some of them");
        Self::refused(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", message)
    }

    pub(super) fn in_use(what: &str) -> Self {
        let message = format!("{what}: delete that manifest first");
        Self::refused(StatusCode::CONFLICT, "DENIED", message)
    }

    pub(super) fn unsupported() -> Self {
        let message = "this registry does not have this operation";
        Self::refused(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message)
    }

    pub(super) fn no_such_page() -> Self {
        let message = "this is no path of the OCI distribution API";
        Self::refused(StatusCode::NOT_FOUND, "NAME_UNKNOWN", message)
    }

    fn status_and_code(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Refused { status, code, .. } => (*status, code),
            Self::OutOfOrder { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID"),
            Self::Unsatisfiable { .. } => (StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID"),
            Self::Auth(error) => match error.status() {
                StatusCode::FORBIDDEN => (StatusCode::FORBIDDEN, "DENIED"),
                StatusCode::TOO_MANY_REQUESTS => (error.status(), "TOOMANYREQUESTS"),
                StatusCode::UNAUTHORIZED => (error.status(), "UNAUTHORIZED"),
                status => (status, "UNKNOWN"),
            },
            Self::Blob(BlobError::NotFound(_)) => (StatusCode::NOT_FOUND, "BLOB_UNKNOWN"),
            Self::Blob(BlobError::Mismatch { .. }) => (StatusCode::BAD_REQUEST, "DIGEST_INVALID"),
            Self::Blob(BlobError::TooLarge { .. }) => {
                (StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID")
            }
            Self::Blob(BlobError::Interrupted { .. }) => {
                (StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID")
            }
            Self::Blob(BlobError::DiskFull) => (StatusCode::INSUFFICIENT_STORAGE, "UNKNOWN"),
            Self::Blob(BlobError::Denied { .. } | BlobError::Unreachable { .. }) => {
                (StatusCode::SERVICE_UNAVAILABLE, "UNKNOWN")
            }
            Self::Blob(_) => (StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN"),
            Self::Db(error) => match error.cause() {
                DbError::DiskFull => (StatusCode::INSUFFICIENT_STORAGE, "UNKNOWN"),
                DbError::ZeroByte => (StatusCode::BAD_REQUEST, "NAME_INVALID"),
                _ => (StatusCode::SERVICE_UNAVAILABLE, "UNKNOWN"),
            },
            Self::Observer(_) => (StatusCode::SERVICE_UNAVAILABLE, "UNKNOWN"),
        }
    }
}

impl IntoResponse for RegistryError {
    fn into_response(self) -> Response {
        let (status, code) = self.status_and_code();
        if status.is_server_error() {
            tracing::error!(error = &self as &dyn std::error::Error, "a registry call failed");
        }
        let text = self.to_string();
        let (message, hint) = match text.split_once("\nhint: ") {
            Some((message, hint)) => (message, Some(hint)),
            None => (text.as_str(), None),
        };
        let detail = hint.map(|hint| json!({ "hint": hint }));
        let body = json!({ "errors": [{ "code": code, "message": message, "detail": detail }] });
        let mut response = (status, Json(body)).into_response();
        let headers = response.headers_mut();
        match &self {
            Self::OutOfOrder { stands_at, location, .. } => {
                headers.insert(header::RANGE, received(*stands_at));
                if let Ok(location) = HeaderValue::from_str(location) {
                    headers.insert(header::LOCATION, location);
                }
            }
            Self::Unsatisfiable { size_bytes } => {
                let range = HeaderValue::from_str(&format!("bytes */{size_bytes}"));
                headers.insert(header::CONTENT_RANGE, range.expect("digits are a header value"));
            }
            Self::Auth(AuthError::TooMany { retry_after_s }) => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(*retry_after_s));
            }
            // OCI clients send what `login` stored once they are asked for it.
            _ if status == StatusCode::UNAUTHORIZED => {
                let scheme = HeaderValue::from_static("Basic realm=\"slmops\"");
                headers.insert(header::WWW_AUTHENTICATE, scheme);
            }
            _ => {}
        }
        response.map(Body::new)
    }
}

/// The `Range` header of an upload that has `length` bytes (distribution-spec 1.1, "Pushing a blob
/// in chunks"). There is no way to write "none", so an empty upload says `0-0` as other
/// registries do.
pub(super) fn received(length: u64) -> HeaderValue {
    let last = length.saturating_sub(1);
    HeaderValue::from_str(&format!("0-{last}")).expect("digits are a header value")
}
