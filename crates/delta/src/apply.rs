use std::borrow::Cow;
use std::ops::Range;
use std::thread;

use slmops_artifact::digest::Hasher;
use slmops_artifact::gguf::TensorType;

use crate::DeltaError;
use crate::coder::{Coder, Decoder};
use crate::format::{Body, Frame, Header, Pair, Segment, check};
use crate::layout::Layout;
use crate::model::Model;
use crate::numbers::{self, is_plain};
use crate::planes;

/// The most frames at work at once, which bounds the memory at about 3 MiB each.
pub const MAX_THREADS: usize = 4;

impl Header {
    /// The new bytes of frame `index`, from the whole old file and the frame's payload; checked.
    ///
    /// Frames are independent: any order, any thread, again after an interruption.
    ///
    /// # Errors
    /// [`DeltaError::Base`] where the old file's length is wrong, [`DeltaError::Frame`] where
    /// what comes out is not what the encoder saw.
    ///
    /// # Panics
    /// There is no frame `index`.
    pub fn decode<'a>(
        &self,
        index: usize,
        old: &'a [u8],
        payload: &[u8],
    ) -> Result<Cow<'a, [u8]>, DeltaError> {
        if old.len() as u64 != self.from_bytes {
            return Err(DeltaError::Base {
                expected: self.from,
                expected_bytes: self.from_bytes,
                found_bytes: old.len() as u64,
            });
        }
        self.decode_from(index, Old::Whole(old), payload)
    }

    /// The same, from old bytes that were checked to be enough.
    pub(crate) fn decode_from<'a>(
        &self,
        index: usize,
        old: Old<'a>,
        payload: &[u8],
    ) -> Result<Cow<'a, [u8]>, DeltaError> {
        let frame = &self.frames[index];
        let wrong = DeltaError::Frame { frame: index, base: self.from };
        let len = (frame.output.end - frame.output.start) as usize;
        let output = match &frame.body {
            Body::Copy(from) => Cow::Borrowed(old.slice(&(*from..*from + len as u64))),
            Body::Stored => Cow::Owned(payload.to_vec()),
            Body::Zstd(prefix) => {
                let prefix = old.slice(prefix);
                let mut context = zstd_safe::DCtx::create();
                let mut output = vec![0; len];
                let written = context
                    .ref_prefix(prefix)
                    .and_then(|_| context.decompress(&mut output[..], payload));
                if written != Ok(len) {
                    return Err(wrong);
                }
                Cow::Owned(output)
            }
            Body::Coded(segments) => {
                let mut output = vec![0; len];
                let mut models = Models::of(self);
                code(&mut Decoder::new(payload), &mut models, segments, old, &mut output);
                Cow::Owned(output)
            }
        };
        if check(&output) == frame.check { Ok(output) } else { Err(wrong) }
    }
}

/// The old file, or the parts of it that are needed.
#[derive(Clone, Copy)]
pub(crate) enum Old<'a> {
    Whole(&'a [u8]),
    /// By where they begin, and the shorter one first where two begin at the same place.
    Parts(&'a [Part]),
}

/// Bytes of the old file.
pub(crate) struct Part {
    pub(crate) start: u64,
    pub(crate) bytes: Vec<u8>,
}

impl<'a> Old<'a> {
    fn slice(self, range: &Range<u64>) -> &'a [u8] {
        match self {
            Self::Whole(bytes) => &bytes[range.start as usize..range.end as usize],
            Self::Parts(_) if range.is_empty() => &[],
            Self::Parts(parts) => {
                let after = parts.partition_point(|part| part.start <= range.start);
                let part = &parts[after - 1];
                &part.bytes[(range.start - part.start) as usize..]
                    [..(range.end - range.start) as usize]
            }
        }
    }
}

/// The models that a frame has used so far.
pub(crate) struct Models<'a> {
    header: &'a Header,
    used: Vec<(Pair, Model)>,
}

