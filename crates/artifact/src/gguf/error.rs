use std::io;
use std::path::PathBuf;

/// Why a GGUF file was refused.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The operating system refused.
    #[error(
        "{operation} `{}` failed\nhint: check that the path exists, is readable and has space",
        path.display()
    )]
    Io {
        /// What was tried, such as `open`.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The output refused.
    #[error("write GGUF {object}\nhint: check that the disk has space")]
    Write {
        /// The part of the file.
        object: String,
        /// The cause.
        source: io::Error,
    },
    /// The bytes break the format.
    #[error("GGUF {object} at byte {offset}: {fault}\nhint: {}", fault.hint())]
    Invalid {
        /// The part of the file, such as `tensor "blk.0.attn_q.weight"`.
        object: String,
        /// Where it begins, in bytes from the start of the file.
        offset: u64,
        /// What is wrong with it.
        fault: Fault,
    },
    /// A metadata entry that is needed is absent or has another type.
    #[error(
        "GGUF metadata has no usable `{key}` (expected {expected})\nhint: convert the model again \
         with a current converter"
    )]
    Missing {
        /// Its key.
        key: String,
        /// The type that was expected.
        expected: &'static str,
    },
    /// Something was asked of the writer or the dequantiser that the format cannot hold.
    #[error("GGUF {object}: {fault}\nhint: {}", fault.hint())]
    Unsupported {
        /// The part of the file.
        object: String,
        /// What is wrong with it.
        fault: Fault,
    },
}

/// What is wrong with a part of a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The first four bytes are not `GGUF`.
    #[error("the file begins with {0:02x?} instead of \"GGUF\"")]
    Magic([u8; 4]),
    /// A version that this reader does not know.
    #[error("version {0} is not supported (2 and 3 are)")]
    Version(u32),
    /// The file is for big-endian machines.
    #[error("the file is big-endian")]
    BigEndian,
    /// The file ends too early.
    #[error("needs {needed} bytes, {available} are left")]
    Truncated {
        /// Bytes needed.
        needed: u64,
        /// Bytes left in the file.
        available: u64,
    },
    /// A number is over its bound.
    #[error("{what} is {found}, at most {limit} is accepted")]
    Limit {
        /// What was counted.
        what: &'static str,
        /// What the file says.
        found: u64,
        /// The bound.
        limit: u64,
    },
    /// A string is not UTF-8.
    #[error("is not UTF-8")]
    NotUtf8,
    /// An unknown value type number.
    #[error("value type {0} is unknown")]
    ValueType(u32),
    /// An unknown tensor type number.
    #[error("tensor type {0} is unknown")]
    TensorType(u32),
    /// A type that is known but cannot be dequantised here.
    #[error("type {0} cannot be dequantised here")]
    NoDequantiser(&'static str),
    /// A name that occurs twice.
    #[error("occurs twice")]
    Duplicate,
    /// Anything else.
    #[error("{0}")]
    Other(&'static str),
}

impl Fault {
    /// The next step for the reader of the message.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Magic(_) => "give a GGUF file, or a Hugging Face folder to import",
            Self::Version(_) | Self::BigEndian => {
                "convert the model to little-endian GGUF version 3"
            }
            Self::Truncated { .. } => "the file is cut short; fetch it again",
            Self::TensorType(_) | Self::ValueType(_) => {
                "the file is damaged, or newer than this program; fetch it again or update"
            }
            Self::NoDequantiser(_) => {
                "start from an F32, F16, BF16, Q8_0 or K-quantised file of the same model"
            }
            Self::Limit { .. } | Self::NotUtf8 | Self::Duplicate | Self::Other(_) => {
                "the file is damaged or not a model; fetch it again from its publisher"
            }
        }
    }
}

impl GgufError {
    pub(crate) fn invalid(object: impl Into<String>, offset: u64, fault: Fault) -> Self {
        Self::Invalid { object: object.into(), offset, fault }
    }

    pub(crate) fn unsupported(object: impl Into<String>, fault: Fault) -> Self {
        Self::Unsupported { object: object.into(), fault }
    }

    pub(crate) fn io(
        operation: &'static str,
        path: &std::path::Path,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { operation, path: path.to_owned(), source }
    }
}
