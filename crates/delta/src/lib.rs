//! New model bytes from old model bytes: a delta codec that knows what a quantisation block is.
//! It never opens a file and trusts nothing: what comes out is checked, frame by frame and whole.
//! Start reading at [`encode`], [`apply`] and, for files that are changed where they lie,
//! [`Rewrite`]; the format is described in `docs/delta-format.md`.
#![forbid(unsafe_code)]

mod apply;
mod baseline;
mod coder;
mod encode;
mod error;
mod format;
mod layout;
mod matches;
mod model;
mod numbers;
mod planes;
mod rewrite;
mod sticky;

pub use apply::{MAX_THREADS, apply};
pub use baseline::order0_bytes;
pub use encode::{Encoded, Method, Part, encode};
pub use error::DeltaError;
pub use format::{Frame, Header, MAX_FRAME_BYTES, MAX_HEADER_BYTES, MAX_PREFIX_BYTES, VERSION};
pub use rewrite::{Course, Rewrite, Run, Storage};
pub use sticky::round_to_scales;

#[cfg(test)]
mod tests;
