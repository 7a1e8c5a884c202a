//! Running a model: the llama.cpp wrapper, the worker process, the host and the HTTP surface.
//! It never decides which model to run, and never lets an engine crash reach its caller.
//! Start reading at [`worker`], then [`host`] and [`server`]; [`llama`] and `memory` are
//! the only unsafe code.
#![deny(unsafe_code)]

pub mod chat;
pub mod child;
pub mod constraint;
pub mod host;
#[allow(unsafe_code)]
pub mod llama;
#[allow(unsafe_code)]
mod memory;
mod metrics;
pub mod otlp;
pub mod probe;
pub mod server;
mod shape;
pub mod tools;
pub mod worker;
