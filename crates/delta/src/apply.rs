use std::borrow::Cow;
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
        let frame = &self.frames[index];
        let wrong = DeltaError::Frame { frame: index, base: self.from };
        let len = (frame.output.end - frame.output.start) as usize;
        let output = match &frame.body {
            Body::Copy(from) => Cow::Borrowed(&old[*from as usize..][..len]),
            Body::Stored => Cow::Owned(payload.to_vec()),
            Body::Zstd(prefix) => {
                let prefix = &old[prefix.start as usize..prefix.end as usize];
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
    old: &[u8],
    output: &mut [u8],
) {
    let mut rest = output;
    for segment in segments {
        let (new, after) = rest.split_at_mut(segment.output_bytes as usize);
        rest = after;
        let old = &old[segment.old.start as usize..segment.old.end as usize];
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
