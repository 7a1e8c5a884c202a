//! Sizes and durations as people write and read them.

use std::time::Duration;

/// Why some text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not a size: write a number with a unit, such as 300MB, 512MiB or 1.5GB")]
pub struct ParseSizeError {
    given: String,
}

/// Reads `300MB` (powers of 1000), `512MiB` (powers of 1024) or a plain number of bytes.
///
/// # Errors
/// When it is neither, or more than 2⁵³ bytes.
pub fn parse_size(given: &str) -> Result<u64, ParseSizeError> {
    let error = || ParseSizeError { given: given.chars().take(40).collect() };
    let text = given.trim();
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| error())?;
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err(error()),
    };
    let bytes = number * factor as f64;
    if !bytes.is_finite() || !(1.0..9e15).contains(&bytes) {
        return Err(error());
    }
    Ok(bytes as u64)
}

/// `1.2 GB`, `45 MB`, `3 kB`.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{} kB", bytes / 1_000),
        1_000_000..1_000_000_000 => format!("{} MB", bytes / 1_000_000),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// `12 s`, `3 min`, `2 h`.
pub fn duration(duration: Duration) -> String {
    match duration.as_secs() {
        0 => format!("{} ms", duration.as_millis()),
        seconds @ 1..120 => format!("{seconds} s"),
        seconds @ 120..7_200 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3_600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (given, expected) in [
            ("300MB", Some(300_000_000)),
            ("512 MiB", Some(512 << 20)),
            ("1.5gb", Some(1_500_000_000)),
            ("77", Some(77)),
            ("0", None),
            ("-3MB", None),
            ("MB", None),
            ("3 apples", None),
            ("1e400", None),
            ("99999999999999999999GB", None),
            ("", None),
        ] {
            assert_eq!(parse_size(given).ok(), expected, "{given}");
        }
        assert_eq!([size(7), size(45_200_000), size(1_250_000_000)], ["7 B", "45 MB", "1.2 GB"]);
    }
}
