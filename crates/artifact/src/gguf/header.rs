use std::collections::HashMap;
use std::hash::Hash;

use super::{
    Array, DEFAULT_ALIGNMENT_BYTES, Fault, GgufError, MAX_ALIGNMENT_BYTES, MAX_ARRAY_DEPTH,
    MAX_ARRAY_LEN, MAX_DIMENSIONS, MAX_KEY_BYTES, MAX_METADATA_ENTRIES, MAX_METADATA_MEMORY_BYTES,
    MAX_STRING_BYTES, MAX_TENSOR_NAME_BYTES, MAX_TENSORS, TensorType, Value,
};

const STRING_MEMORY_BYTES: u64 = size_of::<String>() as u64;
const ARRAY_MEMORY_BYTES: u64 = size_of::<Array>() as u64;

/// Everything of a GGUF file but the weights. Once parsed, every tensor lies inside the file.
#[derive(Clone, Debug)]
pub struct Header {
    version: u32,
    metadata: Vec<(String, Value)>,
    tensors: Vec<TensorInfo>,
    alignment_bytes: u64,
    data_offset: u64,
    keys: HashMap<String, usize>,
    names: HashMap<String, usize>,
}

/// Where one tensor lies and what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Elements per dimension, the fastest-changing first: a matrix that maps `columns` inputs to
    /// `rows` outputs is `[columns, rows]`.
    pub dimensions: Vec<u64>,
    /// How its elements are stored.
    pub tensor_type: TensorType,
    /// Where it begins, in bytes from the start of the file.
    pub offset: u64,
    /// Its length in bytes.
    pub size_bytes: u64,
}

impl TensorInfo {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.dimensions.iter().product()
    }

    /// Elements of one row (the first dimension).
    pub fn row_elements(&self) -> u64 {
        self.dimensions.first().copied().unwrap_or(1)
    }
}

impl Header {
    /// Parses a whole file.
    ///
    /// # Errors
    /// [`GgufError::Invalid`], with the part and its offset, for anything that breaks the format
    /// or a bound of this module.
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        Self::parse_prefix(bytes, bytes.len() as u64)
    }

    /// Parses the header of a file of `file_len` bytes from its first bytes, which must hold the
    /// whole header but need not hold the weights.
    ///
    /// # Errors
    /// As [`Header::parse`]; [`Fault::Truncated`] where the prefix is too short.
    pub fn parse_prefix(bytes: &[u8], file_len: u64) -> Result<Self, GgufError> {
        let mut reader = Reader { bytes, position: 0, memory_bytes: 0 };
        let version = reader.preamble()?;
        let tensor_count = reader.count("tensor count", MAX_TENSORS)?;
        let entry_count = reader.count("metadata entry count", MAX_METADATA_ENTRIES)?;
        let (metadata, keys) = reader.metadata(entry_count)?;
        let alignment_bytes = alignment(&metadata, &keys)?;
        let mut tensors = Vec::new();
        let mut names = HashMap::new();
        for index in 0..tensor_count {
            let offset = reader.position;
            let tensor = reader.tensor(index, alignment_bytes)?;
            insert_unique(&mut names, tensor.name.clone(), tensors.len()).map_err(|fault| {
                GgufError::invalid(format!("tensor {:?}", tensor.name), offset, fault)
            })?;
            tensors.push(tensor);
        }
        let data_offset = reader.position.next_multiple_of(alignment_bytes);
        place(&mut tensors, data_offset, file_len)?;
        Ok(Self { version, metadata, tensors, alignment_bytes, data_offset, keys, names })
    }

    /// The format version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The metadata in file order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// The tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.names.get(name).map(|&index| &self.tensors[index])
    }

    /// Alignment of the weights in bytes.
    pub fn alignment_bytes(&self) -> u64 {
        self.alignment_bytes
    }

    /// Where the weights begin, in bytes from the start of the file.
    pub fn data_offset(&self) -> u64 {
        self.data_offset
    }

    /// A metadata value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).map(|&index| &self.metadata[index].1)
    }

    /// A metadata value that is text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// A metadata value that is a non-negative whole number.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// The architecture, such as `llama`.
    ///
    /// # Errors
    /// [`GgufError::Missing`] where the file names none.
    pub fn architecture(&self) -> Result<&str, GgufError> {
        self.text("general.architecture").ok_or_else(|| GgufError::Missing {
            key: "general.architecture".to_owned(),
            expected: "a string",
        })
    }

    /// The model's chat template, where it has one.
    pub fn chat_template(&self) -> Option<&str> {
        self.text("tokenizer.chat_template")
    }

    /// The file type by name, such as `Q4_K_M`; where the file names none, the type that holds
    /// most of the weights.
    pub fn file_type(&self) -> &'static str {
        if let Some(name) = self.number("general.file_type").and_then(super::file_type_name) {
            return name;
        }
        let mut bytes_by_type = HashMap::<TensorType, u64>::new();
        for tensor in &self.tensors {
            let sum = bytes_by_type.entry(tensor.tensor_type).or_default();
            *sum = sum.saturating_add(tensor.size_bytes);
        }
        let most = bytes_by_type.into_iter().max_by_key(|&(kind, bytes)| (bytes, kind));
        most.map_or("F32", |(kind, _)| kind.name())
    }

    /// Number of parameters: the elements of all tensors together.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().fold(0, |sum, tensor| tensor.elements().saturating_add(sum))
    }
}

