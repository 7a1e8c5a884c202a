//! Change notices, for pages and for waiting devices.
