//! The delta file: its header and frame table, as `docs/delta-format.md` describes them.

use std::ops::Range;

use sha2::{Digest as _, Sha256};
use slmops_artifact::Digest;
use slmops_artifact::gguf::TensorType;

use crate::DeltaError;
use crate::coder::{Coder, Decoder, Encoder, Slot};
use crate::layout::Layout;
use crate::model::{Model, SLOTS};
use crate::numbers::is_plain;
use crate::planes::Start;

/// The first bytes of every delta.
pub const MAGIC: &[u8; 8] = b"SLMDELTA";
/// The version of the format.
pub const VERSION: u16 = 1;
/// The most bytes that a frame which is not a copy gives.
pub const MAX_FRAME_BYTES: u64 = 1 << 20;
/// The longest header in bytes, and so the most memory that it takes.
pub const MAX_HEADER_BYTES: u64 = 8 << 20;
/// The most old bytes that a zstd frame refers to.
pub const MAX_PREFIX_BYTES: u64 = 8 << 20;
/// Magic, version, and the length of the rest of the header.
pub(crate) const PREAMBLE_BYTES: usize = 14;
/// Bytes of the checksum that ends the header.
const CHECK_BYTES: usize = 16;
/// The most pieces of one frame, and the most models of one delta.
pub(crate) const MAX_SEGMENTS: u64 = 4096;
const MAX_MODELS: u64 = 64;
/// The most pairs of types in one frame: each takes memory for its model.
pub(crate) const MAX_PAIRS: usize = 16;
/// Bytes that a payload may be longer than its output.
const PAYLOAD_SLACK_BYTES: u64 = 64;

/// The start of a SHA-256 digest: tells damage from the right bytes. The signed digest of the
/// whole result is what makes them trusted.
pub(crate) type Check = [u8; CHECK_BYTES];

pub(crate) fn check(bytes: &[u8]) -> Check {
    let digest: [u8; 32] = Sha256::digest(bytes).into();
    *digest.first_chunk().expect("a digest is longer")
}

/// Everything of a delta but the payloads of its frames.
#[derive(Debug)]
pub struct Header {
    /// The digest of the old file.
    pub from: Digest,
    /// The length of the old file in bytes.
    pub from_bytes: u64,
    /// The digest of the new file.
    pub to: Digest,
    /// The length of the new file in bytes.
    pub to_bytes: u64,
    pub(crate) frames: Vec<Frame>,
    pub(crate) priors: Vec<(Pair, Priors)>,
    pub(crate) header_bytes: u64,
}

/// An independent part of the new file.
#[derive(Clone, Debug, PartialEq)]
pub struct Frame {
    /// Where its bytes go in the new file.
    pub output: Range<u64>,
    /// Where its payload lies in the delta.
    pub payload: Range<u64>,
    pub(crate) check: Check,
    pub(crate) body: Body,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Body {
    /// The old file's bytes from here.
    Copy(u64),
    /// The payload itself.
    Stored,
    /// A zstd frame with these old bytes as its prefix.
    Zstd(Range<u64>),
    /// Segments that share one range-coded payload.
    Coded(Vec<Segment>),
}

/// A part of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Segment {
    pub(crate) pair: Pair,
    pub(crate) start: Start,
    pub(crate) old: Range<u64>,
    pub(crate) output_bytes: u64,
}

/// The types of the new and the old bytes; `None` for bytes without structure.
pub(crate) type Pair = (Option<TensorType>, Option<TensorType>);

/// Levels of the probabilities that differ from one half.
pub(crate) type Priors = Vec<Option<u8>>;

const UNTYPED: u8 = 255;

impl Frame {
    /// Whether bytes with this digest are this frame's output.
    pub fn gives(&self, digest: &Digest) -> bool {
        digest.as_bytes().starts_with(&self.check)
    }
}

