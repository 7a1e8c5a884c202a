//! Which class a device belongs to.
