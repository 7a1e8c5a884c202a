//! Which variant fits a device: predicted memory against the owner's budget.
//!
//! The prediction is the resident memory of the worker process: the model file (read, not mapped,
//! so that no tensor is held twice), the key-value cache, the engine's compute buffers, and what the
//! process itself takes. It is an upper bound for a full context and otherwise within some percent.

use slmops_api::VariantName;
use slmops_api::device::DeviceFacts;
use slmops_api::model::{ADAPTERS, ModelShape, NewRelease, Variant};
use slmops_api::runtime::{KvType, RuntimeConfig};
use slmops_api::selector::{engine_version, version_numbers};
use slmops_artifact::Digest;

use crate::words::bytes;

/// What measurements say about the parts that no formula gives exactly: fitted to the worker's peak
/// memory with SmolLM2-135M in six quantisations, contexts of 512 to 8192 tokens, 1 to 4 sequences,
/// batches of 128 to 1024 tokens and all cache types (`docs/measurements.md`), llama.cpp 0.1.161's
/// CPU backend.
pub mod calibration {
    /// Resident bytes of a worker process without a model: code, allocator, threads.
    pub const PROCESS_OVERHEAD_BYTES: u64 = 13_300_000;
    /// Intermediate activations that are alive at the same time, as multiples of
    /// `batch_tokens * (embedding + feed_forward)` floats.
    pub const ACTIVATION_COPIES: f64 = 3.6;
    /// Bytes of the attention mask and its copies for each token of a batch and of the context.
    pub const MASK_BYTES: f64 = 2.5;
    /// Copies of one layer's attention scores that are alive without fused attention.
    pub const SCORE_COPIES: f64 = 1.35;
    /// Rows of logits for each parallel sequence: the engine's output, and what sampling copies.
    pub const LOGIT_ROWS_PER_SEQUENCE: f64 = 3.5;
    /// Rows of logits that a worker keeps beside those, to score given texts.
    pub const SHARED_LOGIT_ROWS: f64 = 12.0;
    /// Bytes for each vocabulary entry: token text, merges, scores and the lookup tables over them.
    pub const VOCABULARY_ENTRY_BYTES: u64 = 323;
    /// The engine allots context for each sequence in steps of this many tokens.
    pub const CONTEXT_STEP_TOKENS: f64 = 256.0;
}

/// Bytes of a float32.
const F32_BYTES: f64 = 4.0;

/// A prediction of resident memory, part by part, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// The model file and the tensors held a second time.
    pub weights_bytes: u64,
    /// The key-value cache at the full context of every sequence.
    pub kv_cache_bytes: u64,
    /// Compute buffers and logits.
    pub compute_bytes: u64,
    /// The process itself and the vocabulary.
    pub overhead_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
}

impl Prediction {
    /// The parts in words: `101 MB weights + 94 MB cache + 20 MB buffers + 28 MB process`.
    pub fn parts(&self) -> String {
        format!(
            "{} weights + {} key-value cache + {} buffers + {} process",
            bytes(self.weights_bytes),
            bytes(self.kv_cache_bytes),
            bytes(self.compute_bytes),
            bytes(self.overhead_bytes)
        )
    }
}

/// Predicts the resident memory of a worker that runs a model with this shape.
///
/// Key-value cache: `layers * kv_heads * (key_width + value_width) * context * parallel` values;
/// Q8_0 takes 34 bytes for 32 values (GGML block layout). `repacked_bytes` are tensors that an
/// engine holds a second time; ours holds none.
pub fn predict(
    shape: &ModelShape,
    size_bytes: u64,
    repacked_bytes: u64,
    runtime: &RuntimeConfig,
) -> Prediction {
    let bytes_per_value = match runtime.kv_type {
        KvType::F32 => 4.0,
        KvType::F16 => 2.0,
        KvType::Q8_0 => 34.0 / 32.0,
    };
    let values_per_token = f64::from(shape.layers)
        * f64::from(shape.kv_heads)
        * (f64::from(shape.key_width) + f64::from(shape.value_width));
    let context = (f64::from(runtime.context_tokens) / calibration::CONTEXT_STEP_TOKENS).ceil()
        * calibration::CONTEXT_STEP_TOKENS;
    let kv_cache = values_per_token * context * f64::from(runtime.parallel) * bytes_per_value;

    let batch = f64::from(runtime.batch_tokens);
    let width = f64::from(shape.embedding) + f64::from(shape.feed_forward);
    let activations = batch * width * F32_BYTES * calibration::ACTIVATION_COPIES;
    let mask = batch * context * calibration::MASK_BYTES;
    let rows = calibration::SHARED_LOGIT_ROWS
        + f64::from(runtime.parallel) * calibration::LOGIT_ROWS_PER_SEQUENCE;
    let logits = f64::from(shape.vocabulary) * F32_BYTES * rows;
    // Without fused attention, one layer's scores of a whole batch exist at once.
    let scores = match runtime.flash_attention {
        true => 0.0,
        false => f64::from(shape.heads) * batch * context * F32_BYTES * calibration::SCORE_COPIES,
    };

    let weights_bytes = size_bytes.saturating_add(repacked_bytes);
    let kv_cache_bytes = kv_cache as u64;
    let compute_bytes = (activations + mask + logits + scores) as u64;
    let overhead_bytes = calibration::PROCESS_OVERHEAD_BYTES
        + u64::from(shape.vocabulary) * calibration::VOCABULARY_ENTRY_BYTES;
    let total_bytes = weights_bytes
        .saturating_add(kv_cache_bytes)
        .saturating_add(compute_bytes)
        .saturating_add(overhead_bytes);
    Prediction { weights_bytes, kv_cache_bytes, compute_bytes, overhead_bytes, total_bytes }
}

