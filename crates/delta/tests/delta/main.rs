//! The decoder from outside: what a device does with whatever it was sent.

#[path = "../../../artifact/tests/artifact/allocation.rs"]
mod allocation;
mod hostile;
