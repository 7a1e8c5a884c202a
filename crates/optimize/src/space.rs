//! Room for what is about to be written.

use std::path::{Path, PathBuf};

use crate::OptimizeError;

/// Refuses a target whose folder is missing or has less than `needed_bytes` free.
pub(crate) fn check(target: &Path, needed_bytes: u64) -> Result<(), OptimizeError> {
    let folder = folder_of(target);
    let stat = rustix::fs::statvfs(&folder)
        .map_err(|error| OptimizeError::io("write into", &folder, error.into()))?;
    let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free_bytes < needed_bytes {
        return Err(OptimizeError::DiskFull { path: target.to_owned(), needed_bytes, free_bytes });
    }
    Ok(())
}

fn folder_of(target: &Path) -> PathBuf {
    match target.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}