/// What [`choose`] found.
#[derive(Clone, Debug, PartialEq)]
pub enum Fit {
    /// The best variant whose prediction is within the budget.
    Fits {
        /// Its place in the list.
        index: usize,
        /// Its name.
        variant: VariantName,
        /// Its manifest.
        manifest: Digest,
        /// Its predicted memory.
        prediction: Prediction,
        /// Why this one, in words.
        why: String,
    },
    /// None does.
    NoFit {
        /// The smallest prediction in bytes.
        smallest_bytes: u64,
        /// What the device offers in bytes.
        budget_bytes: u64,
        /// Why, in words.
        why: String,
    },
}

impl Fit {
    /// Why, in words.
    pub fn why(&self) -> &str {
        match self {
            Self::Fits { why, .. } | Self::NoFit { why, .. } => why,
        }
    }
}

/// `no variant fits: smallest needs 141 MB, device offers 96 MB`.
pub fn no_fit(smallest_bytes: u64, budget_bytes: u64) -> String {
    format!(
        "no variant fits: smallest needs {}, device offers {}",
        bytes(smallest_bytes),
        bytes(budget_bytes)
    )
}

/// What a release requires and a device does not have, in words.
pub fn unmet(release: &NewRelease, facts: &DeviceFacts) -> Option<String> {
    let requires = &release.requires;
    if release.variants.iter().any(|variant| variant.adapter.is_some())
        && !facts.obeys.iter().any(|known| known == ADAPTERS)
    {
        return Some("it has an adapter, which this device's agent does not apply".to_owned());
    }
    let least = |what: &str, least: &Option<String>, has: &str, version: Option<Vec<u64>>| {
        let least = least.as_ref()?;
        let good = version.is_some_and(|version| Some(version) >= version_numbers(least));
        (!good).then(|| format!("it needs {what} {least} or later, and this device has {has}"))
    };
    least("the engine", &requires.engine, &facts.engine, engine_version(&facts.engine)).or_else(
        || {
            let version = version_numbers(&facts.agent_version);
            least("agent", &requires.agent, &facts.agent_version, version)
        },
    )
}

/// The variant of the best quality (lowest KL divergence from the reference; then the smaller one)
/// whose predicted memory is within `budget_bytes`, by its place in the list.
///
/// # Errors
/// The smallest prediction in bytes when none is.
pub fn best(
    variants: &[Variant],
    budget_bytes: u64,
    runtime: &RuntimeConfig,
) -> Result<(usize, Prediction), u64> {
    let mut best: Option<(usize, Prediction)> = None;
    let mut smallest_bytes = u64::MAX;
    for (index, variant) in variants.iter().enumerate() {
        let prediction = predict_variant(variant, runtime);
        smallest_bytes = smallest_bytes.min(prediction.total_bytes);
        let better = |other: usize| better(variant, &variants[other]);
        if prediction.total_bytes <= budget_bytes
            && best.as_ref().is_none_or(|(other, _)| better(*other))
        {
            best = Some((index, prediction));
        }
    }
    best.ok_or(if variants.is_empty() { 0 } else { smallest_bytes })
}

