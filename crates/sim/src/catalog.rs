//! The releases of a simulation, and how each does on each device.

use std::collections::HashMap;
use std::sync::Arc;

use slmops_agent_core::{Blob, Package};
use slmops_api::delta::{Delta, MAX_CHAIN};
use slmops_api::model::{Adapter, ModelShape, NewRelease, Variant};
use slmops_api::report::{Estimate, EvaluationReport, MachineFacts, MeasuredWhere};
use slmops_artifact::Digest;
use slmops_fleet_core::world::Releases;

use crate::spec::{Ailment, BEFORE, FleetSpec, Health, VariantSpec};
use crate::traffic::Change;

/// The size of a package's probes in bytes.
const PROBES_BYTES: u64 = 20_000;

/// A manifest that devices may meet.
#[derive(Clone, Copy)]
pub(crate) struct Known {
    /// Which release: 0 is the one that is there before, `n` is rollout `n - 1`.
    pub release: usize,
    /// Its files.
    pub package: Package,
    health: Health,
}

/// Every release.
pub(crate) struct Catalog {
    pub releases: Releases,
    pub versions: Vec<semver::Version>,
    known: HashMap<Digest, Known>,
    /// By the manifest that it ends at: the delta from the release before.
    deltas: HashMap<Digest, (Digest, Delta)>,
    seed: u64,
}

impl Catalog {
    pub(crate) fn new(spec: &FleetSpec) -> Self {
        let mut catalog = Self {
            releases: Releases::new(),
            versions: Vec::new(),
            known: HashMap::new(),
            deltas: HashMap::new(),
            seed: spec.seed,
        };
        catalog.add(spec, BEFORE, Health::Good);
        for rollout in &spec.rollouts {
            catalog.add(spec, rollout.version.clone(), rollout.health);
        }
        catalog
    }

    fn add(&mut self, spec: &FleetSpec, version: semver::Version, health: Health) {
        let digest =
            |what: &str, name: &str| Digest::of(format!("{what} {version} {name}").as_bytes());
        let mut variants = Vec::new();
        for variant in &spec.variants {
            let manifest = digest("manifest", variant.name.as_str());
            // An adapter stands on the weights of the first release.
            let adapter_bytes = variant.adapter_bytes.filter(|_| !self.versions.is_empty());
            let weights = match adapter_bytes {
                Some(_) => Digest::of(format!("weights {BEFORE} {}", variant.name).as_bytes()),
                None => digest("weights", variant.name.as_str()),
            };
            let adapter = adapter_bytes.map(|size_bytes| Blob {
                digest: digest("adapter", variant.name.as_str()),
                size_bytes,
            });
            let package = Package {
                manifest,
                weights: Blob { digest: weights, size_bytes: variant.size_bytes },
                probes: Blob { digest: digest("probes", ""), size_bytes: PROBES_BYTES },
                adapter,
            };
            let before = self.versions.last().map(|before| {
                let digest =
                    |what: &str| Digest::of(format!("{what} {before} {}", variant.name).as_bytes());
                (digest("manifest"), digest("weights"))
            });
            if let (Some((before, from)), Some(bytes)) = (before, variant.delta_bytes) {
                let delta = Delta {
                    from,
                    to: weights,
                    to_bytes: variant.size_bytes,
                    blob: digest("delta", variant.name.as_str()),
                    bytes,
                    header_bytes: 1,
                };
                self.deltas.insert(manifest, (before, delta));
            }
            self.known.insert(manifest, Known { release: self.versions.len(), package, health });
            variants.push(Variant {
                name: variant.name.clone(),
                classes: vec![],
                quantisation: variant.name.as_str().to_ascii_uppercase(),
                manifest,
                weights,
                size_bytes: variant.size_bytes,
                adapter: adapter
                    .map(|blob| Adapter { digest: blob.digest, size_bytes: blob.size_bytes }),
                repacked_bytes: 0,
                shape: variant.shape.clone().unwrap_or_else(smollm2),
                report: report(weights, variant),
                gate: None,
            });
        }
        let release = NewRelease {
            model: spec.model.clone(),
            version: version.clone(),
            original: Digest::of(b"original"),
            key: "0123456789abcdef".parse().expect("a constant id is an id"),
            variants,
            gate_override: None,
            requires: Default::default(),
        };
        self.releases.insert((spec.model.clone(), version.clone()), Arc::new(release));
        self.versions.push(version);
    }

