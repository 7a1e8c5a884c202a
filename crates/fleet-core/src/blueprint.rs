//! Desired configuration in layers, fleet < class < site < device, with the origin of every value.

use std::fmt::Display;

use slmops_api::ModelName;
use slmops_api::blueprint::{Blueprint, ExplainedValue, Layer};
use slmops_api::runtime::{KvType, RuntimeConfig};

/// The largest blueprint text, in bytes.
pub const MAX_BLUEPRINT_BYTES: usize = 64 << 10;
/// Bounds of `runtime.context_tokens`.
pub const CONTEXT_TOKENS: (u32, u32) = (16, 131_072);
/// Bounds of `runtime.parallel`.
pub const PARALLEL: (u32, u32) = (1, 64);
/// Bounds of `runtime.threads`; 0 means every core.
pub const THREADS: (u32, u32) = (0, 256);
/// Bounds of `runtime.batch_tokens`.
pub const BATCH_TOKENS: (u32, u32) = (1, 8192);
/// Bounds of `runtime.queue_limit`.
pub const QUEUE_LIMIT: (u32, u32) = (0, 4096);
/// Bounds of `policy.confirm_timeout_s`.
pub const CONFIRM_TIMEOUT_S: (u32, u32) = (5, 604_800);
/// `policy.confirm_timeout_s` where no layer sets it.
pub const DEFAULT_CONFIRM_TIMEOUT_S: u32 = 900;

/// Why a blueprint is refused.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum BlueprintError {
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{layer}, line {line}: {message}")]
    Syntax {
        /// Which layer.
        layer: String,
        /// Line of the text, from 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// A value beyond its bounds.
    #[error("{layer}, line {line}: {key} = {value} is not within {least} to {most}")]
    Bounds {
        /// Which layer.
        layer: String,
        /// Line of the text, from 1.
        line: usize,
        /// Dotted key.
        key: &'static str,
        /// What was given.
        value: u32,
        /// Least value.
        least: u32,
        /// Greatest value.
        most: u32,
    },
    /// The text is too long.
    #[error("{layer}: {size_bytes} bytes are more than a blueprint's {MAX_BLUEPRINT_BYTES}")]
    TooLong {
        /// Which layer.
        layer: String,
        /// Its size.
        size_bytes: usize,
    },
    /// Values that cannot hold together.
    #[error("{0}")]
    Conflict(String),
}

impl BlueprintError {
    /// The next step.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Syntax { .. } => {
                "keys are model, runtime.{context_tokens, parallel, threads, batch_tokens, kv_type, \
                 flash_attention, queue_limit} and policy.{confirm_timeout_s, frozen}"
            }
            Self::Bounds { .. } => "choose a value within the bounds",
            Self::TooLong { .. } => "a blueprint holds a handful of settings; shorten it",
            Self::Conflict(_) => "`slm blueprint explain DEVICE` shows which layer sets each value",
        }
    }
}

/// A layer in words: `fleet`, `class small`, `site berlin`, `device …`.
pub fn layer_name(layer: &Layer) -> String {
    match layer {
        Layer::Fleet => "fleet".to_owned(),
        Layer::Class(name) => format!("class {name}"),
        Layer::Site(name) => format!("site {name}"),
        Layer::Device(name) => format!("device {name}"),
    }
}

/// Parses one layer. Unknown keys and values beyond their bounds are errors with a line number.
///
/// # Errors
/// [`BlueprintError::TooLong`], [`BlueprintError::Syntax`] or [`BlueprintError::Bounds`].
pub fn parse(layer: &Layer, text: &str) -> Result<Blueprint, BlueprintError> {
    let name = layer_name(layer);
    if text.len() > MAX_BLUEPRINT_BYTES {
        return Err(BlueprintError::TooLong { layer: name, size_bytes: text.len() });
    }
    let blueprint: Blueprint = toml::from_str(text).map_err(|error| BlueprintError::Syntax {
        layer: name.clone(),
        line: error.span().map_or(1, |span| line_of(text, span.start)),
        message: error.message().to_owned(),
    })?;
    let runtime = &blueprint.runtime;
    let bounded = [
        ("context_tokens", "runtime.context_tokens", runtime.context_tokens, CONTEXT_TOKENS),
        ("parallel", "runtime.parallel", runtime.parallel, PARALLEL),
        ("threads", "runtime.threads", runtime.threads, THREADS),
        ("batch_tokens", "runtime.batch_tokens", runtime.batch_tokens, BATCH_TOKENS),
        ("queue_limit", "runtime.queue_limit", runtime.queue_limit, QUEUE_LIMIT),
        (
            "confirm_timeout_s",
            "policy.confirm_timeout_s",
            blueprint.policy.confirm_timeout_s,
            CONFIRM_TIMEOUT_S,
        ),
    ];
    for (short, key, value, (least, most)) in bounded {
        if let Some(value) = value
            && !(least..=most).contains(&value)
        {
            let line = line_of_key(text, short);
            return Err(BlueprintError::Bounds { layer: name, line, key, value, least, most });
        }
    }
    Ok(blueprint)
}

