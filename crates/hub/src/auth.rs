//! Operator tokens, device challenges and device tokens, invitation texts.
