//! What a model package is: GGUF files, manifests, digests, lineage and signatures.
//! Bytes in, verdict out: it never opens a socket, spawns a process or decides a policy.
//! Start reading at [`digest`], then `gguf`, `manifest` and `signing`.
#![forbid(unsafe_code)]

pub mod digest;
pub mod shape;

pub use digest::Digest;
