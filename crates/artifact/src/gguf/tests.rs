use std::path::PathBuf;

use super::*;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)
}

/// A small file with a value of each kind and three tensors, one of them quantised.
fn sample() -> Vec<u8> {
    let mut writer = Writer::new();
    writer
        .set("general.architecture", "llama")
        .set("llama.block_count", 2_u32)
        .set("a.u8", Value::U8(7))
        .set("a.i8", Value::I8(-7))
        .set("a.u16", Value::U16(700))
        .set("a.i16", Value::I16(-700))
        .set("a.i32", Value::I32(-70_000))
        .set("a.f32", 1.5_f32)
        .set("a.bool", true)
        .set("a.u64", Value::U64(1 << 40))
        .set("a.i64", Value::I64(-(1 << 40)))
        .set("a.f64", Value::F64(2.5))
        .set("a.strings", Value::Array(Array::String(vec!["ein".to_owned(), "zwei".to_owned()])))
        .set("a.numbers", Value::Array(Array::I32(vec![1, -2, 3])))
        .set("a.truths", Value::Array(Array::Bool(vec![true, false])))
        .set("a.nested", Value::Array(Array::Array(vec![Array::U8(vec![1]), Array::F32(vec![])])))
        .tensor("matrix", &[32, 2], TensorType::Q8_0)
        .tensor("vector", &[3], TensorType::F32)
        .tensor("half", &[4, 2], TensorType::F16);
    let mut out = writer.begin(Vec::new()).unwrap();
    out.write(&[1; 34]).unwrap();
    out.write(&[2; 34]).unwrap();
    out.write(&[0; 12]).unwrap();
    out.write(&[0; 16]).unwrap();
    out.finish().unwrap()
}