/// [`best`], with the reasons in words.
pub fn choose(variants: &[Variant], budget_bytes: u64, runtime: &RuntimeConfig) -> Fit {
    let (index, prediction) = match best(variants, budget_bytes, runtime) {
        Ok(found) => found,
        Err(smallest_bytes) => {
            let why = match variants.is_empty() {
                true => "no variant fits: the release has none".to_owned(),
                false => no_fit(smallest_bytes, budget_bytes),
            };
            return Fit::NoFit { smallest_bytes, budget_bytes, why };
        }
    };
    let chosen = &variants[index];
    let better_but_larger: Vec<String> = variants
        .iter()
        .filter(|variant| better(variant, chosen))
        .map(|variant| {
            let needs = predict_variant(variant, runtime).total_bytes;
            format!("{} needs {}", variant.name, bytes(needs))
        })
        .collect();
    let why = format!(
        "{} needs {} of {} ({}){}",
        chosen.name,
        bytes(prediction.total_bytes),
        bytes(budget_bytes),
        prediction.parts(),
        match better_but_larger.is_empty() {
            true => ", and none is closer to the reference".to_owned(),
            false => format!(
                "; closer to the reference, but too large: {}",
                better_but_larger.join(", ")
            ),
        }
    );
    Fit::Fits { index, variant: chosen.name.clone(), manifest: chosen.manifest, prediction, why }
}

/// The fit of every variant in words, best quality first, one line each.
pub fn explain(variants: &[Variant], budget_bytes: u64, runtime: &RuntimeConfig) -> Vec<String> {
    let chosen = match choose(variants, budget_bytes, runtime) {
        Fit::Fits { index, .. } => Some(index),
        Fit::NoFit { .. } => None,
    };
    let mut order: Vec<usize> = (0..variants.len()).collect();
    order.sort_by(|a, b| quality(&variants[*a]).total_cmp(&quality(&variants[*b])));
    let mut lines: Vec<String> = order
        .into_iter()
        .map(|index| {
            let variant = &variants[index];
            let prediction = predict_variant(variant, runtime);
            let verdict = if Some(index) == chosen {
                "chosen"
            } else if prediction.total_bytes <= budget_bytes {
                "fits, but another is closer to the reference"
            } else {
                "too large"
            };
            format!(
                "{}: needs {} of {} ({}); KL divergence {:.4} nats: {verdict}",
                variant.name,
                bytes(prediction.total_bytes),
                bytes(budget_bytes),
                prediction.parts(),
                quality(variant),
            )
        })
        .collect();
    if let Fit::NoFit { why, .. } = choose(variants, budget_bytes, runtime) {
        lines.push(why);
    }
    lines
}

/// [`predict`] for a variant of a release.
pub fn predict_variant(variant: &Variant, runtime: &RuntimeConfig) -> Prediction {
    let adapter_bytes = variant.adapter.map_or(0, |adapter| adapter.size_bytes);
    let size_bytes = variant.size_bytes.saturating_add(adapter_bytes);
    predict(&variant.shape, size_bytes, variant.repacked_bytes, runtime)
}

fn quality(variant: &Variant) -> f64 {
    variant.report.kl_divergence.mean
}

