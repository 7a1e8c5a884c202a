//! Makes deltas between the model files that the fleet runs and those that rollouts bring, so that
//! devices fetch what has changed and not the whole.
//! It never holds anything up that matters: a device without a delta gets the whole file. Start
//! reading at [`Maker::run`]; which deltas are wanted says `fleet_core::deltas`, what is kept of
//! them is in `store/deltas.rs`.
//!
//! One delta at a time, at the lowest priority, by an [`Encode`]. Jobs are leased rows: a hub that
//! dies over one leaves it to the next, or to itself after a restart.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use slmops_api::delta::{
    BYTES_ANNOTATION, DELTA_MEDIA_TYPE, Delta, DeltaJob, FROM_ANNOTATION, TO_ANNOTATION,
};
use slmops_artifact::MappedFile;
use slmops_delta::{Header, MAX_HEADER_BYTES};
use slmops_fleet_core::deltas::{saves_enough, wanted};
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::Instant;

use crate::engine::{Engine, stopped};
use crate::events::Events;
use crate::registry::{Registry, RegistryError, RepositoryName};
use crate::store::{Made, Store, StoreError};

/// How often it is looked for work even if nothing is heard: what other hubs left behind.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// The least time between two looks at the fleet, which may be large.
const REST: Duration = Duration::from_secs(2);
/// How long a delta is leased at a time.
const LEASE: Duration = Duration::from_secs(60);
/// How often the lease is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(20);
/// How soon something that was in the way is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// The largest model files that deltas are made between, in bytes: a delta is made in memory, and
/// may come to be as large as the file.
const MAX_MODEL_BYTES: u64 = 4 << 30;
/// What a delta's header has besides its body, at most, in bytes.
const HEADER_ENDS_BYTES: u64 = 64;
/// The lowest priority that a thread can have (`setpriority(2)`).
const LOWEST_PRIORITY: i32 = 19;

/// Files that a delta is made of, and where it goes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeltaFiles {
    /// What devices have.
    pub old: PathBuf,
    /// What they are to have.
    pub new: PathBuf,
    /// The delta; not there yet.
    pub delta: PathBuf,
}

impl DeltaFiles {
    /// Makes the delta. On Linux the calling thread has the lowest priority from then on.
    ///
    /// # Errors
    /// Files that cannot be read, or a delta that cannot be written.
    pub fn encode(&self) -> io::Result<()> {
        if let Err(error) = rustix::process::setpriority_process(None, LOWEST_PRIORITY) {
            tracing::debug!(%error, "a delta is made at the usual priority");
        }
        let (old, new) = (MappedFile::open(&self.old)?, MappedFile::open(&self.new)?);
        fs::write(&self.delta, slmops_delta::encode(&old, &new, 1, &|_| {}).bytes)
    }
}

/// Makes one delta, somewhere; an error says why it could not. Dropping the future may end the work.
pub type Encode = fn(DeltaFiles) -> BoxFuture<'static, Result<(), String>>;

/// An [`Encode`] on a thread of this process.
pub fn encode_on_thread(files: DeltaFiles) -> BoxFuture<'static, Result<(), String>> {
    Box::pin(async move {
        let (sender, made) = tokio::sync::oneshot::channel();
        let work = move || {
            // Whoever asked may be gone.
            let _ = sender.send(files.encode().map_err(|error| error.to_string()));
        };
        let thread = std::thread::Builder::new().name("delta".to_owned()).spawn(work);
        thread.map_err(|error| format!("start a thread: {error}"))?;
        made.await.unwrap_or_else(|_| Err("the encoder gave up".to_owned()))
    })
}

/// Makes what is wanted.
pub struct Maker {
    /// Where jobs are.
    pub store: Arc<dyn Store>,
    /// The fleet.
    pub engine: Engine,
    /// Where models are, and deltas go.
    pub registry: Registry,
    /// Says when rollouts change.
    pub events: Events,
    /// Says that a device asked for something new.
    pub wake: Arc<Notify>,
    /// Makes a delta.
    pub encode: Encode,
    /// Where deltas are until they are in the registry.
    pub folder: PathBuf,
}