    /// What is known of a manifest.
    pub(crate) fn known(&self, manifest: &Digest) -> &Known {
        self.known.get(manifest).expect("devices are told of registered releases alone")
    }

    /// The deltas that end at a manifest's weights, by themselves or one after the other.
    pub(crate) fn deltas(&self, manifest: &Digest) -> Vec<Delta> {
        let mut at = *manifest;
        let chain = std::iter::from_fn(|| {
            let (before, delta) = self.deltas.get(&at)?;
            at = *before;
            Some(delta.clone())
        });
        chain.take(MAX_CHAIN).collect()
    }

    /// What is wrong with this manifest on this device, if something is.
    pub(crate) fn ailment(&self, manifest: &Digest, device: u32) -> Option<Ailment> {
        let known = self.known(manifest);
        let Health::Bad { ailment, share } = known.health else { return None };
        // The source is the same for every device.
        let everywhere = matches!(ailment, Ailment::BadSignature | Ailment::WrongBytes);
        let dice = mix(self.seed ^ (u64::from(device) << 20) ^ known.release as u64);
        let hit = (dice >> 11) as f64 / (1_u64 << 53) as f64;
        (everywhere || hit < share).then_some(ailment)
    }

    /// What this release changes in use.
    pub(crate) fn change(&self, manifest: &Digest) -> Option<Change> {
        match self.known(manifest).health {
            Health::WorseInUse { metric, factor } => Some((metric, factor)),
            Health::Good | Health::Bad { .. } => None,
        }
    }

    /// Whether this release must not get past its first wave: no device can confirm it.
    pub(crate) fn is_bad_everywhere(&self, manifest: &Digest) -> bool {
        match self.known(manifest).health {
            Health::Good | Health::WorseInUse { .. } => false,
            Health::Bad { ailment, share } => {
                let everywhere = matches!(ailment, Ailment::BadSignature | Ailment::WrongBytes);
                ailment.shows_before_confirmation() && (share >= 1.0 || everywhere)
            }
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): one number made from another, evenly.
pub(crate) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The shape of SmolLM2-135M.
fn smollm2() -> ModelShape {
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

fn report(subject: Digest, variant: &VariantSpec) -> EvaluationReport {
    let estimate = |mean| Estimate { mean, low: mean, high: mean, samples: 100 };
    EvaluationReport {
        version: 1,
        subject,
        adapter: None,
        reference: Digest::of(b"original"),
        suite: Digest::of(b"suite"),
        size_bytes: variant.size_bytes,
        perplexity: 20.0,
        kl_divergence: estimate(variant.kl_divergence),
        kl_p99: variant.kl_divergence,
        top1_agreement: estimate(0.9),
        tasks: vec![],
        decode_tokens_per_s: 20.0,
        prompt_tokens_per_s: 100.0,
        time_to_first_token_ms: 500.0,
        peak_memory_bytes: variant.size_bytes,
        machine: MachineFacts {
            cpu: "simulated".to_owned(),
            arch: "simulated".to_owned(),
            cores: 4,
            memory_bytes: 1 << 30,
            kernel: "simulated".to_owned(),
            measured: MeasuredWhere::Modelled,
        },
        engine: "simulated".to_owned(),
        finished_at: jiff::Timestamp::UNIX_EPOCH,
        chunk_nll: vec![],
        chunk_kl: vec![],
    }
}
