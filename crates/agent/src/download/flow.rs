//! The bytes of one download as they come in: counted, and held back to a rate.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Downloads;

/// Seconds of a rate that may come at once after a pause of the network.
const BURST_S: f64 = 0.25;
/// How often what was fetched is written down while more comes in.
const NOTE_INTERVAL: Duration = Duration::from_secs(5);

/// What bytes that come in are part of.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// A delta.
    Delta,
    /// The model file itself.
    Whole,
    /// The model file or a delta, from a device of the same site.
    Peer,
    /// An adapter.
    Adapter,
    /// A small file.
    Other,
    /// Something that is here already.
    Here,
}

/// The bytes of one download as they come in: counted, and held back to a rate.
pub(super) struct Flow<'a> {
    pub(super) downloads: &'a Downloads,
    pub(super) bucket: Option<Bucket>,
    pub(super) part: Part,
    pub(super) noted: Instant,
}

impl Flow<'_> {
    pub(super) async fn take(&mut self, bytes: u64) {
        if self.part == Part::Here {
            return;
        }
        if self.part != Part::Peer {
            self.downloads.received_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        self.downloads.note(|transfer| match self.part {
            Part::Delta => transfer.delta_bytes += bytes,
            Part::Whole => transfer.whole_bytes += bytes,
            Part::Peer => transfer.peer_bytes += bytes,
            Part::Adapter => transfer.adapter_bytes += bytes,
            Part::Other | Part::Here => {}
        });
        if self.noted.elapsed() >= NOTE_INTERVAL {
            self.noted = Instant::now();
            self.downloads.save_transfer();
        }
        if let Some(bucket) = &mut self.bucket {
            bucket.take(bytes).await;
        }
    }
}

impl Drop for Flow<'_> {
    fn drop(&mut self) {
        // Whatever ended it: what was fetched is counted over restarts.
        self.downloads.save_transfer();
    }
}

/// A token bucket: what is read over the rate is waited for before more is read, so that the sender
/// is held back by the connection's own flow control.
pub(crate) struct Bucket {
    rate_bytes_per_s: u64,
    /// Bytes that may be read now; below zero they were read too early.
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    pub(crate) fn new(rate_bytes_per_s: u64) -> Self {
        Self { rate_bytes_per_s: rate_bytes_per_s.max(1), tokens: 0.0, filled: Instant::now() }
    }

    /// Takes out `bytes` that were read, and waits until the bucket is even again.
    pub(crate) async fn take(&mut self, bytes: u64) {
        let rate = self.rate_bytes_per_s as f64;
        let passed_s = self.filled.elapsed().as_secs_f64();
        self.filled = Instant::now();
        // What the network did not bring is made up for, but not for longer than this.
        self.tokens = (self.tokens + passed_s * rate).min(rate * BURST_S) - bytes as f64;
        if self.tokens < 0.0 {
            tokio::time::sleep(Duration::from_secs_f64(-self.tokens / rate)).await;
        }
    }
}
