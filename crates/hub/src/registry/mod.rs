//! The OCI registry.