fn line_of(text: &str, offset: usize) -> usize {
    let until = offset.min(text.len());
    1 + text.as_bytes()[..until].iter().filter(|byte| **byte == b'\n').count()
}

fn line_of_key(text: &str, key: &str) -> usize {
    let sets = |line: &str| line.split('#').next().unwrap_or("").contains(key);
    1 + text.lines().position(sets).unwrap_or(0)
}

/// Effective values of a device and where each came from.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// The model line, if a layer names one.
    pub model: Option<ModelName>,
    /// How it is run.
    pub runtime: RuntimeConfig,
    /// Whether some layer set `runtime.context_tokens`; a default yields to the model's limit.
    pub context_set: bool,
    /// Seconds to confirm.
    pub confirm_timeout_s: u32,
    /// Whether the device takes no part in rollouts.
    pub frozen: bool,
    /// Every value with its origin.
    pub values: Vec<ExplainedValue>,
}

impl Resolved {
    /// The runtime configuration for a model trained for `trained_context` tokens: a context that
    /// no layer asked for is not longer than the model can use.
    pub fn runtime_for(&self, trained_context: u32) -> RuntimeConfig {
        let mut runtime = self.runtime.clone();
        if !self.context_set && trained_context > 0 {
            runtime.context_tokens = runtime.context_tokens.min(trained_context);
        }
        runtime
    }
}

struct Setting {
    key: &'static str,
    value: String,
    layer: String,
    overrides: Vec<String>,
}

impl Setting {
    fn new(key: &'static str, default: impl Display) -> Self {
        let value = default.to_string();
        Self { key, value, layer: "default".to_owned(), overrides: Vec::new() }
    }

    fn set<T: Clone>(&mut self, target: &mut T, given: Option<&T>, layer: &str, shown: String) {
        let Some(given) = given else { return };
        *target = given.clone();
        self.overrides.push(format!("{}: {}", self.layer, self.value));
        self.value = shown;
        self.layer = layer.to_owned();
    }
}

/// Lays `layers` over the defaults, later kinds of layer over earlier ones, whatever their order.
///
/// # Errors
/// As [`parse`], and [`BlueprintError::Conflict`] where the effective values contradict each other.
pub fn resolve(layers: &[(Layer, String)]) -> Result<Resolved, BlueprintError> {
    let mut order: Vec<&(Layer, String)> = layers.iter().collect();
    order.sort_by(|a, b| a.0.cmp(&b.0));

    let mut runtime = RuntimeConfig::default();
    let mut model: Option<ModelName> = None;
    let mut confirm_timeout_s = DEFAULT_CONFIRM_TIMEOUT_S;
    let mut frozen = false;
    let mut context_set = false;

    let mut model_is = Setting::new("model", "(none)");
    let mut context = Setting::new("runtime.context_tokens", runtime.context_tokens);
    let mut parallel = Setting::new("runtime.parallel", runtime.parallel);
    let mut threads = Setting::new("runtime.threads", runtime.threads);
    let mut batch = Setting::new("runtime.batch_tokens", runtime.batch_tokens);
    let mut kv_type = Setting::new("runtime.kv_type", kv_name(runtime.kv_type));
    let mut flash = Setting::new("runtime.flash_attention", runtime.flash_attention);
    let mut queue = Setting::new("runtime.queue_limit", runtime.queue_limit);
    let mut confirm = Setting::new("policy.confirm_timeout_s", confirm_timeout_s);
    let mut frozen_is = Setting::new("policy.frozen", frozen);

    for (place, text) in order {
        let given = parse(place, text)?;
        let layer = layer_name(place);
        if let Some(name) = &given.model {
            model_is.set(&mut model, Some(&Some(name.clone())), &layer, format!("\"{name}\""));
        }
        let asked = &given.runtime;
        context_set |= asked.context_tokens.is_some();
        let number = |value: Option<u32>| value.map(|v| v.to_string()).unwrap_or_default();
        let truth = |value: Option<bool>| value.map(|v| v.to_string()).unwrap_or_default();
        context.set(
            &mut runtime.context_tokens,
            asked.context_tokens.as_ref(),
            &layer,
            number(asked.context_tokens),
        );
        parallel.set(
            &mut runtime.parallel,
            asked.parallel.as_ref(),
            &layer,
            number(asked.parallel),
        );
        threads.set(&mut runtime.threads, asked.threads.as_ref(), &layer, number(asked.threads));
        batch.set(
            &mut runtime.batch_tokens,
            asked.batch_tokens.as_ref(),
            &layer,
            number(asked.batch_tokens),
        );
        let kv_shown = asked.kv_type.map(kv_name).unwrap_or_default();
        kv_type.set(&mut runtime.kv_type, asked.kv_type.as_ref(), &layer, kv_shown);
        flash.set(
            &mut runtime.flash_attention,
            asked.flash_attention.as_ref(),
            &layer,
            truth(asked.flash_attention),
        );
        queue.set(
            &mut runtime.queue_limit,
            asked.queue_limit.as_ref(),
            &layer,
            number(asked.queue_limit),
        );
        let policy = &given.policy;
        confirm.set(
            &mut confirm_timeout_s,
            policy.confirm_timeout_s.as_ref(),
            &layer,
            number(policy.confirm_timeout_s),
        );
        frozen_is.set(&mut frozen, policy.frozen.as_ref(), &layer, truth(policy.frozen));
    }

    if runtime.kv_type == KvType::Q8_0 && !runtime.flash_attention {
        return Err(BlueprintError::Conflict(format!(
            "runtime.kv_type = \"q8_0\" ({}) needs runtime.flash_attention = true, which {} sets to false",
            kv_type.layer, flash.layer
        )));
    }
    let settings =
        [model_is, context, parallel, threads, batch, kv_type, flash, queue, confirm, frozen_is];
    let values = settings.map(|setting| ExplainedValue {
        key: setting.key.to_owned(),
        value: setting.value,
        layer: setting.layer,
        overrides: setting.overrides,
    });
    let values = values.to_vec();
    Ok(Resolved { model, runtime, context_set, confirm_timeout_s, frozen, values })
}

