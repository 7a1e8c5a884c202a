//! In which order the frames of a delta change a file where it lies, and what is kept aside.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::{MAGIC, PREAMBLE_BYTES, SLOT_HEADER_BYTES};
use crate::DeltaError;
use crate::format::{Body, Check, Header, MAX_FRAME_BYTES, check};
/// The most old bytes that one frame reads, and so the memory for them.
const MAX_READ_BYTES: u64 = 8 << 20;
/// The most steps, and the most pairs of them that depend on each other.
const MAX_STEPS: usize = 1 << 16;
const MAX_EDGES: usize = 1 << 19;

/// How work is cut up.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    /// The most bytes of a copy that are one step.
    pub(crate) piece_bytes: u64,
    /// The most new bytes that go into the file at once.
    pub(crate) batch_bytes: u64,
}

pub(super) const SIZES: Sizes =
    Sizes { piece_bytes: MAX_FRAME_BYTES, batch_bytes: MAX_FRAME_BYTES };

/// In which order the frames of a delta change a file where it lies, and what must be kept aside.
#[derive(Debug)]
pub struct Course {
    pub(super) header: Header,
    pub(super) id: Check,
    /// In order; those of a batch by their place in the delta.
    pub(super) steps: Vec<Step>,
    /// Where each batch ends in `steps`.
    pub(super) batches: Vec<usize>,
    /// Old bytes that are kept, in order and apart from each other, and where in the journal.
    pub(super) kept: Vec<(Range<u64>, u64)>,
    pub(super) kept_bytes: u64,
    /// The most new bytes of one batch.
    pub(super) slot_bytes: u64,
}

/// A frame, or a piece of a long copy.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) frame: u32,
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Step {
    pub(super) fn bytes(self) -> u64 {
        self.end - self.start
    }

    /// The old bytes that it reads.
    pub(super) fn reads(self, header: &Header) -> Vec<Range<u64>> {
        let frame = &header.frames[self.frame as usize];
        match &frame.body {
            Body::Copy(from) => {
                let start = from + (self.start - frame.output.start);
                std::iter::once(start..start + self.bytes()).collect()
            }
            Body::Stored => Vec::new(),
            Body::Zstd(prefix) => vec![prefix.clone()],
            Body::Coded(segments) => segments.iter().map(|segment| segment.old.clone()).collect(),
        }
    }
}

impl Course {
    /// Reads it out of the first bytes of a delta.
    ///
    /// # Errors
    /// As [`Header::parse`]; [`DeltaError::Entangled`] where it would take too much memory.
    pub fn of(delta: &[u8]) -> Result<Self, DeltaError> {
        Self::with_sizes(delta, SIZES)
    }

    pub(crate) fn with_sizes(delta: &[u8], sizes: Sizes) -> Result<Self, DeltaError> {
        let header = Header::parse(delta)?;
        let id = check(&delta[..header.header_bytes as usize]);
        let steps = steps(&header, sizes)?;
        let edges = Edges::between(&header, &steps)?;
        let order = edges.order();
        let (mut batches, mut sum, mut slot_bytes) = (Vec::new(), 0, 0);
        let mut batch_of = vec![0_u32; steps.len()];
        for (place, &step) in order.iter().enumerate() {
            let bytes = steps[step as usize].bytes();
            if sum > 0 && sum + bytes > sizes.batch_bytes {
                batches.push(place);
                sum = 0;
            }
            sum += bytes;
            slot_bytes = slot_bytes.max(sum);
            batch_of[step as usize] = batches.len() as u32;
        }
        if !order.is_empty() {
            batches.push(order.len());
        }
        let mut end = PREAMBLE_BYTES;
        let place = |range: Range<u64>| {
            let at = end;
            end += range.end - range.start;
            (range, at)
        };
        let kept: Vec<_> =
            kept(&header, &steps, &edges, &batch_of).into_iter().map(place).collect();
        let mut order = order;
        let mut from = 0;
        for &end in &batches {
            order[from..end].sort_unstable();
            from = end;
        }
        Ok(Self {
            id,
            steps: order.into_iter().map(|step| steps[step as usize]).collect(),
            batches,
            kept,
            kept_bytes: end - PREAMBLE_BYTES,
            slot_bytes,
            header,
        })
    }

    /// The delta's header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The most bytes that the journal has.
    pub fn journal_bytes(&self) -> u64 {
        self.slot_at(2)
    }

    /// Bytes that the file needs while it is changed.
    pub fn file_bytes(&self) -> u64 {
        self.header.from_bytes.max(self.header.to_bytes)
    }

    pub(super) fn slot_at(&self, slot: u64) -> u64 {
        PREAMBLE_BYTES + self.kept_bytes + slot * (SLOT_HEADER_BYTES + self.slot_bytes)
    }

    pub(super) fn preamble(&self) -> Vec<u8> {
        let mut preamble = [&MAGIC[..], &self.id].concat();
        preamble.extend(check(&preamble));
        preamble
    }

