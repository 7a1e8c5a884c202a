use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::{Array, DEFAULT_ALIGNMENT_BYTES, Fault, GgufError, Header, TensorType, Value};

/// The version that is written.
const VERSION: u32 = 3;
const ZEROS: [u8; 64] = [0; 64];

/// A GGUF file to be: its metadata and the list of its tensors, whose data follows through a
/// [`TensorWriter`].
#[derive(Clone, Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, Value)>,
    tensors: Vec<(String, Vec<u64>, TensorType)>,
}

impl Writer {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// A file with the metadata of another, without its tensors.
    pub fn with_metadata_of(header: &Header) -> Self {
        Self { metadata: header.metadata().to_vec(), tensors: Vec::new() }
    }

    /// Sets a metadata entry, in the place of the one with the same key if there is one.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let value = value.into();
        match self.metadata.iter_mut().find(|(known, _)| known == key) {
            Some((_, old)) => *old = value,
            None => self.metadata.push((key.to_owned(), value)),
        }
        self
    }

    /// Removes a metadata entry if there is one.
    pub fn remove(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(known, _)| known != key);
        self
    }

    /// Adds a tensor; `dimensions` as in [`super::TensorInfo`].
    pub fn tensor(&mut self, name: &str, dimensions: &[u64], kind: TensorType) -> &mut Self {
        self.tensors.push((name.to_owned(), dimensions.to_vec(), kind));
        self
    }

    /// Writes the header to `out`; the data follows through the returned writer.
    ///
    /// # Errors
    /// [`GgufError::Invalid`] for what [`Header::parse`] would refuse, [`GgufError::Write`] where
    /// `out` refuses.
    pub fn begin<W: Write>(&self, mut out: W) -> Result<TensorWriter<W>, GgufError> {
        let alignment = self
            .metadata
            .iter()
            .find(|(key, _)| key == "general.alignment")
            .map_or(Some(DEFAULT_ALIGNMENT_BYTES), |(_, value)| value.as_u64())
            .filter(|bytes| bytes.is_power_of_two())
            .ok_or_else(|| {
                let fault = Fault::Other("is not a power of two");
                GgufError::unsupported("metadata `general.alignment`", fault)
            })?;
        let (mut bytes, data_len) = self.header_bytes(alignment)?;
        bytes.resize(bytes.len().next_multiple_of(alignment as usize), 0);
        // What is written can be read: the reader's own checks decide.
        let header = Header::parse_prefix(&bytes, bytes.len() as u64 + data_len)?;
        out.write_all(&bytes).map_err(write_error("header"))?;
        let mut writer = TensorWriter { out, header, alignment, index: 0, written: 0 };
        writer.advance()?;
        Ok(writer)
    }

    /// Writes a whole file at `path`: under a temporary name beside it, flushed to the disk, then
    /// renamed, so that a crash leaves the old file or none. `write` supplies the data.
    ///
    /// # Errors
    /// As [`Writer::begin`] and `write`; [`GgufError::Io`] where the file system refuses.
    pub fn create(
        &self,
        path: &Path,
        write: impl FnOnce(&mut TensorWriter<BufWriter<&File>>) -> Result<(), GgufError>,
    ) -> Result<(), GgufError> {
        crate::files::replace(
            path,
            |file| {
                let mut writer = self.begin(BufWriter::with_capacity(1 << 20, file))?;
                write(&mut writer)?;
                writer.finish()?;
                Ok(())
            },
            |operation, source| GgufError::Io { operation, path: path.to_owned(), source },
        )
    }

    /// The header without its final padding, and the length of the data in bytes.
    fn header_bytes(&self, alignment: u64) -> Result<(Vec<u8>, u64), GgufError> {
        let mut bytes = Vec::new();
        bytes.extend(b"GGUF");
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut bytes, key);
            bytes.extend(value.type_id().to_le_bytes());
            put_value(&mut bytes, value);
        }
        let mut offset = 0_u64;
        for (name, dimensions, kind) in &self.tensors {
            put_string(&mut bytes, name);
            bytes.extend((dimensions.len() as u32).to_le_bytes());
            bytes.extend(dimensions.iter().flat_map(|dimension| dimension.to_le_bytes()));
            bytes.extend(kind.id().to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            offset = dimensions
                .iter()
                .try_fold(1_u64, |product, &dimension| product.checked_mul(dimension))
                .and_then(|elements| kind.bytes_of(elements))
                .and_then(|size| offset.checked_add(size)?.checked_next_multiple_of(alignment))
                .ok_or_else(|| {
                    let fault = Fault::Other("has dimensions that its type cannot hold");
                    GgufError::unsupported(format!("tensor {name:?}"), fault)
                })?;
        }
        Ok((bytes, offset))
    }
}

