//! Models and deltas for devices of the same site: files by digest, over plain HTTP, at a bounded rate.
//!
//! Only while the hub's rules say so, and only on the address by which this device reaches its hub.
//! Whoever knows a file's digest may have it: the bytes need no trust, since each device checks
//! them against the digest that was signed.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use bytes::Bytes;
use slmops_artifact::Digest;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore, mpsc};

use crate::download::Bucket;
use crate::identity::HubUrl;
use crate::nearby::{self, Nearby};
use crate::outbox::Outbox;
use crate::state::StateFolder;

/// Devices that are served at once; more are turned away.
const MAX_AT_ONCE: usize = 8;
/// Devices that are asked for one file, at most.
const MAX_ASKED: usize = 8;
/// Seconds after which one that was turned away may ask again.
const RETRY_AFTER_S: u32 = 5;
/// Bytes that are read and sent at once.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces between the disk and the network.
const QUEUED_PIECES: usize = 4;

/// Serves models, or not, as the rules say.
pub struct Sharing {
    state: StateFolder,
    hub: HubUrl,
    outbox: Arc<Outbox>,
    running: Option<Running>,
}

struct Running {
    rate_bytes_per_s: u64,
    address: SocketAddr,
    server: tokio::task::JoinHandle<()>,
    /// Absent where the network has no multicast.
    nearby: Option<Nearby>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Sharing {
    /// Shares what is in `state` with whoever reaches this device where the hub does.
    pub fn new(state: StateFolder, hub: HubUrl, outbox: Arc<Outbox>) -> Self {
        Self { state, hub, outbox, running: None }
    }

    /// Serves at so many bytes a second, or stops. Where others find it: `http://ADDRESS:PORT`.
    pub fn keep_to(&mut self, rate_bytes_per_s: Option<u64>) -> Option<String> {
        let runs = self.running.as_ref().map(|running| running.rate_bytes_per_s);
        if runs != rate_bytes_per_s {
            self.running = None;
            if let Some(rate) = rate_bytes_per_s {
                match self.start(rate) {
                    Ok(running) => {
                        tracing::info!("shares its models with its site at {}", running.address);
                        self.running = Some(running);
                    }
                    Err(error) => tracing::warn!("cannot share models with the site: {error}"),
                }
            }
        }
        self.running.as_ref().map(|running| format!("http://{}", running.address))
    }

    /// Tells the network that these files are to be had here, while they are.
    pub fn announce(&mut self, files: &BTreeSet<Digest>) {
        let Some(running) = &mut self.running else { return };
        let Some(nearby) = &mut running.nearby else { return };
        if nearby.announce(files) {
            let names: Vec<String> = files.iter().map(nearby::short_name).collect();
            let said = serde_json::json!({ "address": running.address, "files": names });
            self.outbox.sent("mDNS _slm-model._tcp", &said);
        }
    }

    /// Who on the network has a file, besides those that the hub named: these first, so many at most.
    pub fn who_has(&self, file: Digest, mut named: Vec<String>) -> Vec<String> {
        let nearby = self.running.as_ref().and_then(|running| running.nearby.as_ref());
        for peer in nearby.map(|nearby| nearby.who_has(file)).unwrap_or_default() {
            if named.len() < MAX_ASKED && !named.contains(&peer) {
                named.push(peer);
            }
        }
        named
    }

    fn start(&self, rate_bytes_per_s: u64) -> io::Result<Running> {
        let listener = std::net::TcpListener::bind((own_address(&self.hub)?, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = TcpListener::from_std(listener)?;
        let shelf = Arc::new(Shelf {
            state: self.state.clone(),
            bucket: Mutex::new(Bucket::new(rate_bytes_per_s)),
            places: Arc::new(Semaphore::new(MAX_AT_ONCE)),
        });
        let router = Router::new().route("/blobs/{digest}", get(blob)).with_state(shelf);
        let server = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::warn!("sharing models with the site ended: {error}");
            }
        });
        let nearby = Nearby::new(address)
            .inspect_err(|error| tracing::info!("cannot look for models on the network: {error}"));
        Ok(Running { rate_bytes_per_s, address, server, nearby: nearby.ok() })
    }
}

