//! `config.json`: the dimensions of the model and the features that it uses.

use std::path::Path;

use serde::Deserialize;

use super::{
    ARCHITECTURES, ImportError, MAX_CONFIG_BYTES, MAX_LAYERS, MAX_VOCABULARY, inconsistent,
    read_json, unsupported,
};
use crate::gguf::Writer;

/// The greatest dimension that is believed.
const MAX_WIDTH: u32 = 1 << 20;

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    architectures: Vec<String>,
    vocab_size: u32,
    hidden_size: u32,
    intermediate_size: u32,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    head_dim: Option<u32>,
    max_position_embeddings: u32,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    /// Newer files put both of the above here.
    rope_parameters: Option<RawRope>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<serde_json::Value>,
    #[serde(default)]
    bos_token_id: TokenIds,
    #[serde(default)]
    eos_token_id: TokenIds,
    #[serde(default)]
    pad_token_id: TokenIds,
}

#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

/// One id, several, or none.
#[derive(Deserialize, Default, Clone)]
#[serde(untagged)]
pub(super) enum TokenIds {
    One(u32),
    Many(Vec<u32>),
    #[default]
    None,
}

impl TokenIds {
    pub(super) fn first(&self) -> Option<u32> {
        match self {
            Self::One(id) => Some(*id),
            Self::Many(ids) => ids.first().copied(),
            Self::None => None,
        }
    }
}

/// How positions beyond the first training length are reached.
pub(super) enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// Factors for each pair of rotated elements, stored as the tensor `rope_freqs.weight`.
    Factors(Vec<f32>),
}

/// The model's dimensions and features, checked.
pub(super) struct Config {
    pub vocabulary: u32,
    pub embedding: u32,
    pub feed_forward: u32,
    pub layers: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_width: u32,
    pub context: u32,
    pub norm_epsilon: f32,
    pub rope_base: f32,
    pub rope_scaling: RopeScaling,
    /// Whether the output matrix is the embedding's; `None` where the file does not say.
    pub tied: Option<bool>,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub pad: Option<u32>,
}

impl Config {
    pub(super) fn read(folder: &Path) -> Result<Self, ImportError> {
        // The architecture first: other architectures lack the fields below.
        #[derive(Deserialize)]
        struct Kind {
            #[serde(default)]
            architectures: Vec<String>,
            model_type: Option<String>,
        }
        let path = folder.join("config.json");
        let kind: Kind = read_json(&path, MAX_CONFIG_BYTES)?;
        let architecture = kind.architectures.first().or(kind.model_type.as_ref());
        let architecture = architecture.map_or("none", String::as_str);
        if !ARCHITECTURES.contains(&architecture) {
            return Err(unsupported("architecture", architecture, ARCHITECTURES.join(", ")));
        }
        Self::check(read_json(&path, MAX_CONFIG_BYTES)?)
    }

    fn check(raw: RawConfig) -> Result<Self, ImportError> {
        debug_assert!(!raw.architectures.is_empty(), "`read` has checked the architecture");
        let act = raw.hidden_act.as_deref().unwrap_or("silu");
        if act != "silu" {
            return Err(unsupported("activation", act, "silu"));
        }
        if raw.quantization_config.as_ref().is_some_and(|value| !value.is_null()) {
            return Err(unsupported("quantization_config", "present", "F32, F16 or BF16 weights"));
        }
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let partial = rope.and_then(|rope| rope.partial_rotary_factor);
        if let Some(factor) = partial.or(raw.partial_rotary_factor).filter(|&factor| factor != 1.0)
        {
            return Err(unsupported("partial_rotary_factor", &factor.to_string(), "1"));
        }
        let within = |what: &str, value: u32, limit: u32| match value {
            0 => Err(inconsistent("config.json", format!("{what} is 0"))),
            _ if value > limit => Err(inconsistent(
                "config.json",
                format!("{what} is {value}, at most {limit} is accepted"),
            )),
            _ => Ok(value),
        };
        let embedding = within("hidden_size", raw.hidden_size, MAX_WIDTH)?;
        let heads = within("num_attention_heads", raw.num_attention_heads, MAX_WIDTH)?;
        let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        let kv_heads = within("num_key_value_heads", kv_heads, heads)?;
        let head_width = raw.head_dim.unwrap_or(embedding / heads);
        let head_width = within("head_dim", head_width, MAX_WIDTH / heads)?;
        if head_width % 2 != 0 || heads % kv_heads != 0 {
            let reason = "head_dim is odd, or the heads are no multiple of the key-value heads";
            return Err(inconsistent("config.json", reason));
        }
        let base = raw.rope_theta.or(rope.and_then(|rope| rope.rope_theta)).unwrap_or(10_000.0);
        let positive = |what: &str, value: f64| {
            let usable = value.is_finite() && value > 0.0;
            let reason = || inconsistent("config.json", format!("{what} is {value}"));
            usable.then_some(value).ok_or_else(reason)
        };
        let base = positive("rope_theta", base)?;
        Ok(Self {
            vocabulary: within("vocab_size", raw.vocab_size, MAX_VOCABULARY)?,
            embedding,
            feed_forward: within("intermediate_size", raw.intermediate_size, MAX_WIDTH)?,
            layers: within("num_hidden_layers", raw.num_hidden_layers, MAX_LAYERS)?,
            heads,
            kv_heads,
            head_width,
            context: within(
                "max_position_embeddings",
                raw.max_position_embeddings,
                i32::MAX as u32,
            )?,
            norm_epsilon: positive("rms_norm_eps", raw.rms_norm_eps)? as f32,
            rope_base: base as f32,
            rope_scaling: rope_scaling(rope, base, head_width)?,
            tied: raw.tie_word_embeddings,
            bos: raw.bos_token_id.first(),
            eos: raw.eos_token_id.first(),
            pad: raw.pad_token_id.first(),
        })
    }

