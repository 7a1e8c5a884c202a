//! Parting the new file into frames, and finding what each is made against.

use std::collections::HashMap;
use std::ops::Range;

use slmops_artifact::gguf::{self, TensorType};

use super::range;
use crate::format::{
    MAX_FRAME_BYTES, MAX_PAIRS, MAX_PREFIX_BYTES, MAX_SEGMENTS, Pair, Segment, old_bytes,
};
use crate::layout::Layout;
use crate::matches::matches;
use crate::numbers::{self, is_plain};
use crate::planes::{self, Start};
/// Elements at whose multiples tensors are parted into frames: whole blocks of every type.
const PART_ELEMENTS: u64 = 512;
/// A copy shorter than this goes into a coded frame where that is possible.
const MIN_COPY_BYTES: u64 = 4096;
/// How hard zstd tries with bytes other than weights, and with few of these.
const OTHER_LEVEL: i32 = 9;
const FEW_LEVEL: i32 = 19;
/// Bytes that are few: the part before the weights.
const FEW_BYTES: u64 = 4 << 20;

/// How a frame is to be made.
pub(super) struct Plan {
    pub(super) output: Range<u64>,
    pub(super) how: How,
}

pub(super) enum How {
    Copy(u64),
    /// Compressed: weights without a counterpart.
    Compress,
    /// Coded against old bytes of the same tensor.
    Code(Vec<Segment>),
    /// Of unknown structure: compressed, or coded as whatever does best against as many old bytes
    /// from one of two places on.
    Guess {
        prefix: Range<u64>,
        level: i32,
        olds: [u64; 2],
    },
}

/// A part of a file: a tensor, or what lies between.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) name: Option<String>,
    pub(crate) kind: Option<TensorType>,
    pub(crate) bytes: Range<u64>,
}

/// The regions of a file in order, without gaps; `None` where it is of no known format.
pub(crate) fn regions(file: &[u8]) -> Option<Vec<Region>> {
    let mut tensors = gguf_tensors(file).or_else(|| safetensors_tensors(file))?;
    tensors.sort_by_key(|tensor| tensor.bytes.start);
    let mut regions = Vec::new();
    let mut position = 0;
    for tensor in tensors {
        if tensor.bytes.start < position {
            return None;
        }
        if tensor.bytes.start > position {
            regions.push(Region { name: None, kind: None, bytes: position..tensor.bytes.start });
        }
        position = tensor.bytes.end;
        regions.push(tensor);
    }
    if position < file.len() as u64 {
        regions.push(Region { name: None, kind: None, bytes: position..file.len() as u64 });
    }
    Some(regions)
}

fn gguf_tensors(file: &[u8]) -> Option<Vec<Region>> {
    let header = gguf::Header::parse(file).ok()?;
    let region = |tensor: &gguf::TensorInfo| Region {
        name: Some(tensor.name.clone()),
        kind: Some(tensor.tensor_type),
        bytes: tensor.offset..tensor.offset + tensor.size_bytes,
    };
    Some(header.tensors().iter().map(region).collect())
}

fn safetensors_tensors(file: &[u8]) -> Option<Vec<Region>> {
    let (header_bytes, metadata) = safetensors::SafeTensors::read_metadata(file).ok()?;
    // The length field and the JSON come before the data.
    let data = header_bytes as u64 + 8;
    let region = |(name, info): (String, &safetensors::tensor::TensorInfo)| Region {
        name: Some(name),
        kind: match info.dtype {
            safetensors::Dtype::F32 => Some(TensorType::F32),
            safetensors::Dtype::F16 => Some(TensorType::F16),
            safetensors::Dtype::BF16 => Some(TensorType::BF16),
            _ => None,
        },
        bytes: data + info.data_offsets.0 as u64..data + info.data_offsets.1 as u64,
    };
    Some(metadata.tensors().into_iter().map(region).collect())
}

/// Parts the new file into frames.
pub(super) fn plan(old: &[u8], new: &[u8], news: Option<&[Region]>) -> Vec<Plan> {
    let (plans, pending, pairs) = (Vec::new(), Vec::new(), Vec::new());
    let mut planner = Planner { old, new, plans, pending, pending_from: 0, pairs };
    match (regions(old), news) {
        (Some(olds), Some(news)) => planner.tensors(&olds, news),
        _ => planner.bytes(&(0..new.len() as u64), &(0..old.len() as u64)),
    }
    planner.flush();
    planner.plans
}

