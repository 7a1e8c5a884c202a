//! What a model package is: GGUF files, manifests, digests, lineage and signatures.
//! Bytes in, verdict out: it never opens a socket, spawns a process or decides a policy.
//! Start reading at [`package`], then [`signing`] and [`gguf`].
#![deny(unsafe_code)]

pub mod digest;
pub mod files;
pub mod gguf;
pub mod huggingface;
pub mod lineage;
mod map;
pub mod package;
pub mod shape;
pub mod signing;
pub mod title;

pub use digest::Digest;
pub use map::MappedFile;