fn better(variant: &Variant, other: &Variant) -> bool {
    let ours = (quality(variant), variant.size_bytes, &variant.name);
    let theirs = (quality(other), other.size_bytes, &other.name);
    ours.0.total_cmp(&theirs.0).then(ours.1.cmp(&theirs.1)).then(ours.2.cmp(theirs.2)).is_lt()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing;

    fn check(budget_mib: u64, expected: &str) {
        let release = testing::release("m", "1.0.0");
        let runtime = testing::small_runtime();
        let fit = choose(&release.variants, budget_mib << 20, &runtime);
        let found = match &fit {
            Fit::Fits { variant, .. } => variant.as_str().to_owned(),
            Fit::NoFit { .. } => "none".to_owned(),
        };
        assert_eq!(found, expected, "{}", fit.why());
    }

    #[test]
    fn best_quality_that_fits() {
        check(1000, "q8_0");
        check(450, "q8_0");
        check(290, "q4_k_m");
        check(140, "q2_k");
        check(10, "none");
    }

    #[test]
    fn no_fit_names_both_numbers() {
        assert_eq!(
            no_fit(141_000_000, 96_000_000),
            "no variant fits: smallest needs 141 MB, device offers 96 MB"
        );
    }

    #[test]
    fn cache_of_smollm2() {
        // 30 layers * 3 heads * (64 + 64) * 2048 tokens * 2 sequences * 2 bytes.
        let shape = testing::shape();
        let prediction = predict(&shape, 0, 0, &RuntimeConfig::default());
        assert_eq!(prediction.kv_cache_bytes, 94_371_840);
    }

    /// `(file bytes, context, parallel, batch, cache, fused attention)` and the worker's measured
    /// peak in bytes, x86-64, SmolLM2-135M.
    const MEASURED: &[(u64, u32, u32, u32, KvType, bool, u64)] = &[
        (144_811_072, 2048, 2, 512, KvType::F16, true, 287_207_424),
        (105_454_144, 2048, 2, 512, KvType::F16, true, 248_524_800),
        (93_510_208, 2048, 2, 512, KvType::F16, true, 236_355_584),
        (91_726_912, 2048, 2, 512, KvType::F16, true, 231_989_248),
        (92_058_688, 2048, 2, 512, KvType::F16, true, 232_554_496),
        (88_201_792, 2048, 2, 512, KvType::F16, true, 228_945_920),
        (105_454_144, 512, 1, 512, KvType::F16, true, 165_195_776),
        (105_454_144, 512, 2, 512, KvType::F16, true, 175_521_792),
        (105_454_144, 512, 4, 512, KvType::F16, true, 199_516_160),
        (105_454_144, 2048, 1, 512, KvType::F16, true, 200_282_112),
        (105_454_144, 2048, 4, 512, KvType::F16, true, 344_289_280),
        (105_454_144, 8192, 1, 512, KvType::F16, true, 351_641_600),
        (105_454_144, 8192, 4, 512, KvType::F16, true, 908_357_632),
        (105_454_144, 2048, 1, 512, KvType::Q8_0, true, 176_914_432),
        (105_454_144, 2048, 2, 512, KvType::F32, true, 340_688_896),
        (105_454_144, 2048, 2, 128, KvType::F16, true, 235_106_304),
        (105_454_144, 2048, 2, 1024, KvType::F16, true, 262_184_960),
        (105_454_144, 2048, 1, 512, KvType::F16, false, 250_888_192),
    ];

    #[test]
    fn predictions_are_near_what_was_measured() {
        for &(size, context_tokens, parallel, batch_tokens, kv_type, flash_attention, measured) in
            MEASURED
        {
            let runtime = RuntimeConfig {
                context_tokens,
                parallel,
                batch_tokens,
                kv_type,
                flash_attention,
                ..RuntimeConfig::default()
            };
            let predicted = predict(&testing::shape(), size, 0, &runtime).total_bytes;
            let error = predicted as f64 / measured as f64 - 1.0;
            println!("{context_tokens}x{parallel} {error:+.3}");
            assert!(error.abs() < 0.05, "{runtime:?}: {predicted} for {measured}, {error:+.3}");
        }
    }

    #[test]
    fn a_tiny_model_is_mostly_its_process() {
        // GlassLM, F32, 128 tokens, 2 sequences, batch 128: measured 19 095 552.
        let shape = ModelShape {
            parameters: 852_608,
            layers: 4,
            embedding: 128,
            feed_forward: 352,
            heads: 4,
            kv_heads: 2,
            key_width: 32,
            value_width: 32,
            vocabulary: 1024,
            trained_context: 128,
            ..testing::shape()
        };
        let runtime = RuntimeConfig {
            context_tokens: 128,
            parallel: 2,
            batch_tokens: 128,
            ..RuntimeConfig::default()
        };
        let predicted = predict(&shape, 3_502_336, 0, &runtime).total_bytes as f64;
        assert!((predicted / 19_095_552.0 - 1.0).abs() < 0.05, "{predicted}");
    }

    #[test]
    fn hostile_dimensions_do_not_overflow() {
        let mut shape = testing::shape();
        shape.layers = u32::MAX;
        shape.kv_heads = u32::MAX;
        shape.key_width = u32::MAX;
        shape.vocabulary = u32::MAX;
        let runtime = RuntimeConfig {
            context_tokens: u32::MAX,
            parallel: u32::MAX,
            batch_tokens: u32::MAX,
            flash_attention: false,
            ..RuntimeConfig::default()
        };
        let prediction = predict(&shape, u64::MAX, u64::MAX, &runtime);
        assert_eq!(prediction.total_bytes, u64::MAX);
    }

    proptest! {
        #[test]
        fn choice_is_within_budget(budget_mib in 0_u64..600, parallel in 1_u32..8) {
            let release = testing::release("m", "1.0.0");
            let runtime = RuntimeConfig { parallel, ..RuntimeConfig::default() };
            let budget = budget_mib << 20;
            match choose(&release.variants, budget, &runtime) {
                Fit::Fits { prediction, .. } => prop_assert!(prediction.total_bytes <= budget),
                Fit::NoFit { smallest_bytes, .. } => prop_assert!(smallest_bytes > budget),
            }
        }
    }
}
