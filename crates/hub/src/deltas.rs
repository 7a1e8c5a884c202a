//! Makes deltas between the model files that the fleet runs and those that rollouts bring, so that
//! devices fetch what has changed and not the whole.
//! It never holds anything up that matters: a device without a delta gets the whole file. Start
//! reading at [`Maker::run`]; which deltas are wanted says `fleet_core::deltas`, what is kept of
//! them is in `store/deltas.rs`.
//!
//! One delta at a time, on a thread of the lowest priority. Jobs are leased rows: a hub that dies
//! over one leaves it to the next, or to itself after a restart.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use slmops_api::delta::{
    BYTES_ANNOTATION, DELTA_MEDIA_TYPE, Delta, DeltaJob, FROM_ANNOTATION, TO_ANNOTATION,
};
use slmops_artifact::{Digest, MappedFile};
use slmops_fleet_core::deltas::{MAX_HUNDREDTHS, wanted};
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
/// The lowest priority that a thread can have (`setpriority(2)`).
const LOWEST_PRIORITY: i32 = 19;

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
        let (sender, made) = tokio::sync::oneshot::channel();
        let thread = std::thread::Builder::new().name("delta".to_owned()).spawn(move || {
            let mapped = MappedFile::open(old.path())
                .and_then(|old| Ok((old, MappedFile::open(new.path())?)));
            // Whoever asked may be gone.
            let _ = sender.send(mapped.map(|(old, new)| encode(&old, &new)));
        });
        if let Err(error) = thread {
            return Ok(Made::Later(format!("start a thread: {error}")));
        }
        let encoded = match made.await {
            Ok(Ok(encoded)) => encoded,
            Ok(Err(error)) => return Ok(Made::Later(format!("read the models: {error}"))),
            Err(_) => return Ok(Made::Failed("the encoder gave up".to_owned())),
        };
        if (encoded.from, encoded.to) != (job.from, job.to) {
            return Ok(Made::Failed("a model's bytes are not what its digest says".to_owned()));
        }
        let bytes = encoded.bytes.len() as u64;
        if bytes.saturating_mul(100) >= encoded.to_bytes.saturating_mul(MAX_HUNDREDTHS) {
            return Ok(Made::Useless(format!(
                "it has {bytes} bytes, the whole {}",
                encoded.to_bytes
            )));
        }
        let annotations = BTreeMap::from([
            (FROM_ANNOTATION.to_owned(), job.from.to_string()),
            (TO_ANNOTATION.to_owned(), job.to.to_string()),
            (BYTES_ANNOTATION.to_owned(), bytes.to_string()),
        ]);
        let layer = encoded.bytes.into();
        let blob = self
            .registry
            .attach(repository, job.manifest, DELTA_MEDIA_TYPE, annotations, layer)
            .await?;
        Ok(Made::Ready(Delta {
            from: job.from,
            to: job.to,
            to_bytes: encoded.to_bytes,
            blob,
            bytes,
            header_bytes: encoded.header_bytes,
        }))
    }
}

/// A delta, and what it says of itself.
struct Encoded {
    bytes: Vec<u8>,
    from: Digest,
    to: Digest,
    to_bytes: u64,
    header_bytes: u64,
}

fn encode(old: &[u8], new: &[u8]) -> Encoded {
    // On Linux this is about the calling thread alone. Without it the rest of the hub is slower.
    if let Err(error) = rustix::process::setpriority_process(None, LOWEST_PRIORITY) {
        tracing::debug!(%error, "a delta is made at the usual priority");
    }
    let bytes = slmops_delta::encode(old, new, 1, &|_| {}).bytes;
    let header = slmops_delta::Header::parse(&bytes).expect("what was encoded has a header");
    Encoded {
        from: header.from,
        to: header.to,
        to_bytes: header.to_bytes,
        header_bytes: header.header_bytes(),
        bytes,
    }
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