fn kv_name(kv_type: KvType) -> String {
    let name = match kv_type {
        KvType::F32 => "f32",
        KvType::F16 => "f16",
        KvType::Q8_0 => "q8_0",
    };
    format!("\"{name}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(kind: &str, name: &str) -> Layer {
        match kind {
            "class" => Layer::Class(name.parse().unwrap()),
            "site" => Layer::Site(name.parse().unwrap()),
            "device" => Layer::Device(name.parse().unwrap()),
            _ => Layer::Fleet,
        }
    }

    fn check_error(text: &str, expected: &str) {
        let error = parse(&Layer::Fleet, text).expect_err(text).to_string();
        assert!(error.contains(expected), "{text:?} gave {error:?}, not {expected:?}");
    }

    #[test]
    fn later_layers_win_and_origins_are_told() {
        // Given out of order: the kind of layer decides.
        let layers = [
            (layer("device", "d1"), "[runtime]\nparallel = 4".to_owned()),
            (
                Layer::Fleet,
                "model = \"smollm2\"\n[runtime]\nparallel = 1\ncontext_tokens = 512".to_owned(),
            ),
            (layer("class", "small"), "[runtime]\nparallel = 3\nkv_type = \"q8_0\"".to_owned()),
        ];
        let resolved = resolve(&layers).unwrap();
        assert_eq!(resolved.runtime.parallel, 4);
        assert_eq!(resolved.runtime.context_tokens, 512);
        assert_eq!(resolved.runtime.kv_type, KvType::Q8_0);
        assert_eq!(resolved.model.as_ref().unwrap().as_str(), "smollm2");
        let parallel =
            resolved.values.iter().find(|value| value.key == "runtime.parallel").unwrap();
        assert_eq!(parallel.layer, "device d1");
        assert_eq!(parallel.overrides, ["default: 2", "fleet: 1", "class small: 3"]);
        let threads = resolved.values.iter().find(|value| value.key == "runtime.threads").unwrap();
        assert_eq!((threads.layer.as_str(), threads.value.as_str()), ("default", "0"));
    }

    #[test]
    fn errors_name_the_line() {
        check_error("\n[runtime]\ncontext = 5\n", "line 3: unknown field `context`");
        check_error("models = \"x\"", "line 1: unknown field `models`");
        check_error("[runtime]\nparallel = \"two\"", "line 2");
        check_error("[runtime]\n\nparallel = 0", "line 3: runtime.parallel = 0 is not within 1 to");
        check_error("[runtime", "line 1");
        check_error("[policy]\nconfirm_timeout_s = 1", "line 2: policy.confirm_timeout_s = 1");
        check_error("model = \"Not A Name\"", "line 1");
        check_error("[runtime]\nparallel = -1", "line 2");
        check_error(&"#".repeat(MAX_BLUEPRINT_BYTES + 1), "bytes are more than");
    }

    #[test]
    fn contradictions_name_both_layers() {
        let layers = [
            (Layer::Fleet, "[runtime]\nflash_attention = false".to_owned()),
            (layer("site", "berlin"), "[runtime]\nkv_type = \"q8_0\"".to_owned()),
        ];
        let error = resolve(&layers).unwrap_err().to_string();
        assert!(error.contains("(site berlin)") && error.contains("which fleet sets"), "{error}");
    }

    #[test]
    fn default_context_yields_to_the_model() {
        let resolved = resolve(&[]).unwrap();
        assert_eq!(resolved.runtime_for(128).context_tokens, 128);
        let set = [(Layer::Fleet, "[runtime]\ncontext_tokens = 512".to_owned())];
        assert_eq!(resolve(&set).unwrap().runtime_for(128).context_tokens, 512);
    }
}