/// The `general.alignment` of the metadata.
fn alignment(
    metadata: &[(String, Value)],
    keys: &HashMap<String, usize>,
) -> Result<u64, GgufError> {
    let Some(&index) = keys.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT_BYTES) };
    let error = |fault| GgufError::invalid("metadata `general.alignment`", 0, fault);
    let bytes = metadata[index].1.as_u64().ok_or(error(Fault::Other("is not a whole number")))?;
    if !bytes.is_power_of_two() {
        return Err(error(Fault::Other("is not a power of two")));
    }
    if bytes > MAX_ALIGNMENT_BYTES {
        let what = "the alignment in bytes";
        return Err(error(Fault::Limit { what, found: bytes, limit: MAX_ALIGNMENT_BYTES }));
    }
    Ok(bytes)
}

/// Turns offsets within the data into offsets within the file, and checks that every tensor lies
/// inside the file and that no two overlap.
fn place(tensors: &mut [TensorInfo], data_offset: u64, file_len: u64) -> Result<(), GgufError> {
    for tensor in tensors.iter_mut() {
        let relative = tensor.offset;
        let outside = |available| {
            let fault = Fault::Truncated { needed: tensor.size_bytes, available };
            GgufError::invalid(format!("data of tensor {:?}", tensor.name), relative, fault)
        };
        let start = data_offset.checked_add(relative).ok_or_else(|| outside(0))?;
        let end = start.checked_add(tensor.size_bytes).ok_or_else(|| outside(0))?;
        if end > file_len {
            return Err(outside(file_len.saturating_sub(start)));
        }
        tensor.offset = start;
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].size_bytes > pair[1].offset {
            return Err(GgufError::invalid(
                format!("data of tensor {:?}", pair[1].name),
                pair[1].offset,
                Fault::Other("overlaps the tensor before it"),
            ));
        }
    }
    Ok(())
}