    /// The end of the batch that begins at a step.
    pub(super) fn batch_end(&self, from: usize) -> usize {
        let batch = self.batches.partition_point(|&end| end <= from);
        self.batches.get(batch).copied().unwrap_or(self.steps.len())
    }

    /// New bytes of the steps before one.
    pub(super) fn bytes_before(&self, step: usize) -> u64 {
        self.steps[..step].iter().map(|step| step.bytes()).sum()
    }
}

/// What changes, in the order of the delta. What stays where it is takes no step.
fn steps(header: &Header, sizes: Sizes) -> Result<Vec<Step>, DeltaError> {
    let mut steps = Vec::new();
    for (index, frame) in header.frames.iter().enumerate() {
        let Range { start, end } = frame.output;
        let piece = match frame.body {
            Body::Copy(from) if from == start => continue,
            Body::Copy(_) => sizes.piece_bytes,
            _ => end - start,
        };
        let mut at = start;
        while at < end {
            if steps.len() == MAX_STEPS {
                return Err(DeltaError::Entangled("it has too many parts"));
            }
            let to = at.saturating_add(piece).min(end);
            steps.push(Step { frame: index as u32, start: at, end: to });
            at = to;
        }
        let of_frame =
            Step { frame: index as u32, start, end: start.saturating_add(piece).min(end) };
        let reads = of_frame.reads(header);
        if reads.iter().map(|range| range.end - range.start).sum::<u64>() > MAX_READ_BYTES {
            return Err(DeltaError::Entangled("a frame refers to too much of the old file"));
        }
    }
    Ok(steps)
}

/// Which steps overwrite what a step reads: they must come after it.
struct Edges {
    /// Where those of each step begin in `to`.
    from: Vec<u32>,
    to: Vec<u32>,
}

impl Edges {
    fn between(header: &Header, steps: &[Step]) -> Result<Self, DeltaError> {
        let (mut from, mut to) = (vec![0], Vec::new());
        for (reader, step) in steps.iter().enumerate() {
            for range in step.reads(header) {
                for writer in overwriters(steps, &range).filter(|writer| *writer != reader) {
                    if to.len() == MAX_EDGES {
                        return Err(DeltaError::Entangled("too many of its parts overlap"));
                    }
                    to.push(writer as u32);
                }
            }
            from.push(to.len() as u32);
        }
        Ok(Self { from, to })
    }

    fn of(&self, step: usize) -> &[u32] {
        &self.to[self.from[step] as usize..self.from[step + 1] as usize]
    }

    /// Readers before overwriters, as far as that goes, and otherwise in the delta's order.
    fn order(&self) -> Vec<u32> {
        let count = self.from.len() - 1;
        let mut waits_for = vec![0_u32; count];
        self.to.iter().for_each(|&writer| waits_for[writer as usize] += 1);
        let free = |step: &u32| waits_for[*step as usize] == 0;
        let mut ready: BinaryHeap<Reverse<u32>> =
            (0..count as u32).filter(free).map(Reverse).collect();
        let mut done = vec![false; count];
        let mut order = Vec::with_capacity(count);
        let mut first = 0;
        while order.len() < count {
            let step = match ready.pop() {
                Some(Reverse(step)) => step,
                // A ring: what the first one overwrites is kept for the others.
                None => {
                    while done[first] {
                        first += 1;
                    }
                    first as u32
                }
            };
            done[step as usize] = true;
            order.push(step);
            for &writer in self.of(step as usize) {
                waits_for[writer as usize] -= 1;
                if waits_for[writer as usize] == 0 && !done[writer as usize] {
                    ready.push(Reverse(writer));
                }
            }
        }
        order
    }
}

/// The steps that write into a range.
fn overwriters<'a>(steps: &'a [Step], range: &'a Range<u64>) -> impl Iterator<Item = usize> + 'a {
    let first = steps.partition_point(|step| step.end <= range.start);
    (first..steps.len()).take_while(|&step| steps[step].start < range.end && !range.is_empty())
}

/// Old bytes that are overwritten in an earlier batch than the one that reads them.
fn kept(header: &Header, steps: &[Step], edges: &Edges, batch_of: &[u32]) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::new();
    for (reader, step) in steps.iter().enumerate() {
        let earlier = |writer: &usize| batch_of[*writer] < batch_of[reader];
        if !edges.of(reader).iter().any(|writer| earlier(&(*writer as usize))) {
            continue;
        }
        for range in step.reads(header) {
            let both = |writer: usize| {
                range.start.max(steps[writer].start)..range.end.min(steps[writer].end)
            };
            all.extend(overwriters(steps, &range).filter(earlier).map(both));
        }
    }
    all.sort_unstable_by_key(|range| range.start);
    let mut apart: Vec<Range<u64>> = Vec::new();
    for range in all {
        match apart.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => apart.push(range),
        }
    }
    apart
}
