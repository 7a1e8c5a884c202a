//! Names in the registry's paths, and what a path asks for.

use std::fmt;
use std::str::FromStr;

use slmops_artifact::Digest;

use super::error::RegistryError;

/// The longest repository name, in bytes.
pub const MAX_REPOSITORY_BYTES: usize = 255;
/// The longest tag, in bytes (distribution-spec 1.1, "Pulling manifests").
pub const MAX_TAG_BYTES: usize = 128;

/// A repository's name: path components of lower-case letters, digits and single separators.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepositoryName(String);

impl RepositoryName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RepositoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RepositoryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RepositoryName {
    type Err = RegistryError;

    /// distribution-spec 1.1, "Pulling manifests":
    /// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(\/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*`
    fn from_str(given: &str) -> Result<Self, Self::Err> {
        if given.len() <= MAX_REPOSITORY_BYTES && given.split('/').all(is_component) {
            return Ok(Self(given.to_owned()));
        }
        let shown: String = given.chars().take(MAX_REPOSITORY_BYTES).collect();
        Err(RegistryError::name_invalid(format!(
            "`{shown}` is not a repository name: use lower-case letters and digits, joined by `.`, `_`, `-` or `/`"
        )))
    }
}

fn is_component(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let mut rest = text.as_bytes();
    loop {
        let word = rest.iter().take_while(|byte| plain(**byte)).count();
        if word == 0 {
            return false;
        }
        rest = &rest[word..];
        if rest.is_empty() {
            return true;
        }
        let separator = rest.iter().take_while(|byte| !plain(**byte)).count();
        let good = match &rest[..separator] {
            b"." | b"_" | b"__" => true,
            dashes => dashes.iter().all(|byte| *byte == b'-'),
        };
        if !good {
            return false;
        }
        rest = &rest[separator..];
    }
}

/// What a manifest is asked for by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// A tag, which may move.
    Tag(String),
    /// A digest, which may not.
    Digest(Digest),
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

impl FromStr for Reference {
    type Err = RegistryError;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        // A tag has no colon; a digest always has.
        if given.contains(':') {
            return parse_digest(given).map(Self::Digest);
        }
        let first = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let good = (1..=MAX_TAG_BYTES).contains(&given.len())
            && given.bytes().next().is_some_and(first)
            && given.bytes().all(|byte| first(byte) || byte == b'.' || byte == b'-');
        if good {
            return Ok(Self::Tag(given.to_owned()));
        }
        let shown: String = given.chars().take(MAX_TAG_BYTES).collect();
        Err(RegistryError::manifest_invalid(format!("`{shown}` is neither a tag nor a digest")))
    }
}

pub(super) fn parse_digest(given: &str) -> Result<Digest, RegistryError> {
    given.parse().map_err(|error: slmops_artifact::digest::ParseDigestError| {
        RegistryError::digest_invalid(format!("{error} (no other algorithm is supported)"))
    })
}

/// What a path below `/v2/` asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    Catalogue,
    Tags(RepositoryName),
    Manifest(RepositoryName, Reference),
    Blob(RepositoryName, Digest),
    /// Where uploads begin.
    Uploads(RepositoryName),
    Upload(RepositoryName, String),
    Referrers(RepositoryName, Digest),
}

impl Target {
    /// Reads a path, percent-decoded, without `/v2/`. A repository may have a component such as
    /// `blobs`, so the path is read from its end.
    pub(super) fn parse(path: &str) -> Result<Self, RegistryError> {
        if path == "_catalog" {
            return Ok(Self::Catalogue);
        }
        let parts: Vec<&str> = path.split('/').collect();
        let name = |parts: &[&str]| parts.join("/").parse::<RepositoryName>();
        Ok(match parts.as_slice() {
            [repository @ .., "tags", "list"] => Self::Tags(name(repository)?),
            [repository @ .., "blobs", "uploads"] | [repository @ .., "blobs", "uploads", ""] => {
                Self::Uploads(name(repository)?)
            }
            [repository @ .., "blobs", "uploads", id] => {
                Self::Upload(name(repository)?, upload_id(id)?)
            }
            [repository @ .., "blobs", digest] => {
                Self::Blob(name(repository)?, parse_digest(digest)?)
            }
            [repository @ .., "manifests", reference] => {
                Self::Manifest(name(repository)?, reference.parse()?)
            }
            [repository @ .., "referrers", digest] => {
                Self::Referrers(name(repository)?, parse_digest(digest)?)
            }
            _ => return Err(RegistryError::no_such_page()),
        })
    }
}

/// Uploads are named by 32 hex digits; nothing else ever reaches the file system.
fn upload_id(given: &str) -> Result<String, RegistryError> {
    let good = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if given.len() == 32 && given.bytes().all(good) {
        return Ok(given.to_owned());
    }
    Err(RegistryError::upload_unknown(&given.chars().take(64).collect::<String>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_names() {
        let long = "a".repeat(MAX_REPOSITORY_BYTES);
        for good in
            ["a", "a/b/c", "smollm2-135m", "a--b", "a__b", "a.b_c-d/e0", "blobs/uploads", &long]
        {
            assert!(good.parse::<RepositoryName>().is_ok(), "{good}");
        }
        let long = "a".repeat(MAX_REPOSITORY_BYTES + 1);
        for bad in [
            "", "/", "a/", "/a", "a//b", "A", "a..b", "a___b", "a.-b", "-a", "a-", "../a",
            "a/../b", ".", "a b", "a\0b", "ä", "a%2fb", &long,
        ] {
            assert!(bad.parse::<RepositoryName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn references() {
        let digest = Digest::of(b"x").to_string();
        assert!(matches!(digest.parse(), Ok(Reference::Digest(_))));
        for good in ["latest", "1.0.0", "_x", "A-b.c_d", &"a".repeat(MAX_TAG_BYTES)] {
            assert!(matches!(good.parse(), Ok(Reference::Tag(tag)) if tag == good), "{good}");
        }
        let sha512 = format!("sha512:{}", "0".repeat(128));
        for bad in ["", ".a", "-a", "a/b", "a b", "sha256:00", &sha512, &"a".repeat(129)] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn paths_are_read_from_the_end() {
        let digest = Digest::of(b"x");
        let name = |text: &str| text.parse::<RepositoryName>().unwrap();
        let check = |path: &str, target: Target| assert_eq!(Target::parse(path).unwrap(), target);
        check("a/tags/list", Target::Tags(name("a")));
        check("a/tags/list/tags/list", Target::Tags(name("a/tags/list")));
        check("a/blobs/uploads/", Target::Uploads(name("a")));
        check("blobs/uploads/blobs/uploads", Target::Uploads(name("blobs/uploads")));
        check(&format!("a/b/blobs/{digest}"), Target::Blob(name("a/b"), digest));
        check(&format!("a/referrers/{digest}"), Target::Referrers(name("a"), digest));
        let tag = Reference::Tag("uploads".to_owned());
        check("a/blobs/manifests/uploads", Target::Manifest(name("a/blobs"), tag));
        let id = "0123456789abcdef0123456789abcdef";
        check(&format!("a/blobs/uploads/{id}"), Target::Upload(name("a"), id.to_owned()));
        for bad in ["", "a", "a/b", "tags/list", "a/blobs/x", "a/blobs/uploads/../x", "_catalog/x"]
        {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }
}
