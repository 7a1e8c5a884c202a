//! One device's program: it pulls what the hub asks for, proves it here, serves it, and goes back
//! by itself. It never sends anyone's text, and never decides: that is `slmops-agent-core`'s part.
//! Start reading at [`shell`], then [`hub`], [`download`] and [`engine`].
#![forbid(unsafe_code)]

pub mod cli;
pub mod clock;
pub mod download;
pub mod durable;
pub mod engine;
pub mod error;
pub mod facts;
pub mod hub;
pub mod identity;
mod nearby;
pub mod outbox;
pub mod peers;
pub mod shell;
pub mod state;
pub mod status;
pub mod tls;
pub mod trust;
pub mod units;
pub mod words;
