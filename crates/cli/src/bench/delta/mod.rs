//! `slm bench delta`: versions of a model, the deltas between them, and what other tools make.

pub mod rivals;
pub mod versions;
