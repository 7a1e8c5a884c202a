//! The program as a whole: help, errors and exit codes as snapshots; a hub, a release and a device
//! with the tiny model of `testdata/`; and what ARCHITECTURE.md says of the workspace's crates.

mod architecture;
mod bench;
mod demo;
mod disks_and_clocks;
mod fleet;
mod kills;
mod link;
mod networks;
mod snapshots;
mod storage;
mod whole;
