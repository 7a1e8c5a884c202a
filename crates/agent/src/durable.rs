//! Files that are whole or absent, whatever happens while they are written.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Who may read a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Its owner alone.
    Secret,
    /// Everyone on the machine.
    Public,
}

impl Access {
    fn mode(self) -> u32 {
        match self {
            Self::Secret => 0o600,
            Self::Public => 0o644,
        }
    }
}

/// Replaces `path` by `bytes`. When it returns, the new content is on the disk; when it fails or
/// the power goes, the old content is.
///
/// # Errors
/// Whatever the disk says.
pub fn replace(path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
    let temporary = with_suffix(path, ".new");
    let written = write_synced(&temporary, bytes, access).and_then(|()| {
        std::fs::rename(&temporary, path)?;
        sync_parent(path)
    });
    if written.is_err() {
        // Frees what a full disk would need most.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

fn write_synced(path: &Path, bytes: &[u8], access: Access) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(access.mode()).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes a rename in `path`'s folder durable.
///
/// # Errors
/// Whatever the disk says.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Reads a file of at most `limit_bytes`; `None` if there is none.
///
/// # Errors
/// A longer file is [`io::ErrorKind::InvalidData`]; otherwise whatever the disk says.
pub fn read(path: &Path, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(limit_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit_bytes {
        let message = format!("longer than {limit_bytes} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(Some(bytes))
}

/// `path` with `suffix` after its name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn replaces_whole_files_with_the_right_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        // What a power cut left behind does not matter.
        std::fs::write(with_suffix(&path, ".new"), b"torn").unwrap();
        replace(&path, b"one", Access::Secret).unwrap();
        replace(&path, b"two", Access::Secret).unwrap();
        assert_eq!(read(&path, 3).unwrap().unwrap(), b"two");
        assert_eq!(read(&path, 2).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(read(&folder.path().join("none"), 9).unwrap().is_none());
        assert!(replace(&folder.path().join("no/folder"), b"", Access::Public).is_err());
    }
}
