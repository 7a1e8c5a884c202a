//! Identifiers and names, each a type of its own, checked once at the boundary. Clones share their
//! text: the same few names stand in every device of a fleet.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The longest identifier or name, in bytes.
pub const MAX_NAME_BYTES: usize = 128;

/// Why a string is not a name of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{given}` is not a {kind}: use 1 to {MAX_NAME_BYTES} of a-z and 0-9, with '.', '_', '__' or '-' between them"
)]
pub struct ParseNameError {
    kind: &'static str,
    given: String,
}

/// The form of a path component of an OCI repository's name (distribution-spec 1.1, "Pulling
/// manifests"), since a model's name is one.
fn check(kind: &'static str, given: &str) -> Result<(), ParseNameError> {
    let plain = |char: char| char.is_ascii_lowercase() || char.is_ascii_digit();
    let separates =
        |text: &str| matches!(text, "." | "_" | "__") || text.bytes().all(|byte| byte == b'-');
    let good = (1..=MAX_NAME_BYTES).contains(&given.len())
        && given.starts_with(plain)
        && given.ends_with(plain)
        && given.split(plain).all(separates);
    if good {
        return Ok(());
    }
    Err(ParseNameError { kind, given: given.chars().take(MAX_NAME_BYTES).collect() })
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, utoipa::ToSchema)]
        #[schema(value_type = String)]
        pub struct $type(Arc<str>);

        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = ParseNameError;
            fn from_str(given: &str) -> Result<Self, Self::Err> {
                check($kind, given).map(|()| Self(given.into()))
            }
        }

        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// One enrolled device, given by the hub at enrolment.
    DeviceId, "device id"
);
name!(
    /// One rollout of one release.
    RolloutId, "rollout id"
);
name!(
    /// One invitation to join the fleet.
    InvitationId, "invitation id"
);
name!(
    /// One operator token (its id, never its secret).
    TokenId, "token id"
);
name!(
    /// One publisher key: the first 16 hex digits of the SHA-256 of its SPKI DER.
    KeyId, "key id"
);
name!(
    /// A model line, such as `smollm2-135m-instruct`; also its OCI repository.
    ModelName, "model name"
);
name!(
    /// A channel, such as `beta`.
    ChannelName, "channel name"
);
name!(
    /// One webhook.
    WebhookId, "webhook id"
);
name!(
    /// A variant of a release, such as `q4_k_m`.
    VariantName, "variant name"
);
name!(
    /// A device class, such as `small`.
    ClassName, "class name"
);
name!(
    /// A site: devices behind one link, such as `berlin-3`.
    SiteName, "site name"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_oci_repositories() {
        for good in ["a", "7", "smollm2-135m-instruct", "q4_k_m", "a--b", "a__b", "v1.0"] {
            assert_eq!(good.parse::<ModelName>().map(|name| name.to_string()), Ok(good.to_owned()));
        }
        let long = "a".repeat(MAX_NAME_BYTES + 1);
        for bad in ["", "-a", "a-", "a--", "a..b", "a_.b", "a___b", "A", "a/b", "ä", "a b", &long]
        {
            let error = bad.parse::<ModelName>().unwrap_err().to_string();
            assert!(error.contains("is not a model name: use 1 to 128"), "{error}");
        }
    }
}
