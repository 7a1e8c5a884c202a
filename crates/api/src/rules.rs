//! What a device obeys by itself while it carries out what it is told.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::window::{self, Opening, Windows};

/// When and how a device may carry out what it is told. It keeps to them by itself, with the hub
/// out of reach too. Going back to the model before is never held up by them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(default)]
pub struct DeviceRules {
    /// Nothing new is begun: neither fetched nor switched to. What was fetched is kept.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub hold: bool,
    /// Not switched to before. Fetched, verified and kept on the disk meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub activate_at: Option<Timestamp>,
    /// Switched to only while all of these are open.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub activate_in: Vec<Hours>,
    /// Fetched only while all of these are open.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub download_in: Vec<Hours>,
    /// What may be fetched over a link on which every byte costs.
    #[serde(skip_serializing_if = "Metered::is_allow")]
    #[schema(value_type = String)]
    pub metered: Metered,
    /// Fetched with at most so many bytes a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rate_bytes_per_s: Option<u64>,
    /// Models that the device has are shared with devices of its site, which need not get them over
    /// the site's line, at so many bytes a second together; they are not if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_bytes_per_s: Option<u64>,
    /// A device whose disk has no room for a second model gives up the one that serves: it has none
    /// until the new one is confirmed, and if that fails until it has fetched the old one again.
    /// Without this it waits for room. What it allows nobody has to obey.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub replace: bool,
}

/// Hours of the week in a time zone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Hours {
    /// The hours.
    #[schema(value_type = String)]
    pub windows: Windows,
    /// The time zone's IANA name; the device's own if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
}

/// What may be fetched over a metered link: `allow`, `defer`, or `small-only BYTES`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Metered {
    /// Any model.
    #[default]
    Allow,
    /// Models of at most so many bytes.
    SmallOnly {
        /// The bytes.
        max_bytes: u64,
    },
    /// None: it waits for another link.
    Defer,
}

/// Why a string is not a [`Metered`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is none of `allow`, `defer` and `small-only BYTES`")]
pub struct ParseMeteredError {
    given: String,
}

impl DeviceRules {
    /// The name of [`DeviceRules::hold`] among those that an agent obeys.
    pub const HOLD: &str = "hold";
    const ACTIVATE_AT: &str = "activate_at";
    const ACTIVATE_IN: &str = "activate_in";
    const DOWNLOAD_IN: &str = "download_in";
    const METERED: &str = "metered";
    const MAX_RATE: &str = "max_rate";
    const SHARE: &str = "share";
    /// The name of [`DeviceRules::replace`].
    pub const REPLACE: &str = "replace";
    /// Every rule that an agent of this version obeys, by name; see
    /// [`crate::device::DeviceFacts::obeys`].
    pub const ALL: [&str; 8] = [
        Self::HOLD,
        Self::ACTIVATE_AT,
        Self::ACTIVATE_IN,
        Self::DOWNLOAD_IN,
        Self::METERED,
        Self::MAX_RATE,
        Self::SHARE,
        Self::REPLACE,
    ];

    /// Whether there are no rules at all.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// The names of the rules that are given and hold something up: an agent that does not know
    /// them would do what it must not.
    pub fn names(&self) -> Vec<&'static str> {
        let given = [
            (Self::HOLD, self.hold),
            (Self::ACTIVATE_AT, self.activate_at.is_some()),
            (Self::ACTIVATE_IN, !self.activate_in.is_empty()),
            (Self::DOWNLOAD_IN, !self.download_in.is_empty()),
            (Self::METERED, !self.metered.is_allow()),
            (Self::MAX_RATE, self.max_rate_bytes_per_s.is_some()),
            (Self::SHARE, self.share_bytes_per_s.is_some()),
        ];
        given.into_iter().filter(|(_, given)| *given).map(|(name, _)| name).collect()
    }

    /// Those of the rules that hold nothing up: what a device may do besides.
    #[must_use]
    pub fn permissions(&self) -> Self {
        Self { share_bytes_per_s: self.share_bytes_per_s, replace: self.replace, ..Self::default() }
    }

    /// Both of these rules.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let hours = |a: &[Hours], b: &[Hours]| {
            let mut all = a.to_vec();
            all.extend(b.iter().filter(|hours| !a.contains(hours)).cloned());
            all
        };
        let least = |a: Option<u64>, b: Option<u64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (one, other) => one.or(other),
        };
        Self {
            hold: self.hold || other.hold,
            activate_at: self.activate_at.max(other.activate_at),
            activate_in: hours(&self.activate_in, &other.activate_in),
            download_in: hours(&self.download_in, &other.download_in),
            metered: self.metered.and(other.metered),
            max_rate_bytes_per_s: least(self.max_rate_bytes_per_s, other.max_rate_bytes_per_s),
            share_bytes_per_s: least(self.share_bytes_per_s, other.share_bytes_per_s),
            replace: self.replace || other.replace,
        }
    }
}

impl Hours {
    /// These hours, unless they are always open.
    pub fn of(windows: &Windows, time_zone: Option<&String>) -> Option<Self> {
        let hours = Self { windows: windows.clone(), time_zone: time_zone.cloned() };
        (!windows.is_always()).then_some(hours)
    }

