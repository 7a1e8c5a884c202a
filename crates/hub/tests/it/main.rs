//! The hub as others see it: over HTTP and in a browser.

mod browser;
