//! Weekly hours in a device's own time, such as its shop's closing hours.

use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

use jiff::civil::{Date, Weekday};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{SignedDuration, Span, Timestamp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most windows in one [`Windows`].
pub const MAX_WINDOWS: usize = 32;
/// Days ahead that are searched for a window: a week, and the days that touch it.
const DAYS_AHEAD: i32 = 8;
/// Rounds in which several [`Windows`] are brought together, at most.
const MAX_ROUNDS: usize = 64;
/// Minutes of a day.
const DAY_MINUTES: u16 = 24 * 60;
/// Days of the week as they are written.
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// Hours of the week, in local time: `sat-sun 02:00-05:00`, `mon-fri 22:00-06:00; sun`,
/// `22:00-05:00` (every day). A window that ends before it begins ends on the next day. Without any,
/// it is always open; that is written `always`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Windows {
    windows: Vec<Window>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Window {
    /// From Monday on.
    days: [bool; 7],
    from_minute: u16,
    to_minute: u16,
}

/// Whether windows are open at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// They are, up to this moment; if absent, at least for a week.
    Open {
        /// When they shut.
        until: Option<Timestamp>,
    },
    /// They are not.
    Shut {
        /// When they open; absent where that is not within a week.
        until: Option<Timestamp>,
    },
}

/// Why a string is not [`Windows`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{given}` are no hours: write `always`, or such as `sat-sun 02:00-05:00`, `mon,wed 22:00-06:00` and `22:00-05:00`, joined by `;`"
)]
pub struct ParseWindowsError {
    given: String,
}

/// The time zone of this name in the IANA database that this program carries: the same on a device
/// without one and on the hub.
pub fn time_zone(name: &str) -> Option<TimeZone> {
    static BUNDLED: LazyLock<TimeZoneDatabase> = LazyLock::new(TimeZoneDatabase::bundled);
    BUNDLED.get(name).ok()
}

impl Windows {
    /// Whether there are no hours to keep to.
    pub fn is_always(&self) -> bool {
        self.windows.is_empty()
    }

    /// Whether they are open at this moment in this time zone. Hours that daylight saving skips
    /// begin at the moment it does; hours that come twice are open both times.
    pub fn opening(&self, at: Timestamp, zone: &TimeZone) -> Opening {
        if self.is_always() {
            return Opening::Open { until: None };
        }
        let today = at.to_zoned(zone.clone()).date();
        let spans = self.spans(today, zone);
        let holds = |span: &&(Timestamp, Timestamp)| span.0 <= at && at < span.1;
        let Some(&(_, mut until)) = spans.iter().find(holds) else {
            let next = spans.iter().map(|span| span.0).filter(|from| *from > at).min();
            return Opening::Shut { until: next };
        };
        // Windows that touch are one.
        for _ in 0..spans.len() {
            let goes_on = |span: &&(Timestamp, Timestamp)| span.0 <= until && until < span.1;
            let Some(next) = spans.iter().find(goes_on) else { break };
            until = next.1;
        }
        let lasts_a_week = until.duration_since(at) >= SignedDuration::from_hours(7 * 24);
        Opening::Open { until: (!lasts_a_week).then_some(until) }
    }

    /// Every window from the day before `today` on, as moments.
    fn spans(&self, today: Date, zone: &TimeZone) -> Vec<(Timestamp, Timestamp)> {
        let mut spans = Vec::new();
        for offset in -1..=DAYS_AHEAD {
            let Ok(day) = today.checked_add(Span::new().days(offset)) else { continue };
            for window in self.windows.iter().filter(|window| window.is_on(day.weekday())) {
                let ends_next_day = window.to_minute <= window.from_minute;
                let last = if ends_next_day { day.tomorrow() } else { Ok(day) };
                let from = moment(day, window.from_minute, zone);
                let to = last.ok().and_then(|last| moment(last, window.to_minute, zone));
                spans.extend(from.zip(to).filter(|(from, to)| from < to));
            }
        }
        spans.sort_unstable();
        spans
    }
}

