//! Thousands of damaged inputs for every parser: none may panic, or take memory out of
//! proportion to its input.

use std::path::Path;

use proptest::prelude::*;
use slmops_artifact::Digest;
use slmops_artifact::gguf::{self, Header, TensorType};
use slmops_artifact::huggingface::{export, import};
use slmops_artifact::lineage::{Lineage, Step};
use slmops_artifact::package::{self, ModelConfig, Package, PackageFile};
use slmops_artifact::signing::{self, PrivateKey};

use crate::allocation::peak_bytes;
use crate::tiny::{fixture, write_folder, write_gguf};

/// What every parser may take on top of a multiple of its input, in bytes.
const BASE_BYTES: usize = 1 << 20;
/// Memory over input for GGUF: an empty string takes 8 bytes in a file and 24 in memory, and a
/// growing list is up to three times its content while it moves.
const GGUF_FACTOR: usize = 12;
/// Memory over input for JSON: an element takes 2 bytes in a file and up to 72 in memory.
const JSON_FACTOR: usize = 128;

/// One kind of damage.
#[derive(Clone, Debug)]
enum Damage {
    Truncate(prop::sample::Index),
    FlipBit(prop::sample::Index, u8),
    SetByte(prop::sample::Index, u8),
    /// A number that is likely to overflow something, over the bytes that are there.
    SetNumber(prop::sample::Index, u64, bool),
    /// Some bytes once more, elsewhere.
    Repeat(prop::sample::Index, prop::sample::Index, u8),
    Remove(prop::sample::Index, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>;
    let number = prop_oneof![
        Just(u64::MAX),
        Just(i64::MAX as u64),
        Just(u64::MAX - 31),
        Just(1 << 32),
        Just(u64::from(u32::MAX)),
        Just(1 << 31),
        Just(1 << 24),
        Just(0),
        0_u64..64,
        any::<u64>(),
    ];
    prop_oneof![
        1 => at().prop_map(Damage::Truncate),
        3 => (at(), 0_u8..8).prop_map(|(at, bit)| Damage::FlipBit(at, bit)),
        2 => (at(), any::<u8>()).prop_map(|(at, byte)| Damage::SetByte(at, byte)),
        4 => (at(), number, any::<bool>()).prop_map(|(at, n, wide)| Damage::SetNumber(at, n, wide)),
        1 => (at(), at(), any::<u8>()).prop_map(|(from, to, len)| Damage::Repeat(from, to, len)),
        1 => (at(), any::<u8>()).prop_map(|(at, len)| Damage::Remove(at, len)),
    ]
}

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    prop::collection::vec(damage(), 1..5)
}

fn damaged(bytes: &[u8], damages: &[Damage]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for damage in damages {
        if bytes.is_empty() {
            break;
        }
        let place = |at: &prop::sample::Index| at.index(bytes.len());
        match damage {
            Damage::Truncate(at) => bytes.truncate(place(at)),
            Damage::FlipBit(at, bit) => {
                let at = place(at);
                bytes[at] ^= 1 << bit;
            }
            Damage::SetByte(at, byte) => {
                let at = place(at);
                bytes[at] = *byte;
            }
            Damage::SetNumber(at, number, wide) => {
                let at = place(at);
                let number = number.to_le_bytes();
                let len = if *wide { 8 } else { 4 }.min(bytes.len() - at);
                bytes[at..at + len].copy_from_slice(&number[..len]);
            }
            Damage::Repeat(from, to, len) => {
                let (from, to) = (place(from), place(to));
                let end = (from + usize::from(*len)).min(bytes.len());
                let piece = bytes[from..end].to_vec();
                bytes.splice(to..to, piece);
            }
            Damage::Remove(at, len) => {
                let at = place(at);
                let end = (at + usize::from(*len)).min(bytes.len());
                bytes.drain(at..end);
            }
        }
    }
    bytes
}

/// Damages `input` in `cases` ways; `parse` must return, within `factor` times the input.
fn check(cases: u32, input: &[u8], factor: usize, parse: impl Fn(&[u8])) {
    parse(input);
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(damages in damages())| {
        let bytes = damaged(input, &damages);
        let ((), peak) = peak_bytes(|| parse(&bytes));
        let bound = BASE_BYTES + factor * bytes.len();
        prop_assert!(peak <= bound, "{peak} bytes for {} of input", bytes.len());
    });
}

#[test]
fn damaged_gguf_headers() {
    let file = gguf::open(&fixture("glasslm/glass-f32.gguf")).unwrap();
    let head = &file.bytes()[..file.header().data_offset() as usize];
    let len = file.bytes().len() as u64;
    check(6000, head, GGUF_FACTOR, |bytes| {
        if let Ok(header) = Header::parse_prefix(bytes, len) {
            for tensor in header.tensors() {
                assert!(tensor.offset + tensor.size_bytes <= len);
            }
            let _ = gguf::shape(&header);
            header.file_type();
        }
    });
}

