//! Memory maps of files: the one place of this crate that needs `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

use memmap2::Mmap;

/// A file's bytes as a read-only memory map.
///
/// The file must not be shortened while it is mapped: reading a page that is gone kills the
/// process (`SIGBUS`). Model files here are written under another name and renamed, never changed.
#[derive(Debug)]
pub struct MappedFile(Mmap);

impl MappedFile {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// Where it cannot be opened or mapped.
    pub fn open(path: &Path) -> io::Result<Self> {
        map(path).map(Self)
    }
}

impl std::ops::Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Maps a file for reading.
///
/// The file must not be shortened while it is mapped: reading a page that is gone kills the
/// process (`SIGBUS`). Model files here are written under another name and renamed, never changed.
///
/// # Errors
/// The file cannot be opened or mapped; it is a folder.
pub fn map(path: &Path) -> io::Result<Mmap> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    // SAFETY: the map is read-only, and files given to this crate are replaced by rename and
    // never written in place while they are in use, as the public documentation demands.
    unsafe { Mmap::map(&file) }
}
