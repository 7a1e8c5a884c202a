//! Turning a file into its new version where it lies, for a disk that has room for one of them.
//!
//! Frames are put in an order in which none overwrites what a later one still reads (Burns and Long
//! 1998, "In-place reconstruction of delta compressed files"); where there is none, as when tensors
//! change places, the old bytes are kept in the journal first. What overwrites goes by way of the
//! journal: a batch of frames is written there, made durable, and only then written into the file.
//! So whatever the power cuts short is done again.
//!
//! The journal: a preamble that names the delta, the kept bytes, and two slots that take turns. The
//! newest whole slot says how far the work is. Everything else follows from the delta's header.

mod course;

use std::io;
use std::ops::Range;

use sha2::{Digest as _, Sha256};
use slmops_artifact::digest::Hasher;

use crate::DeltaError;
use crate::apply::{Old, Part};
use crate::format::{Body, Check, check};
pub use course::Course;
use course::Step;

/// The first bytes of a journal.
const MAGIC: &[u8; 8] = b"SLMDJRN1";
const PREAMBLE_BYTES: u64 = 64;
const SLOT_HEADER_BYTES: u64 = 64;
/// Bytes that are read or written at once where they are only moved.
const CHUNK_BYTES: u64 = 1 << 20;

/// A file that is read and written at positions. Of what was written since it was last synced, any
/// part may be there after a power cut.
pub trait Storage {
    /// Its length in bytes.
    ///
    /// # Errors
    /// Whatever the disk says.
    fn size(&self) -> io::Result<u64>;
    /// Fills the buffer from `offset` on.
    ///
    /// # Errors
    /// A file that ends before; whatever the disk says.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of the bytes from `offset` on.
    ///
    /// # Errors
    /// Whatever the disk says.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Cuts it off, or fills it up with zeros.
    ///
    /// # Errors
    /// Whatever the disk says.
    fn set_len(&mut self, bytes: u64) -> io::Result<()>;
    /// Returns once everything written is durable.
    ///
    /// # Errors
    /// Whatever the disk says.
    fn sync(&mut self) -> io::Result<()>;
}

#[cfg(unix)]
impl Storage for std::fs::File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(self, bytes, offset)
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        std::fs::File::set_len(self, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// A file on its way to its new version.
#[derive(Debug)]
pub struct Rewrite<F, J> {
    course: Course,
    file: F,
    journal: J,
    /// The next step; always the first one of its batch when the work goes on after a cut.
    next: usize,
    /// The number of the newest batch that is in the file; none is 0.
    sequence: u64,
    /// What of the next batch is in the journal.
    written: u64,
    hasher: Sha256,
}

/// Steps that can be made from one range of the delta, without a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// How many.
    pub steps: usize,
    /// Their payloads in the delta.
    pub payloads: Range<u64>,
}

/// The head of a slot.
struct Slot {
    sequence: u64,
    first: u64,
    count: u64,
    bytes: u64,
}

impl Slot {
    fn head(&self, id: &Check) -> Vec<u8> {
        let numbers = [self.sequence, self.first, self.count, self.bytes];
        id.iter().copied().chain(numbers.into_iter().flat_map(u64::to_le_bytes)).collect()
    }
}

impl<F: Storage, J: Storage> Rewrite<F, J> {
    /// Goes on with what is in the file and its journal; with an empty journal, from the file's
    /// beginning: then it must be the old file, by its digest.
    ///
    /// # Errors
    /// [`DeltaError::Base`] where the file has another length, [`DeltaError::Journal`] where the
    /// journal is about another delta, [`DeltaError::Storage`].
    pub fn new(course: Course, file: F, journal: J) -> Result<Self, DeltaError> {
        let hasher = Sha256::new();
        let mut rewrite = Self { course, file, journal, next: 0, sequence: 0, written: 0, hasher };
        match rewrite.newest_slot()? {
            Some(slot) => rewrite.replay(&slot)?,
            None => rewrite.prepare()?,
        }
        rewrite.begin_batch();
        Ok(rewrite)
    }

