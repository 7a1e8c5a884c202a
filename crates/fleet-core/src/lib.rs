//! fleet-core
