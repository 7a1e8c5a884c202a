//! A fleet to begin with: devices that have joined, a publisher key and a release, written through
//! the hub's own store before the hub starts.

use std::path::Path;
use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use jiff::{SignedDuration, Timestamp};
use slmops_api::device::{DeviceFacts, InvitationInfo, PublisherKey};
use slmops_api::model::{ModelShape, NewRelease, Variant};
use slmops_api::report::{Estimate, EvaluationReport, MachineFacts, MeasuredWhere};
use slmops_artifact::Digest;
use slmops_artifact::signing::PrivateKey;
use slmops_hub::auth::SecretHash;
use slmops_hub::db::Database;
use slmops_hub::registry;
use slmops_hub::store::{By, Enrolment, NewInvitationRow, SCHEMA, SqlStore, Store};

use super::devices::Device;
use crate::error::{Context as _, Result};

/// The model line of the release.
pub const MODEL: &str = "bench";
/// Its version.
pub const VERSION: &str = "1.0.0";
/// Enrolments under way at the same time; they share the flushes to the disk.
const AT_ONCE: usize = 512;
/// Sites of the fleet.
const SITES: u32 = 50;

/// Makes a fleet of `count` devices in `folder`, where no hub may run.
pub async fn seed(folder: &Path, count: u32) -> Result<Vec<Device>> {
    let what = || "make a fleet".to_owned();
    let path = folder.join("hub");
    let open = move || Database::open(&path, &[SCHEMA, registry::SCHEMA]);
    let db = tokio::task::spawn_blocking(open).await.internal(what)?.internal(what)?;
    let store = Arc::new(SqlStore::new(db));
    let now = Timestamp::now();
    let signer = PrivateKey::generate();
    let key = PublisherKey {
        id: signer.public().id().parse().internal(what)?,
        name: "bench".to_owned(),
        public_key: signer.public().to_pem().to_owned(),
        expires_at: None,
        endorsement: None,
    };
    store.add_release(By::hub(now), release(&key)?).await.internal(what)?;
    store.add_key(By::hub(now), key).await.internal(what)?;
    stream::iter(0..count)
        .map(|number| join(Arc::clone(&store), number, now))
        .buffered(AT_ONCE)
        .try_collect()
        .await
}

async fn join(store: Arc<SqlStore>, number: u32, now: Timestamp) -> Result<Device> {
    let what = || format!("let device {number} join");
    let making = tokio::task::spawn_blocking(PrivateKey::generate);
    let key = making.await.internal(what)?;
    let secret = SecretHash::of(&number.to_string());
    let info = InvitationInfo {
        id: format!("i{number:07}").parse().internal(what)?,
        labels: [("rack".to_owned(), format!("r{}", number % 400))].into(),
        site: Some(format!("site-{}", number % SITES).parse().internal(what)?),
        created_at: now,
        expires_at: now + SignedDuration::from_hours(1),
        used_by: None,
    };
    let invitation = info.id.clone();
    store.add_invitation(By::hub(now), NewInvitationRow { info, secret }).await.internal(what)?;
    let facts = facts(number);
    let enrolment = Enrolment {
        device: format!("d{number:07}").parse().internal(what)?,
        invitation,
        secret,
        public_key: key.public().to_pem().to_owned(),
        name: Some(format!("kiosk-{number:07}")),
        facts: facts.clone(),
        at: now,
    };
    let enrolled = store.enrol(enrolment).await.internal(what)?;
    Ok(Device::new(enrolled.device.id, key, facts))
}

fn facts(number: u32) -> DeviceFacts {
    // Half of them take the smaller variant.
    let budget_mib = if number.is_multiple_of(2) { 260 } else { 600 };
    DeviceFacts {
        hostname: format!("kiosk-{number:07}"),
        arch: "aarch64".to_owned(),
        kernel: "Linux 6.12.25+rpt-rpi-v8".to_owned(),
        cpu: "Cortex-A76".to_owned(),
        cpu_features: ["asimd", "asimddp", "fphp", "aes", "crc32"].map(str::to_owned).to_vec(),
        cores: 4,
        memory_bytes: 4 << 30,
        memory_budget_bytes: budget_mib << 20,
        disk_free_bytes: 20 << 30,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        engine: "llama.cpp (NEON DOTPROD)".to_owned(),
        endpoint: Some("http://127.0.0.1:8480".to_owned()),
        time_zone: None,
        metered: false,
        shares_at: None,
        obeys: vec![],
    }
}

fn release(key: &PublisherKey) -> Result<NewRelease> {
    let what = || "make a release".to_owned();
    let variant = |name: &str, size_mib: u64, kl: f64| -> Result<Variant> {
        let weights = Digest::of(format!("weights {name}").as_bytes());
        Ok(Variant {
            name: name.parse().internal(what)?,
            classes: vec![],
            quantisation: name.to_ascii_uppercase(),
            manifest: Digest::of(format!("manifest {name}").as_bytes()),
            weights,
            size_bytes: size_mib << 20,
            adapter: None,
            repacked_bytes: 0,
            shape: shape(),
            report: report(weights, size_mib << 20, kl),
            gate: None,
        })
    };
    Ok(NewRelease {
        model: MODEL.parse().internal(what)?,
        version: VERSION.parse().internal(what)?,
        original: Digest::of(b"original"),
        key: key.id.clone(),
        variants: vec![variant("q4_k_m", 100, 0.05)?, variant("q8_0", 140, 0.004)?],
        gate_override: None,
        requires: Default::default(),
    })
}

/// The shape of SmolLM2-135M.
fn shape() -> ModelShape {
    ModelShape {
        architecture: "llama".to_owned(),
        parameters: 134_515_008,
        layers: 30,
        embedding: 576,
        feed_forward: 1536,
        heads: 9,
        kv_heads: 3,
        key_width: 64,
        value_width: 64,
        vocabulary: 49152,
        trained_context: 8192,
    }
}

fn report(subject: Digest, size_bytes: u64, kl: f64) -> EvaluationReport {
    let estimate = |mean| Estimate { mean, low: mean, high: mean, samples: 100 };
    EvaluationReport {
        version: 1,
        subject,
        adapter: None,
        reference: Digest::of(b"original"),
        suite: Digest::of(b"suite"),
        size_bytes,
        perplexity: 20.0,
        kl_divergence: estimate(kl),
        kl_p99: kl,
        top1_agreement: estimate(0.9),
        tasks: vec![],
        decode_tokens_per_s: 20.0,
        prompt_tokens_per_s: 100.0,
        time_to_first_token_ms: 500.0,
        peak_memory_bytes: size_bytes,
        machine: MachineFacts {
            cpu: "simulated".to_owned(),
            arch: "simulated".to_owned(),
            cores: 4,
            memory_bytes: 4 << 30,
            kernel: "simulated".to_owned(),
            measured: MeasuredWhere::Modelled,
        },
        engine: "simulated".to_owned(),
        finished_at: Timestamp::UNIX_EPOCH,
        chunk_nll: vec![],
        chunk_kl: vec![],
    }
}