impl Header {
    /// The frames, in the order of their output and of their payloads.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// The length of the header in bytes: the payloads follow.
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
    }

    /// The length of the whole delta in bytes.
    pub fn delta_bytes(&self) -> u64 {
        self.frames.last().map_or(self.header_bytes, |frame| frame.payload.end)
    }

    /// Reads the header from the first bytes of a delta.
    ///
    /// # Errors
    /// [`DeltaError::Truncated`] says how many bytes it needs; anything else is final.
    pub fn parse(bytes: &[u8]) -> Result<Self, DeltaError> {
        let truncated = |needed: usize| DeltaError::Truncated {
            needed: needed as u64,
            available: bytes.len() as u64,
        };
        let Some(preamble) = bytes.first_chunk::<PREAMBLE_BYTES>() else {
            if !MAGIC.starts_with(&bytes[..bytes.len().min(MAGIC.len())]) {
                return Err(DeltaError::Invalid("it does not begin with SLMDELTA"));
            }
            return Err(truncated(PREAMBLE_BYTES));
        };
        if preamble[..8] != *MAGIC {
            return Err(DeltaError::Invalid("it does not begin with SLMDELTA"));
        }
        let version = u16::from_le_bytes([preamble[8], preamble[9]]);
        if version != VERSION {
            return Err(DeltaError::Version(version));
        }
        let [.., a, b, c, d] = *preamble;
        let body_bytes = u32::from_le_bytes([a, b, c, d]) as usize;
        if body_bytes as u64 > MAX_HEADER_BYTES {
            return Err(DeltaError::Invalid("its header is too long"));
        }
        let end = PREAMBLE_BYTES + body_bytes;
        let Some(stored) = bytes.get(end..end + CHECK_BYTES) else {
            return Err(truncated(end + CHECK_BYTES));
        };
        if check(&bytes[..end]) != *stored {
            return Err(DeltaError::Invalid("its header is damaged"));
        }
        let header_bytes = (end + CHECK_BYTES) as u64;
        Reader { bytes: &bytes[PREAMBLE_BYTES..end] }.header(header_bytes)
    }

    /// Writes the header; payload positions follow from lengths and are not stored.
    pub(crate) fn write(&self) -> Vec<u8> {
        let mut body = Vec::new();
        put(&mut body, self.from_bytes);
        body.extend(self.from.as_bytes());
        put(&mut body, self.to_bytes);
        body.extend(self.to.as_bytes());
        put(&mut body, self.priors.len() as u64);
        for (pair, priors) in &self.priors {
            put_pair(&mut body, *pair);
            let coded = write_priors(priors);
            put(&mut body, coded.len() as u64);
            body.extend(coded);
        }
        put(&mut body, self.frames.len() as u64);
        let mut expected = 0_u64;
        for frame in &self.frames {
            put(&mut body, frame.output.end - frame.output.start);
            put(&mut body, frame.payload.end - frame.payload.start);
            body.extend(frame.check);
            match &frame.body {
                Body::Copy(old) => {
                    body.push(0);
                    put_from(&mut body, &mut expected, *old, frame.output.end - frame.output.start);
                }
                Body::Stored => body.push(1),
                Body::Zstd(old) => {
                    body.push(2);
                    let len = old.end - old.start;
                    put(&mut body, len);
                    put_from(&mut body, &mut expected, old.start, len);
                }
                Body::Coded(segments) => {
                    body.push(3);
                    put(&mut body, segments.len() as u64);
                    for segment in segments {
                        put_pair(&mut body, segment.pair);
                        body.push(segment.start.noise);
                        body.extend(segment.start.edges);
                        put(&mut body, segment.output_bytes);
                        let len = segment.old.end - segment.old.start;
                        put_from(&mut body, &mut expected, segment.old.start, len);
                    }
                }
            }
        }
        let mut out = Vec::with_capacity(body.len() + PREAMBLE_BYTES + CHECK_BYTES);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((body.len() as u32).to_le_bytes());
        out.extend(body);
        out.extend(check(&out));
        out
    }

    /// The model that a frame starts with for a pair of types.
    pub(crate) fn model(&self, pair: Pair) -> Model {
        let mut model = Model::default();
        if let Some((_, priors)) = self.priors.iter().find(|(known, _)| *known == pair) {
            for (slot, level) in model.slots.iter_mut().zip(priors) {
                if let Some(level) = level {
                    *slot = Slot::from_prior(*level);
                }
            }
        }
        model
    }
}

