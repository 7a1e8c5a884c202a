//! Everything on the wire between programs: the types of the hub's HTTP API.
//! It never does IO and never decides anything; both ends share these definitions.
//! Start reading at [`device`] (what a device asks and reports), then [`rollout`].
#![forbid(unsafe_code)]

pub mod audit;
pub mod blueprint;
pub mod channel;
pub mod delta;
pub mod device;
pub mod evidence;
pub mod fleet;
pub mod gate;
pub mod id;
pub mod model;
pub mod orders;
pub mod plan;
pub mod probe;
pub mod problem;
pub mod report;
pub mod rollout;
pub mod rules;
pub mod runtime;
pub mod selector;
pub mod telemetry;
pub mod webhook;
pub mod window;

pub use id::*;

/// The version of this API, as it stands in every path (`/v1/…`).
pub const API_VERSION: &str = "v1";

/// One page of a listing, continued with `cursor` (`?cursor=…`) while it is present.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Page<T> {
    /// The entries of this page.
    pub items: Vec<T>,
    /// Where the next page starts; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
}
