//! Devices, classes and releases for tests.

use slmops_api::device::DeviceFacts;
use slmops_api::model::{DeviceClass, ModelShape, NewRelease, Variant};
use slmops_api::report::{Estimate, EvaluationReport, MachineFacts, MeasuredWhere};
use slmops_api::rules::DeviceRules;
use slmops_api::runtime::RuntimeConfig;
use slmops_artifact::Digest;

pub fn class(name: &str, min_mib: u64) -> DeviceClass {
    DeviceClass {
        name: name.parse().unwrap(),
        description: String::new(),
        min_memory_bytes: min_mib << 20,
        quantisation: "Q4_K_M".to_owned(),
    }
}

pub fn facts(budget_mib: u64) -> DeviceFacts {
    DeviceFacts {
        hostname: "host".to_owned(),
        arch: "x86_64".to_owned(),
        kernel: "Linux 6.1".to_owned(),
        cpu: "test".to_owned(),
        cpu_features: vec![],
        cores: 2,
        memory_bytes: 8 << 30,
        memory_budget_bytes: budget_mib << 20,
        disk_free_bytes: 8 << 30,
        agent_version: "0.1.0".to_owned(),
        engine: "test".to_owned(),
        endpoint: None,
        time_zone: None,
        metered: false,
        shares_at: None,
        obeys: DeviceRules::ALL.map(str::to_owned).to_vec(),
    }
}

/// The shape of SmolLM2-135M.
pub fn shape() -> ModelShape {
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

pub fn small_runtime() -> RuntimeConfig {
    RuntimeConfig { context_tokens: 256, parallel: 1, batch_tokens: 64, ..RuntimeConfig::default() }
}

pub fn report(subject: Digest, kl: f64) -> EvaluationReport {
    let estimate = |mean| Estimate { mean, low: mean, high: mean, samples: 10 };
    EvaluationReport {
        version: 1,
        subject,
        adapter: None,
        reference: Digest::of(b"reference"),
        suite: Digest::of(b"suite"),
        size_bytes: 1,
        perplexity: 20.0,
        kl_divergence: estimate(kl),
        kl_p99: kl,
        top1_agreement: estimate(0.9),
        tasks: vec![],
        decode_tokens_per_s: 10.0,
        prompt_tokens_per_s: 10.0,
        time_to_first_token_ms: 10.0,
        peak_memory_bytes: 1,
        machine: MachineFacts {
            cpu: "test".to_owned(),
            arch: "x86_64".to_owned(),
            cores: 1,
            memory_bytes: 1,
            kernel: "test".to_owned(),
            measured: MeasuredWhere::Real,
        },
        engine: "test".to_owned(),
        finished_at: jiff::Timestamp::UNIX_EPOCH,
        chunk_nll: vec![],
        chunk_kl: vec![],
    }
}

pub fn variant(model: &str, version: &str, name: &str, size_mib: u64, kl: f64) -> Variant {
    let weights = Digest::of(format!("{model} {version} {name}").as_bytes());
    Variant {
        name: name.parse().unwrap(),
        classes: vec![],
        quantisation: name.to_ascii_uppercase(),
        manifest: Digest::of(format!("manifest {model} {version} {name}").as_bytes()),
        weights,
        size_bytes: size_mib << 20,
        adapter: None,
        repacked_bytes: 0,
        shape: shape(),
        report: report(weights, kl),
        gate: None,
    }
}

pub fn release(model: &str, version: &str) -> NewRelease {
    NewRelease {
        model: model.parse().unwrap(),
        version: version.parse().unwrap(),
        original: Digest::of(b"reference"),
        key: "0123456789abcdef".parse().unwrap(),
        variants: vec![
            variant(model, version, "q2_k", 40, 0.5),
            variant(model, version, "q8_0", 300, 0.001),
            variant(model, version, "q4_k_m", 150, 0.05),
        ],
        gate_override: None,
        requires: Default::default(),
    }
}
