//! Runs `fleet-core` on every change and persists what it decides.
