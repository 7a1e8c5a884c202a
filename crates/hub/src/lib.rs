//! The control plane, the registry, the store and the dashboard of a fleet.
//! It never runs a model and never decides by itself: decisions come from `fleet-core`.
//! Start reading at [`Hub::start`] in `server.rs`, then `engine.rs` and `store/`.
#![forbid(unsafe_code)]

pub mod auth;
pub mod backup;
pub mod blobs;
pub mod dashboard;
pub mod db;
pub mod deltas;
pub mod durable;
pub mod engine;
pub mod events;
pub mod fleet;
mod listening;
pub mod neighbours;
pub mod registry;
pub mod replicas;
pub mod routes;
pub mod server;
pub mod store;
pub mod telemetry;
pub mod tls;
pub mod webhooks;

pub use server::{Hub, HubConfig, HubError, RunningHub};
