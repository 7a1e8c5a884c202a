//! Tests of the running model, through real child processes.
#![forbid(unsafe_code)]

mod adapters;
mod child;
mod clients;
mod constrained;
mod context_shift;
mod hostile;
mod lm_eval;
mod otlp;
mod page;
mod prompt_cache;
mod responses;
mod server;
mod sleep;
mod speculation;
mod support;
mod tools;
mod worker;
