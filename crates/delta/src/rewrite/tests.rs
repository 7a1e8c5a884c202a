//! Files that are changed where they lie on a disk that loses, at a power cut, any part of what was
//! not synced.

use std::cell::RefCell;
use std::rc::Rc;

use proptest::prelude::*;
use slmops_artifact::Digest;

use super::course::{SIZES, Sizes};
use super::*;
use crate::apply::{Models, code};
use crate::coder::Encoder;
use crate::encode::compress;
use crate::format::{Frame, Segment};
use crate::planes::Start;
use crate::{Header, encode};

/// A file and its journal.
#[derive(Clone)]
struct Disk(Rc<RefCell<State>>);

struct State {
    files: [Contents; 2],
    /// Operations until the power goes.
    left: Option<u64>,
    operations: u64,
}

/// What a file has, and what of that would survive.
#[derive(Default)]
struct Contents {
    now: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
}

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Length(u64),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, new) => {
                let end = *at as usize + new.len();
                bytes.resize(bytes.len().max(end), 0);
                bytes[*at as usize..end].copy_from_slice(new);
            }
            Self::Length(len) => bytes.resize(*len as usize, 0),
        }
    }
}

impl Disk {
    fn with(old: &[u8]) -> Self {
        let file = Contents { now: old.to_vec(), durable: old.to_vec(), unsynced: vec![] };
        let files = [file, Contents::default()];
        Self(Rc::new(RefCell::new(State { files, left: None, operations: 0 })))
    }

    fn cut_after(&self, operations: Option<u64>) {
        self.0.borrow_mut().left = operations;
    }

    /// The power was cut and is back: of each change that was not synced, any bytes are there.
    fn lose(&self, mut chance: impl FnMut() -> u32) {
        let state = &mut *self.0.borrow_mut();
        state.left = None;
        for file in &mut state.files {
            for change in file.unsynced.drain(..) {
                match change {
                    Change::Write(at, bytes) => {
                        for (index, sector) in bytes.chunks(1 + chance() as usize % 97).enumerate()
                        {
                            if chance().is_multiple_of(2) {
                                let at = at + (index * sector.len()) as u64;
                                Change::Write(at, sector.to_vec()).apply(&mut file.durable);
                            }
                        }
                    }
                    length if chance().is_multiple_of(2) => length.apply(&mut file.durable),
                    Change::Length(_) => {}
                }
            }
            file.now.clone_from(&file.durable);
        }
    }

    fn file(&self) -> Vec<u8> {
        self.0.borrow().files[0].durable.clone()
    }
}

struct Handle(Disk, usize);

impl Handle {
    fn change(&self, change: Change) -> io::Result<()> {
        let state = &mut *self.0.0.borrow_mut();
        let file = &mut state.files[self.1];
        // What the power interrupts may be there, too.
        file.unsynced.push(change.clone());
        count(&mut state.left, &mut state.operations)?;
        change.apply(&mut file.now);
        Ok(())
    }
}

fn count(left: &mut Option<u64>, operations: &mut u64) -> io::Result<()> {
    *operations += 1;
    match left {
        Some(0) => Err(io::Error::other("the power is gone")),
        Some(left) => {
            *left -= 1;
            Ok(())
        }
        None => Ok(()),
    }
}

impl Storage for Handle {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.0.borrow().files[self.1].now.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.0.0.borrow();
        let bytes = state.files[self.1].now.get(offset as usize..).unwrap_or_default();
        let bytes = bytes.get(..buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change(Change::Write(offset, bytes.to_vec()))
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        self.change(Change::Length(bytes))
    }

    fn sync(&mut self) -> io::Result<()> {
        let state = &mut *self.0.0.borrow_mut();
        count(&mut state.left, &mut state.operations)?;
        let file = &mut state.files[self.1];
        file.unsynced.clear();
        file.durable.clone_from(&file.now);
        Ok(())
    }
}