/// Takes the data of the tensors, one after the other in the order of the header, and pads them.
#[derive(Debug)]
pub struct TensorWriter<W: Write> {
    out: W,
    header: Header,
    alignment: u64,
    index: usize,
    written: u64,
}

impl<W: Write> TensorWriter<W> {
    /// The header that was written.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Writes the next bytes of the current tensor; once it is full, the next one is current.
    ///
    /// # Errors
    /// [`GgufError::Unsupported`] for bytes beyond the current tensor's end,
    /// [`GgufError::Write`] where the output refuses.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        let Some(tensor) = self.header.tensors().get(self.index) else {
            let fault = Fault::Other("gets data after its last tensor");
            return Err(GgufError::unsupported("file", fault));
        };
        if bytes.len() as u64 > tensor.size_bytes - self.written {
            let fault = Fault::Other("gets more data than it holds");
            return Err(GgufError::unsupported(format!("tensor {:?}", tensor.name), fault));
        }
        let fail = write_error(&tensor.name);
        self.out.write_all(bytes).map_err(fail)?;
        self.written += bytes.len() as u64;
        self.advance()
    }

    /// Ends the file.
    ///
    /// # Errors
    /// [`GgufError::Unsupported`] where a tensor lacks data, [`GgufError::Write`] where the
    /// output refuses.
    pub fn finish(mut self) -> Result<W, GgufError> {
        if let Some(tensor) = self.header.tensors().get(self.index) {
            let fault = Fault::Other("lacks data");
            return Err(GgufError::unsupported(format!("tensor {:?}", tensor.name), fault));
        }
        self.out.flush().map_err(write_error("end"))?;
        Ok(self.out)
    }

    /// Pads and goes on to the next tensor where the current one is full.
    fn advance(&mut self) -> Result<(), GgufError> {
        let Some(tensor) = self.header.tensors().get(self.index) else { return Ok(()) };
        if self.written < tensor.size_bytes {
            return Ok(());
        }
        let mut padding = self.written.next_multiple_of(self.alignment) - self.written;
        while padding > 0 {
            let piece = padding.min(ZEROS.len() as u64);
            self.out.write_all(&ZEROS[..piece as usize]).map_err(write_error(&tensor.name))?;
            padding -= piece;
        }
        self.index += 1;
        self.written = 0;
        Ok(())
    }
}

fn write_error(object: &str) -> impl FnOnce(io::Error) -> GgufError {
    let object = object.to_owned();
    move |source| GgufError::Write { object, source }
}

fn put_string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn put_value(bytes: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(value) => bytes.push(*value),
        Value::I8(value) => bytes.extend(value.to_le_bytes()),
        Value::U16(value) => bytes.extend(value.to_le_bytes()),
        Value::I16(value) => bytes.extend(value.to_le_bytes()),
        Value::U32(value) => bytes.extend(value.to_le_bytes()),
        Value::I32(value) => bytes.extend(value.to_le_bytes()),
        Value::F32(value) => bytes.extend(value.to_le_bytes()),
        Value::Bool(value) => bytes.push((*value).into()),
        Value::String(value) => put_string(bytes, value),
        Value::Array(array) => put_array(bytes, array),
        Value::U64(value) => bytes.extend(value.to_le_bytes()),
        Value::I64(value) => bytes.extend(value.to_le_bytes()),
        Value::F64(value) => bytes.extend(value.to_le_bytes()),
    }
}

fn put_array(bytes: &mut Vec<u8>, array: &Array) {
    bytes.extend(array.type_id().to_le_bytes());
    bytes.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(items) => bytes.extend(items),
        Array::I8(items) => bytes.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::U16(items) => bytes.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::I16(items) => bytes.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::U32(items) => bytes.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::I32(items) => bytes.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::F32(items) => bytes.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::Bool(items) => bytes.extend(items.iter().map(|&item| u8::from(item))),
        Array::String(items) => items.iter().for_each(|item| put_string(bytes, item)),
        Array::Array(items) => items.iter().for_each(|item| put_array(bytes, item)),
        Array::U64(items) => bytes.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::I64(items) => bytes.extend(items.iter().flat_map(|item| item.to_le_bytes())),
        Array::F64(items) => bytes.extend(items.iter().flat_map(|item| item.to_le_bytes())),
    }
}
