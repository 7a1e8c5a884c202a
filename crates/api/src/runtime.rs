//! How a model is run: what was asked for, and what the engine says it does.

use serde::{Deserialize, Serialize};

/// The number format of the key-value cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum KvType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    #[default]
    F16,
    /// 8.5 bits per value. Needs flash attention.
    Q8_0,
}

/// A complete runtime configuration: every value that the engine is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RuntimeConfig {
    /// Tokens of context for each parallel sequence.
    pub context_tokens: u32,
    /// Sequences decoded at the same time.
    pub parallel: u32,
    /// Compute threads; 0 means one for each core the process may use.
    pub threads: u32,
    /// Tokens submitted to the engine in one batch, at most.
    pub batch_tokens: u32,
    /// Number format of the key-value cache.
    pub kv_type: KvType,
    /// Whether fused attention is used.
    pub flash_attention: bool,
    /// Requests that may wait for a free sequence; more are answered 429.
    pub queue_limit: u32,
    /// Seconds without a request after which the model's memory is freed until the next one; 0 means
    /// that it is kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub idle_after_s: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_zero(value: &u32) -> bool {
    *value == 0
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            context_tokens: 2048,
            parallel: 2,
            threads: 0,
            batch_tokens: 512,
            kv_type: KvType::F16,
            flash_attention: true,
            queue_limit: 64,
            idle_after_s: 0,
        }
    }
}

/// The configuration in effect, read back from the loaded engine and never copied from the request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct EffectiveConfig {
    /// Tokens of context for each parallel sequence.
    pub context_tokens: u32,
    /// Sequences decoded at the same time.
    pub parallel: u32,
    /// Compute threads.
    pub threads: u32,
    /// Tokens in one batch, at most.
    pub batch_tokens: u32,
    /// Number format of the key-value cache.
    pub kv_type: KvType,
    /// Whether fused attention is used.
    pub flash_attention: bool,
    /// Requests that may wait.
    pub queue_limit: u32,
    /// Seconds without a request after which the model's memory is freed; 0 means that it is kept.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub idle_after_s: u32,
    /// Engine name and version, such as `llama.cpp b7100 (AVX2 FMA F16C)`.
    pub engine: String,
}

impl EffectiveConfig {
    /// The settings in which `self` differs from what was asked, as `(name, asked, effective)`.
    /// Empty means that the configuration is honoured exactly.
    pub fn differences(&self, asked: &RuntimeConfig) -> Vec<(&'static str, String, String)> {
        let mut found = Vec::new();
        let mut compare = |name, asked: String, effective: String| {
            if asked != effective {
                found.push((name, asked, effective));
            }
        };
        compare(
            "context_tokens",
            asked.context_tokens.to_string(),
            self.context_tokens.to_string(),
        );
        compare("parallel", asked.parallel.to_string(), self.parallel.to_string());
        if asked.threads != 0 {
            compare("threads", asked.threads.to_string(), self.threads.to_string());
        }
        compare("batch_tokens", asked.batch_tokens.to_string(), self.batch_tokens.to_string());
        compare("kv_type", format!("{:?}", asked.kv_type), format!("{:?}", self.kv_type));
        compare(
            "flash_attention",
            asked.flash_attention.to_string(),
            self.flash_attention.to_string(),
        );
        compare("queue_limit", asked.queue_limit.to_string(), self.queue_limit.to_string());
        compare("idle_after_s", asked.idle_after_s.to_string(), self.idle_after_s.to_string());
        found
    }
}
