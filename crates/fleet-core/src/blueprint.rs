//! Desired configuration in layers, fleet < class < site < device, with the origin of every value.

use std::fmt::Display;

use slmops_api::blueprint::{Blueprint, ExplainedValue, Layer};
use slmops_api::rules::{DeviceRules, Hours, Metered};
use slmops_api::runtime::{KvType, RuntimeConfig};
use slmops_api::window::{self, Windows};
use slmops_api::{ChannelName, ModelName};

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
/// Bounds of `runtime.idle_after_s`; 0 means that the model's memory is kept.
pub const IDLE_AFTER_S: (u32, u32) = (0, 2_592_000);
/// Bounds of `policy.confirm_timeout_s`.
pub const CONFIRM_TIMEOUT_S: (u32, u32) = (5, 604_800);
/// Every key, in the order in which they are explained.
const KEYS: [&str; 19] = [
    "model",
    "channel",
    "runtime.context_tokens",
    "runtime.parallel",
    "runtime.threads",
    "runtime.batch_tokens",
    "runtime.kv_type",
    "runtime.flash_attention",
    "runtime.queue_limit",
    "runtime.idle_after_s",
    "policy.confirm_timeout_s",
    "policy.frozen",
    "policy.activate_in",
    "policy.download_in",
    "policy.time_zone",
    "policy.max_rate_bytes_per_s",
    "policy.metered",
    "policy.share_bytes_per_s",
    "policy.replace_in_place",
];
/// `policy.time_zone` for each device's own.
const DEVICE_TIME_ZONE: &str = "device";
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
    /// A time zone that is not in the IANA database.
    #[error("{layer}, line {line}: policy.time_zone = \"{given}\" is no time zone")]
    TimeZone {
        /// Which layer.
        layer: String,
        /// Line of the text, from 1.
        line: usize,
        /// What was given.
        given: String,
    },
    /// A list of overridable keys that is none.
    #[error("{layer}, line {line}: {message}")]
    Overridable {
        /// Which layer.
        layer: String,
        /// Line of the text, from 1.
        line: usize,
        /// What is wrong.
        message: String,
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
                "keys are overridable, model, channel, runtime.{context_tokens, parallel, threads, batch_tokens, kv_type, \
                 flash_attention, queue_limit, idle_after_s} and policy.{confirm_timeout_s, frozen, activate_in, \
                 download_in, time_zone, metered, max_rate_bytes_per_s, \
                 share_bytes_per_s, replace_in_place}"
            }
            Self::Bounds { .. } => "choose a value within the bounds",
            Self::TimeZone { .. } => {
                "write a name of the IANA database such as Europe/Berlin, or `device` for each \
                 device's own"
            }
            Self::Overridable { .. } => {
                "write it for the fleet or a class, such as overridable = [\"runtime.threads\"]; \
                 `slm blueprint explain DEVICE` lists all keys"
            }
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
        ("idle_after_s", "runtime.idle_after_s", runtime.idle_after_s, IDLE_AFTER_S),
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
    if let Some(keys) = &blueprint.overridable {
        let unknown = keys.iter().find(|key| !KEYS.contains(&key.as_str()));
        let message = match (layer, unknown) {
            (Layer::Site(_) | Layer::Device(_), _) => {
                "what may be overridden is up to the fleet and the class".to_owned()
            }
            (_, Some(key)) => {
                format!(
                    "overridable: there is no key `{}`",
                    key.chars().take(200).collect::<String>()
                )
            }
            (Layer::Fleet | Layer::Class(_), None) => return Ok(blueprint),
        };
        let line = line_of_key(text, "overridable");
        return Err(BlueprintError::Overridable { layer: name, line, message });
    }
    if let Some(given) = &blueprint.policy.time_zone
        && given != DEVICE_TIME_ZONE
        && window::time_zone(given).is_none()
    {
        let line = line_of_key(text, "time_zone");
        let given = given.chars().take(200).collect();
        return Err(BlueprintError::TimeZone { layer: name, line, given });
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
    /// The channel that it follows, if a layer names one.
    pub channel: Option<ChannelName>,
    /// How it is run.
    pub runtime: RuntimeConfig,
    /// Whether some layer set `runtime.context_tokens`; a default yields to the model's limit.
    pub context_set: bool,
    /// Seconds to confirm.
    pub confirm_timeout_s: u32,
    /// Whether the device takes no part in rollouts.
    pub frozen: bool,
    /// What the device obeys by itself, whatever it is told.
    pub rules: DeviceRules,
    /// Every value with its origin.
    pub values: Vec<ExplainedValue>,
    /// What sites and devices set and may not: it counts for nothing.
    pub conflicts: Vec<String>,
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
    refused: Vec<(String, String)>,
}

