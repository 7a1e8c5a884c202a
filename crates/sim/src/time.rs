//! Virtual time: milliseconds since the simulation began, and its days in words.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One second.
pub(crate) const SECOND: u64 = 1_000;
/// One minute.
pub(crate) const MINUTE: u64 = 60 * SECOND;
/// One hour.
pub(crate) const HOUR: u64 = 60 * MINUTE;
/// One day.
pub(crate) const DAY: u64 = 24 * HOUR;

/// A moment or a duration of virtual time in milliseconds, written `HH:MM:SS` or `HH:MM:SS.mmm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// The time of day at which this moment falls, were the simulation to begin at midnight of
    /// 1 January 2026, UTC.
    pub(crate) fn timestamp(self) -> Timestamp {
        const START_MS: i64 = 1_767_225_600_000;
        let after_ms = i64::try_from(self.0).unwrap_or(i64::MAX);
        Timestamp::from_millisecond(START_MS.saturating_add(after_ms)).unwrap_or(Timestamp::MAX)
    }

    /// The moment of the simulation that is this timestamp; its beginning for all before.
    pub fn at(timestamp: Timestamp) -> Self {
        let since = timestamp.as_millisecond() - Self(0).timestamp().as_millisecond();
        // Timestamps may be finer than milliseconds: the next whole one is not too early.
        Self(u64::try_from(since).unwrap_or(0))
    }

    /// Seconds, with their fraction.
    pub fn seconds(self) -> f64 {
        self.0 as f64 / SECOND as f64
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (hours, minutes) = (self.0 / HOUR, self.0 / MINUTE % 60);
        let (seconds, millis) = (self.0 / SECOND % 60, self.0 % SECOND);
        write!(f, "{hours:02}:{minutes:02}:{seconds:02}")?;
        if millis > 0 {
            write!(f, ".{millis:03}")?;
        }
        Ok(())
    }
}

/// Why some text is not a [`Time`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a time: write HH:MM:SS or HH:MM:SS.mmm")]
pub struct ParseTimeError(String);

impl FromStr for Time {
    type Err = ParseTimeError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let error = || ParseTimeError(given.chars().take(40).collect());
        let (whole, millis) = given.split_once('.').unwrap_or((given, "0"));
        let mut parts = whole.split(':').map(str::parse::<u64>);
        let (Some(Ok(h)), Some(Ok(m)), Some(Ok(s)), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(error());
        };
        let millis: u64 = format!("{millis:0<3}").parse().map_err(|_| error())?;
        if h > 1_000_000 || m >= 60 || s >= 60 || millis >= 1_000 {
            return Err(error());
        }
        Ok(Self(h * HOUR + m * MINUTE + s * SECOND + millis))
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