    /// How far the work is: new bytes that are made, and of how many that change.
    pub fn progress(&self) -> (u64, u64) {
        (self.course.bytes_before(self.next), self.course.bytes_before(self.course.steps.len()))
    }

    /// What to do next; none once every step is made.
    pub fn run(&self) -> Option<Run> {
        let steps = &self.course.steps[self.next..];
        let frames = &self.course.header.frames;
        let mut payloads: Option<Range<u64>> = None;
        let mut count = 0;
        for step in steps {
            let next = &frames[step.frame as usize].payload;
            match &mut payloads {
                // What has no payload is anywhere.
                _ if next.is_empty() => {}
                None => payloads = Some(next.clone()),
                Some(so_far) if next.start == so_far.end => so_far.end = next.end,
                Some(_) => break,
            }
            count += 1;
        }
        (count > 0).then(|| Run { steps: count, payloads: payloads.unwrap_or(0..0) })
    }

    /// How many bytes of payload the next step needs.
    ///
    /// # Panics
    /// Every step is made.
    pub fn needed_bytes(&self) -> usize {
        let frame = &self.course.header.frames[self.course.steps[self.next].frame as usize];
        (frame.payload.end - frame.payload.start) as usize
    }

    /// Makes the next step, with its payload. Every few of them the file changes: what is made then
    /// is durable.
    ///
    /// # Errors
    /// [`DeltaError::Frame`] where the result is wrong, [`DeltaError::Storage`]. Neither has
    /// changed the file in a way that a later attempt could not go on from.
    ///
    /// # Panics
    /// Every step is made.
    pub fn step(&mut self, payload: &[u8]) -> Result<(), DeltaError> {
        let output = self.output(self.course.steps[self.next], payload)?;
        let slot = self.sequence.wrapping_add(1) % 2;
        let at = self.course.slot_at(slot) + SLOT_HEADER_BYTES + self.written;
        self.journal.write_at(&output, at).map_err(DeltaError::Storage)?;
        self.hasher.update(&output);
        self.written += output.len() as u64;
        self.next += 1;
        if self.next == self.course.batch_end(self.next - 1) {
            self.commit().map_err(DeltaError::Storage)?;
        }
        Ok(())
    }

    /// Cuts the file to its new length, and compares its digest.
    ///
    /// # Errors
    /// [`DeltaError::Result`] where it is not the promised file, [`DeltaError::Storage`].
    ///
    /// # Panics
    /// There are steps left.
    pub fn finish(mut self) -> Result<(), DeltaError> {
        assert_eq!(self.next, self.course.steps.len(), "every step is made");
        let found = self.whole().map_err(DeltaError::Storage)?;
        match found == self.course.header.to {
            true => Ok(()),
            false => Err(DeltaError::Result { expected: self.course.header.to, found }),
        }
    }

    fn whole(&mut self) -> io::Result<slmops_artifact::Digest> {
        let bytes = self.course.header.to_bytes;
        self.file.set_len(bytes)?;
        self.file.sync()?;
        let mut hasher = Hasher::default();
        in_chunks(bytes, |at, len| {
            let mut chunk = vec![0; len];
            self.file.read_at(&mut chunk, at)?;
            hasher.update(&chunk);
            Ok(())
        })?;
        Ok(hasher.finish().0)
    }

    // --- the journal

