//! What the hub remembers: whole transactions, behind a trait.
