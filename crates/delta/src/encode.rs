mod plan;

use std::ops::Range;
use std::slice;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use slmops_artifact::Digest;
use slmops_artifact::gguf::TensorType;
use zstd_safe::{CCtx, CParameter};

use crate::apply::{Models, Old, code};
use crate::coder::{Encoder, Learner};
use crate::format::{Body, Frame, Header, MAX_FRAME_BYTES, Segment, check};
use crate::numbers;
use crate::planes::Start;
use plan::{How, Plan, plan};
pub(crate) use plan::{Region, regions};

/// The most frames that probabilities are learned from.
const SAMPLE_FRAMES: usize = 24;
/// How often a probability must have been needed to be worth its byte.
const MIN_SEEN: u32 = 6;
/// Fewer coded bytes than this do not repay the probabilities' place in the header.
const MIN_LEARNED_BYTES: u64 = 2 << 20;
/// How hard zstd tries with weights.
const DATA_LEVEL: i32 = 3;
/// What bytes of unknown structure may be: nothing in particular, or numbers.
const GUESSES: [Option<TensorType>; 4] =
    [None, Some(TensorType::F32), Some(TensorType::F16), Some(TensorType::BF16)];
/// Numbers in files of unknown structure begin at multiples of this, counted from its beginning.
const NUMBERS_BEGIN: u64 = 4;
/// Bytes of a frame by which it is told what they may be.
const SAMPLE_BYTES: u64 = 64 << 10;

/// A delta, and what it consists of.
#[derive(Debug)]
pub struct Encoded {
    /// The delta file.
    pub bytes: Vec<u8>,
    /// Bytes of the new file that are copied.
    pub copied_bytes: u64,
    /// Bytes of the new file that are coded against old ones, field by field.
    pub coded_bytes: u64,
    /// Bytes of the new file that general compression did better on, or that are stored.
    pub other_bytes: u64,
    /// The parts of the new file in order: its tensors, and what lies between them.
    pub parts: Vec<Part>,
}

/// A tensor of the new file, or bytes between tensors, and what it cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The tensor; `None` for what is none.
    pub name: Option<String>,
    /// The tensor's type, where it is a known one.
    pub kind: Option<TensorType>,
    /// Its length in the new file.
    pub bytes: u64,
    /// What it takes of the delta's payloads.
    pub delta_bytes: u64,
    /// How most of it was made.
    pub method: Method,
}

/// How bytes of the new file come out of a delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// They are bytes of the old file.
    Copied,
    /// Coded against the old ones, field by field.
    Coded,
    /// Compressed by zstd, with or without old bytes as its prefix.
    Compressed,
    /// As they are.
    Stored,
}

/// Makes the delta from `old` to `new`: GGUF or safetensors files tensor by tensor, others as
/// bytes. `on_progress` hears how many bytes of `new` are done.
pub fn encode(
    old: &[u8],
    new: &[u8],
    threads: usize,
    on_progress: &(dyn Fn(u64) + Sync),
) -> Encoded {
    let news = regions(new);
    let plans = plan(old, new, news.as_deref());
    let mut header = Header {
        from: Digest::of(old),
        from_bytes: old.len() as u64,
        to: Digest::of(new),
        to_bytes: new.len() as u64,
        frames: Vec::new(),
        priors: Vec::new(),
        header_bytes: 0,
    };
    learn(&mut header, &plans, old, new);

    let results: Vec<Mutex<Option<Made>>> = plans.iter().map(|_| Mutex::new(None)).collect();
    let next = AtomicUsize::new(0);
    let done = Mutex::new(0_u64);
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(plan) = plans.get(index) else { return };
                    let made = plan.encode(&header, old, new);
                    *results[index].lock().expect("no holder panics") = Some(made);
                    let mut done = done.lock().expect("no holder panics");
                    *done += plan.output.end - plan.output.start;
                    on_progress(*done);
                }
            });
        }
    });

    let mut payloads = Vec::new();
    let (mut copied_bytes, mut coded_bytes, mut other_bytes) = (0, 0, 0);
    let mut pieces = Vec::new();
    for (plan, result) in plans.into_iter().zip(results) {
        let result = result.into_inner().expect("no holder panics");
        let Made { body, payload, segments } = result.expect("every frame was encoded");
        let len = plan.output.end - plan.output.start;
        let whole = |method| Piece { bytes: len, delta_bytes: payload.len() as u64, method };
        match &body {
            Body::Copy(_) => {
                copied_bytes += len;
                pieces.push(whole(Method::Copied));
            }
            Body::Coded(_) => {
                coded_bytes += len;
                pieces.extend(segments);
            }
            Body::Zstd(_) => {
                other_bytes += len;
                pieces.push(whole(Method::Compressed));
            }
            Body::Stored => {
                other_bytes += len;
                pieces.push(whole(Method::Stored));
            }
        }
        let start = payloads.len() as u64;
        payloads.extend(payload);
        header.frames.push(Frame {
            check: check(&new[range(&plan.output)]),
            output: plan.output,
            payload: start..payloads.len() as u64,
            body,
        });
    }
    let mut bytes = header.write();
    bytes.extend(payloads);
    let whole = Region { name: None, kind: None, bytes: 0..new.len() as u64 };
    let parts = parts(&news.unwrap_or_else(|| vec![whole]), &pieces);
    Encoded { bytes, copied_bytes, coded_bytes, other_bytes, parts }
}

