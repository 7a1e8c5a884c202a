//! Blobs by digest, in an object store.