fn rewrite(disk: &Disk, delta: &[u8], sizes: Sizes) -> Result<(), DeltaError> {
    let course = Course::with_sizes(delta, sizes)?;
    let journal_bytes = course.journal_bytes();
    let mut rewrite = Rewrite::new(course, Handle(disk.clone(), 0), Handle(disk.clone(), 1))?;
    while let Some(run) = rewrite.run() {
        let mut payloads = &delta[run.payloads.start as usize..run.payloads.end as usize];
        for _ in 0..run.steps {
            let (payload, rest) = payloads.split_at(rewrite.needed_bytes());
            rewrite.step(payload)?;
            payloads = rest;
        }
        assert!(payloads.is_empty(), "a run has the payloads of its steps and nothing else");
    }
    let (done, of) = rewrite.progress();
    assert_eq!(done, of);
    assert!(Handle(disk.clone(), 1).size().unwrap() <= journal_bytes);
    rewrite.finish()
}

/// Changes `old` in place, with a disk that works.
pub(crate) fn in_place(old: &[u8], delta: &[u8]) -> Vec<u8> {
    let disk = Disk::with(old);
    rewrite(&disk, delta, SIZES).unwrap();
    disk.file()
}

const SMALL: Sizes = Sizes { piece_bytes: 64, batch_bytes: 300 };

/// Numbers without order.
fn chances(mut state: u64) -> impl FnMut() -> u32 {
    move || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    }
}

/// A part of a new file, and how it comes out of the old one.
#[derive(Clone, Debug)]
enum Weave {
    Copy { from: usize, len: usize },
    Stored { len: usize },
    Zstd { from: usize, prefix: usize, len: usize },
    Coded { from: [usize; 2], len: usize },
}

fn weave() -> impl Strategy<Value = Weave> {
    let at = 0..4_000_usize;
    prop_oneof![
        4 => (at.clone(), 1..900_usize).prop_map(|(from, len)| Weave::Copy { from, len }),
        1 => (1..200_usize).prop_map(|len| Weave::Stored { len }),
        1 => (at.clone(), 0..600_usize, 1..200_usize)
            .prop_map(|(from, prefix, len)| Weave::Zstd { from, prefix, len }),
        2 => (at.clone(), at, 1..200_usize)
            .prop_map(|(a, b, len)| Weave::Coded { from: [a, b], len }),
    ]
}

/// The delta from `old` that consists of these parts, and the new file.
fn woven(old: &[u8], parts: &[Weave], seed: u64) -> (Vec<u8>, Vec<u8>) {
    let mut chance = chances(seed);
    let clip = |from: usize, len: usize| {
        let from = from % old.len();
        from..(from + len).min(old.len())
    };
    let mut header = Header {
        from: Digest::of(old),
        from_bytes: old.len() as u64,
        to: Digest::of(b""),
        to_bytes: 0,
        frames: vec![],
        priors: vec![],
        header_bytes: 0,
    };
    let (mut new, mut payloads) = (Vec::new(), Vec::new());
    for part in parts {
        let (bytes, body, payload) = match *part {
            Weave::Copy { from, len } => {
                let range = clip(from, len);
                (old[range.clone()].to_vec(), Body::Copy(range.start as u64), vec![])
            }
            Weave::Stored { len } => {
                let bytes: Vec<u8> = (0..len).map(|_| chance() as u8).collect();
                (bytes.clone(), Body::Stored, bytes)
            }
            Weave::Zstd { from, prefix, len } => {
                let range = clip(from, prefix);
                let mut bytes = old[range.clone()].to_vec();
                bytes.truncate(len);
                bytes.extend((bytes.len()..len).map(|index| index as u8));
                let made = compress(old, &bytes, &(range.start as u64..range.end as u64), 3);
                (bytes, made.body, made.payload)
            }
            Weave::Coded { from, len } => {
                let ranges = from.map(|from| clip(from, len));
                let mut bytes: Vec<u8> =
                    ranges.iter().flat_map(|range| old[range.clone()].to_vec()).collect();
                bytes.iter_mut().step_by(9).for_each(|byte| *byte = byte.wrapping_add(1));
                let segment = |range: Range<usize>| Segment {
                    pair: (None, None),
                    start: Start::default(),
                    output_bytes: range.len() as u64,
                    old: range.start as u64..range.end as u64,
                };
                let segments: Vec<Segment> = ranges.map(segment).to_vec();
                let mut coder = Encoder::new();
                let mut models = Models::of(&header);
                code(&mut coder, &mut models, &segments, Old::Whole(old), &mut bytes.clone());
                (bytes, Body::Coded(segments), coder.finish())
            }
        };
        let (at, payload_at) = (new.len() as u64, payloads.len() as u64);
        new.extend(&bytes);
        payloads.extend(payload);
        header.frames.push(Frame {
            output: at..new.len() as u64,
            payload: payload_at..payloads.len() as u64,
            check: check(&bytes),
            body,
        });
    }
    (header.to, header.to_bytes) = (Digest::of(&new), new.len() as u64);
    let mut delta = header.write();
    delta.extend(payloads);
    (delta, new)
}