fn insert_unique<K: Eq + Hash>(
    map: &mut HashMap<K, usize>,
    key: K,
    index: usize,
) -> Result<(), Fault> {
    match map.insert(key, index) {
        None => Ok(()),
        Some(_) => Err(Fault::Duplicate),
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    position: u64,
    memory_bytes: u64,
}

impl<'a> Reader<'a> {
    fn left(&self) -> u64 {
        self.bytes.len() as u64 - self.position
    }

    fn take(&mut self, len: u64, object: &str) -> Result<&'a [u8], GgufError> {
        if len > self.left() {
            let fault = Fault::Truncated { needed: len, available: self.left() };
            return Err(GgufError::invalid(object, self.position, fault));
        }
        // `left` fits in `usize`, since it is the length of a slice.
        let start = self.position as usize;
        self.position += len;
        Ok(&self.bytes[start..start + len as usize])
    }

    fn array<const N: usize>(&mut self, object: &str) -> Result<[u8; N], GgufError> {
        let taken = self.take(N as u64, object)?;
        Ok(taken.try_into().expect("`take` returns as many bytes as asked"))
    }

    fn u32(&mut self, object: &str) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array(object)?))
    }

    fn u64(&mut self, object: &str) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array(object)?))
    }

    fn count(&mut self, what: &'static str, limit: u64) -> Result<u64, GgufError> {
        let offset = self.position;
        let found = self.u64(what)?;
        if found > limit {
            return Err(GgufError::invalid("header", offset, Fault::Limit { what, found, limit }));
        }
        Ok(found)
    }

    fn charge(&mut self, object: &str, bytes: u64) -> Result<(), GgufError> {
        self.memory_bytes = self.memory_bytes.saturating_add(bytes);
        if self.memory_bytes > MAX_METADATA_MEMORY_BYTES {
            let fault = Fault::Limit {
                what: "the memory of all metadata in bytes",
                found: self.memory_bytes,
                limit: MAX_METADATA_MEMORY_BYTES,
            };
            return Err(GgufError::invalid(object, self.position, fault));
        }
        Ok(())
    }

    fn preamble(&mut self) -> Result<u32, GgufError> {
        let magic = self.array::<4>("magic")?;
        if &magic != b"GGUF" {
            return Err(GgufError::invalid("magic", 0, Fault::Magic(magic)));
        }
        let version = self.u32("version")?;
        match version {
            2 | 3 => Ok(version),
            // A big-endian 1, 2 or 3 has its only set bits in the upper half.
            _ if version & 0xffff == 0 && version != 0 => {
                Err(GgufError::invalid("version", 4, Fault::BigEndian))
            }
            _ => Err(GgufError::invalid("version", 4, Fault::Version(version))),
        }
    }

    fn string(
        &mut self,
        object: &str,
        what: &'static str,
        limit: u64,
    ) -> Result<String, GgufError> {
        let offset = self.position;
        let found = self.u64(object)?;
        if found > limit {
            return Err(GgufError::invalid(object, offset, Fault::Limit { what, found, limit }));
        }
        self.charge(object, STRING_MEMORY_BYTES + found)?;
        let bytes = self.take(found, object)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(GgufError::invalid(object, offset, Fault::NotUtf8)),
        }
    }

    #[allow(clippy::type_complexity, reason = "an ordered list and its index")]
    fn metadata(
        &mut self,
        count: u64,
    ) -> Result<(Vec<(String, Value)>, HashMap<String, usize>), GgufError> {
        let mut metadata = Vec::new();
        let mut keys = HashMap::new();
        for index in 0..count {
            let offset = self.position;
            let object = format!("key of metadata entry {index}");
            let key = self.string(&object, "the key's length in bytes", MAX_KEY_BYTES)?;
            let object = format!("metadata `{}`", printable(&key));
            insert_unique(&mut keys, key.clone(), metadata.len())
                .map_err(|fault| GgufError::invalid(&object, offset, fault))?;
            let kind = self.u32(&object)?;
            let value = self.value(kind, &object)?;
            metadata.push((key, value));
        }
        Ok((metadata, keys))
    }

    fn bool(&mut self, object: &str) -> Result<bool, GgufError> {
        let offset = self.position;
        match self.array::<1>(object)? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(GgufError::invalid(
                object,
                offset,
                Fault::Other("is a boolean that is neither 0 nor 1"),
            )),
        }
    }

    fn value(&mut self, kind: u32, object: &str) -> Result<Value, GgufError> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(object)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(object)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(object)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(object)?)),
            4 => Value::U32(self.u32(object)?),
            5 => Value::I32(i32::from_le_bytes(self.array(object)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(object)?)),
            7 => Value::Bool(self.bool(object)?),
            8 => Value::String(self.string(
                object,
                "the text's length in bytes",
                MAX_STRING_BYTES,
            )?),
            9 => Value::Array(self.array_value(object, 1)?),
            10 => Value::U64(self.u64(object)?),
            11 => Value::I64(i64::from_le_bytes(self.array(object)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(object)?)),
            _ => return Err(GgufError::invalid(object, self.position, Fault::ValueType(kind))),
        })
    }

    fn array_value(&mut self, object: &str, depth: u32) -> Result<Array, GgufError> {
        let offset = self.position;
        if depth > MAX_ARRAY_DEPTH {
            let fault = Fault::Limit {
                what: "the nesting of arrays",
                found: depth.into(),
                limit: MAX_ARRAY_DEPTH.into(),
            };
            return Err(GgufError::invalid(object, offset, fault));
        }
        let kind = self.u32(object)?;
        let len = self.u64(object)?;
        if len > MAX_ARRAY_LEN {
            let what = "the array's length";
            let fault = Fault::Limit { what, found: len, limit: MAX_ARRAY_LEN };
            return Err(GgufError::invalid(object, offset, fault));
        }
        Ok(match kind {
            0 => Array::U8(self.numbers(len, object, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(len, object, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(len, object, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(len, object, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(len, object, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(len, object, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(len, object, f32::from_le_bytes)?),
            10 => Array::U64(self.numbers(len, object, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(len, object, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(len, object, f64::from_le_bytes)?),
            7 => {
                self.charge(object, len)?;
                // Each push follows bytes that were read, so the list cannot outgrow the file.
                let mut items = Vec::new();
                for _ in 0..len {
                    items.push(self.bool(object)?);
                }
                Array::Bool(items)
            }
            8 => {
                let mut items = Vec::new();
                for _ in 0..len {
                    let what = "the text's length in bytes";
                    items.push(self.string(object, what, MAX_STRING_BYTES)?);
                }
                Array::String(items)
            }
            9 => {
                let mut items = Vec::new();
                for _ in 0..len {
                    self.charge(object, ARRAY_MEMORY_BYTES)?;
                    items.push(self.array_value(object, depth + 1)?);
                }
                Array::Array(items)
            }
            _ => return Err(GgufError::invalid(object, offset, Fault::ValueType(kind))),
        })
    }

    /// `len` numbers; allocates only after the bytes are known to exist.
    fn numbers<const N: usize, T>(
        &mut self,
        len: u64,
        object: &str,
        from: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        // No overflow: `len` is at most MAX_ARRAY_LEN and N at most 8.
        let bytes = len * N as u64;
        self.charge(object, bytes)?;
        let taken = self.take(bytes, object)?;
        let chunks = taken.chunks_exact(N);
        Ok(chunks.map(|chunk| from(chunk.try_into().expect("chunks of N bytes"))).collect())
    }

    /// A tensor's entry; its `offset` is still relative to the data.
    fn tensor(&mut self, index: u64, alignment_bytes: u64) -> Result<TensorInfo, GgufError> {
        let begin = self.position;
        let object = format!("name of tensor {index}");
        let name = self.string(&object, "the name's length in bytes", MAX_TENSOR_NAME_BYTES)?;
        let object = format!("tensor {name:?}");
        let fail = |fault| Err(GgufError::invalid(object.as_str(), begin, fault));
        let dimension_count = self.u32(&object)?;
        if dimension_count > MAX_DIMENSIONS {
            return fail(Fault::Limit {
                what: "the number of dimensions",
                found: dimension_count.into(),
                limit: MAX_DIMENSIONS.into(),
            });
        }
        let mut dimensions = Vec::with_capacity(dimension_count as usize);
        let mut elements = 1_u64;
        for _ in 0..dimension_count {
            let dimension = self.u64(&object)?;
            if dimension == 0 {
                return fail(Fault::Other("has a dimension of 0"));
            }
            // ggml counts elements in a signed 64-bit number.
            elements = match elements.checked_mul(dimension) {
                Some(product) if i64::try_from(product).is_ok() => product,
                _ => return fail(Fault::Other("has more elements than 64 bits can count")),
            };
            dimensions.push(dimension);
        }
        let type_id = self.u32(&object)?;
        let Some(tensor_type) = TensorType::from_id(type_id) else {
            return fail(Fault::TensorType(type_id));
        };
        let row = dimensions.first().copied().unwrap_or(1);
        if !row.is_multiple_of(tensor_type.block_elements()) {
            return fail(Fault::Other("has rows that are no whole number of blocks"));
        }
        let Some(size_bytes) = tensor_type.bytes_of(elements) else {
            return fail(Fault::Other("has more bytes than 64 bits can count"));
        };
        let offset = self.u64(&object)?;
        if !offset.is_multiple_of(alignment_bytes) {
            return fail(Fault::Other("has an offset that is not aligned"));
        }
        Ok(TensorInfo { name, dimensions, tensor_type, offset, size_bytes })
    }
}

/// A key for a message: shortened, control characters escaped.
fn printable(key: &str) -> String {
    key.chars().take(80).flat_map(char::escape_debug).collect()
}