impl Maker {
    /// Makes deltas until `stop` turns true. One that is being made then is made again later.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        let mut changes = self.events.subscribe();
        // What came before this hub started.
        let mut look = true;
        let mut rested = Instant::now();
        loop {
            if look {
                if let Err(error) = self.look().await {
                    tracing::warn!(%error, "cannot see which deltas are wanted");
                }
                (look, rested) = (false, Instant::now() + REST);
            }
            tokio::select! {
                () = stopped(&mut stop) => return,
                worked = self.work() => match worked {
                    Ok(true) => continue,
                    Ok(false) => {}
                    Err(error) => tracing::warn!(%error, "cannot make deltas"),
                }
            }
            tokio::select! {
                () = stopped(&mut stop) => return,
                () = self.wake.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => look = true,
                changed = rollout_changed(&mut changes) => {
                    if !changed {
                        return;
                    }
                    tokio::time::sleep_until(rested).await;
                    look = true;
                }
            }
        }
    }

    /// Notes what rollouts under way could use.
    async fn look(&self) -> Result<(), StoreError> {
        let wanted = self.engine.look(wanted).await?;
        if !wanted.is_empty() {
            self.store.want_deltas(Timestamp::now(), wanted).await?;
        }
        Ok(())
    }

    /// Makes the delta that most devices wait for; false if there is none.
    async fn work(&self) -> Result<bool, StoreError> {
        let now = Timestamp::now();
        let Some(job) = self.store.lease_delta(now, now + LEASE).await? else { return Ok(false) };
        let begun = std::time::Instant::now();
        let made = tokio::select! {
            made = self.make(&job) => made,
            () = self.renew(&job) => return Ok(true),
        };
        let (from, to) = (job.from.short(), job.to.short());
        let ms = begun.elapsed().as_millis();
        match &made {
            Made::Ready(delta) => tracing::info!(
                model = %job.model, %from, %to, bytes = delta.bytes, of = delta.to_bytes, ms,
                "made a delta"
            ),
            Made::Useless(why) | Made::Failed(why) | Made::Later(why) => {
                tracing::info!(model = %job.model, %from, %to, why, ms, "made no delta");
            }
        }
        self.store.finish_delta(job.clone(), made, Timestamp::now() + RETRY_AFTER).await?;
        self.events.announce("release", job.model);
        Ok(true)
    }

    /// Keeps the lease; returns once it is lost.
    async fn renew(&self, job: &DeltaJob) {
        loop {
            tokio::time::sleep(RENEW_EVERY).await;
            match self.store.keep_delta(job.clone(), Timestamp::now() + LEASE).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => tracing::warn!(%error, "cannot keep a delta that is being made"),
            }
        }
    }

    async fn make(&self, job: &DeltaJob) -> Made {
        let Ok(repository) = job.model.as_str().parse::<RepositoryName>() else {
            return Made::Failed(format!("{} is no repository", job.model));
        };
        self.try_make(job, &repository).await.unwrap_or_else(|error| match error {
            RegistryError::Refused { .. } => Made::Failed(first_line(&error)),
            other => Made::Later(first_line(&other)),
        })
    }

    async fn try_make(
        &self,
        job: &DeltaJob,
        repository: &RepositoryName,
    ) -> Result<Made, RegistryError> {
        for digest in [&job.from, &job.to] {
            let size = self.registry.blob_size(repository, digest).await?;
            if size.is_some_and(|size| size > MAX_MODEL_BYTES) {
                return Ok(Made::Useless(format!(
                    "deltas are made of models up to {} GiB",
                    MAX_MODEL_BYTES >> 30
                )));
            }
        }
        let old = self.registry.blob_file(repository, &job.from).await?;
        let new = self.registry.blob_file(repository, &job.to).await?;
        let room = match tempfile::tempdir_in(&self.folder) {
            Ok(room) => room,
            Err(error) => return Ok(Made::Later(format!("make room for the delta: {error}"))),
        };
        let files = DeltaFiles {
            old: old.path().to_owned(),
            new: new.path().to_owned(),
            delta: room.path().join("delta"),
        };
        let path = files.delta.clone();
        if let Err(why) = (self.encode)(files).await {
            return Ok(Made::Later(why));
        }
        let (header, bytes) = match read_header(&path) {
            Ok(read) => read,
            Err(error) => return Ok(Made::Later(format!("read the delta: {error}"))),
        };
        if (header.from, header.to) != (job.from, job.to) {
            return Ok(Made::Failed("a model's bytes are not what its digest says".to_owned()));
        }
        if !saves_enough(bytes, header.to_bytes) {
            return Ok(Made::Useless(format!(
                "it has {bytes} bytes, the whole {}",
                header.to_bytes
            )));
        }
        let annotations = BTreeMap::from([
            (FROM_ANNOTATION.to_owned(), job.from.to_string()),
            (TO_ANNOTATION.to_owned(), job.to.to_string()),
            (BYTES_ANNOTATION.to_owned(), bytes.to_string()),
        ]);
        let blob = self
            .registry
            .attach(repository, job.manifest, DELTA_MEDIA_TYPE, annotations, &path)
            .await?;
        Ok(Made::Ready(Delta {
            from: job.from,
            to: job.to,
            to_bytes: header.to_bytes,
            blob,
            bytes,
            header_bytes: header.header_bytes(),
        }))
    }
}

/// A delta's header, and the delta's length in bytes.
fn read_header(path: &Path) -> io::Result<(Header, u64)> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut start = Vec::new();
    file.take(MAX_HEADER_BYTES + HEADER_ENDS_BYTES).read_to_end(&mut start)?;
    let header = Header::parse(&start).map_err(io::Error::other)?;
    Ok((header, len))
}

/// Waits until a rollout changes, or more does than can be told; false once nobody announces.
async fn rollout_changed(changes: &mut broadcast::Receiver<crate::events::Change>) -> bool {
    loop {
        match changes.recv().await {
            Ok(change) if change.kind == "rollout" => return true,
            Ok(_) => {}
            Err(broadcast::error::RecvError::Lagged(_)) => return true,
            Err(broadcast::error::RecvError::Closed) => return false,
        }
    }
}

fn first_line(error: &dyn std::fmt::Display) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
