//! Tests of the running model, through real child processes.
#![forbid(unsafe_code)]

mod adapters;
mod child;
mod clients;
mod constrained;
mod context_shift;
mod hostile;
mod lm_eval;
mod page;
mod responses;
mod server;
mod sleep;
mod support;
mod tools;
mod worker;