/// A frame as it was made.
pub(crate) struct Made {
    pub(crate) body: Body,
    pub(crate) payload: Vec<u8>,
    /// What the segments of a coded frame cost.
    segments: Vec<Piece>,
}

impl Made {
    fn of(body: Body, payload: Vec<u8>) -> Self {
        Self { body, payload, segments: Vec::new() }
    }

    /// This, or `other` where that takes fewer bytes.
    fn or_less(self, other: Self) -> Self {
        if other.payload.len() < self.payload.len() { other } else { self }
    }
}

/// A stretch of the new file, and what it cost.
struct Piece {
    bytes: u64,
    delta_bytes: u64,
    method: Method,
}

/// What each region cost. Regions and pieces both fill the new file; a piece that spans regions
/// is shared out by length.
fn parts(regions: &[Region], pieces: &[Piece]) -> Vec<Part> {
    let mut pieces = pieces.iter();
    let mut piece = pieces.next();
    let mut used = 0;
    let part = |region: &Region| {
        let bytes = region.bytes.end - region.bytes.start;
        let (mut left, mut delta_bytes) = (bytes, 0);
        let mut most = (0, Method::Copied);
        while left > 0 {
            let Some(current) = piece else { break };
            let taken = left.min(current.bytes - used);
            // Rounded so that the shares of a piece add up.
            let cost = |bytes: u64| {
                u128::from(current.delta_bytes) * u128::from(bytes) / u128::from(current.bytes)
            };
            delta_bytes += (cost(used + taken) - cost(used)) as u64;
            if taken > most.0 {
                most = (taken, current.method);
            }
            left -= taken;
            used += taken;
            if used == current.bytes {
                piece = pieces.next();
                used = 0;
            }
        }
        Part { name: region.name.clone(), kind: region.kind, bytes, delta_bytes, method: most.1 }
    };
    regions.iter().map(part).collect()
}

impl Plan {
    fn encode(&self, header: &Header, old: &[u8], new: &[u8]) -> Made {
        let new = &new[range(&self.output)];
        match &self.how {
            How::Copy(from) => Made::of(Body::Copy(*from), Vec::new()),
            How::Compress => compress(old, new, &(0..0), DATA_LEVEL),
            How::Code(segments) => {
                let coded = coded(header, segments, old, new);
                // Where the types' structure says little, others may do better.
                if coded.payload.len() < new.len() / 3 {
                    return coded;
                }
                let start = segments.first().map_or(0, |segment| segment.old.start);
                let prefix = start..(start + 2 * MAX_FRAME_BYTES).min(old.len() as u64);
                coded.or_less(compressed(old, new, &prefix, DATA_LEVEL))
            }
            How::Guess { prefix, level, olds } => {
                let made = compressed(old, new, prefix, *level);
                match guess(header, self.output.start, *olds, old, new) {
                    Some(segments) => made.or_less(coded(header, &segments, old, new)),
                    None => made,
                }
            }
        }
    }
}

fn range(range: &Range<u64>) -> Range<usize> {
    range.start as usize..range.end as usize
}

/// The frame whose bytes are `new`, coded against old ones.
fn coded(header: &Header, segments: &[Segment], old: &[u8], new: &[u8]) -> Made {
    let mut coder = Encoder::new();
    let mut models = Models::of(header);
    let mut output = new.to_vec();
    let mut rest = &mut output[..];
    let mut costs = Vec::with_capacity(segments.len());
    for segment in segments {
        let (output, after) = rest.split_at_mut(segment.output_bytes as usize);
        rest = after;
        let before = coder.written();
        let old = Old::Whole(old);
        code(&mut coder, &mut models, slice::from_ref(segment), old, output);
        costs.push(Piece {
            bytes: segment.output_bytes,
            delta_bytes: coder.written() - before,
            method: Method::Coded,
        });
    }
    let payload = coder.finish();
    // The last bytes are written when the coder ends.
    if let Some((last, before)) = costs.split_last_mut() {
        let written: u64 = before.iter().map(|cost| cost.delta_bytes).sum();
        last.delta_bytes = (payload.len() as u64).saturating_sub(written);
    }
    Made { body: Body::Coded(segments.to_vec()), payload, segments: costs }
}

