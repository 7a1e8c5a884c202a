use slmops_artifact::Digest;

/// Why a delta was refused, or could not be applied.
#[derive(Debug, thiserror::Error)]
pub enum DeltaError {
    /// The bytes are no delta, or damaged.
    #[error("read the delta: {0}\nhint: fetch or make the delta again")]
    Invalid(&'static str),
    /// A later version of the format.
    #[error("read the delta: its format version {0} is not known\nhint: install a newer release")]
    Version(u16),
    /// The delta ends too early.
    #[error("read the delta: it ends after {available} of {needed} bytes\nhint: fetch the rest")]
    Truncated {
        /// Bytes needed, of those known so far.
        needed: u64,
        /// Bytes that there are.
        available: u64,
    },
    /// The old file has another length than the one that the delta was made from.
    #[error(
        "apply the delta: it changes {expected} of {expected_bytes} bytes, this file has \
         {found_bytes}\nhint: give it the file with that digest"
    )]
    Base {
        /// The digest of the right file.
        expected: Digest,
        /// Its length.
        expected_bytes: u64,
        /// The length of the file at hand.
        found_bytes: u64,
    },
    /// What a frame gave is not what it should give.
    #[error(
        "apply frame {frame} of the delta: the result is wrong, so the old file is not {base}, or \
         the delta is damaged\nhint: compare the old file's digest, then fetch the delta again"
    )]
    Frame {
        /// Which frame.
        frame: usize,
        /// The digest of the right old file.
        base: Digest,
    },
    /// The result as a whole is not what the delta promised.
    #[error(
        "apply the delta: the result is {found}, expected {expected}\nhint: fetch the whole model"
    )]
    Result {
        /// The promised digest.
        expected: Digest,
        /// The digest of what came out.
        found: Digest,
    },
    /// It cannot be applied in place with bounded memory.
    #[error("apply the delta in place: {0}\nhint: apply it to another file, or fetch the whole")]
    Entangled(&'static str),
    /// A journal of an application in place is about another delta.
    #[error(
        "apply the delta in place: the journal beside the file is about another delta, with which \
         the file was changed half-way\nhint: go on with that delta, or fetch the whole file"
    )]
    Journal,
    /// The file that is changed in place, or its journal, refused.
    #[error("change the file in place\nhint: check that the disk has space, then go on")]
    Storage(#[source] std::io::Error),
    /// The output refused.
    #[error("write the new file\nhint: check that the disk has space")]
    Write(#[source] std::io::Error),
}
