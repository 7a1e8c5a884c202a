//! The hub as others see it: over HTTP and in a browser.

mod api;
mod browser;