impl<'a> Models<'a> {
    pub(crate) fn of(header: &'a Header) -> Self {
        Self { header, used: Vec::new() }
    }

    fn get(&mut self, pair: Pair) -> &mut Model {
        let at = self.used.iter().position(|(known, _)| *known == pair).unwrap_or_else(|| {
            self.used.push((pair, self.header.model(pair)));
            self.used.len() - 1
        });
        &mut self.used[at].1
    }

    /// What they have learned.
    pub(crate) fn into_used(self) -> Vec<(Pair, Model)> {
        self.used
    }
}

/// Codes the segments of a frame whose new bytes are `output`.
pub(crate) fn code<C: Coder>(
    coder: &mut C,
    models: &mut Models<'_>,
    segments: &[Segment],
    old: Old<'_>,
    output: &mut [u8],
) {
    let mut rest = output;
    for segment in segments {
        let (new, after) = rest.split_at_mut(segment.output_bytes as usize);
        rest = after;
        let old = old.slice(&segment.old);
        let model = models.get(segment.pair);
        match segment.pair {
            (Some(kind), Some(old_kind)) if is_plain(kind) => {
                numbers::numbers(coder, model, (kind, old_kind), segment.start, old, new);
            }
            (Some(kind), Some(old_kind)) => match Layout::of(kind) {
                Some(layout) if kind == old_kind => {
                    planes::same(coder, model, layout, segment.start, old, new);
                }
                Some(layout) => {
                    planes::across(coder, model, layout, old_kind, segment.start, old, new);
                }
                None => numbers::bytes(coder, model, record(kind), old, new),
            },
            _ => numbers::bytes(coder, model, 1, old, new),
        }
    }
}

fn record(kind: TensorType) -> usize {
    kind.block_bytes() as usize
}

/// Writes the new file to `write`, in order, from the old file and the whole delta; up to
/// `threads` frames at a time. Memory stays below 16 MiB besides the two inputs.
///
/// # Errors
/// What is wrong with the delta or the old file; [`DeltaError::Result`] where the digest of
/// everything written is not the promised one, after the last byte was written.
pub fn apply(
    old: &[u8],
    delta: &[u8],
    threads: usize,
    mut write: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<(), DeltaError> {
    let header = Header::parse(delta)?;
    let (needed, available) = (header.delta_bytes(), delta.len() as u64);
    if needed > available {
        return Err(DeltaError::Truncated { needed, available });
    }
    if needed < available {
        return Err(DeltaError::Invalid("it goes on after its last frame"));
    }
    let mut hasher = Hasher::default();
    let mut emit = |bytes: &[u8]| {
        // Copies may be as long as the file.
        for piece in bytes.chunks(1 << 20) {
            hasher.update(piece);
            write(piece).map_err(DeltaError::Write)?;
        }
        Ok(())
    };
    let payload = |frame: &Frame| &delta[frame.payload.start as usize..frame.payload.end as usize];
    let indices: Vec<usize> = (0..header.frames.len()).collect();
    for batch in indices.chunks(threads.clamp(1, MAX_THREADS)) {
        if let [index] = batch {
            emit(&header.decode(*index, old, payload(&header.frames[*index]))?)?;
            continue;
        }
        let outputs: Vec<_> = thread::scope(|scope| {
            let header = &header;
            let work = |&index: &usize| {
                scope.spawn(move || header.decode(index, old, payload(&header.frames[index])))
            };
            let started: Vec<_> = batch.iter().map(work).collect();
            let join = |work: thread::ScopedJoinHandle<'_, _>| {
                work.join().expect("decoding a frame panics at nothing")
            };
            started.into_iter().map(join).collect()
        });
        for output in outputs {
            emit(&output?)?;
        }
    }
    let (found, _) = hasher.finish();
    if found != header.to {
        return Err(DeltaError::Result { expected: header.to, found });
    }
    Ok(())
}