    /// The newest whole slot; none where nothing was changed yet.
    fn newest_slot(&mut self) -> Result<Option<Slot>, DeltaError> {
        let expected = self.course.preamble();
        let mut found = vec![0; expected.len()];
        if self.journal.size().map_err(DeltaError::Storage)? < PREAMBLE_BYTES {
            return Ok(None);
        }
        self.journal.read_at(&mut found, 0).map_err(DeltaError::Storage)?;
        if found != expected {
            let (said, sum) = found.split_at(found.len() - 16);
            // A torn one was written before anything changed.
            return match said.starts_with(MAGIC) && check(said) == *sum {
                true => Err(DeltaError::Journal),
                false => Ok(None),
            };
        }
        let mut newest: Option<Slot> = None;
        for number in 0..2 {
            let slot = self.slot(number).map_err(DeltaError::Storage)?;
            newest = match (newest, slot) {
                (Some(a), Some(b)) if a.sequence > b.sequence => Some(a),
                (a, b) => b.or(a),
            };
        }
        Ok(newest)
    }

    /// A slot, if it is whole.
    fn slot(&self, number: u64) -> io::Result<Option<Slot>> {
        let at = self.course.slot_at(number);
        let length = self.journal.size()?;
        if length < at + SLOT_HEADER_BYTES {
            return Ok(None);
        }
        let mut head = vec![0; SLOT_HEADER_BYTES as usize];
        self.journal.read_at(&mut head, at)?;
        let number = |index: usize| {
            let bytes = head[16 + index * 8..].first_chunk().expect("a head is longer");
            u64::from_le_bytes(*bytes)
        };
        let slot =
            Slot { sequence: number(0), first: number(1), count: number(2), bytes: number(3) };
        let said = slot.head(&self.course.id);
        let fits = slot.bytes <= self.course.slot_bytes
            && length - at - SLOT_HEADER_BYTES >= slot.bytes
            && head.starts_with(&said);
        if !fits {
            return Ok(None);
        }
        let mut hasher = Sha256::new();
        in_chunks(slot.bytes, |offset, len| {
            let mut chunk = vec![0; len];
            self.journal.read_at(&mut chunk, at + SLOT_HEADER_BYTES + offset)?;
            hasher.update(&chunk);
            Ok(())
        })?;
        hasher.update(&said);
        Ok((head[said.len()..][..16] == hasher.finalize()[..16]).then_some(slot))
    }

    /// Nothing was changed yet: keeps what will be overwritten too early.
    fn prepare(&mut self) -> Result<(), DeltaError> {
        let header = &self.course.header;
        let found_bytes = self.file.size().map_err(DeltaError::Storage)?;
        // It may have grown already.
        if found_bytes != header.from_bytes && found_bytes != self.course.file_bytes() {
            return Err(DeltaError::Base {
                expected: header.from,
                expected_bytes: header.from_bytes,
                found_bytes,
            });
        }
        self.keep().map_err(DeltaError::Storage)
    }

    fn keep(&mut self) -> io::Result<()> {
        self.journal.set_len(0)?;
        self.journal.set_len(self.course.journal_bytes())?;
        self.file.set_len(self.course.file_bytes())?;
        self.journal.write_at(&self.course.preamble(), 0)?;
        for (range, to) in &self.course.kept {
            in_chunks(range.end - range.start, |offset, len| {
                let mut chunk = vec![0; len];
                self.file.read_at(&mut chunk, range.start + offset)?;
                self.journal.write_at(&chunk, to + offset)
            })?;
        }
        self.file.sync()?;
        self.journal.sync()?;
        self.seal(&Slot { sequence: 0, first: 0, count: 0, bytes: 0 })
    }

    /// Makes a slot count whose bytes are written.
    fn seal(&mut self, slot: &Slot) -> io::Result<()> {
        let mut head = slot.head(&self.course.id);
        let mut hasher = std::mem::take(&mut self.hasher);
        hasher.update(&head);
        head.extend(&hasher.finalize()[..16]);
        self.journal.write_at(&head, self.course.slot_at(slot.sequence % 2))?;
        self.journal.sync()
    }

    /// The batch is in the journal: now it goes into the file.
    fn commit(&mut self) -> io::Result<()> {
        let count = self.next as u64 - self.batch_start() as u64;
        let slot = Slot {
            sequence: self.sequence + 1,
            first: self.batch_start() as u64,
            count,
            bytes: self.written,
        };
        self.seal(&slot)?;
        self.write_out(&slot)?;
        self.sequence = slot.sequence;
        self.begin_batch();
        Ok(())
    }

