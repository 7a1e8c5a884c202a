//! The SQLite connection and its migrations.