/// The address by which this device reaches its hub. Nothing is sent for it.
fn own_address(hub: &HubUrl) -> io::Result<IpAddr> {
    let target = hub.join("/").socket_addrs(|| None)?.into_iter().next();
    let target = target.ok_or(io::ErrorKind::AddrNotAvailable)?;
    let any: SocketAddr = match target {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0_u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

struct Shelf {
    state: StateFolder,
    bucket: Mutex<Bucket>,
    places: Arc<Semaphore>,
}

async fn blob(
    State(shelf): State<Arc<Shelf>>,
    Path(digest): Path<Digest>,
    headers: HeaderMap,
) -> Response {
    let Ok(place) = Arc::clone(&shelf.places).try_acquire_owned() else {
        let retry = [(header::RETRY_AFTER, RETRY_AFTER_S.to_string())];
        return (StatusCode::SERVICE_UNAVAILABLE, retry).into_response();
    };
    let path = shelf.state.blob(digest);
    let opened = tokio::task::spawn_blocking(move || {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        io::Result::Ok((file, size))
    });
    let Ok(Ok((file, size))) = opened.await else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let asked = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    let range = match asked.map(|asked| range_of(asked, size)) {
        None => None,
        Some(Some(range)) => Some(range),
        Some(None) => return StatusCode::RANGE_NOT_SATISFIABLE.into_response(),
    };
    let Range { start, end } = range.clone().unwrap_or(0..size);
    let pieces = futures_util::stream::unfold(
        (read_pieces(file, start..end), shelf, place),
        |(mut receiver, shelf, place)| async move {
            let piece = receiver.recv().await?;
            if let Ok(piece) = &piece {
                shelf.bucket.lock().await.take(piece.len() as u64).await;
            }
            Some((piece, (receiver, shelf, place)))
        },
    );
    let mut response = Response::builder().header(header::CONTENT_LENGTH, end - start);
    if range.is_some() {
        let shown = format!("bytes {start}-{}/{size}", end - 1);
        response =
            response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, shown);
    }
    response.body(Body::from_stream(pieces)).expect("digits are header values")
}

/// A part of a file as it is read, on a thread of its own.
pub(crate) fn read_pieces(mut file: File, range: Range<u64>) -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(QUEUED_PIECES);
    tokio::task::spawn_blocking(move || {
        let mut left = range.end - range.start;
        let mut sent = file.seek(SeekFrom::Start(range.start)).map(|_| ());
        while left > 0 && sent.is_ok() {
            let mut piece = vec![0; usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES)];
            sent = file.read_exact(&mut piece);
            left -= piece.len() as u64;
            if sent.is_ok() && sender.blocking_send(Ok(piece.into())).is_err() {
                return;
            }
        }
        if let Err(error) = sent {
            // Whoever asked may be gone.
            let _ = sender.blocking_send(Err(error));
        }
    });
    receiver
}

/// `bytes=FIRST-LAST` or `bytes=FIRST-` inside a file (RFC 9110, section 14.1.2).
fn range_of(asked: &str, size: u64) -> Option<Range<u64>> {
    let (first, last) = asked.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let end = match last {
        "" => size,
        last => last.parse::<u64>().ok()?.checked_add(1)?.min(size),
    };
    (first < end).then_some(first..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_lie_inside_the_file() {
        for (asked, expected) in [
            ("bytes=0-", Some(0..10)),
            ("bytes=3-", Some(3..10)),
            ("bytes=3-4", Some(3..5)),
            ("bytes=3-99", Some(3..10)),
            ("bytes=10-", None),
            ("bytes=5-4", None),
            ("bytes=-3", None),
            ("bytes=3-18446744073709551615", None),
            ("bytes=0-1,3-4", None),
            ("lines=1-2", None),
        ] {
            assert_eq!(range_of(asked, 10), expected, "{asked}");
        }
    }
}
