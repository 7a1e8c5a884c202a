//! The hub's own certificate authority and its server certificate.
