//! Desired configuration in layers, with the origin of every value.
