//! Thousands of hostile deltas: valid ones of every kind are taken apart as `docs/delta-format.md`
//! says, damaged field by field and given the right checksum again. Whatever comes of that, the
//! decoder returns soon, takes little memory, and gives nothing but what the header promises.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use half::f16;
use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use slmops_artifact::Digest;
use slmops_artifact::gguf::{TensorType, Writer};
use slmops_delta::{Header, apply, encode};

use crate::allocation::peak_bytes;

/// Cases of each test; more in the nightly run.
const CASES: u32 = 3000;
const CASES_VARIABLE: &str = "SLM_FUZZ_CASES";
/// The most memory for reading one delta and applying it frame by frame.
const MAX_BYTES: usize = 8 << 20;
/// The longest that one delta of these sizes may take: the worst of them take a quarter of a
/// second, but the machine may have others to serve.
const MAX_TIME: Duration = Duration::from_secs(60);
/// Magic, version and length before a header's body, and the checksum after it.
const PREAMBLE_BYTES: usize = 14;
const CHECK_BYTES: usize = 16;

/// A delta, and what it changes.
struct Sample {
    old: Vec<u8>,
    new: Vec<u8>,
    delta: Vec<u8>,
    fields: Vec<Field>,
    payloads: Vec<u8>,
}

/// A part of a header's body.
#[derive(Clone, Debug)]
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

/// One kind of damage.
#[derive(Clone, Debug)]
enum Damage {
    /// Another number somewhere: a length, a count, a position.
    Number(prop::sample::Index, u64),
    /// A number that is off by a little.
    Near(prop::sample::Index, i8),
    /// Another byte in a digest, a kind, a pair of types, a model.
    Byte(prop::sample::Index, prop::sample::Index, u8),
    Remove(prop::sample::Index),
    /// Some fields once more, elsewhere.
    Repeat(prop::sample::Index, u8, prop::sample::Index),
    Swap(prop::sample::Index, prop::sample::Index),
    /// A byte of the payloads.
    Payload(prop::sample::Index, u8),
    /// All of them the same.
    Payloads(u8),
    /// Payloads that end early.
    Cut(prop::sample::Index),
    /// A byte of the old file.
    Old(prop::sample::Index, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    let number = prop_oneof![
        Just(u64::MAX),
        Just(i64::MAX as u64),
        Just(1 << 63),
        Just(1 << 32),
        Just(u64::from(u32::MAX)),
        Just((1 << 20) + 1),
        Just(1 << 20),
        Just(8 << 20),
        0_u64..300,
        any::<u64>(),
    ];
    prop_oneof![
        6 => (at(), number).prop_map(|(at, number)| Damage::Number(at, number)),
        4 => (at(), -4_i8..5).prop_map(|(at, by)| Damage::Near(at, by)),
        4 => (at(), at(), any::<u8>()).prop_map(|(at, byte, to)| Damage::Byte(at, byte, to)),
        1 => at().prop_map(Damage::Remove),
        1 => (at(), 1_u8..20, at()).prop_map(|(from, len, to)| Damage::Repeat(from, len, to)),
        1 => (at(), at()).prop_map(|(one, other)| Damage::Swap(one, other)),
        4 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Payload(at, byte)),
        1 => prop_oneof![Just(0), Just(0xff), any::<u8>()].prop_map(Damage::Payloads),
        1 => at().prop_map(Damage::Cut),
        1 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::Old(at, byte)),
    ]
}

/// Reads a header's body field by field.
struct Reader<'a> {
    bytes: &'a [u8],
    fields: Vec<Field>,
}

