//! Files read as memory maps, and written so that a crash leaves the old one or the new one,
//! never half of one.

use std::fs::File;
use std::io;
use std::path::Path;

pub use crate::map::map;

/// Writes a file beside `path` under a temporary name, flushes it to the disk and renames it to
/// `path`; durable when it returns. `error` makes an error of an operation's name and its cause.
///
/// # Errors
/// Whatever `write` and `error` make; then `path` is as it was.
pub fn replace<E>(
    path: &Path,
    write: impl FnOnce(&File) -> Result<(), E>,
    error: impl Fn(&'static str, io::Error) -> E,
) -> Result<(), E> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut builder = tempfile::Builder::new();
    builder.prefix(".slmops-").suffix(".partial");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // What the umask leaves of it: model files are no secrets.
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let file = builder.tempfile_in(folder).map_err(|source| error("create", source))?;
    write(file.as_file())?;
    file.as_file().sync_all().map_err(|source| error("flush", source))?;
    file.persist(path).map_err(|refused| error("rename", refused.error))?;
    let folder = File::open(folder).map_err(|source| error("open the folder of", source))?;
    folder.sync_all().map_err(|source| error("flush the folder of", source))
}
