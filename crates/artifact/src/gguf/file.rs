use std::path::{Path, PathBuf};

use super::{GgufError, Header, TensorInfo};

/// An open GGUF file: its header, and its bytes as a read-only memory map.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: memmap2::Mmap,
    header: Header,
}

/// Opens a GGUF file, maps it and checks its header.
///
/// The file must not be shortened while it is open: reading a page that is gone kills the process
/// (`SIGBUS`). Model files here are written under another name and renamed, never changed.
///
/// # Errors
/// [`GgufError::Io`] where it cannot be opened, otherwise as [`Header::parse`].
pub fn open(path: &Path) -> Result<GgufFile, GgufError> {
    let map = crate::map::map(path).map_err(GgufError::io("open", path))?;
    let header = Header::parse(&map)?;
    Ok(GgufFile { path: path.to_owned(), map, header })
}

/// Checks the header of the file at `path`, and that every tensor lies inside the file.
///
/// # Errors
/// As [`open`].
pub fn check_file(path: &Path) -> Result<Header, GgufError> {
    open(path).map(|file| file.header)
}

impl GgufFile {
    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The stored bytes of a tensor of this file; empty for a tensor of another file that does
    /// not lie inside this one.
    pub fn data(&self, tensor: &TensorInfo) -> &[u8] {
        let range = usize::try_from(tensor.offset).ok().and_then(|start| {
            Some(start..start.checked_add(usize::try_from(tensor.size_bytes).ok()?)?)
        });
        range.and_then(|range| self.map.get(range)).unwrap_or_default()
    }
}