/// What the bytes `new` of unknown structure, at `at` of their file, are best coded as against as
/// many old ones from one of `olds` on, by a sample; `None` where there are not so many.
fn guess(header: &Header, at: u64, olds: [u64; 2], old: &[u8], new: &[u8]) -> Option<Vec<Segment>> {
    let len = new.len() as u64;
    // In the middle, at a multiple of what numbers begin at.
    let skipped = len.saturating_sub(SAMPLE_BYTES) / 2 / NUMBERS_BEGIN * NUMBERS_BEGIN;
    let sampled = skipped..len.min(skipped + SAMPLE_BYTES);
    let places = if olds[0] == olds[1] { &olds[..1] } else { &olds[..] };
    let fits = |from: &&u64| from.checked_add(len).is_some_and(|end| end <= old.len() as u64);
    let guesses = places.iter().filter(fits).flat_map(|from| GUESSES.map(|kind| (*from, kind)));
    let cost = |(from, kind): &(u64, Option<TensorType>)| {
        let news = &new[range(&sampled)];
        let segments = segments_of(*kind, at + skipped, from + skipped, old, news);
        coded(header, &segments, old, news).payload.len()
    };
    let (from, kind) = guesses.min_by_key(cost)?;
    Some(segments_of(kind, at, from, old, new))
}

/// Segments that take the bytes `new`, at `at` of their file, for numbers of a type, and those that
/// are no whole number for bytes; the old ones are at `from` of `old`.
fn segments_of(
    kind: Option<TensorType>,
    at: u64,
    from: u64,
    old: &[u8],
    new: &[u8],
) -> Vec<Segment> {
    let len = new.len() as u64;
    let (lead, whole, start) = match kind {
        None => (0, len, Start::default()),
        Some(kind) => {
            let lead = (at.next_multiple_of(NUMBERS_BEGIN) - at).min(len);
            let whole = (len - lead) / kind.block_bytes() * kind.block_bytes();
            let numbers = |start: u64| range(&(start + lead..start + lead + whole));
            (lead, whole, numbers::measure(kind, &old[numbers(from)], &new[numbers(0)]))
        }
    };
    let mut position = from;
    let bytes = (None, Start::default());
    let parts = [(bytes, lead), ((kind, start), whole), (bytes, len - lead - whole)];
    let filled = parts.into_iter().filter(|(_, len)| *len > 0);
    filled
        .map(|((kind, start), output_bytes)| {
            let old = position..position + output_bytes;
            position = old.end;
            Segment { pair: (kind, kind), start, old, output_bytes }
        })
        .collect()
}

/// zstd with or without a prefix, whichever takes less.
fn compressed(old: &[u8], new: &[u8], prefix: &Range<u64>, level: i32) -> Made {
    let alone = compress(old, new, &(0..0), level);
    if prefix.is_empty() { alone } else { alone.or_less(compress(old, new, prefix, level)) }
}

/// zstd with a prefix, or the bytes as they are.
pub(crate) fn compress(old: &[u8], new: &[u8], prefix: &Range<u64>, level: i32) -> Made {
    let old = &old[range(prefix)];
    let mut context = CCtx::create();
    let window = (old.len() + new.len()).next_power_of_two().ilog2().clamp(17, 24);
    let settings = [
        CParameter::CompressionLevel(level),
        CParameter::WindowLog(window),
        CParameter::EnableLongDistanceMatching(!old.is_empty()),
        CParameter::ChecksumFlag(false),
    ];
    let mut out = vec![0; zstd_safe::compress_bound(new.len())];
    let set =
        settings.into_iter().try_for_each(|setting| context.set_parameter(setting).map(|_| ()));
    let written = set
        .and_then(|()| context.ref_prefix(old))
        .and_then(|_| context.compress2(&mut out[..], new));
    match written {
        Ok(len) if len < new.len() => {
            out.truncate(len);
            Made::of(Body::Zstd(prefix.clone()), out)
        }
        _ => Made::of(Body::Stored, new.to_vec()),
    }
}

/// Learns where probabilities begin, from a sample of the frames.
fn learn(header: &mut Header, plans: &[Plan], old: &[u8], new: &[u8]) {
    let coded: Vec<(&Plan, &Vec<Segment>)> = plans
        .iter()
        .filter_map(|plan| match &plan.how {
            How::Code(segments) => Some((plan, segments)),
            _ => None,
        })
        .collect();
    let bytes: u64 = coded.iter().map(|(plan, _)| plan.output.end - plan.output.start).sum();
    if bytes < MIN_LEARNED_BYTES {
        return;
    }
    let mut models = Models::of(header);
    let skip = coded.len().div_ceil(SAMPLE_FRAMES).max(1);
    for (plan, segments) in coded.into_iter().step_by(skip) {
        let mut output = new[range(&plan.output)].to_vec();
        code(&mut Learner, &mut models, segments, Old::Whole(old), &mut output);
    }
    let learned = models.into_used().into_iter();
    header.priors = learned
        .map(|(pair, model)| {
            let level = |slot: &crate::coder::Slot| (slot.seen() >= MIN_SEEN).then(|| slot.level());
            (pair, model.slots.iter().map(level).collect())
        })
        .collect();
}
