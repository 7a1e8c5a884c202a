//! The dimensions of a model that decide its memory at run time.

use serde::{Deserialize, Serialize};

/// The dimensions of a transformer that decide its memory at run time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ModelShape {
    /// GGUF architecture, such as `llama`.
    pub architecture: String,
    /// Number of parameters.
    pub parameters: u64,
    /// Transformer blocks.
    pub layers: u32,
    /// Width of the residual stream.
    pub embedding: u32,
    /// Width of the feed-forward layer.
    pub feed_forward: u32,
    /// Attention heads.
    pub heads: u32,
    /// Key-value heads.
    pub kv_heads: u32,
    /// Width of one head's keys.
    pub key_width: u32,
    /// Width of one head's values.
    pub value_width: u32,
    /// Vocabulary size in tokens.
    pub vocabulary: u32,
    /// Longest context trained for, in tokens.
    pub trained_context: u32,
}
