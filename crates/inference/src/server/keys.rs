//! Who may use the endpoint, and how much of it: a file of keys, of which it knows only the digests.
//!
//! ```toml
//! [[key]]
//! name = "till"
//! digest = "sha256:…"
//! concurrent = 2      # requests at the same time; any number if absent
//! per_minute = 60     # requests; any number if absent
//! ```

use std::collections::HashMap;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{HeaderMap, header};
use axum::response::Response;
use serde::{Deserialize, Serialize};
use slmops_artifact::Digest;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;

/// How every key begins, so that one that leaked is recognised.
const PREFIX: &str = "slm-";
/// The most bytes of the file.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// The longest name.
const MAX_NAME_BYTES: usize = 64;
/// How often it is looked whether the file has changed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// Why a file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It cannot be read or written.
    #[error("endpoint keys {}: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// It is no list of keys.
    #[error(
        "endpoint keys {}: {message}\nhint: each [[key]] has a name and a digest, and may have concurrent and per_minute",
        .path.display()
    )]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
}

/// The keys of a file, which is read again when it changes.
#[derive(Debug)]
pub struct Keys {
    path: PathBuf,
    /// Of the program that serves, for its own questions.
    own: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    looked_at: Instant,
    /// When the file had changed last, as it was read.
    changed: Option<SystemTime>,
    holders: HashMap<Digest, Arc<Holder>>,
}

/// One key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    digest: Digest,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    concurrent: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    per_minute: Option<u32>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    key: Vec<Entry>,
}

/// One key, with what its holder uses at the moment.
#[derive(Debug)]
struct Holder {
    entry: Entry,
    requests: Option<Arc<Semaphore>>,
    /// Requests that may begin now, and since when.
    allowance: Mutex<(f64, Instant)>,
}

/// What a new key may use.
#[derive(Clone, Copy, Debug, Default)]
pub struct KeyLimits {
    /// Requests at the same time.
    pub concurrent: Option<u32>,
    /// Requests that begin within a minute.
    pub per_minute: Option<u32>,
}

/// A request of a key that is under way.
pub(super) struct Permit(
    #[expect(dead_code, reason = "held until the answer is over")] Option<OwnedSemaphorePermit>,
);

impl Keys {
    /// Reads the keys.
    ///
    /// # Errors
    /// The file cannot be read, or is no list of keys.
    pub fn open(path: &Path) -> Result<Self, KeysError> {
        let changed = changed(path);
        let holders = read(path)?.key.into_iter().map(Holder::of).collect();
        let state = State { looked_at: Instant::now(), changed, holders };
        Ok(Self { path: path.to_owned(), own: new_key(), state: Mutex::new(state) })
    }

    /// A key without limits that stands in no file, for questions of the program that serves.
    pub fn own(&self) -> &str {
        &self.own
    }

    /// Makes a key, adds its digest to the file (which need not exist yet), and returns it. A key of
    /// that name is replaced.
    ///
    /// # Errors
    /// The file cannot be read or written, or is no list of keys; a name that is none.
    pub fn create(path: &Path, name: &str, limits: KeyLimits) -> Result<String, KeysError> {
        let wrong = |message: &str| {
            let message = format!("key `{name}`: {message}");
            KeysError::Content { path: path.to_owned(), message }
        };
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
            return Err(wrong(&format!("its name must have 1 to {MAX_NAME_BYTES} bytes")));
        }
        let mut file = match read(path) {
            Err(KeysError::File { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                File::default()
            }
            read => read?,
        };
        let key = new_key();
        let KeyLimits { concurrent, per_minute } = limits;
        let digest = Digest::of(key.as_bytes());
        file.key.retain(|known| known.name != name);
        file.key.push(Entry { name: name.to_owned(), digest, concurrent, per_minute });
        check(&file).map_err(|message| wrong(&message))?;
        let text = toml::to_string(&file).expect("keys are plain data");
        write(path, &text).map_err(|source| KeysError::File { path: path.to_owned(), source })?;
        Ok(key)
    }

