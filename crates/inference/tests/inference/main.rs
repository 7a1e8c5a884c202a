//! Tests of the running model, through real child processes.
#![forbid(unsafe_code)]

mod child;
mod server;
mod support;
mod worker;