impl Reader<'_> {
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let (taken, rest) = self.bytes.split_at(len);
        self.bytes = rest;
        self.fields.push(Field::Bytes(taken.to_vec()));
        taken.to_vec()
    }

    fn number(&mut self) -> u64 {
        let mut number = 0;
        for shift in (0..).step_by(7) {
            let (byte, rest) = self.bytes.split_first().unwrap();
            self.bytes = rest;
            number |= u64::from(byte & 0x7f) << shift;
            if *byte < 0x80 {
                break;
            }
        }
        self.fields.push(Field::Number(number));
        number
    }

    fn body(&mut self) {
        for _ in ["old", "new"] {
            self.number();
            self.bytes(32);
        }
        for _ in 0..self.number() {
            self.bytes(2);
            let len = self.number() as usize;
            self.bytes(len);
        }
        for _ in 0..self.number() {
            self.number();
            self.number();
            self.bytes(16);
            match self.bytes(1)[0] {
                0 => _ = self.number(),
                1 => {}
                2 => _ = (self.number(), self.number()),
                _ => {
                    for _ in 0..self.number() {
                        self.bytes(2);
                        self.bytes(3);
                        self.number();
                        self.number();
                    }
                }
            }
        }
        assert_eq!(self.bytes, b"", "the format is as documented");
    }
}

impl Sample {
    fn of(old: Vec<u8>, new: Vec<u8>) -> Self {
        let delta = encode(&old, &new, 1, &|_| ()).bytes;
        let length: [u8; 4] = delta[PREAMBLE_BYTES - 4..PREAMBLE_BYTES].try_into().unwrap();
        let end = PREAMBLE_BYTES + u32::from_le_bytes(length) as usize;
        let mut reader = Reader { bytes: &delta[PREAMBLE_BYTES..end], fields: Vec::new() };
        reader.body();
        let (fields, payloads) = (reader.fields, delta[end + CHECK_BYTES..].to_vec());
        let sample = Self { old, new, delta, fields, payloads };
        assert!(together(&sample.fields, &sample.payloads) == sample.delta);
        sample
    }
}

/// A delta of these fields, with the right checksum.
fn together(fields: &[Field], payloads: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    for field in fields {
        match field {
            Field::Bytes(bytes) => body.extend(bytes),
            Field::Number(number) => {
                let mut left = *number;
                while left >= 0x80 {
                    body.push(left as u8 | 0x80);
                    left >>= 7;
                }
                body.push(left as u8);
            }
        }
    }
    let mut delta = b"SLMDELTA\x01\x00".to_vec();
    delta.extend((body.len() as u32).to_le_bytes());
    delta.extend(body);
    let check = Sha256::digest(&delta);
    delta.extend(&check[..CHECK_BYTES]);
    delta.extend(payloads);
    delta
}

/// The old file and the delta after some damage.
fn damaged(sample: &Sample, damages: &[Damage]) -> (Vec<u8>, Vec<u8>) {
    let mut old = sample.old.clone();
    let (mut fields, mut payloads) = (sample.fields.clone(), sample.payloads.clone());
    for damage in damages {
        if fields.is_empty() {
            break;
        }
        let count = fields.len();
        match damage {
            Damage::Number(at, number) => {
                // The next number from there on.
                let from = at.index(count);
                let found = fields[from..].iter_mut().find(|it| matches!(it, Field::Number(_)));
                if let Some(field) = found {
                    *field = Field::Number(*number);
                }
            }
            Damage::Near(at, by) => {
                let from = at.index(count);
                let numbers = fields[from..].iter_mut().filter_map(|field| match field {
                    Field::Number(number) => Some(number),
                    Field::Bytes(_) => None,
                });
                if let Some(number) = numbers.take(1).next() {
                    *number = number.wrapping_add_signed(i64::from(*by));
                }
            }
            Damage::Byte(at, byte, to) => {
                let from = at.index(count);
                let filled = fields[from..].iter_mut().filter_map(|field| match field {
                    Field::Bytes(bytes) if !bytes.is_empty() => Some(bytes),
                    _ => None,
                });
                if let Some(bytes) = filled.take(1).next() {
                    let at = byte.index(bytes.len());
                    bytes[at] = *to;
                }
            }
            Damage::Remove(at) => _ = fields.remove(at.index(count)),
            Damage::Repeat(from, len, to) => {
                let from = from.index(count);
                let piece = fields[from..count.min(from + usize::from(*len))].to_vec();
                let to = to.index(count);
                fields.splice(to..to, piece);
            }
            Damage::Swap(one, other) => fields.swap(one.index(count), other.index(count)),
            Damage::Payload(at, byte) if !payloads.is_empty() => {
                let at = at.index(payloads.len());
                payloads[at] = *byte;
            }
            Damage::Payloads(byte) => payloads.fill(*byte),
            Damage::Cut(at) if !payloads.is_empty() => payloads.truncate(at.index(payloads.len())),
            Damage::Old(at, byte) if !old.is_empty() => {
                let at = at.index(old.len());
                old[at] = *byte;
            }
            Damage::Payload(..) | Damage::Cut(_) | Damage::Old(..) => {}
        }
    }
    (old, together(&fields, &payloads))
}

