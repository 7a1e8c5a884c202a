//! The agent against a hub in this process, with a real model, real workers and real kills.

mod adapters;
mod deltas;
mod fake_hub;
mod kills;
mod program;
mod replace;
mod rollouts;
mod site;
mod sleep;
mod tls;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fake_hub::FakeHub;
use slmops_agent::hub::Hub;
use slmops_agent::identity::{self, DeviceKey, Identity, MeteredLink, Settings};
use slmops_agent::outbox::Outbox;
use slmops_agent::shell::Agent;
use slmops_agent::state::StateFolder;
use slmops_agent::tls::{PinnedAuthority, SystemClock};
use slmops_agent_core::Config;
use slmops_api::device::EnrolRequest;
use tokio::sync::oneshot;

/// An agent in this process.
struct Device {
    folder: tempfile::TempDir,
    running: Option<(oneshot::Sender<()>, tokio::task::JoinHandle<()>)>,
}

fn impatient() -> Config {
    Config {
        poll_wait_s: 2,
        poll_interval_ms: 50,
        backoff_base_ms: 20,
        backoff_cap_ms: 300,
        progress_interval_ms: 50,
        ..Config::default()
    }
}

impl Device {
    /// Joins and runs.
    async fn join(hub: &FakeHub) -> Self {
        // Workers are children of this very program's sibling.
        slmops_inference::child::set_program(env!("CARGO_BIN_EXE_slm-agent"));
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let (invitation, url) = identity::parse_invitation(&hub.invitation()).unwrap();
        let authority = PinnedAuthority::new(invitation.ca, None);
        let outbox = Arc::new(Outbox::open(folder.path()));
        let client = Hub::new(url.clone(), &authority, Arc::new(SystemClock), outbox).unwrap();
        let key = DeviceKey::open(folder.path()).unwrap();
        let request = EnrolRequest {
            invitation: invitation.id,
            secret: invitation.secret,
            public_key: key.public_pem(),
            name: Some("kiosk".to_owned()),
            facts: slmops_agent::facts::read(1 << 30, 1 << 30, "engine", None),
        };
        let response = client.enrol(&request).await.unwrap();
        let settings = Settings {
            memory_budget_bytes: 2 << 30,
            listen: "127.0.0.1:0".parse().unwrap(),
            metered: MeteredLink::No,
            otlp: None,
        };
        let identity = Identity {
            device: response.device,
            url,
            ca: invitation.ca,
            publisher_keys: response.publisher_keys,
            settings,
        };
        identity.save(state.root()).unwrap();
        let mut device = Self { folder, running: None };
        device.start();
        device
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn state(&self) -> StateFolder {
        StateFolder::at(self.path())
    }

    fn start(&mut self) {
        let identity = Identity::load(self.path()).unwrap().unwrap();
        let agent = Agent {
            state: self.state(),
            identity,
            config: impatient(),
            clock: Arc::new(SystemClock),
        };
        let (stop, stopped) = oneshot::channel();
        let run = agent.run(async {
            let _ = stopped.await;
        });
        let running = tokio::spawn(async move { run.await.unwrap() });
        self.running = Some((stop, running));
    }

    async fn stop(&mut self) {
        if let Some((stop, running)) = self.running.take() {
            stop.send(()).unwrap();
            running.await.unwrap();
        }
    }

    /// The owner says what the link is; counts from the next start.
    fn set_metered(&self, metered: MeteredLink) {
        let mut identity = Identity::load(self.path()).unwrap().unwrap();
        identity.settings.metered = metered;
        identity.save(self.path()).unwrap();
    }

    /// What `slm-agent status` says.
    fn status(&self) -> String {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_slm-agent"));
        let output = command.args(["status", "--state"]).arg(self.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Asks the local endpoint; says the status code.
    async fn ask(&self) -> u16 {
        ask(self.path()).await
    }
}

/// Asks the endpoint of the agent on this folder for one token; 0 where nobody answers.
async fn ask(folder: &Path) -> u16 {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let Ok(endpoint) = std::fs::read_to_string(folder.join("endpoint")) else { return 0 };
    let body = serde_json::json!({ "prompt": "Alice was", "max_tokens": 1 });
    let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build().unwrap();
    let url = format!("{}/v1/completions", endpoint.trim());
    client.post(url).json(&body).send().await.map_or(0, |answer| answer.status().as_u16())
}

/// Waits for a condition, for at most a minute.
async fn until<F: Future<Output = bool>>(what: &str, mut met: impl FnMut() -> F) {
    let wait = async {
        while !met().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
    assert!(waited.is_ok(), "waited a minute until {what}");
}