/// Whether all of these are open at this moment.
pub fn all_open(windows: &[(&Windows, TimeZone)], at: Timestamp) -> Opening {
    let mut moment = at;
    for _ in 0..MAX_ROUNDS {
        let mut shuts: Option<Timestamp> = None;
        let mut opens = None;
        for (one, zone) in windows {
            match one.opening(moment, zone) {
                Opening::Open { until: None } => {}
                Opening::Open { until: Some(until) } => {
                    shuts = Some(shuts.map_or(until, |known| known.min(until)));
                }
                Opening::Shut { until: None } => return Opening::Shut { until: None },
                Opening::Shut { until: Some(until) } => opens = opens.max(Some(until)),
            }
        }
        match opens {
            None if moment == at => return Opening::Open { until: shuts },
            None => return Opening::Shut { until: Some(moment) },
            Some(next) => moment = next,
        }
        if moment.duration_since(at) > SignedDuration::from_hours(24 * i64::from(DAYS_AHEAD)) {
            break;
        }
    }
    Opening::Shut { until: None }
}

fn moment(day: Date, minute: u16, zone: &TimeZone) -> Option<Timestamp> {
    let day = if minute == DAY_MINUTES { day.tomorrow().ok()? } else { day };
    let minute = minute % DAY_MINUTES;
    let time = day.at((minute / 60) as i8, (minute % 60) as i8, 0, 0);
    zone.to_ambiguous_timestamp(time).compatible().ok()
}

impl Window {
    fn is_on(&self, day: Weekday) -> bool {
        self.days[day.to_monday_zero_offset() as usize]
    }

    fn parse(given: &str) -> Option<Self> {
        if given.is_empty() {
            return None;
        }
        let (days, hours) = match given.split_once(char::is_whitespace) {
            Some((days, hours)) => (days, Some(hours.trim())),
            None if given.starts_with(|char: char| char.is_ascii_digit()) => ("", Some(given)),
            None => (given, None),
        };
        let mut on = [days.is_empty(); 7];
        for part in days.split(',').filter(|_| !days.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let day = |name: &str| DAYS.iter().position(|day| *day == name);
            let (mut index, last) = (day(first)?, day(last)?);
            on[index] = true;
            while index != last {
                index = (index + 1) % 7;
                on[index] = true;
            }
        }
        let (from, to) = match hours {
            Some(hours) => hours.split_once('-')?,
            None => ("00:00", "24:00"),
        };
        let minute = |text: &str| {
            let (hour, minute) = text.trim().split_once(':')?;
            if hour.len() != 2 || minute.len() != 2 {
                return None;
            }
            let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
            let total = hour * 60 + minute;
            (minute < 60 && total <= DAY_MINUTES).then_some(total)
        };
        let (from_minute, to_minute) = (minute(from)?, minute(to)?);
        let good = from_minute != to_minute && from_minute != DAY_MINUTES;
        // Midnight as an end is 24:00.
        let to_minute = if to_minute == 0 { DAY_MINUTES } else { to_minute };
        good.then_some(Self { days: on, from_minute, to_minute })
    }
}

impl FromStr for Windows {
    type Err = ParseWindowsError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let error = || ParseWindowsError { given: given.chars().take(200).collect() };
        if given.trim() == "always" {
            return Ok(Self::default());
        }
        let windows: Option<Vec<Window>> =
            given.split(';').map(|part| Window::parse(part.trim())).collect();
        let windows = windows.filter(|windows| windows.len() <= MAX_WINDOWS).ok_or_else(error)?;
        Ok(Self { windows })
    }
}

impl fmt::Display for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.windows.is_empty() {
            return f.write_str("always");
        }
        for (index, window) in self.windows.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            if window.days != [true; 7] {
                let names = DAYS.iter().zip(window.days).filter(|(_, on)| *on);
                let names: Vec<&str> = names.map(|(name, _)| *name).collect();
                write!(f, "{} ", names.join(","))?;
            }
            let clock = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
            write!(f, "{}-{}", clock(window.from_minute), clock(window.to_minute))?;
        }
        Ok(())
    }
}

impl Serialize for Windows {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Windows {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn check(windows: &str, zone: &str, moment: &str, expected: Opening) {
        let windows: Windows = windows.parse().unwrap();
        let found = windows.opening(at(moment), &time_zone(zone).unwrap());
        assert_eq!(found, expected, "{windows} in {zone} at {moment}");
    }

    fn open(until: &str) -> Opening {
        Opening::Open { until: Some(at(until)) }
    }

    fn shut(until: &str) -> Opening {
        Opening::Shut { until: Some(at(until)) }
    }