/// Cuts the power again and again, at random, until the work is done.
fn cut_at_random(old: &[u8], delta: &[u8], new: &[u8], seed: u64) -> u32 {
    let disk = Disk::with(old);
    let mut chance = chances(seed);
    let mut cuts = 0;
    loop {
        // Longer and longer lives: some work is always done in the end.
        disk.cut_after(Some(u64::from(chance()) % (10 + u64::from(cuts))));
        match rewrite(&disk, delta, SMALL) {
            Ok(()) => break,
            Err(DeltaError::Storage(_)) => cuts += 1,
            Err(other) => panic!("after {cuts} cuts: {other}"),
        }
        disk.lose(&mut chance);
    }
    disk.lose(&mut chance);
    assert!(disk.file() == new, "after {cuts} cuts the file is another one");
    cuts
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// Any parts in any order, with the power cut at any operation.
    #[test]
    fn any_delta_survives_any_power_cut(
        parts in proptest::collection::vec(weave(), 1..14),
        old_bytes in 1..4_000_usize,
        seed in any::<u64>(),
    ) {
        let mut chance = chances(seed);
        let old: Vec<u8> = (0..old_bytes).map(|_| chance() as u8).collect();
        let (delta, new) = woven(&old, &parts, seed);
        let disk = Disk::with(&old);
        rewrite(&disk, &delta, SMALL).unwrap();
        prop_assert!(disk.file() == new);
        cut_at_random(&old, &delta, &new, seed);
    }
}

/// A file of tensors: each of so many bytes, its content known by a number.
fn file(tensors: &[(u8, usize)]) -> Vec<u8> {
    let bytes = |&(seed, len): &(u8, usize)| {
        let mut chance = chances(u64::from(seed));
        (0..len).map(|_| chance() as u8).collect::<Vec<u8>>()
    };
    tensors.iter().flat_map(bytes).collect()
}

/// Copies of each of the new tensors from where the old file has it.
fn copies(old: &[(u8, usize)], new: &[(u8, usize)]) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
    let at = |seed: u8| {
        let before = old.iter().take_while(|tensor| tensor.0 != seed);
        before.map(|tensor| tensor.1).sum::<usize>()
    };
    let parts: Vec<Weave> =
        new.iter().map(|&(seed, len)| Weave::Copy { from: at(seed), len }).collect();
    let old = file(old);
    let (delta, made) = woven(&old, &parts, 1);
    assert!(made == file(new));
    (old, delta, made)
}

#[test]
fn a_power_cut_at_each_operation_is_survived() {
    let old = [(1, 500), (2, 700), (3, 300)];
    let cases: [&[(u8, usize)]; 6] = [
        // As it was; shifted down; cut off; in another order; one twice; the last one first.
        &[(1, 500), (2, 700), (3, 300)],
        &[(2, 700), (3, 300)],
        &[(1, 500)],
        &[(3, 300), (2, 700), (1, 500)],
        &[(1, 500), (1, 500), (2, 700), (3, 300)],
        &[(3, 300), (1, 500), (2, 700)],
    ];
    for new in cases {
        let (old, delta, new) = copies(&old, new);
        let disk = Disk::with(&old);
        rewrite(&disk, &delta, SMALL).unwrap();
        let operations = disk.0.borrow().operations;
        for cut in 0..operations {
            for seed in 0..4 {
                let disk = Disk::with(&old);
                let mut chance = chances(cut * 4 + seed);
                disk.cut_after(Some(cut));
                let error = rewrite(&disk, &delta, SMALL).unwrap_err();
                assert!(matches!(error, DeltaError::Storage(_)), "{error}");
                disk.lose(&mut chance);
                rewrite(&disk, &delta, SMALL).unwrap();
                assert!(disk.file() == new, "cut after {cut} of {operations}, seed {seed}");
            }
        }
    }
}

