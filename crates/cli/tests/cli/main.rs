//! The program as a whole: help, errors and exit codes as snapshots; a hub, a release and a device
//! with the tiny model of `testdata/`; and what ARCHITECTURE.md says of the workspace's crates.

mod adapters;
mod architecture;
mod bench;
mod bench_serve;
mod deltas;
mod demo;
mod disks_and_clocks;
mod fleet;
mod kills;
mod link;
mod networks;
mod replicas;
mod sites;
mod snapshots;
mod storage;
mod whole;

#[allow(dead_code, reason = "the hub's tests use more of it")]
#[path = "../../../hub/tests/support/postgres.rs"]
mod postgres;
#[allow(dead_code, reason = "the hub's tests use more of it")]
#[path = "../../../hub/tests/support/s3.rs"]
mod s3;