    /// Whether all of these are open at `now` on a device in the zone `own` (UTC where it has
    /// none, or one that is not known).
    pub fn opening(all: &[Self], now: Timestamp, own: Option<&str>) -> Opening {
        let named = |hours: &Self| {
            let name = hours.time_zone.as_deref().or(own);
            name.and_then(window::time_zone).unwrap_or(TimeZone::UTC)
        };
        let zoned: Vec<(&Windows, TimeZone)> =
            all.iter().map(|hours| (&hours.windows, named(hours))).collect();
        window::all_open(&zoned, now)
    }
}

impl fmt::Display for Hours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zone = self.time_zone.as_deref().unwrap_or("the device's time");
        write!(f, "{} ({zone})", self.windows)
    }
}

/// In words, for people; empty where there are none.
impl fmt::Display for DeviceRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        if self.hold {
            words.push("held".to_owned());
        }
        let clock = |at: Timestamp| at.strftime("%Y-%m-%d %H:%M:%S UTC").to_string();
        words.extend(self.activate_at.map(|at| format!("switches not before {}", clock(at))));
        words.extend(self.activate_in.iter().map(|hours| format!("switches in {hours}")));
        words.extend(self.download_in.iter().map(|hours| format!("fetches in {hours}")));
        if !self.metered.is_allow() {
            words.push(format!("metered links: {}", self.metered));
        }
        let rate = self.max_rate_bytes_per_s;
        words.extend(rate.map(|bytes| format!("fetches at most {bytes} bytes/s")));
        let share = self.share_bytes_per_s;
        words.extend(share.map(|bytes| format!("shares with its site at {bytes} bytes/s")));
        if self.replace {
            words.push("gives up its model where there is no room for two".to_owned());
        }
        f.write_str(&words.join("; "))
    }
}

impl Metered {
    fn is_allow(&self) -> bool {
        *self == Self::Allow
    }

    /// The stricter of both.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Defer, _) | (_, Self::Defer) => Self::Defer,
            (Self::Allow, other) | (other, Self::Allow) => other,
            (Self::SmallOnly { max_bytes: a }, Self::SmallOnly { max_bytes: b }) => {
                Self::SmallOnly { max_bytes: a.min(b) }
            }
        }
    }

    /// Whether a model of this size may be fetched over a metered link.
    pub fn allows(self, size_bytes: u64) -> bool {
        match self {
            Self::Allow => true,
            Self::SmallOnly { max_bytes } => size_bytes <= max_bytes,
            Self::Defer => false,
        }
    }
}

impl FromStr for Metered {
    type Err = ParseMeteredError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let error = || ParseMeteredError { given: given.chars().take(200).collect() };
        match given.trim() {
            "allow" => Ok(Self::Allow),
            "defer" => Ok(Self::Defer),
            other => {
                let bytes = other.strip_prefix("small-only ").and_then(|n| n.trim().parse().ok());
                bytes.map(|max_bytes| Self::SmallOnly { max_bytes }).ok_or_else(error)
            }
        }
    }
}

impl fmt::Display for Metered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => f.write_str("allow"),
            Self::SmallOnly { max_bytes } => write!(f, "small-only {max_bytes}"),
            Self::Defer => f.write_str("defer"),
        }
    }
}

impl Serialize for Metered {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Metered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metered_is_written_as_it_is_read_and_nonsense_is_refused() {
        for text in ["allow", "defer", "small-only 5000000"] {
            assert_eq!(text.parse::<Metered>().unwrap().to_string(), text);
        }
        for bad in ["", "never", "small-only", "small-only much", "small-only -1", "Allow"] {
            let error = bad.parse::<Metered>().unwrap_err().to_string();
            assert!(error.contains("none of `allow`"), "{error}");
        }
    }

    #[test]
    fn the_stricter_of_two_rules_counts() {
        let rules = |text: &str| serde_json::from_str::<DeviceRules>(text).unwrap();
        let a = rules(
            r#"{"activate_at": "2026-01-01T00:00:00Z", "metered": "small-only 9",
                "activate_in": [{"windows": "sat"}]}"#,
        );
        let b = rules(
            r#"{"activate_at": "2026-01-02T00:00:00Z", "metered": "small-only 5",
                "activate_in": [{"windows": "sat"}, {"windows": "sun", "time_zone": "Asia/Tokyo"}]}"#,
        );
        let both = a.and(&b);
        assert_eq!(both, b.and(&a).and(&a));
        assert_eq!(both.activate_at, b.activate_at);
        assert_eq!((both.metered, both.activate_in.len()), (b.metered, 2));
        assert_eq!(a.and(&DeviceRules::default()), a);
        assert_eq!(both.names(), ["activate_at", "activate_in", "metered"]);
        assert_eq!(
            both.to_string(),
            "switches not before 2026-01-02 00:00:00 UTC; switches in sat 00:00-24:00 (the device's time); \
             switches in sun 00:00-24:00 (Asia/Tokyo); metered links: small-only 5"
        );
        // What an older hub or agent wrote, and what a newer one will.
        assert!(rules("{}").is_none() && rules(r#"{"of_tomorrow": 1}"#).is_none());
    }
}