    /// Sets the metadata that describes the dimensions.
    pub(super) fn describe(&self, writer: &mut Writer) {
        writer
            .set("llama.context_length", self.context)
            .set("llama.embedding_length", self.embedding)
            .set("llama.block_count", self.layers)
            .set("llama.feed_forward_length", self.feed_forward)
            .set("llama.attention.head_count", self.heads)
            .set("llama.attention.head_count_kv", self.kv_heads)
            .set("llama.rope.dimension_count", self.head_width)
            .set("llama.rope.freq_base", self.rope_base)
            .set("llama.attention.layer_norm_rms_epsilon", self.norm_epsilon)
            .set("llama.vocab_size", self.vocabulary);
        if self.head_width.checked_mul(self.heads) != Some(self.embedding) {
            writer
                .set("llama.attention.key_length", self.head_width)
                .set("llama.attention.value_length", self.head_width);
        }
        if let RopeScaling::Linear { factor } = self.rope_scaling {
            writer
                .set("llama.rope.scaling.type", "linear")
                .set("llama.rope.scaling.factor", factor as f32);
        }
    }
}

fn rope_scaling(
    rope: Option<&RawRope>,
    base: f64,
    head_width: u32,
) -> Result<RopeScaling, ImportError> {
    let Some(rope) = rope else { return Ok(RopeScaling::None) };
    let field = |what: &str, value: Option<f64>| {
        value.filter(|value| value.is_finite() && *value > 0.0).ok_or_else(|| {
            inconsistent("config.json", format!("rope scaling has no usable {what}"))
        })
    };
    match rope.rope_type.as_deref().unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: field("factor", rope.factor)? }),
        "llama3" => {
            let factor = field("factor", rope.factor)?;
            let low = field("low_freq_factor", rope.low_freq_factor)?;
            let high = field("high_freq_factor", rope.high_freq_factor)?;
            let trained = rope.original_max_position_embeddings;
            let trained = field("original_max_position_embeddings", trained)?;
            if low >= high {
                let reason = "low_freq_factor is not below high_freq_factor";
                return Err(inconsistent("config.json", reason));
            }
            // Llama 3.1's scaling: short waves stay, long ones are stretched by `factor`, those
            // between are blended.
            let factors = (0..head_width / 2).map(|pair| {
                let frequency = base.powf(-2.0 * f64::from(pair) / f64::from(head_width));
                let wave = 2.0 * std::f64::consts::PI / frequency;
                let scaled = if wave < trained / high {
                    1.0
                } else if wave > trained / low {
                    factor
                } else {
                    let blend = (trained / wave - low) / (high - low);
                    1.0 / ((1.0 - blend) / factor + blend)
                };
                scaled as f32
            });
            Ok(RopeScaling::Factors(factors.collect()))
        }
        other => Err(unsupported("rope scaling", other, "default, linear, llama3")),
    }
}