/// What moves one way is never in its own way: only what changes places is kept.
#[test]
fn only_rings_are_kept_aside() {
    let kept = |old: &[(u8, usize)], new: &[(u8, usize)]| {
        let (_, delta, _) = copies(old, new);
        Course::with_sizes(&delta, SMALL).unwrap().kept_bytes
    };
    let old = [(1, 5_000), (2, 7_000), (3, 3_000)];
    assert_eq!(kept(&old, &old), 0);
    assert_eq!(kept(&old, &[(2, 7_000), (3, 3_000)]), 0, "down");
    let grown = [(1, 5_000), (1, 5_000), (2, 7_000), (3, 3_000)];
    assert_eq!(kept(&old, &grown), 0, "up");
    let swapped = kept(&old, &[(3, 3_000), (2, 7_000), (1, 5_000)]);
    assert!((1..4_000).contains(&swapped), "{swapped}");
}

/// The real sizes: several batches, up and down.
#[test]
fn large_files_move_both_ways() {
    let parts = [(1, 3 << 20), (2, 9 << 20), (3, 100)];
    for new in [
        vec![(3, 100), (1, 3 << 20), (2, 9 << 20)],
        vec![(2, 9 << 20), (3, 100)],
        vec![(2, 9 << 20), (1, 3 << 20), (3, 100)],
    ] {
        let (old, delta, new) = copies(&parts, &new);
        assert!(in_place(&old, &delta) == new);
    }
    let old = file(&parts);
    let new = [&old[..4 << 20], b"some more", &old[4 << 20..]].concat();
    let delta = encode(&old, &new, 2, &|_| ()).bytes;
    assert!(in_place(&old, &delta) == new);
}

#[test]
fn a_journal_of_another_delta_is_not_gone_on_with() {
    let tensors = [(1, 900), (2, 700)];
    let (old, delta, new) = copies(&tensors, &[(2, 700), (1, 900)]);
    let disk = Disk::with(&old);
    disk.cut_after(Some(12));
    rewrite(&disk, &delta, SMALL).unwrap_err();
    disk.cut_after(None);
    let (_, other, _) = copies(&tensors, &[(2, 700)]);
    assert!(matches!(rewrite(&disk, &other, SMALL), Err(DeltaError::Journal)));
    rewrite(&disk, &delta, SMALL).unwrap();
    assert!(disk.file() == new);
}

#[test]
fn what_is_wrong_is_noticed() {
    let (old, delta, _) = copies(&[(1, 900), (2, 700)], &[(2, 700), (1, 900)]);
    let length = rewrite(&Disk::with(&old[1..]), &delta, SMALL);
    assert!(matches!(length, Err(DeltaError::Base { .. })));
    let mut flipped = old.clone();
    flipped[1_000] ^= 1;
    let result = rewrite(&Disk::with(&flipped), &delta, SMALL);
    assert!(matches!(result, Err(DeltaError::Result { .. })));
    let mut chance = chances(5);
    let noise: Vec<u8> = (0..2_000).map(|_| chance() as u8).collect();
    let (mut delta, _) = woven(&noise, &[Weave::Coded { from: [100, 900], len: 150 }], 3);
    let last = delta.len() - 9;
    delta[last] ^= 0x10;
    assert!(matches!(rewrite(&Disk::with(&noise), &delta, SMALL), Err(DeltaError::Frame { .. })));
}

/// More references than there is memory for are refused, not followed.
#[test]
fn hostile_references_are_refused() {
    let old = vec![7; 1 << 20];
    let frame = |index: u64| Frame {
        output: index * 8..index * 8 + 8,
        payload: 0..0,
        check: check(&[7; 8]),
        body: Body::Zstd(0..1 << 20),
    };
    let header = Header {
        from: Digest::of(&old),
        from_bytes: old.len() as u64,
        to: Digest::of(&old),
        to_bytes: 8 * 30_000,
        frames: (0..30_000).map(frame).collect(),
        priors: vec![],
        header_bytes: 0,
    };
    assert!(matches!(Course::of(&header.write()), Err(DeltaError::Entangled(_))));
    let copy = Frame { output: 0..1 << 50, payload: 0..0, check: [0; 16], body: Body::Copy(1) };
    let header =
        Header { from_bytes: (1 << 50) + 1, to_bytes: 1 << 50, frames: vec![copy], ..header };
    assert!(matches!(Course::of(&header.write()), Err(DeltaError::Entangled(_))));
}