    #[test]
    fn hours_of_the_week_in_local_time() {
        // 2026-01-03 is a Saturday. Berlin is one hour ahead of UTC in winter.
        let weekend = "sat-sun 02:00-05:00";
        check(weekend, "UTC", "2026-01-03T01:59:59Z", shut("2026-01-03T02:00:00Z"));
        check(weekend, "UTC", "2026-01-03T02:00:00Z", open("2026-01-03T05:00:00Z"));
        check(weekend, "UTC", "2026-01-03T05:00:00Z", shut("2026-01-04T02:00:00Z"));
        check(weekend, "UTC", "2026-01-04T05:00:00Z", shut("2026-01-10T02:00:00Z"));
        check(weekend, "Europe/Berlin", "2026-01-03T01:30:00Z", open("2026-01-03T04:00:00Z"));
        check(weekend, "America/New_York", "2026-01-03T06:59:00Z", shut("2026-01-03T07:00:00Z"));
    }

    #[test]
    fn a_night_ends_on_the_next_day() {
        let nights = "fri 22:00-06:00";
        check(nights, "UTC", "2026-01-02T23:00:00Z", open("2026-01-03T06:00:00Z"));
        check(nights, "UTC", "2026-01-03T05:59:00Z", open("2026-01-03T06:00:00Z"));
        check(nights, "UTC", "2026-01-03T06:00:00Z", shut("2026-01-09T22:00:00Z"));
    }

    #[test]
    fn windows_that_touch_are_one_and_a_whole_week_never_shuts() {
        check("fri 22:00-24:00; sat", "UTC", "2026-01-02T23:00:00Z", open("2026-01-04T00:00:00Z"));
        check("mon-sun", "UTC", "2026-01-02T23:00:00Z", Opening::Open { until: None });
        check("always", "UTC", "2026-01-02T23:00:00Z", Opening::Open { until: None });
        check("sun-mon", "UTC", "2026-01-04T12:00:00Z", open("2026-01-06T00:00:00Z"));
    }

    #[test]
    fn daylight_saving_moves_the_hours() {
        // In Berlin, 2026-03-29 has no 02:00 to 03:00.
        let nights = "02:00-04:00";
        check(nights, "Europe/Berlin", "2026-03-29T00:59:00Z", shut("2026-03-29T01:00:00Z"));
        check(nights, "Europe/Berlin", "2026-03-29T01:00:00Z", open("2026-03-29T02:00:00Z"));
        // And 2026-10-25 has it twice: 00:00 to 02:00 UTC, and one hour more.
        check(nights, "Europe/Berlin", "2026-10-25T00:00:00Z", open("2026-10-25T03:00:00Z"));
    }

    #[test]
    fn all_must_be_open() {
        let parse = |text: &str| text.parse::<Windows>().unwrap();
        let zone = TimeZone::UTC;
        let check = |texts: &[&str], moment: &str, expected: Opening| {
            let windows: Vec<Windows> = texts.iter().map(|text| parse(text)).collect();
            let zoned: Vec<_> = windows.iter().map(|one| (one, zone.clone())).collect();
            assert_eq!(all_open(&zoned, at(moment)), expected, "{texts:?}");
        };
        let both = ["22:00-06:00", "sat-sun"];
        check(&both, "2026-01-02T23:00:00Z", shut("2026-01-03T00:00:00Z"));
        check(&both, "2026-01-03T00:00:00Z", open("2026-01-03T06:00:00Z"));
        check(&both, "2026-01-03T12:00:00Z", shut("2026-01-03T22:00:00Z"));
        check(&[], "2026-01-03T12:00:00Z", Opening::Open { until: None });
        check(&["mon 01:00-02:00", "tue"], "2026-01-03T12:00:00Z", Opening::Shut { until: None });
    }

    #[test]
    fn hours_are_written_as_they_are_read_and_nonsense_is_refused() {
        for text in ["always", "22:00-05:00", "sat,sun 02:00-05:00", "mon 00:00-24:00; 01:00-02:00"]
        {
            assert_eq!(text.parse::<Windows>().unwrap().to_string(), text);
        }
        assert_eq!(
            "mon-wed 22:00-00:00".parse::<Windows>().unwrap().to_string(),
            "mon,tue,wed 22:00-24:00"
        );
        for bad in [
            "",
            "sat 2:00-5:00",
            "sat 02:00",
            "caturday",
            "25:00-26:00",
            "02:60-03:00",
            "02:00-02:00",
            "24:00-02:00",
            "sat;",
            "sat- 01:00-02:00",
            "00:00-00:00",
            "-1:00-02:00",
        ] {
            assert!(bad.parse::<Windows>().is_err(), "{bad}");
        }
        assert!(vec!["sat"; MAX_WINDOWS + 1].join(";").parse::<Windows>().is_err());
        assert!(time_zone("Nowhere/City").is_none());
    }
}