/// The first bytes hold every count: here each bit matters, so all of them are tried.
#[test]
fn every_flipped_bit_of_the_first_kibibyte_of_gguf() {
    let file = gguf::open(&fixture("glasslm/glass-f32.gguf")).unwrap();
    let mut head = file.bytes()[..file.header().data_offset() as usize].to_vec();
    for bit in 0..8 * 1024 {
        head[bit / 8] ^= 1 << (bit % 8);
        let (_, peak) =
            peak_bytes(|| Header::parse_prefix(&head, file.bytes().len() as u64).is_ok());
        assert!(peak <= BASE_BYTES + GGUF_FACTOR * head.len(), "bit {bit}: {peak} bytes");
        head[bit / 8] ^= 1 << (bit % 8);
    }
}

#[test]
fn damaged_manifests_and_configs() {
    let files: Vec<PackageFile> = (0..20)
        .map(|index| PackageFile::of_bytes(&format!("part-{index}.gguf"), b"weights"))
        .collect();
    let config = ModelConfig { name: "model".to_owned(), ..ModelConfig::default() };
    let package = Package::new(files, &config).unwrap();
    check(3000, &package.manifest_bytes(), JSON_FACTOR, |bytes| {
        if let Ok(package) = Package::parse(bytes) {
            package.weights();
            package.manifest_bytes();
        }
    });
    check(2000, package.config_bytes().unwrap(), JSON_FACTOR, |bytes| {
        let _ = ModelConfig::parse(bytes);
    });
    let signature =
        package::signature_manifest(&package.manifest_descriptor(), Digest::of(b"bundle"), 6);
    check(2000, &signature, JSON_FACTOR, |bytes| {
        let _ = package::parse_signature_manifest(bytes);
    });
}

#[test]
fn damaged_signatures_verify_to_what_was_signed_or_not_at_all() {
    let key = PrivateKey::generate();
    let files: Vec<(String, Digest)> =
        (0..10).map(|index| (format!("file-{index}"), Digest::of(&[index]))).collect();
    let bundle = signing::sign("model", &files, &key).unwrap();
    let keys = [key.public()];
    let expected = signing::verify(&bundle, &keys).unwrap();
    check(3000, &bundle, JSON_FACTOR, |bytes| {
        if let Ok(statement) = signing::verify(bytes, &keys) {
            assert_eq!(statement, expected);
        }
    });
}

#[test]
fn damaged_lineages() {
    let digest = Digest::of(b"model");
    let lineage = Lineage::original("model", semver::Version::new(1, 0, 0), "f16", digest).child(
        "q4_0",
        digest,
        Step::new("quantise", [("type", "Q4_0".to_owned())]),
    );
    check(2000, &lineage.to_bytes(), JSON_FACTOR, |bytes| {
        let _ = Lineage::parse(bytes);
    });
}

/// Damages one file of a model folder and imports the folder each time.
fn check_import(file: &str, cases: u32) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("hf");
    write_folder(&model);
    let path = model.join(file);
    let output = folder.path().join("out.gguf");
    let import_with = |path: &Path, bytes: &[u8]| {
        std::fs::write(path, bytes).unwrap();
        if import(&model, &output).is_ok() {
            gguf::open(&output).unwrap();
        }
    };
    // Beside the damaged file, the import reads the others and buffers what it writes.
    let others = 4 << 20;
    let input = std::fs::read(&path).unwrap();
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(damages in damages())| {
        let bytes = damaged(&input, &damages);
        let ((), peak) = peak_bytes(|| import_with(&path, &bytes));
        let bound = others + JSON_FACTOR * bytes.len();
        prop_assert!(peak <= bound, "{peak} bytes for {} of input", bytes.len());
    });
}

#[test]
fn damaged_safetensors() {
    check_import("model.safetensors", 1500);
}

#[test]
fn damaged_tokenizers() {
    check_import("tokenizer.json", 1500);
}

#[test]
fn damaged_model_configs() {
    check_import("config.json", 1000);
    check_import("tokenizer_config.json", 500);
}

/// A small file that claims a great vocabulary does not get the memory for it.
#[test]
fn a_claimed_vocabulary_takes_no_memory() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("hf");
    write_folder(&model);
    let path = model.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"vocab_size\":9", "\"vocab_size\":1000000")).unwrap();
    let output = folder.path().join("out.gguf");
    let (error, peak) = peak_bytes(|| import(&model, &output).unwrap_err().to_string());
    assert!(error.contains("asks for [1000000, 8]"), "{error}");
    assert!(peak < BASE_BYTES, "{peak}");
}

#[test]
fn damaged_gguf_files_are_converted_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("in.gguf");
    write_gguf(&input, TensorType::F32, "smollm");
    let bytes = std::fs::read(&input).unwrap();
    let outputs = [folder.path().join("out.gguf"), folder.path().join("hf")];
    let config = ProptestConfig { cases: 800, failure_persistence: None, ..Default::default() };
    proptest!(config, |(damages in damages())| {
        std::fs::write(&input, damaged(&bytes, &damages)).unwrap();
        let (_, peak) = peak_bytes(|| {
            let _ = gguf::to_f16(&input, &outputs[0]);
            let _ = export(&input, &outputs[1]);
        });
        prop_assert!(peak <= (4 << 20) + JSON_FACTOR * bytes.len(), "{peak} bytes");
    });
}
