//! Tests of the crate's public surface: import, other people's tools, hostile bytes.

mod allocation;
mod huggingface;
mod interop;
mod mutation;
mod tiny;