/// What a device may do with a delta: apply it whole, and any frame alone.
fn take(sample: &Sample, old: &[u8], delta: &[u8]) {
    let mut written = Vec::new();
    // What is written is the test's own memory.
    written.reserve_exact(sample.new.len());
    let applied = apply(old, delta, 1, |piece| {
        if written.len() + piece.len() > sample.new.len() {
            return Err(std::io::ErrorKind::StorageFull.into());
        }
        written.extend_from_slice(piece);
        Ok(())
    });
    assert!(
        applied.is_err()
            || written == sample.new
            || Header::parse(delta).unwrap().to == Digest::of(&written)
    );
    let Ok(header) = Header::parse(delta) else { return };
    for (index, frame) in header.frames().iter().enumerate() {
        let range = frame.payload.start as usize..frame.payload.end as usize;
        let Some(payload) = delta.get(range) else { return };
        if let Ok(output) = header.decode(index, old, payload) {
            assert_eq!(output.len() as u64, frame.output.end - frame.output.start);
            assert!(frame.gives(&Digest::of(&output)));
        }
    }
}

/// Damages the samples again and again; one in `share` of all cases.
fn check(samples: &[Sample], share: u32) {
    let more = std::env::var(CASES_VARIABLE).ok().and_then(|cases| cases.parse().ok());
    let config = ProptestConfig {
        cases: more.unwrap_or(CASES) / share,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let strategy = (0..samples.len(), prop::collection::vec(damage(), 1..5));
    proptest!(config, |((sample, damages) in strategy)| {
        let sample = &samples[sample];
        let (old, delta) = damaged(sample, &damages);
        let begun = Instant::now();
        let ((), peak) = peak_bytes(|| take(sample, &old, &delta));
        prop_assert!(peak <= MAX_BYTES + sample.new.len(), "{peak} bytes");
        let took = begun.elapsed();
        prop_assert!(took <= MAX_TIME, "{took:?}");
    });
}

/// Bytes without order, the same in every run.
fn noise(len: usize, mut state: u64) -> Vec<u8> {
    let mut next = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Types that are taken apart, types that are numbers, and one that is only bytes.
const TYPES: [TensorType; 16] = [
    TensorType::F32,
    TensorType::F16,
    TensorType::BF16,
    TensorType::Q8_0,
    TensorType::Q4_0,
    TensorType::Q4_1,
    TensorType::Q5_0,
    TensorType::Q5_1,
    TensorType::Q2_K,
    TensorType::Q3_K,
    TensorType::Q4_K,
    TensorType::Q5_K,
    TensorType::Q6_K,
    TensorType::IQ4_NL,
    TensorType::IQ4_XS,
    TensorType::MXFP4,
];

/// A file with one tensor of each kind; in `changed` of 256 bytes others stand.
fn model(kinds: &[TensorType], elements: u64, changed: u8) -> Vec<u8> {
    let mut writer = Writer::new();
    writer.set("general.architecture", "llama");
    writer.set("tokenizer.chat_template", "template ".repeat(usize::from(changed)));
    for (index, kind) in kinds.iter().enumerate() {
        writer.tensor(&format!("blk.{index}"), &[elements], *kind);
    }
    let mut out = writer.begin(Vec::new()).unwrap();
    for (index, kind) in kinds.iter().enumerate() {
        let mut bytes = noise(kind.bytes_of(elements).unwrap() as usize, index as u64);
        for block in bytes.chunks_exact_mut(kind.block_bytes() as usize) {
            if block.len() > 4 {
                block[..2].copy_from_slice(&f16::from_f32(0.01).to_le_bytes());
            }
        }
        let others = noise(bytes.len() * 2, 1000 + index as u64);
        for (byte, other) in bytes.iter_mut().zip(others.as_chunks::<2>().0) {
            *byte = if other[0] < changed { other[1] } else { *byte };
        }
        out.write(&bytes).unwrap();
    }
    out.finish().unwrap()
}

/// Deltas of every kind of frame.
static SAMPLES: LazyLock<Vec<Sample>> = LazyLock::new(|| {
    let text = "All the world's a stage, and all the men and women merely players. ".repeat(300);
    let other_text = text.replace("world", "whole world").replace("men", "people");
    let old_noise = noise(60_000, 7);
    let moved = [&old_noise[31_001..], &noise(5000, 8), &old_noise[..30_007]].concat();
    let mut reversed = TYPES;
    reversed.reverse();
    vec![
        Sample::of(model(&TYPES, 1024, 0), model(&TYPES, 1024, 6)),
        Sample::of(model(&TYPES, 512, 0), model(&reversed, 512, 0)),
        Sample::of(text.into_bytes(), other_text.into_bytes()),
        Sample::of(old_noise, moved),
        Sample::of(Vec::new(), noise(300, 9)),
    ]
});

#[test]
fn hostile_deltas() {
    check(&SAMPLES, 1);
}

/// With probabilities in the header, which only larger files have.
#[test]
fn hostile_models() {
    let kinds = [TensorType::Q4_0, TensorType::Q8_0];
    let sample = Sample::of(model(&kinds, 3 << 19, 0), model(&kinds, 3 << 19, 1));
    let models =
        sample.fields.iter().filter(|it| matches!(it, Field::Bytes(bytes) if bytes.len() > 32));
    assert!(models.count() >= 2, "the header has models");
    check(&[sample], 30);
}

/// A zstd frame may claim any window and any content size: memory is given for neither.
#[test]
fn hostile_windows() {
    let sample = Sample::of(Vec::new(), b"to be or not to be, ".repeat(50));
    let content = &sample.new[..];
    // RFC 8878, 3.1.1: magic, a descriptor, a window of 2^41 bytes or less, one raw block.
    let block = ((content.len() as u32) << 3 | 1).to_le_bytes();
    let magic = 0xfd2f_b528_u32.to_le_bytes();
    for window in [0x00, 0x58, 0xa0, 0xa8, 0xff] {
        for size in [None, Some(u64::MAX), Some(1 << 40), Some(content.len() as u64)] {
            // The upper bits tell that the content's size has eight bytes.
            let descriptor = if size.is_some() { 0xc0 } else { 0x00 };
            let size = size.map(u64::to_le_bytes);
            let mut payload = [&magic[..], &[descriptor, window]].concat();
            payload.extend(size.iter().flatten());
            payload.extend(&block[..3]);
            payload.extend(content);
            let mut fields = sample.fields.clone();
            // Counted from the end: output, payload, hash, kind, prefix, position.
            let payload_bytes = fields.len() - 5;
            fields[payload_bytes] = Field::Number(payload.len() as u64);
            let delta = together(&fields, &payload);
            let ((), peak) = peak_bytes(|| take(&sample, &sample.old, &delta));
            assert!(peak <= 1 << 20, "{peak} bytes for window {window:#x}, size {size:?}");
        }
    }
}