/// A part of the new file in pieces that fit into a frame.
fn frames_of(region: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let end = region.end;
    let starts = (region.start..end).step_by(MAX_FRAME_BYTES as usize);
    starts.map(move |start| start..(start + MAX_FRAME_BYTES).min(end))
}

struct Planner<'a> {
    old: &'a [u8],
    new: &'a [u8],
    plans: Vec<Plan>,
    /// Segments of the frame in the making, and where it begins.
    pending: Vec<Segment>,
    pending_from: u64,
    /// The types of those segments.
    pairs: Vec<Pair>,
}

impl Planner<'_> {
    fn tensors(&mut self, olds: &[Region], news: &[Region]) {
        let by_name: HashMap<&str, &Region> =
            olds.iter().filter_map(|region| Some((region.name.as_deref()?, region))).collect();
        // Where the part before the weights, and what follows a tensor, are in the old file.
        let mut old_position = 0;
        for region in news {
            let Some(name) = &region.name else {
                let end =
                    if old_position == 0 { olds.first().map_or(0, |it| it.bytes.end) } else { 0 };
                let len = region.bytes.end - region.bytes.start;
                let end = end.max(old_position + len).min(self.old.len() as u64);
                self.bytes(&region.bytes, &(old_position.min(end)..end));
                continue;
            };
            let found = by_name.get(name.as_str()).copied().or_else(|| self.renamed(olds, region));
            match found {
                Some(found) => {
                    old_position = found.bytes.end;
                    self.tensor(region, found);
                }
                None => self.new_tensor(&region.bytes),
            }
        }
    }

    /// An old tensor with the same bytes.
    fn renamed<'b>(&self, olds: &'b [Region], region: &Region) -> Option<&'b Region> {
        let bytes = &self.new[range(&region.bytes)];
        olds.iter().find(|old| &self.old[range(&old.bytes)] == bytes)
    }

    fn tensor(&mut self, region: &Region, old: &Region) {
        if self.new[range(&region.bytes)] == self.old[range(&old.bytes)] {
            self.copy(&region.bytes, old.bytes.start);
            return;
        }
        let pair: Pair = (region.kind, old.kind);
        let length = |region: &Region| region.bytes.end - region.bytes.start;
        let (len, old_len) = (length(region), length(old));
        // Of one type with rows added or taken away (a vocabulary's, say), the first rows are
        // the same ones.
        let same_kind = region.kind.is_some() && region.kind == old.kind;
        let shared = if same_kind { len.min(old_len) } else { len };
        if shared < len {
            let first = |of: &Region| Region {
                bytes: of.bytes.start..of.bytes.start + shared,
                ..of.clone()
            };
            self.tensor(&first(region), &first(old));
            self.new_tensor(&(region.bytes.start + shared..region.bytes.end));
            return;
        }
        let fits = old_bytes(pair, shared).is_some_and(|bytes| bytes <= old_len);
        let (Some(kind), Some(old_kind), true) = (region.kind, old.kind, fits) else {
            self.bytes(&region.bytes, &old.bytes);
            return;
        };
        let (olds, news) = (&self.old[range(&old.bytes)], &self.new[range(&region.bytes)]);
        let start = match Layout::of(kind) {
            Some(layout) if kind == old_kind => planes::measure(layout, olds, news),
            None if is_plain(kind) && kind == old_kind => numbers::measure(kind, olds, news),
            _ => Start::default(),
        };
        let part = |kind: TensorType| PART_ELEMENTS / kind.block_elements() * kind.block_bytes();
        let (new_part, old_part) = (part(kind), part(old_kind));
        let mut done = 0;
        while done * new_part < len {
            let from = region.bytes.start + done * new_part;
            if !self.has_room_for(pair) {
                self.flush();
            }
            if self.pending.is_empty() {
                self.pending_from = from;
            }
            let room = (MAX_FRAME_BYTES - (from - self.pending_from)) / new_part;
            if room == 0 {
                self.flush();
                continue;
            }
            let output_bytes = (len - done * new_part).min(room * new_part);
            let from_old = old.bytes.start + done * old_part;
            let old_len = old_bytes(pair, output_bytes).expect("parts are whole blocks");
            let segment = Segment { pair, start, old: from_old..from_old + old_len, output_bytes };
            self.add(segment);
            done += room;
        }
    }

    /// Weights that the old file lacks.
    fn new_tensor(&mut self, region: &Range<u64>) {
        self.flush();
        for output in frames_of(region) {
            self.plans.push(Plan { output, how: How::Compress });
        }
    }

    /// Bytes of unknown structure. What the old bytes have too is copied, wherever it is.
    fn bytes(&mut self, region: &Range<u64>, old: &Range<u64>) {
        let few = region.end - region.start <= FEW_BYTES;
        let level = if few { FEW_LEVEL } else { OTHER_LEVEL };
        let (mut done, mut expected) = (region.start, old.start);
        for found in matches(&self.old[range(old)], &self.new[range(region)]) {
            let len = (found.new.end - found.new.start) as u64;
            if len < MIN_COPY_BYTES {
                continue;
            }
            let (from, start) =
                (old.start + found.old as u64, region.start + found.new.start as u64);
            self.guessed(&(done..start), &(expected..from), old, level);
            self.copy(&(start..start + len), from);
            (done, expected) = (start + len, from + len);
        }
        self.guessed(&(done..region.end), &(expected..old.end), old, level);
    }

    /// Bytes that are probably like old ones: those from where the bytes before them are on
    /// (`between.start`), or those up to where the bytes after them are (`between.end`).
    fn guessed(&mut self, region: &Range<u64>, between: &Range<u64>, old: &Range<u64>, level: i32) {
        self.flush();
        // Where there are more than before, the first ones may be those that were added: they are
        // frames of their own, so that the others have old bytes in their place.
        let len = region.end - region.start;
        let more = len.saturating_sub(between.end.saturating_sub(between.start));
        let split = region.start + more;
        for output in frames_of(&(region.start..split)).chain(frames_of(&(split..region.end))) {
            let offset = output.start - region.start;
            let after = (between.start + offset).min(old.end);
            let before = (between.end + offset).saturating_sub(len).clamp(old.start, old.end);
            let begin = after.saturating_sub(MAX_PREFIX_BYTES / 2).max(old.start);
            let prefix = begin..(begin + MAX_PREFIX_BYTES).min(old.end);
            let how = How::Guess { prefix, level, olds: [after, before] };
            self.plans.push(Plan { output, how });
        }
    }

    fn copy(&mut self, output: &Range<u64>, from: u64) {
        let len = output.end - output.start;
        if len == 0 {
            return;
        }
        if !self.pending.is_empty() {
            // Small unchanged tensors between changed ones are not worth a frame.
            let room = MAX_FRAME_BYTES - (output.start - self.pending_from);
            let pair = (None, None);
            if len < MIN_COPY_BYTES && len <= room && self.has_room_for(pair) {
                let old = from..from + len;
                let segment = Segment { pair, start: Start::default(), old, output_bytes: len };
                self.add(segment);
                return;
            }
        }
        self.flush();
        if let Some(Plan { output: before, how: How::Copy(start) }) = self.plans.last_mut()
            && before.end == output.start
            && *start + (before.end - before.start) == from
        {
            before.end = output.end;
            return;
        }
        self.plans.push(Plan { output: output.clone(), how: How::Copy(from) });
    }

    /// Whether the frame in the making can have another segment, of these types.
    fn has_room_for(&self, pair: Pair) -> bool {
        let known = self.pairs.len() < MAX_PAIRS || self.pairs.contains(&pair);
        known && self.pending.len() < MAX_SEGMENTS as usize
    }

    fn add(&mut self, segment: Segment) {
        if !self.pairs.contains(&segment.pair) {
            self.pairs.push(segment.pair);
        }
        self.pending.push(segment);
    }

    fn flush(&mut self) {
        let segments = std::mem::take(&mut self.pending);
        self.pairs.clear();
        let len: u64 = segments.iter().map(|segment| segment.output_bytes).sum();
        if len > 0 {
            let output = self.pending_from..self.pending_from + len;
            self.plans.push(Plan { output, how: How::Code(segments) });
        }
    }
}
