//! `Range` and `Content-Range`.

use std::ops::Range;

use axum::http::{HeaderMap, header};

use super::error::RegistryError;

/// The part of a blob of `size_bytes` that a request asks for; `None` for all of it. A header that
/// cannot be read, several ranges, or an `If-Range` that is not `etag` also mean all of it
/// (RFC 9110, sections 13.1.5 and 14.2).
pub(super) fn requested(
    headers: &HeaderMap,
    size_bytes: u64,
    etag: &str,
) -> Result<Option<Range<u64>>, RegistryError> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    if text(header::IF_RANGE).is_some_and(|given| given != etag) {
        return Ok(None);
    }
    let Some(asked) = text(header::RANGE).and_then(parse) else { return Ok(None) };
    let range = match asked {
        Asked::From(first, last) => first..last.saturating_add(1).min(size_bytes),
        Asked::Last(count) => size_bytes.saturating_sub(count)..size_bytes,
    };
    match range.is_empty() {
        true => Err(RegistryError::Unsatisfiable { size_bytes }),
        false => Ok(Some(range)),
    }
}

#[derive(Debug, PartialEq)]
enum Asked {
    /// From the first to the last byte, both included.
    From(u64, u64),
    /// The last so many bytes.
    Last(u64),
}

fn parse(text: &str) -> Option<Asked> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    match (first.trim(), last.trim()) {
        ("", count) => number(count).map(Asked::Last),
        (first, "") => Some(Asked::From(number(first)?, u64::MAX)),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Asked::From(first, last))
        }
    }
}

/// The `Content-Range` of a chunk: `START-END`, both included (distribution-spec 1.1, "Pushing a
/// blob in chunks"); the form `bytes START-END/TOTAL` is taken, too.
pub(super) fn chunk(headers: &HeaderMap) -> Result<Option<Range<u64>>, RegistryError> {
    let Some(value) = headers.get(header::CONTENT_RANGE) else { return Ok(None) };
    let read = || {
        let text = value.to_str().ok()?.trim();
        let text =
            text.strip_prefix("bytes").map_or(text, |rest| rest.trim_start_matches(['=', ' ']));
        let text = text.split_once('/').map_or(text, |(range, _total)| range);
        let (start, end) = text.split_once('-')?;
        let (start, end) = (number(start)?, number(end)?.checked_add(1)?);
        (start < end).then_some(start..end)
    };
    read().map(Some).ok_or_else(|| {
        RegistryError::upload_invalid("Content-Range cannot be read: expected `START-END`")
    })
}

/// Digits alone: `parse` would also take a `+`.
fn number(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn header(name: header::HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn ranges_of_a_blob() {
        let check = |value, expected: Option<Range<u64>>| {
            let headers = header(header::RANGE, value);
            assert_eq!(requested(&headers, 10, "\"e\"").unwrap(), expected, "{value}");
        };
        check("bytes=0-0", Some(0..1));
        check("bytes=2-5", Some(2..6));
        check("bytes=2-", Some(2..10));
        check("bytes=2-99", Some(2..10));
        check("bytes=2-18446744073709551615", Some(2..10));
        check("bytes=-3", Some(7..10));
        check("bytes=-99", Some(0..10));
        for ignored in ["bytes=5-2", "bytes=a-b", "bytes=", "bytes=-", "items=0-1", "bytes=0-1,3-4"]
        {
            check(ignored, None);
        }
        check("bytes=99999999999999999999-", None);
        for outside in ["bytes=10-", "bytes=10-20", "bytes=-0"] {
            let result = requested(&header(header::RANGE, outside), 10, "\"e\"");
            assert!(matches!(result, Err(RegistryError::Unsatisfiable { size_bytes: 10 })));
        }
        let mut headers = header(header::RANGE, "bytes=2-5");
        headers.insert(header::IF_RANGE, HeaderValue::from_static("\"other\""));
        assert_eq!(requested(&headers, 10, "\"e\"").unwrap(), None);
        headers.insert(header::IF_RANGE, HeaderValue::from_static("\"e\""));
        assert_eq!(requested(&headers, 10, "\"e\"").unwrap(), Some(2..6));
    }

    #[test]
    fn ranges_of_a_chunk() {
        for good in ["5-9", "bytes 5-9/100", "bytes=5-9", "bytes 5-9/*"] {
            assert_eq!(chunk(&header(header::CONTENT_RANGE, good)).unwrap(), Some(5..10), "{good}");
        }
        assert_eq!(chunk(&HeaderMap::new()).unwrap(), None);
        for bad in ["", "5", "9-5", "-5", "5-", "a-b", "+5-9", "0-18446744073709551615"] {
            assert!(chunk(&header(header::CONTENT_RANGE, bad)).is_err(), "{bad}");
        }
    }
}
