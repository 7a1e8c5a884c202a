//! Customers of the demo's devices: they ask all the time, and every failure is counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Time between two questions to one device.
const PAUSE: Duration = Duration::from_millis(250);
/// An answer that takes longer counts as failed.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Length of one answer.
const ANSWER_TOKENS: u32 = 4;

/// What became of the questions to one device.
#[derive(Default)]
pub struct Tally {
    /// Answered.
    pub answered: AtomicU64,
    /// Not answered, or with an error.
    pub failed: AtomicU64,
    /// The first failure in words.
    pub first: std::sync::Mutex<Option<String>>,
}

/// Questions going on in the background.
pub struct Load {
    stop: CancellationToken,
    tasks: JoinSet<()>,
    tallies: Vec<(String, Arc<Tally>)>,
}

impl Load {
    /// Starts asking each of the devices, given by name and endpoint.
    pub fn start(devices: &[(String, String)]) -> Self {
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        let mut tallies = Vec::new();
        for (name, endpoint) in devices {
            let tally = Arc::new(Tally::default());
            tallies.push((name.clone(), tally.clone()));
            tasks.spawn(ask_all_the_time(endpoint.clone(), tally, stop.clone()));
        }
        Self { stop, tasks, tallies }
    }

    /// Stops and says, for each device, how many were answered and how many failed.
    pub async fn finish(mut self) -> Vec<(String, u64, u64, Option<String>)> {
        self.stop.cancel();
        while self.tasks.join_next().await.is_some() {}
        let mut counts = Vec::new();
        for (name, tally) in &self.tallies {
            let first = tally.first.lock().map(|first| first.clone()).unwrap_or_default();
            let answered = tally.answered.load(Ordering::Relaxed);
            counts.push((name.clone(), answered, tally.failed.load(Ordering::Relaxed), first));
        }
        counts
    }
}

async fn ask_all_the_time(endpoint: String, tally: Arc<Tally>, stop: CancellationToken) {
    let client = reqwest::Client::builder().no_proxy().timeout(TIMEOUT).build();
    let Ok(client) = client else { return };
    let body = json!({
        "messages": [{ "role": "user", "content": "Name a colour." }],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
    });
    // A question that was asked is waited for even when told to stop, so that none is left out.
    while !stop.is_cancelled() {
        let request = client.post(format!("{endpoint}/v1/chat/completions")).json(&body);
        let outcome = match request.send().await {
            Err(error) => Err(error.without_url().to_string()),
            Ok(response) if response.status().is_success() => {
                response.bytes().await.map(|_| ()).map_err(|error| error.without_url().to_string())
            }
            Ok(response) => Err(format!("status {}", response.status())),
        };
        match outcome {
            Ok(()) => {
                tally.answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                tally.failed.fetch_add(1, Ordering::Relaxed);
                if let Ok(mut first) = tally.first.lock() {
                    first.get_or_insert(error);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = stop.cancelled() => {}
        }
    }
}
