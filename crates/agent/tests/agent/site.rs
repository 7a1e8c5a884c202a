//! A device of the same site, as far as others see it: files by digest over plain HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use slmops_artifact::Digest;

struct Neighbour {
    files: BTreeMap<Digest, Vec<u8>>,
    /// How often it says first that it serves others.
    busy: AtomicU32,
}

/// Starts one that turns away whoever asks so many times first; its address. A file is known by any
/// digest that it is given here with, also by a wrong one.
pub async fn neighbour(files: impl IntoIterator<Item = (Digest, Vec<u8>)>, busy: u32) -> String {
    let files = files.into_iter().collect();
    let neighbour = Arc::new(Neighbour { files, busy: AtomicU32::new(busy) });
    let router = axum::Router::new().route("/blobs/{digest}", get(blob)).with_state(neighbour);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    format!("http://{address}")
}

async fn blob(
    State(neighbour): State<Arc<Neighbour>>,
    Path(digest): Path<Digest>,
    headers: HeaderMap,
) -> Response {
    let Some(file) = neighbour.files.get(&digest) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let order = Ordering::Relaxed;
    if neighbour.busy.fetch_update(order, order, |left| left.checked_sub(1)).is_ok() {
        return (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")]).into_response();
    }
    let range = headers[header::RANGE].to_str().unwrap().strip_prefix("bytes=").unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
    let shown = format!("bytes {first}-{last}/{}", file.len());
    let part = file[first..=last].to_vec();
    (StatusCode::PARTIAL_CONTENT, [(header::CONTENT_RANGE, shown)], part).into_response()
}
