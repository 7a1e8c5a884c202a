//! Small files that must be whole after a crash, and secrets that only their owner may read.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::Path;

/// Mode bits of a secret's file: its owner alone.
const SECRET_MODE: u32 = 0o600;

/// Writes `bytes` to `path` in one step: after a crash the file is the old one or the new one. Only
/// its owner may read it. When this returns, the bytes are on the disk.
///
/// # Errors
/// Whatever the file system says; `path` is then unchanged.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    // `tempfile` makes files with mode 0600.
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    sync_folder(folder)
}

/// Reads a secret of at most `limit_bytes`, and takes it back from everyone but its owner if its
/// mode is too open.
///
/// # Errors
/// Whatever the file system says; a longer file is [`io::ErrorKind::InvalidData`].
pub fn read_secret(path: &Path, limit_bytes: u64) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if metadata.len() > limit_bytes {
        return Err(io::ErrorKind::InvalidData.into());
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "others could read this secret; mode set to 0600");
        fs::set_permissions(path, fs::Permissions::from_mode(SECRET_MODE))?;
    }
    fs::read(path)
}

/// Makes a folder (and those above it) that only its owner may enter.
///
/// # Errors
/// Whatever the file system says.
pub fn create_private_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Makes the names in `folder` durable: a rename or a new file in it survives loss of power.
///
/// # Errors
/// Whatever the file system says.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
