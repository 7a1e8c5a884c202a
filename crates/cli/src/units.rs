//! Sizes, durations and shares as people write and read them.

use std::time::Duration;

/// `300MB`, `1.5GiB`, `4096` → bytes. Decimal and binary prefixes are told apart.
pub fn parse_bytes(given: &str) -> Result<u64, String> {
    let text = given.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1000,
        "m" | "mb" => 1000 * 1000,
        "g" | "gb" => 1000 * 1000 * 1000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(format!("`{given}` is not a size: write 300MB, 256MiB or 2GB")),
    };
    let number: f64 =
        number.parse().map_err(|_| format!("`{given}` is not a size: write 300MB or 256MiB"))?;
    let bytes = number * scale as f64;
    if !(0.0..=1e18).contains(&bytes) {
        return Err(format!("`{given}` is out of range"));
    }
    Ok(bytes as u64)
}

/// `8Mbit`, `500kbit`, `1Gbit` → bits per second.
pub fn parse_bits(given: &str) -> Result<u64, String> {
    let text = given.trim().to_ascii_lowercase();
    let text = text.strip_suffix("/s").unwrap_or(&text);
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let wrong = || format!("`{given}` is no rate: write 500kbit, 8Mbit or 1Gbit (per second)");
    let scale = match unit {
        "bit" => 1.0,
        "kbit" => 1e3,
        "mbit" => 1e6,
        "gbit" => 1e9,
        _ => return Err(wrong()),
    };
    let bits = number.parse::<f64>().map_err(|_| wrong())? * scale;
    if !(1.0..=1e15).contains(&bits) {
        return Err(format!("`{given}` is out of range"));
    }
    Ok(bits as u64)
}

/// `90s`, `15m`, `2h`, `1d`, `30` (seconds) → seconds.
pub fn parse_seconds(given: &str) -> Result<u64, String> {
    let text = given.trim();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale: u64 = match unit {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(format!("`{given}` is not a duration: write 90s, 15m, 2h or 1d")),
    };
    let number: u64 =
        number.parse().map_err(|_| format!("`{given}` is not a duration: write 90s, 15m or 2h"))?;
    number.checked_mul(scale).ok_or_else(|| format!("`{given}` is out of range"))
}

/// Bytes for people, decimal: `98.4 MB`.
pub fn bytes(count: u64) -> String {
    let count = count as f64;
    for (scale, unit) in [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")] {
        if count >= scale {
            let value = count / scale;
            return if value >= 100.0 {
                format!("{value:.0} {unit}")
            } else {
                format!("{value:.1} {unit}")
            };
        }
    }
    format!("{count} B")
}

/// A duration for people: `850 ms`, `3.2 s`, `4 min 05 s`.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 1.0 {
        format!("{} ms", time.as_millis())
    } else if seconds < 60.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{} min {:02} s", time.as_secs() / 60, time.as_secs() % 60)
    }
}

/// How long ago `then` was: `3 s ago`.
pub fn ago(then: jiff::Timestamp) -> String {
    let seconds = (jiff::Timestamp::now().as_second() - then.as_second()).max(0);
    match seconds {
        0..=119 => format!("{seconds} s ago"),
        120..=7199 => format!("{} min ago", seconds / 60),
        7200..=172_799 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// `, until 2026-…`, where that is known.
pub fn until(at: Option<jiff::Timestamp>) -> String {
    at.map_or_else(String::new, |at| format!(", until {}", at.strftime("%Y-%m-%d %H:%M:%S UTC")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_bytes("300MB"), Ok(300_000_000));
        assert_eq!(parse_bytes("1.5 KiB"), Ok(1536));
        assert_eq!(parse_bytes("42"), Ok(42));
        for bad in ["", "MB", "3 bananas", "-1", "1e99GB", "1..2MB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_bits("8Mbit"), Ok(8_000_000));
        assert_eq!(parse_bits("1.5kbit/s"), Ok(1_500));
        for bad in ["", "8", "8MB", "-1Mbit", "0Mbit", "Mbit", "1e99Gbit"] {
            assert!(parse_bits(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_read_and_nonsense_is_refused() {
        assert_eq!(parse_seconds("15m"), Ok(900));
        assert_eq!(parse_seconds("30"), Ok(30));
        for bad in ["", "s", "1w", "1.5h", "99999999999999999999", "18446744073709551615d"] {
            assert!(parse_seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_are_told_in_the_unit_that_fits() {
        assert_eq!(bytes(98_362_432), "98.4 MB");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(duration(Duration::from_millis(3210)), "3.2 s");
        assert_eq!(duration(Duration::from_secs(245)), "4 min 05 s");
    }
}
