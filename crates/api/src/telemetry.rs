//! What the devices of the fleet count in use, added up by hour and by day: numbers whose amount does
//! not depend on the number of devices.

use serde::{Deserialize, Serialize};

use crate::{ClassName, ModelName, SiteName};

/// Over which time counts are added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Span {
    /// An hour of UTC.
    Hour,
    /// A day of UTC.
    Day,
}

impl Span {
    /// How long it is, in seconds.
    pub fn seconds(self) -> i64 {
        match self {
            Self::Hour => 3600,
            Self::Day => 24 * 3600,
        }
    }
}

/// What is asked of the devices' counts, as query parameters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct TelemetryQuery {
    /// Only this model line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub model: Option<ModelName>,
    /// Only this version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub version: Option<semver::Version>,
    /// Only devices of this class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub class: Option<ClassName>,
    /// Only devices of this site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub site: Option<SiteName>,
    /// By hour or by day; by hour if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(inline)]
    pub span: Option<Span>,
    /// From when on; the last two days, or sixty where they are asked for by day, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>, format = DateTime)]
    pub since: Option<jiff::Timestamp>,
}

/// What was counted of a release, oldest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TelemetrySeries {
    /// The model line.
    pub model: ModelName,
    /// The release.
    #[schema(value_type = String)]
    pub version: semver::Version,
    /// Hours or days in which something was counted.
    pub points: Vec<TelemetryPoint>,
}

/// What all devices that ran a release counted in one hour or day.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TelemetryPoint {
    /// When it begins.
    #[schema(value_type = String, format = DateTime)]
    pub start: jiff::Timestamp,
    /// Reports that the numbers come from.
    pub reports: u64,
    /// Requests answered.
    pub answered: u64,
    /// Requests that failed by our fault.
    pub errors: u64,
    /// Worker processes that ended unasked.
    pub crashes: u64,
    /// Tokens generated after the first of each answer.
    pub decoded_tokens: u64,
    /// Tokens generated per second and answer; absent where nothing was generated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_s: Option<Quantiles>,
    /// Milliseconds to the first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_token_ms: Option<Quantiles>,
    /// The worker's peak of resident memory in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<Quantiles>,
}

/// Quantiles of a sketch: each is within 5 % of a value that was counted.
///
/// A device tells sums, not single requests: a request counts with the mean of those that its device
/// answered between two reports.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Quantiles {
    /// A twentieth is below.
    pub p05: f64,
    /// Half is below.
    pub p50: f64,
    /// A twentieth is above.
    pub p95: f64,
}