    /// The first step of the batch that the last made step belongs to.
    fn batch_start(&self) -> usize {
        let batch = self.course.batches.partition_point(|&end| end < self.next);
        batch.checked_sub(1).map_or(0, |before| self.course.batches[before])
    }

    fn begin_batch(&mut self) {
        self.written = 0;
        self.hasher = Sha256::new();
    }

    /// Writes the bytes of a slot into the file; doing it again changes nothing.
    fn write_out(&mut self, slot: &Slot) -> io::Result<()> {
        let mut at = self.course.slot_at(slot.sequence % 2) + SLOT_HEADER_BYTES;
        let (first, count) = (slot.first as usize, slot.count as usize);
        for step in &self.course.steps[first..first + count] {
            in_chunks(step.bytes(), |offset, len| {
                let mut chunk = vec![0; len];
                self.journal.read_at(&mut chunk, at + offset)?;
                self.file.write_at(&chunk, step.start + offset)
            })?;
            at += step.bytes();
        }
        self.file.sync()
    }

    /// Goes on after the newest batch, which may have got into the file or not.
    fn replay(&mut self, slot: &Slot) -> Result<(), DeltaError> {
        let last = slot.first.checked_add(slot.count);
        if last.is_none_or(|last| last > self.course.steps.len() as u64) {
            return Err(DeltaError::Journal);
        }
        self.next = (slot.first + slot.count) as usize;
        self.sequence = slot.sequence;
        let grown = self.file.set_len(self.course.file_bytes());
        grown.and_then(|()| self.write_out(slot)).map_err(DeltaError::Storage)
    }

    // --- a step

    fn output(&self, step: Step, payload: &[u8]) -> Result<Vec<u8>, DeltaError> {
        let mut reads = step.reads(&self.course.header);
        reads.sort_unstable_by_key(|range| (range.start, range.end));
        let read = |range: Range<u64>| Ok(Part { bytes: self.old(&range)?, start: range.start });
        let parts: io::Result<Vec<Part>> = reads.into_iter().map(read).collect();
        let mut parts = parts.map_err(DeltaError::Storage)?;
        let frame = &self.course.header.frames[step.frame as usize];
        match &frame.body {
            Body::Copy(_) => {
                let bytes = parts.pop().expect("a copy reads its bytes").bytes;
                let whole = (step.start..step.end) == frame.output;
                match !whole || check(&bytes) == frame.check {
                    true => Ok(bytes),
                    false => Err(DeltaError::Frame {
                        frame: step.frame as usize,
                        base: self.course.header.from,
                    }),
                }
            }
            _ => {
                let old = Old::Parts(&parts);
                let output = self.course.header.decode_from(step.frame as usize, old, payload)?;
                Ok(output.into_owned())
            }
        }
    }

    /// Old bytes, wherever they are by now.
    fn old(&self, range: &Range<u64>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.file.read_at(&mut bytes, range.start)?;
        let kept = &self.course.kept;
        let first = kept.partition_point(|(kept, _)| kept.end <= range.start);
        for (kept, at) in kept[first..].iter().take_while(|(kept, _)| kept.start < range.end) {
            let both = kept.start.max(range.start)..kept.end.min(range.end);
            let to = (both.start - range.start) as usize..(both.end - range.start) as usize;
            self.journal.read_at(&mut bytes[to], at + (both.start - kept.start))?;
        }
        Ok(bytes)
    }
}

/// Calls `work` for pieces of so many bytes: where each begins, and its length.
fn in_chunks(bytes: u64, mut work: impl FnMut(u64, usize) -> io::Result<()>) -> io::Result<()> {
    let mut at = 0;
    while at < bytes {
        let len = (bytes - at).min(CHUNK_BYTES);
        work(at, len as usize)?;
        at += len;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