/// The header as a file of its own, from parts that the writer would refuse.
fn raw(entries: &[u8], entry_count: u64, tensors: &[u8], tensor_count: u64) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3_u32.to_le_bytes());
    bytes.extend(tensor_count.to_le_bytes());
    bytes.extend(entry_count.to_le_bytes());
    bytes.extend(entries);
    bytes.extend(tensors);
    bytes
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn raw_tensor(name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut bytes = text(name);
    bytes.extend((dimensions.len() as u32).to_le_bytes());
    bytes.extend(dimensions.iter().flat_map(|dimension| dimension.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

#[track_caller]
fn check_refused(bytes: &[u8], message: &str) {
    let error = Header::parse(bytes).expect_err("a hostile file must be refused").to_string();
    assert!(error.contains(message), "{error:?} lacks {message:?}");
    assert!(error.contains("\nhint: "), "{error:?} lacks a hint");
    assert!(error.len() < 1000, "{error:?} is too long");
}

#[test]
fn what_is_written_is_read() {
    let bytes = sample();
    let header = Header::parse(&bytes).unwrap();
    assert_eq!(header.version(), 3);
    assert_eq!(header.metadata().len(), 16);
    assert_eq!(header.get("a.i64"), Some(&Value::I64(-(1 << 40))));
    assert_eq!(header.get("a.strings").unwrap().as_strings().unwrap(), ["ein", "zwei"]);
    assert_eq!(
        header.get("a.nested"),
        Some(&Value::Array(Array::Array(vec![Array::U8(vec![1]), Array::F32(vec![])])))
    );
    let matrix = header.tensor("matrix").unwrap();
    assert_eq!((matrix.size_bytes, matrix.elements(), matrix.row_elements()), (68, 64, 32));
    assert_eq!(bytes[matrix.offset as usize + 34], 2);
    assert_eq!(header.parameters(), 64 + 3 + 8);
    assert_eq!(bytes.len() as u64 % DEFAULT_ALIGNMENT_BYTES, 0);
}

#[test]
fn a_prefix_that_holds_the_header_is_enough() {
    let bytes = sample();
    let header = Header::parse(&bytes).unwrap();
    let prefix = &bytes[..header.data_offset() as usize];
    let again = Header::parse_prefix(prefix, bytes.len() as u64).unwrap();
    assert_eq!(again.tensors(), header.tensors());
    assert!(Header::parse(prefix).is_err());
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sample();
    let end = Header::parse(&bytes).unwrap().tensors().last().unwrap().offset + 16;
    for len in 0..end as usize {
        assert!(Header::parse(&bytes[..len]).is_err(), "{len} bytes of {end} were accepted");
    }
}

#[test]
fn hostile_headers_are_refused() {
    check_refused(b"", "magic at byte 0: needs 4 bytes");
    check_refused(b"PK\x03\x04....", "instead of \"GGUF\"");
    check_refused(b"GGUF\x01\0\0\0", "version 1 is not supported");
    check_refused(b"GGUF\x63\0\0\0", "version 99 is not supported");
    check_refused(b"GGUF\0\0\0\x03", "big-endian");
    check_refused(&raw(&[], u64::MAX, &[], 0), "metadata entry count");
    check_refused(&raw(&[], 0, &[], u64::MAX), "tensor count");
    check_refused(&raw(&[], 1, &[], 0), "key of metadata entry 0 at byte 24: needs 8 bytes");
    check_refused(&raw(&u64::MAX.to_le_bytes(), 1, &[], 0), "key's length in bytes");
    check_refused(&raw(&text("\u{1}"), 1, &[], 0), "metadata `\\u{1}`");
    let entry = |kind: u32, rest: &[u8]| [&text("k")[..], &kind.to_le_bytes(), rest].concat();
    check_refused(&raw(&entry(13, &[]), 1, &[], 0), "value type 13 is unknown");
    check_refused(&raw(&entry(7, &[2]), 1, &[], 0), "neither 0 nor 1");
    check_refused(&raw(&entry(8, &1_u64.to_le_bytes()), 1, &[], 0), "needs 1 bytes, 0 are left");
    check_refused(&raw(&entry(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), 1, &[], 0), "not UTF-8");
    let array =
        |kind: u32, len: u64| entry(9, &[&kind.to_le_bytes()[..], &len.to_le_bytes()].concat());
    check_refused(&raw(&array(10, u64::MAX), 1, &[], 0), "the array's length");
    check_refused(&raw(&array(10, MAX_ARRAY_LEN), 1, &[], 0), "needs 33554432 bytes");
    check_refused(&raw(&array(8, MAX_ARRAY_LEN), 1, &[], 0), "needs 8 bytes");
    check_refused(&raw(&array(77, 1), 1, &[], 0), "value type 77 is unknown");
    let mut nested = array(9, 1);
    for _ in 0..10 {
        nested.extend(9_u32.to_le_bytes());
        nested.extend(1_u64.to_le_bytes());
    }
    check_refused(&raw(&nested, 1, &[], 0), "the nesting of arrays is 5");
    let twice = [entry(0, &[1]), entry(0, &[1])].concat();
    check_refused(&raw(&twice, 2, &[], 0), "metadata `k` at byte 38: occurs twice");
    for (alignment, message) in
        [(0_u32, "power of two"), (3, "power of two"), (1 << 30, "alignment in bytes")]
    {
        let entry = [
            text("general.alignment"),
            4_u32.to_le_bytes().to_vec(),
            alignment.to_le_bytes().to_vec(),
        ];
        check_refused(&raw(&entry.concat(), 1, &[], 0), message);
    }
}

#[test]
fn hostile_tensors_are_refused() {
    let one = |tensor: Vec<u8>| raw(&[], 0, &tensor, 1);
    check_refused(&one(raw_tensor(&"x".repeat(65), &[1], 0, 0)), "name's length in bytes is 65");
    check_refused(&one(raw_tensor("t", &[1, 1, 1, 1, 1], 0, 0)), "number of dimensions is 5");
    check_refused(&one(raw_tensor("t", &[0], 0, 0)), "dimension of 0");
    check_refused(&one(raw_tensor("t", &[1 << 32, 1 << 32], 0, 0)), "more elements");
    check_refused(&one(raw_tensor("t", &[1 << 62], 28, 0)), "more bytes");
    check_refused(&one(raw_tensor("t", &[1], 4, 0)), "tensor type 4 is unknown");
    check_refused(&one(raw_tensor("t", &[31], 8, 0)), "whole number of blocks");
    check_refused(&one(raw_tensor("t", &[1], 0, 1)), "not aligned");
    check_refused(&one(raw_tensor("t", &[1], 0, u64::MAX - 31)), "data of tensor \"t\"");
    check_refused(&one(raw_tensor("t", &[1 << 40], 0, 0)), "needs 4398046511104 bytes");
    let two = |second: Vec<u8>| {
        let mut bytes = raw(&[], 0, &[raw_tensor("t", &[16], 0, 0), second].concat(), 2);
        bytes.resize(1000, 0);
        bytes
    };
    check_refused(&two(raw_tensor("t", &[16], 0, 64)), "occurs twice");
    check_refused(&two(raw_tensor("u", &[16], 0, 32)), "overlaps");
    Header::parse(&two(raw_tensor("u", &[16], 0, 64))).unwrap();
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let refuse = |writer: &Writer| writer.begin(Vec::new()).unwrap_err().to_string();
    assert!(refuse(Writer::new().tensor("t", &[31], TensorType::Q8_0)).contains("dimensions"));
    assert!(refuse(Writer::new().tensor("t", &[u64::MAX, 2], TensorType::F32)).contains("dimens"));
    assert!(refuse(Writer::new().set("general.alignment", 5_u32)).contains("power of two"));
    let twice = &mut Writer::new();
    twice.tensor("t", &[1], TensorType::F32).tensor("t", &[1], TensorType::F32);
    assert!(refuse(twice).contains("occurs twice"));

    let mut writer = Writer::new();
    writer.tensor("t", &[2], TensorType::F32);
    let mut out = writer.begin(Vec::new()).unwrap();
    assert!(out.write(&[0; 9]).unwrap_err().to_string().contains("more data than it holds"));
    assert!(out.finish().unwrap_err().to_string().contains("lacks data"));
}

#[test]
fn the_fixture_has_its_shape() {
    let file = open(&fixture("glasslm/glass-f32.gguf")).unwrap();
    let shape = shape(file.header()).unwrap();
    assert_eq!(shape.architecture, "llama");
    assert_eq!(shape.parameters, 869_504);
    assert_eq!((shape.layers, shape.embedding, shape.feed_forward), (4, 128, 352));
    assert_eq!((shape.heads, shape.kv_heads), (4, 2));
    assert_eq!((shape.key_width, shape.value_width), (32, 32));
    assert_eq!((shape.vocabulary, shape.trained_context), (1024, 128));
    assert_eq!(file.header().file_type(), "F32");
    assert_eq!(file.header().chat_template(), None);
}

#[test]
fn a_model_without_dimensions_has_no_shape() {
    let bytes = sample();
    let error = shape(&Header::parse(&bytes).unwrap()).unwrap_err().to_string();
    assert!(error.contains("`llama.embedding_length`"), "{error}");
}

#[test]
fn opening_says_which_file_and_why() {
    let folder = tempfile::tempdir().unwrap();
    let missing = open(&folder.path().join("none.gguf")).unwrap_err().to_string();
    assert!(missing.contains("none.gguf") && missing.contains("hint:"), "{missing}");
    assert!(open(folder.path()).is_err());
    let empty = folder.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    assert!(open(&empty).is_err());
}

#[derive(serde::Deserialize)]
struct Vector {
    #[serde(rename = "type")]
    kind: String,
    stored: String,
    numbers: String,
}

#[test]
fn dequantised_numbers_equal_the_reference_bit_for_bit() {
    let text = std::fs::read_to_string(fixture("quantisation/vectors.json")).unwrap();
    let vectors: Vec<Vector> = serde_json::from_str(&text).unwrap();
    assert_eq!(vectors.len(), 15);
    for vector in vectors {
        let kind = *TensorType::ALL.iter().find(|kind| kind.name() == vector.kind).unwrap();
        let numbers = dequantise(kind, &hex::decode(&vector.stored).unwrap()).unwrap();
        let expected = hex::decode(&vector.numbers).unwrap();
        assert_eq!(numbers.len() * 4, expected.len(), "{kind}");
        for (index, (number, bytes)) in numbers.iter().zip(expected.chunks_exact(4)).enumerate() {
            let expected = f32::from_le_bytes(bytes.try_into().unwrap());
            // Zero may differ in its sign; every other number is the same to the last bit.
            let same =
                number.to_bits() == expected.to_bits() || (*number == 0.0 && expected == 0.0);
            assert!(same, "{kind} element {index}: {number} instead of {expected}");
        }
    }
}

#[test]
fn data_of_the_wrong_length_or_type_is_not_dequantised() {
    assert!(dequantise(TensorType::Q8_0, &[0; 33]).is_err());
    assert!(dequantise_into(TensorType::F32, &[0; 8], &mut [0.0; 3]).is_err());
    let error = dequantise(TensorType::IQ2_XXS, &[0; 66]).unwrap_err().to_string();
    assert!(error.contains("IQ2_XXS cannot be dequantised"), "{error}");
}

#[test]
fn the_reference_of_an_f32_model_holds_its_numbers_in_f16() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("reference.gguf");
    let input = fixture("glasslm/glass-f32.gguf");
    to_f16(&input, &output).unwrap();
    let (from, to) = (open(&input).unwrap(), open(&output).unwrap());
    assert_eq!(to.header().number("general.file_type"), Some(1));
    assert_eq!(to.header().metadata().len(), from.header().metadata().len());
    assert_eq!(to.header().tensors().len(), from.header().tensors().len());
    for (before, after) in from.header().tensors().iter().zip(to.header().tensors()) {
        let is_vector = before.dimensions.len() == 1;
        let expected = if is_vector { TensorType::F32 } else { TensorType::F16 };
        assert_eq!(after.tensor_type, expected, "{}", after.name);
        let before = dequantise(before.tensor_type, from.data(before)).unwrap();
        let after_numbers = dequantise(after.tensor_type, to.data(after)).unwrap();
        for (before, after) in before.iter().zip(&after_numbers) {
            // F16 keeps 11 significant bits; below 2^-14 its steps are 2^-24.
            assert!((before - after).abs() <= (before.abs() / 2048.0).max(3e-8));
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "a temporary file is left");
}

#[test]
fn a_reference_that_f16_cannot_hold_is_refused_and_leaves_nothing() {
    for (number, message) in [(1e6_f32, "beyond the range"), (f32::NAN, "not finite")] {
        let folder = tempfile::tempdir().unwrap();
        let input = folder.path().join("in.gguf");
        let mut writer = Writer::new();
        writer.tensor("matrix", &[2, 2], TensorType::F32);
        let bytes: Vec<u8> =
            [1.0, 2.0, number, 4.0].iter().flat_map(|n: &f32| n.to_le_bytes()).collect();
        writer.create(&input, |out| out.write(&bytes)).unwrap();
        let output = folder.path().join("out.gguf");
        std::fs::write(&output, b"old").unwrap();
        let error = to_f16(&input, &output).unwrap_err().to_string();
        assert!(error.contains(message) && error.contains("matrix"), "{error}");
        assert_eq!(std::fs::read(&output).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