    /// Takes a request on, or says why not. `counts` says whether it uses the model.
    pub(super) fn admit(&self, headers: &HeaderMap, counts: bool) -> Result<Permit, ApiError> {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| {
            let (scheme, key) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
        });
        let given = given.ok_or_else(|| ApiError::unauthorised("a key is needed"))?;
        let digest = Digest::of(given.as_bytes());
        // Digests are compared, so that the time taken tells nothing of a key.
        if digest == Digest::of(self.own.as_bytes()) {
            return Ok(Permit(None));
        }
        let holder = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            self.look_again(&mut state);
            state.holders.get(&digest).map(Arc::clone)
        };
        let holder = holder.ok_or_else(|| ApiError::unauthorised("the key is not known here"))?;
        if counts { holder.begin() } else { Ok(Permit(None)) }
    }

    /// Reads the file again if it has changed. One that cannot be read any more changes nothing.
    fn look_again(&self, state: &mut State) {
        if state.looked_at.elapsed() < LOOK_EVERY {
            return;
        }
        state.looked_at = Instant::now();
        let changed = changed(&self.path);
        if changed == state.changed {
            return;
        }
        match read(&self.path) {
            Ok(file) => {
                let holders = file.key.into_iter().map(|entry| {
                    let known = state.holders.get(&entry.digest);
                    // What its holder uses at the moment goes on counting.
                    match known.filter(|known| known.entry == entry) {
                        Some(known) => (entry.digest, Arc::clone(known)),
                        None => Holder::of(entry),
                    }
                });
                state.holders = holders.collect();
                state.changed = changed;
            }
            Err(error) => tracing::warn!(%error, "the keys stay as they were"),
        }
    }
}

impl Holder {
    fn of(entry: Entry) -> (Digest, Arc<Self>) {
        let requests = entry.concurrent.map(|most| Arc::new(Semaphore::new(most as usize)));
        let allowance = Mutex::new((f64::from(entry.per_minute.unwrap_or(0)), Instant::now()));
        (entry.digest, Arc::new(Self { entry, requests, allowance }))
    }

    fn begin(&self) -> Result<Permit, ApiError> {
        let name = &self.entry.name;
        let permit = match &self.requests {
            None => None,
            Some(requests) => {
                let most = self.entry.concurrent.unwrap_or(0);
                let busy = |_| {
                    let message = format!("key {name} may have {most} requests at the same time");
                    ApiError::too_many(message, Duration::from_secs(1))
                };
                Some(Arc::clone(requests).try_acquire_owned().map_err(busy)?)
            }
        };
        if let Some(most) = self.entry.per_minute {
            let mut allowance = self.allowance.lock().unwrap_or_else(PoisonError::into_inner);
            let (left, since) = *allowance;
            let per_second = f64::from(most) / MINUTE.as_secs_f64();
            let left = (left + since.elapsed().as_secs_f64() * per_second).min(f64::from(most));
            if left < 1.0 {
                *allowance = (left, Instant::now());
                let message = format!("key {name} may begin {most} requests a minute");
                return Err(ApiError::too_many(
                    message,
                    Duration::from_secs_f64(((1.0 - left) / per_second).min(MINUTE.as_secs_f64())),
                ));
            }
            *allowance = (left - 1.0, Instant::now());
        }
        Ok(Permit(permit))
    }
}

impl Permit {
    /// Holds the permit until the whole answer is sent, or nobody wants it any more.
    pub(super) fn hold(self, response: Response) -> Response {
        response.map(|body| Body::new(Held { body, _permit: self }))
    }
}

struct Held {
    body: Body,
    _permit: Permit,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

fn changed(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

fn read(path: &Path) -> Result<File, KeysError> {
    let failed = |source| KeysError::File { path: path.to_owned(), source };
    let wrong = |message| KeysError::Content { path: path.to_owned(), message };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > MAX_FILE_BYTES {
        return Err(wrong(format!("it is longer than {MAX_FILE_BYTES} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let file: File = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    check(&file).map_err(wrong)?;
    Ok(file)
}

fn check(file: &File) -> Result<(), String> {
    match file.key.iter().find(|key| key.concurrent == Some(0) || key.per_minute == Some(0)) {
        Some(key) => Err(format!("key `{}` may do nothing: a limit of 0", key.name)),
        None => Ok(()),
    }
}

/// Writes beside the file and renames, so that there is always a whole one. Only its owner may read it.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let temporary = path.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

fn new_key() -> String {
    let bytes = rand::random::<[u8; 24]>();
    bytes.iter().fold(PREFIX.to_owned(), |key, byte| format!("{key}{byte:02x}"))
}