/// How many old bytes a segment of `output_bytes` refers to; `None` where the types do not code
/// each other or the length is no whole number of blocks.
pub(crate) fn old_bytes(pair: Pair, output_bytes: u64) -> Option<u64> {
    match pair {
        (None, None) => Some(output_bytes),
        (Some(new), Some(old)) if new == old => {
            let known = Layout::of(new).is_some() || is_plain(new);
            // Types that are not taken apart are coded as bytes, in records of a block.
            (known && output_bytes.is_multiple_of(new.block_bytes()) || !known && output_bytes > 0)
                .then_some(output_bytes)
        }
        (Some(new), Some(old)) => {
            let dequantised = Layout::of(old).is_some() || is_plain(old);
            if !dequantised || !(Layout::of(new).is_some() || is_plain(new)) {
                return None;
            }
            if !output_bytes.is_multiple_of(new.block_bytes()) {
                return None;
            }
            old.bytes_of(output_bytes / new.block_bytes() * new.block_elements())
        }
        _ => None,
    }
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// A position in the old file, as its distance from where the last reference ended.
fn put_from(out: &mut Vec<u8>, expected: &mut u64, position: u64, len: u64) {
    let distance = position.wrapping_sub(*expected) as i64;
    put(out, (distance << 1 ^ distance >> 63) as u64);
    *expected = position + len;
}

fn put_pair(out: &mut Vec<u8>, (new, old): Pair) {
    let id = |kind: Option<TensorType>| kind.map_or(UNTYPED, |kind| kind.id() as u8);
    out.extend([id(new), id(old)]);
}

fn write_priors(priors: &Priors) -> Vec<u8> {
    let mut encoder = Encoder::new();
    code_priors(&mut encoder, &mut priors.clone());
    encoder.finish()
}

/// Levels are coded against the last one, with whether the last was there.
fn code_priors<C: Coder>(coder: &mut C, priors: &mut Priors) {
    let mut present = [Slot::default(); 4];
    let mut tree = vec![Slot::default(); 4 * 256];
    let (mut history, mut last) = (0, 128_u8);
    for prior in priors {
        let there = coder.bit(&mut present[history], prior.is_some());
        history = history << 1 & 3 | usize::from(there);
        if !there {
            *prior = None;
            continue;
        }
        let level = prior.unwrap_or_default();
        let part = usize::from(last / 64) * 256;
        let mut node = 1_usize;
        for bit in (0..8).rev() {
            let set = coder.bit(&mut tree[part + node], level >> bit & 1 == 1);
            node = node << 1 | usize::from(set);
        }
        last = node as u8;
        *prior = Some(last);
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
}

const ENDS: DeltaError = DeltaError::Invalid("its header ends too early");

impl Reader<'_> {
    fn header(mut self, header_bytes: u64) -> Result<Header, DeltaError> {
        let from_bytes = self.number()?;
        let from = Digest::from(self.array::<32>()?);
        let to_bytes = self.number()?;
        let to = Digest::from(self.array::<32>()?);
        let mut priors: Vec<(Pair, Priors)> = Vec::new();
        for _ in 0..self.count("its models are too many", MAX_MODELS)? {
            let pair = self.pair()?;
            let len = self.count("a model is too long", SLOTS as u64 * 2)? as usize;
            let coded = self.take(len)?;
            if priors.iter().any(|(known, _)| *known == pair) {
                return Err(DeltaError::Invalid("two models are for the same types"));
            }
            let mut levels = vec![None; SLOTS];
            code_priors(&mut Decoder::new(coded), &mut levels);
            priors.push((pair, levels));
        }
        // A frame takes at least 20 bytes of the header.
        let frame_count = self.count("its frames are too many", self.bytes.len() as u64 / 18)?;
        let mut frames = Vec::new();
        let (mut output, mut payload, mut expected) = (0_u64, header_bytes, 0_u64);
        for _ in 0..frame_count {
            let frame = self.frame(output, payload, &mut expected, from_bytes)?;
            (output, payload) = (frame.output.end, frame.payload.end);
            frames.push(frame);
        }
        if output != to_bytes {
            return Err(DeltaError::Invalid("its frames do not fill the new file"));
        }
        if !self.bytes.is_empty() {
            return Err(DeltaError::Invalid("its header has bytes left over"));
        }
        Ok(Header { from, from_bytes, to, to_bytes, frames, priors, header_bytes })
    }

    fn frame(
        &mut self,
        output: u64,
        payload: u64,
        expected: &mut u64,
        from_bytes: u64,
    ) -> Result<Frame, DeltaError> {
        let output_bytes = self.number()?;
        let payload_bytes = self.number()?;
        let check = self.array()?;
        let kind = self.array::<1>()?[0];
        let too_long = DeltaError::Invalid("a frame is longer than it may be");
        if output_bytes == 0 || kind != 0 && output_bytes > MAX_FRAME_BYTES {
            return Err(too_long);
        }
        if payload_bytes > output_bytes.saturating_add(PAYLOAD_SLACK_BYTES) {
            return Err(too_long);
        }
        let fits = |wanted: bool| match wanted {
            true => Ok(()),
            false => Err(DeltaError::Invalid("a frame's payload has the wrong length")),
        };
        let body = match kind {
            0 => {
                fits(payload_bytes == 0)?;
                Body::Copy(self.old(expected, output_bytes, from_bytes)?.start)
            }
            1 => {
                fits(payload_bytes == output_bytes)?;
                Body::Stored
            }
            2 => {
                let len = self.count("a prefix is too long", MAX_PREFIX_BYTES)?;
                Body::Zstd(self.old(expected, len, from_bytes)?)
            }
            3 => {
                let mut segments = Vec::new();
                let mut pairs: Vec<Pair> = Vec::new();
                let mut sum = 0_u64;
                for _ in 0..self.count("a frame's segments are too many", MAX_SEGMENTS)? {
                    let pair = self.pair()?;
                    if !pairs.contains(&pair) {
                        pairs.push(pair);
                    }
                    if pairs.len() > MAX_PAIRS {
                        return Err(DeltaError::Invalid("a frame has too many pairs of types"));
                    }
                    let [noise, edges @ ..] = self.array::<3>()?;
                    let start = Start { noise, edges };
                    let output_bytes = self.count("a segment is too long", MAX_FRAME_BYTES)?;
                    let Some(old_bytes) = old_bytes(pair, output_bytes) else {
                        return Err(DeltaError::Invalid("a segment's types do not fit it"));
                    };
                    let old = self.old(expected, old_bytes, from_bytes)?;
                    sum += output_bytes;
                    segments.push(Segment { pair, start, old, output_bytes });
                }
                if sum != output_bytes {
                    return Err(DeltaError::Invalid("segments do not fill their frame"));
                }
                Body::Coded(segments)
            }
            _ => return Err(DeltaError::Invalid("a frame is of an unknown kind")),
        };
        let range = |from: u64, len: u64| {
            from.checked_add(len)
                .map(|end| from..end)
                .ok_or(DeltaError::Invalid("a length overflows"))
        };
        let (output, payload) = (range(output, output_bytes)?, range(payload, payload_bytes)?);
        Ok(Frame { output, payload, check, body })
    }

    /// A range of the old file.
    fn old(
        &mut self,
        expected: &mut u64,
        len: u64,
        from_bytes: u64,
    ) -> Result<Range<u64>, DeltaError> {
        let coded = self.number()?;
        let distance = (coded >> 1) as i64 ^ -((coded & 1) as i64);
        let position = expected.wrapping_add(distance as u64);
        match position.checked_add(len) {
            Some(end) if end <= from_bytes => {
                *expected = end;
                Ok(position..end)
            }
            _ => Err(DeltaError::Invalid("it refers to bytes beyond the old file's end")),
        }
    }

    fn pair(&mut self) -> Result<Pair, DeltaError> {
        let [new, old] = self.array()?;
        let kind = |id: u8| match id {
            UNTYPED => Ok(None),
            _ => match TensorType::from_id(id.into()) {
                None => Err(DeltaError::Invalid("a tensor type is unknown")),
                known => Ok(known),
            },
        };
        Ok((kind(new)?, kind(old)?))
    }

    fn number(&mut self) -> Result<u64, DeltaError> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.array::<1>()?[0];
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                break;
            }
            number |= part << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(DeltaError::Invalid("a number is too long"))
    }

    fn count(&mut self, what: &'static str, limit: u64) -> Result<u64, DeltaError> {
        let number = self.number()?;
        if number > limit { Err(DeltaError::Invalid(what)) } else { Ok(number) }
    }

    fn take(&mut self, len: usize) -> Result<&[u8], DeltaError> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or(ENDS)?;
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DeltaError> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or(ENDS)?;
        self.bytes = rest;
        Ok(*taken)
    }
}