/// A layer that gives values.
struct Giver {
    name: String,
    /// The keys that it may give, if not all.
    may: Option<Vec<String>>,
}

impl Setting {
    fn new(key: &'static str, default: impl Display) -> Self {
        let value = default.to_string();
        Self { key, value, layer: "default".to_owned(), overrides: vec![], refused: vec![] }
    }

    fn set<T: Clone>(&mut self, target: &mut T, given: Option<&T>, by: &Giver, shown: String) {
        let Some(given) = given else { return };
        if by.may.as_ref().is_some_and(|keys| keys.iter().all(|key| key != self.key)) {
            return self.refused.push((by.name.clone(), shown));
        }
        *target = given.clone();
        self.overrides.push(format!("{}: {}", self.layer, self.value));
        self.value = shown;
        self.layer.clone_from(&by.name);
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
    let mut channel: Option<ChannelName> = None;
    let mut confirm_timeout_s = DEFAULT_CONFIRM_TIMEOUT_S;
    let mut frozen = false;
    let mut activate_in = Windows::default();
    let mut download_in = Windows::default();
    let mut time_zone = DEVICE_TIME_ZONE.to_owned();
    let mut metered = Metered::default();
    let mut max_rate = 0;
    let mut share = 0;
    let mut replace = false;

    let mut model_is = Setting::new("model", "(none)");
    let mut channel_is = Setting::new("channel", "(none)");
    let mut context = Setting::new("runtime.context_tokens", runtime.context_tokens);
    let mut parallel = Setting::new("runtime.parallel", runtime.parallel);
    let mut threads = Setting::new("runtime.threads", runtime.threads);
    let mut batch = Setting::new("runtime.batch_tokens", runtime.batch_tokens);
    let mut kv_type = Setting::new("runtime.kv_type", kv_name(runtime.kv_type));
    let mut flash = Setting::new("runtime.flash_attention", runtime.flash_attention);
    let mut queue = Setting::new("runtime.queue_limit", runtime.queue_limit);
    let mut idle = Setting::new("runtime.idle_after_s", runtime.idle_after_s);
    let mut confirm = Setting::new("policy.confirm_timeout_s", confirm_timeout_s);
    let mut frozen_is = Setting::new("policy.frozen", frozen);
    let mut activate_is = Setting::new("policy.activate_in", quoted(&activate_in));
    let mut download_is = Setting::new("policy.download_in", quoted(&download_in));
    let mut zone_is = Setting::new("policy.time_zone", quoted(&time_zone));
    let mut rate_is = Setting::new("policy.max_rate_bytes_per_s", max_rate);
    let mut metered_is = Setting::new("policy.metered", quoted(metered));
    let mut share_is = Setting::new("policy.share_bytes_per_s", share);
    let mut replace_is = Setting::new("policy.replace_in_place", replace);

    // What sites and devices may override, and who says so.
    let mut overridable: Option<(Vec<String>, String)> = None;
    for (place, text) in order {
        let given = parse(place, text)?;
        if let Some(keys) = &given.overridable {
            overridable = Some((keys.clone(), layer_name(place)));
        }
        let local = matches!(place, Layer::Site(_) | Layer::Device(_));
        let may = overridable.as_ref().filter(|_| local).map(|(keys, _)| keys.clone());
        let layer = Giver { name: layer_name(place), may };
        if let Some(name) = &given.model {
            model_is.set(&mut model, Some(&Some(name.clone())), &layer, format!("\"{name}\""));
        }
        if let Some(name) = &given.channel {
            channel_is.set(&mut channel, Some(&Some(name.clone())), &layer, format!("\"{name}\""));
        }
        let asked = &given.runtime;
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
        idle.set(
            &mut runtime.idle_after_s,
            asked.idle_after_s.as_ref(),
            &layer,
            number(asked.idle_after_s),
        );
        let policy = &given.policy;
        confirm.set(
            &mut confirm_timeout_s,
            policy.confirm_timeout_s.as_ref(),
            &layer,
            number(policy.confirm_timeout_s),
        );
        frozen_is.set(&mut frozen, policy.frozen.as_ref(), &layer, truth(policy.frozen));
        fn shown<T: Display>(given: Option<&T>) -> String {
            given.map(quoted).unwrap_or_default()
        }
        let (switch, fetch) = (policy.activate_in.as_ref(), policy.download_in.as_ref());
        activate_is.set(&mut activate_in, switch, &layer, shown(switch));
        download_is.set(&mut download_in, fetch, &layer, shown(fetch));
        let zone = policy.time_zone.as_ref();
        zone_is.set(&mut time_zone, zone, &layer, shown(zone));
        let rate = policy.max_rate_bytes_per_s;
        rate_is.set(&mut max_rate, rate.as_ref(), &layer, number(rate));
        metered_is.set(
            &mut metered,
            policy.metered.as_ref(),
            &layer,
            shown(policy.metered.as_ref()),
        );
        let given = policy.share_bytes_per_s;
        share_is.set(&mut share, given.as_ref(), &layer, number(given));
        let given = policy.replace_in_place;
        replace_is.set(&mut replace, given.as_ref(), &layer, truth(given));
    }

    if runtime.kv_type == KvType::Q8_0 && !runtime.flash_attention {
        return Err(BlueprintError::Conflict(format!(
            "runtime.kv_type = \"q8_0\" ({}) needs runtime.flash_attention = true, which {} sets to false",
            kv_type.layer, flash.layer
        )));
    }
    let context_set = context.layer != "default";
    let zone = Some(&time_zone).filter(|zone| *zone != DEVICE_TIME_ZONE);
    let rules = DeviceRules {
        activate_in: Hours::of(&activate_in, zone).into_iter().collect(),
        download_in: Hours::of(&download_in, zone).into_iter().collect(),
        metered,
        max_rate_bytes_per_s: (max_rate > 0).then_some(u64::from(max_rate)),
        share_bytes_per_s: (share > 0).then_some(u64::from(share)),
        replace,
        ..DeviceRules::default()
    };
    let settings = [
        model_is,
        channel_is,
        context,
        parallel,
        threads,
        batch,
        kv_type,
        flash,
        queue,
        idle,
        confirm,
        frozen_is,
        activate_is,
        download_is,
        zone_is,
        rate_is,
        metered_is,
        share_is,
        replace_is,
    ];
    debug_assert!(settings.iter().map(|setting| setting.key).eq(KEYS), "every key is explained");
    let mut conflicts = Vec::new();
    for (setting, (layer, value)) in
        settings.iter().flat_map(|it| it.refused.iter().map(move |r| (it, r)))
    {
        let by = overridable.as_ref().map_or("nobody", |(_, by)| by);
        conflicts.push(format!(
            "{layer} sets {} = {value}, which {by} does not let it override (overridable)",
            setting.key
        ));
    }
    let values = settings.map(|setting| ExplainedValue {
        key: setting.key.to_owned(),
        value: setting.value,
        layer: setting.layer,
        overrides: setting.overrides,
        refused: setting.refused.iter().map(|(layer, value)| format!("{layer}: {value}")).collect(),
    });
    let values = values.to_vec();
    Ok(Resolved {
        model,
        channel,
        runtime,
        context_set,
        confirm_timeout_s,
        frozen,
        rules,
        values,
        conflicts,
    })
}

fn quoted(value: impl Display) -> String {
    format!("\"{value}\"")
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
        check_error("[policy]\nactivate_in = \"caturday\"", "line 2: `caturday` are no hours");
        check_error("[policy]\nmetered = \"perhaps\"", "line 2: `perhaps` is none of");
        check_error("[policy]\n\ntime_zone = \"Mars/Olympus\"", "line 3: policy.time_zone = ");
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
    fn rules_of_the_device_come_from_their_layers() {
        assert!(resolve(&[]).unwrap().rules.is_none());
        let layers = [
            (
                Layer::Fleet,
                "[policy]\nactivate_in = \"sat-sun 02:00-05:00\"\nmetered = \"defer\"".to_owned(),
            ),
            (layer("site", "berlin"), "policy.time_zone = \"Europe/Berlin\"".to_owned()),
            (layer("device", "d1"), "policy.metered = \"small-only 7\"".to_owned()),
        ];
        let resolved = resolve(&layers).unwrap();
        assert_eq!(
            resolved.rules.to_string(),
            "switches in sat,sun 02:00-05:00 (Europe/Berlin); metered links: small-only 7"
        );
        let explained = |key: &str| {
            let value = resolved.values.iter().find(|value| value.key == key).unwrap();
            format!("{} {} {:?}", value.value, value.layer, value.overrides)
        };
        assert_eq!(
            explained("policy.metered"),
            r#""small-only 7" device d1 ["default: \"allow\"", "fleet: \"defer\""]"#
        );
        assert_eq!(explained("policy.download_in"), r#""always" default []"#);
    }

    #[test]
    fn sites_and_devices_override_what_they_may_and_the_rest_is_a_conflict() {
        let fleet = "overridable = [\"runtime.threads\", \"policy.metered\"]\nruntime.parallel = 3";
        let mut layers = vec![
            (Layer::Fleet, fleet.to_owned()),
            (layer("class", "small"), "runtime.queue_limit = 9".to_owned()),
            (layer("site", "berlin"), "runtime.threads = 2\nruntime.parallel = 8".to_owned()),
            (layer("device", "d1"), "runtime.threads = 1\nruntime.context_tokens = 64".to_owned()),
        ];
        let resolved = resolve(&layers).unwrap();
        let runtime = &resolved.runtime;
        assert_eq!((runtime.threads, runtime.parallel, runtime.queue_limit), (1, 3, 9));
        assert!(!resolved.context_set && runtime.context_tokens == 2048);
        assert_eq!(
            resolved.conflicts,
            [
                "device d1 sets runtime.context_tokens = 64, which fleet does not let it override (overridable)",
                "site berlin sets runtime.parallel = 8, which fleet does not let it override (overridable)",
            ]
        );
        let parallel =
            resolved.values.iter().find(|value| value.key == "runtime.parallel").unwrap();
        assert_eq!(
            (parallel.layer.as_str(), &parallel.refused[..]),
            ("fleet", &["site berlin: 8".to_owned()][..])
        );
        // The class's list goes before the fleet's; an empty one lets nothing.
        layers[1].1 = "overridable = []".to_owned();
        let resolved = resolve(&layers).unwrap();
        assert_eq!((resolved.conflicts.len(), resolved.runtime.threads), (4, 0));
        assert!(resolved.conflicts[0].contains("which class small does not let"), "{resolved:?}");

        check_error(
            "overridable = [\"runtime.speed\"]",
            "line 1: overridable: there is no key `runtime.speed`",
        );
        let error = parse(&layer("site", "berlin"), "\noverridable = []").unwrap_err();
        assert!(
            error.to_string().contains("site berlin, line 2: what may be overridden"),
            "{error}"
        );
        assert!(error.hint().contains("overridable = ["));
    }

    #[test]
    fn default_context_yields_to_the_model() {
        let resolved = resolve(&[]).unwrap();
        assert_eq!(resolved.runtime_for(128).context_tokens, 128);
        let set = [(Layer::Fleet, "[runtime]\ncontext_tokens = 512".to_owned())];
        assert_eq!(resolve(&set).unwrap().runtime_for(128).context_tokens, 512);
    }
}
