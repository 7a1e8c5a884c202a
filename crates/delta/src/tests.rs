use half::f16;
use slmops_artifact::Digest;
use slmops_artifact::gguf::{TensorType, Writer};

use crate::{DeltaError, Encoded, Header, Part, apply, encode};

/// Types that are taken apart, types that are numbers, and two that are only bytes.
const TYPES: [TensorType; 17] = [
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
    TensorType::IQ2_XXS,
    TensorType::MXFP4,
];

/// Numbers without order, the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    fn below(&mut self, limit: usize) -> usize {
        self.next() as usize % limit
    }
}

/// Blocks of a type: scales are small F16 numbers where the layout has them first.
fn weights(random: &mut Random, kind: TensorType, elements: u64) -> Vec<u8> {
    let len = kind.bytes_of(elements).unwrap() as usize;
    let mut bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
    for block in bytes.chunks_exact_mut(kind.block_bytes() as usize) {
        let scale = f16::from_f32(0.01 + random.below(100) as f32 / 1e4).to_le_bytes();
        if block.len() > 4 {
            block[..2].copy_from_slice(&scale);
        }
    }
    bytes
}

/// A model file with one tensor of each kind, and a template as long as asked.
fn model(tensors: &[(TensorType, u64, Vec<u8>)], template: &str) -> Vec<u8> {
    let folder = std::env::temp_dir();
    let path = folder.join(format!(
        "slmops-delta-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let mut writer = Writer::new();
    writer.set("general.architecture", "llama");
    writer.set("tokenizer.chat_template", template);
    for (index, (kind, elements, _)) in tensors.iter().enumerate() {
        writer.tensor(&format!("blk.{index}"), &[*elements], *kind);
    }
    writer
        .create(&path, |out| tensors.iter().try_for_each(|(_, _, bytes)| out.write(bytes)))
        .unwrap();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    bytes
}

fn all_types(random: &mut Random, elements: u64) -> Vec<(TensorType, u64, Vec<u8>)> {
    TYPES.iter().map(|&kind| (kind, elements, weights(random, kind, elements))).collect()
}

/// Changes one byte in `every`.
fn change(random: &mut Random, bytes: &mut [u8], every: usize) {
    for _ in 0..bytes.len() / every {
        let at = random.below(bytes.len());
        bytes[at] = bytes[at].wrapping_add(random.next() as u8);
    }
}

/// Makes a delta and applies it with several numbers of threads.
fn check(old: &[u8], new: &[u8]) -> Encoded {
    let encoded = encode(old, new, 2, &|_| ());
    let header = Header::parse(&encoded.bytes).unwrap();
    let sums = |part: &Part| (part.bytes, part.delta_bytes);
    let (bytes, delta_bytes) =
        encoded.parts.iter().map(sums).fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
    assert_eq!(bytes, new.len() as u64, "the parts fill the file");
    assert_eq!(delta_bytes, header.delta_bytes() - header.header_bytes(), "and the payloads");
    for threads in [1, 3] {
        let mut out = Vec::new();
        apply(old, &encoded.bytes, threads, |piece| {
            out.extend_from_slice(piece);
            Ok(())
        })
        .unwrap();
        assert!(out == new, "the result differs");
    }
    assert!(crate::rewrite::tests::in_place(old, &encoded.bytes) == new, "in place it differs");
    encoded
}

fn failure(old: &[u8], delta: &[u8]) -> Option<DeltaError> {
    let mut written = 0;
    apply(old, delta, 1, |piece| {
        written += piece.len();
        Ok(())
    })
    .err()
}

#[test]
fn every_type_survives_every_amount_of_change() {
    let random = &mut Random(1);
    let before = all_types(random, 4096 + 512);
    let old = model(&before, "short");
    for every in [1, 4, 30, 300, 3000] {
        let mut after = before.clone();
        after.iter_mut().for_each(|(_, _, bytes)| change(random, bytes, every));
        let new = model(&after, "a template of another length, which shifts the weights");
        let encoded = check(&old, &new);
        assert!(encoded.bytes.len() < new.len() + 2000, "{}", encoded.bytes.len());
        if every == 3000 {
            assert!(encoded.bytes.len() < new.len() / 20, "{}", encoded.bytes.len());
        }
    }
}

#[test]
fn a_changed_type_is_predicted_from_the_old_numbers() {
    let random = &mut Random(2);
    let old_kinds =
        [TensorType::F32, TensorType::F16, TensorType::Q4_K, TensorType::Q8_0, TensorType::IQ4_XS];
    for old_kind in old_kinds {
        let before: Vec<_> =
            TYPES.iter().map(|_| (old_kind, 1280, weights(random, old_kind, 1280))).collect();
        let mut after = all_types(random, 1280);
        let new = model(&after, "");
        check(&model(&before, ""), &new);
        after.reverse();
        check(&model(&after, ""), &new);
    }
}

#[test]
fn metadata_alone_costs_next_to_nothing() {
    let random = &mut Random(3);
    let tensors: Vec<_> = (0..40)
        .map(|_| (TensorType::Q4_1, 65_536, weights(random, TensorType::Q4_1, 65_536)))
        .collect();
    let old = model(&tensors, "one");
    let new = model(&tensors, &"another ".repeat(100));
    assert_ne!(old.len(), new.len());
    let encoded = check(&old, &new);
    assert!(encoded.bytes.len() < 1024, "{}", encoded.bytes.len());
}

#[test]
fn odd_files_survive() {
    let random = &mut Random(4);
    let noise: Vec<u8> = (0..3_000_000).map(|_| random.next() as u8).collect();
    let mut moved = vec![1, 2, 3];
    moved.extend(&noise);
    for (old, new) in [
        (&[][..], &[][..]),
        (&[], b"x"),
        (b"x", &[]),
        (b"GGUF", b"GGUF"),
        (&noise, &noise[..1_500_000]),
        (&[], &noise),
    ] {
        check(old, new);
    }
    assert!(check(&noise, &moved).bytes.len() < 10_000);
}

#[test]
fn a_frame_is_decoded_alone() {
    let random = &mut Random(5);
    let before: Vec<_> =
        vec![(TensorType::Q8_0, 4 << 20, weights(random, TensorType::Q8_0, 4 << 20))];
    let mut after = before.clone();
    change(random, &mut after[0].2, 100);
    let (old, new) = (model(&before, ""), model(&after, ""));
    let delta = check(&old, &new).bytes;
    let header = Header::parse(&delta).unwrap();
    assert!(header.frames().len() > 4);
    for (index, frame) in header.frames().iter().enumerate().rev() {
        let payload = &delta[frame.payload.start as usize..frame.payload.end as usize];
        let output = header.decode(index, &old, payload).unwrap();
        assert!(*output == new[frame.output.start as usize..frame.output.end as usize]);
    }
}

#[test]
fn damage_is_noticed_wherever_it_is() {
    let random = &mut Random(6);
    let before = all_types(random, 2048);
    let mut after = before.clone();
    after.iter_mut().for_each(|(_, _, bytes)| change(random, bytes, 50));
    let (old, new) = (model(&before, "one"), model(&after, "two"));
    let delta = check(&old, &new).bytes;
    assert!(matches!(failure(&new[1..], &delta), Some(DeltaError::Base { .. })));
    assert!(matches!(failure(&old, &delta[..delta.len() - 1]), Some(DeltaError::Truncated { .. })));
    assert!(failure(&old, &[&delta[..], b"x"].concat()).is_some());
    for len in 0..200 {
        assert!(failure(&old, &delta[..len]).is_some(), "{len} bytes were enough");
    }
    let mut same_length = new.clone();
    same_length.resize(old.len(), 0);
    assert!(matches!(failure(&same_length, &delta), Some(DeltaError::Frame { .. })));
    let expected = Digest::of(&new);
    for _ in 0..2000 {
        let mut damaged = delta.clone();
        let at = random.below(damaged.len());
        damaged[at] ^= 1 << random.below(8);
        let mut out = Vec::new();
        let result = apply(&old, &damaged, 1, |piece| {
            out.extend_from_slice(piece);
            Ok(())
        });
        // A bit after the last one that the coder needs may not matter.
        assert!(result.is_err() || Digest::of(&out) == expected);
    }
}

#[test]
fn a_full_disk_is_an_error_of_its_own() {
    let (old, new) = (vec![0; 5000], vec![1; 5000]);
    let delta = encode(&old, &new, 1, &|_| ()).bytes;
    let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
    let result = apply(&old, &delta, 1, |_| Err(full()));
    assert!(matches!(result, Err(DeltaError::Write(_))));
}

/// Headers whose checksum is right, so that the parser and the frames see what an attacker wrote.
#[test]
fn hostile_headers_are_refused_or_decode_to_a_mismatch() {
    let random = &mut Random(7);
    let before = all_types(random, 1024);
    let mut after = before.clone();
    after.iter_mut().for_each(|(_, _, bytes)| change(random, bytes, 20));
    let (old, new) = (model(&before, "one"), model(&after, "two"));
    let delta = check(&old, &new).bytes;
    let header_bytes = Header::parse(&delta).unwrap().header_bytes() as usize;
    for _ in 0..20_000 {
        let mut damaged = delta.clone();
        for _ in 0..=random.below(3) {
            let at = 14 + random.below(header_bytes - 30);
            damaged[at] = match random.below(3) {
                0 => random.next() as u8,
                1 => damaged[at] ^ 1 << random.below(8),
                _ => [0, 0x7f, 0x80, 0xff][random.below(4)],
            };
        }
        let check = crate::format::check(&damaged[..header_bytes - 16]);
        damaged[header_bytes - 16..header_bytes].copy_from_slice(&check);
        let mut out = Vec::new();
        let result = apply(&old, &damaged, 1, |piece| {
            out.extend_from_slice(piece);
            Ok(())
        });
        assert!(result.is_err() || out == new);
    }
}

#[test]
fn a_delta_cut_anywhere_is_refused() {
    let random = &mut Random(8);
    let before = all_types(random, 512);
    let mut after = before.clone();
    after.iter_mut().for_each(|(_, _, bytes)| change(random, bytes, 40));
    let (old, new) = (model(&before, "one"), model(&after, "two"));
    let delta = check(&old, &new).bytes;
    for len in 0..delta.len() {
        match failure(&old, &delta[..len]) {
            Some(DeltaError::Truncated { needed, available }) => {
                assert_eq!(available, len as u64);
                assert!(needed > available, "{needed} of {available}");
            }
            // The magic is not there yet.
            Some(DeltaError::Invalid(_)) if len < 8 => {}
            other => panic!("{len} of {} bytes: {other:?}", delta.len()),
        }
    }
}

#[test]
fn a_flipped_bit_in_the_old_file_never_gives_another_result() {
    let random = &mut Random(9);
    let before = all_types(random, 1024);
    let mut after = before.clone();
    after.iter_mut().for_each(|(_, _, bytes)| change(random, bytes, 30));
    let (mut old, new) = (model(&before, "one"), model(&after, "two"));
    let delta = check(&old, &new).bytes;
    let mut refused = 0;
    for _ in 0..500 {
        let (at, bit) = (random.below(old.len()), random.below(8));
        old[at] ^= 1 << bit;
        let mut out = Vec::new();
        let result = apply(&old, &delta, 1, |piece| {
            out.extend_from_slice(piece);
            Ok(())
        });
        old[at] ^= 1 << bit;
        match result {
            // Old bytes that nothing refers to may be anything.
            Ok(()) => assert!(out == new),
            Err(DeltaError::Frame { .. }) => refused += 1,
            Err(other) => panic!("byte {at}: {other}"),
        }
    }
    assert!(refused > 400, "{refused} of 500");
}

#[test]
fn payloads_without_sense_are_refused() {
    let random = &mut Random(10);
    let before = all_types(random, 2048);
    let mut after = before.clone();
    after.iter_mut().for_each(|(_, _, bytes)| change(random, bytes, 10));
    let (old, new) = (model(&before, "one"), model(&after, "two"));
    let mut delta = check(&old, &new).bytes;
    let start = Header::parse(&delta).unwrap().header_bytes() as usize;
    for round in 0..300 {
        for byte in &mut delta[start..] {
            *byte = match round % 3 {
                0 => random.next() as u8,
                1 => 0xff,
                _ => (random.below(40) == 0) as u8,
            };
        }
        assert!(failure(&old, &delta).is_some());
    }
}

#[test]
fn safetensors_are_compared_tensor_by_tensor() {
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;
    let random = &mut Random(11);
    let kinds =
        [(Dtype::F32, 4), (Dtype::F16, 2), (Dtype::BF16, 2), (Dtype::I64, 8), (Dtype::U8, 1)];
    let elements = 40_000;
    let mut tensors: Vec<(Dtype, Vec<u8>)> = Vec::new();
    for (kind, bytes) in kinds {
        tensors.push((kind, (0..elements * bytes).map(|_| random.next() as u8).collect()));
    }
    let file = |tensors: &[(Dtype, Vec<u8>)], note: &str| {
        let views = tensors.iter().enumerate().map(|(index, (kind, bytes))| {
            (format!("tensor.{index}"), TensorView::new(*kind, vec![elements], bytes).unwrap())
        });
        let metadata = [("note".to_owned(), note.to_owned())].into();
        safetensors::serialize(views, Some(metadata)).unwrap()
    };
    let old = file(&tensors, "");
    let renamed = check(&old, &file(&tensors, "another note, which moves the weights"));
    assert!(renamed.bytes.len() < 1024, "{}", renamed.bytes.len());
    for (_, bytes) in &mut tensors {
        change(random, bytes, 400);
    }
    let encoded = check(&old, &file(&tensors, "three"));
    let named: Vec<_> = encoded.parts.iter().filter(|part| part.name.is_some()).collect();
    assert_eq!(named.len(), kinds.len());
    let of = |name: &str| named.iter().find(|part| part.name.as_deref() == Some(name)).unwrap();
    assert_eq!(of("tensor.1").kind, Some(TensorType::F16));
    assert!(encoded.bytes.len() < old.len() / 20, "{}", encoded.bytes.len());
}

/// New weights on the old scales: only codes differ, and each is the nearest.
#[test]
fn rounding_to_old_scales_keeps_them_and_is_exact() {
    use slmops_artifact::gguf::dequantise;
    let random = &mut Random(12);
    for kind in TYPES.into_iter().filter(|kind| crate::layout::Layout::of(*kind).is_some()) {
        let base = weights(random, kind, 2048);
        let numbers = dequantise(kind, &base).unwrap();
        if numbers.iter().any(|number| !number.is_finite()) {
            // Blocks whose scale is no number have nothing to round to.
            continue;
        }
        let again = crate::round_to_scales(kind, &base, &numbers).unwrap();
        assert!(dequantise(kind, &again).unwrap() == numbers, "{kind}: old numbers stay");
        let moved: Vec<f32> =
            numbers.iter().map(|number| number + random.below(100) as f32 * 1e-5).collect();
        let rounded = dequantise(kind, &crate::round_to_scales(kind, &base, &moved).unwrap());
        let error = |found: &[f32]| -> f64 {
            found.iter().zip(&moved).map(|(a, b)| f64::from(a - b).powi(2)).sum()
        };
        assert!(error(&rounded.unwrap()) <= error(&numbers), "{kind}: no worse than staying");
    }
    assert!(crate::round_to_scales(TensorType::F16, &[0; 2], &[0.0]).is_none());
    assert!(crate::round_to_scales(TensorType::Q4_0, &[0; 18], &[0.0; 31]).is_none());
}

/// The bytes of zstd over a whole file, as hard as it can, with all of the old file before it.
fn zstd_bytes(old: &[u8], new: &[u8]) -> usize {
    use zstd_safe::{CCtx, CParameter};
    let mut context = CCtx::create();
    for setting in [
        CParameter::CompressionLevel(19),
        CParameter::WindowLog(27),
        CParameter::EnableLongDistanceMatching(true),
    ] {
        context.set_parameter(setting).unwrap();
    }
    context.ref_prefix(old).unwrap();
    let mut out = vec![0; zstd_safe::compress_bound(new.len())];
    context.compress2(&mut out[..], new).unwrap()
}

/// Words in no order that makes sense.
fn prose(random: &mut Random, bytes: usize) -> Vec<u8> {
    let words: Vec<String> = (0..3000).map(|_| format!("{:x}", random.next() >> 11)).collect();
    let mut text = Vec::new();
    while text.len() < bytes {
        // Some words are more frequent than others.
        let word = random.below(3000).min(random.below(3000)).min(random.below(3000));
        text.extend(words[word].bytes());
        text.push(b' ');
    }
    text
}

#[test]
fn files_without_tensors_cost_no_more_than_zstd_over_the_whole() {
    let random = &mut Random(20);
    let text = prose(random, 1 << 20);
    let mut edited = text.clone();
    for _ in 0..100 {
        let (at, len) = (random.below(edited.len() - 200), random.below(100));
        let others = 1 + random.below(100);
        edited.splice(at..at + len, prose(random, others));
    }
    let noise: Vec<u8> = (0..1_500_000).map(|_| random.next() as u8).collect();
    let shuffled: Vec<u8> =
        noise.chunks(200_000).rev().flat_map(|chunk| [chunk, b"between"].concat()).collect();
    // Numbers in a container that is not known, which begin somewhere else than before.
    let floats: Vec<f32> =
        (0..400_000).map(|_| (random.next() as f32 / (1 << 30) as f32 - 1.0) * 0.05).collect();
    let container = |name: &[u8], scale: f32| -> Vec<u8> {
        let bytes = floats.iter().flat_map(|number| (number * scale).to_le_bytes());
        name.iter().copied().chain(bytes).collect()
    };
    let (weights, tuned) = (container(b"PK34", 1.0), container(b"PK34, and more of it", 1.0001));
    for (name, old, new, share) in [
        ("text, edited", &text, &edited, 1.0),
        ("text, new", &noise, &text, 1.03),
        ("noise, shuffled", &noise, &shuffled, 1.0),
        ("noise, new", &text, &noise, 1.0),
        ("numbers", &weights, &tuned, 0.6),
        ("the same", &text, &text, 1.0),
    ] {
        let encoded = check(old, new);
        let bytes = encoded.bytes.len() as f64;
        // A header, and what a frame is described by.
        let frames = Header::parse(&encoded.bytes).unwrap().frames().len();
        let zstd = zstd_bytes(old, new).min(zstd_bytes(&[], new)) as f64;
        assert!(
            bytes <= zstd * share + 200.0 + frames as f64 * 40.0,
            "{name}: {bytes}, zstd {zstd}"
        );
    }
}

#[test]
fn a_longer_vocabulary_costs_its_new_rows_alone() {
    let random = &mut Random(21);
    let rows = |random: &mut Random, count: u64| weights(random, TensorType::Q8_0, count * 256);
    let mut before = rows(random, 4000);
    let old = model(&[(TensorType::Q8_0, 4000 * 256, before.clone())], "");
    change(random, &mut before, 500);
    let added = rows(random, 20);
    let after = [before, added.clone()].concat();
    let encoded = check(&old, &model(&[(TensorType::Q8_0, 4020 * 256, after)], ""));
    assert!(encoded.bytes.len() < added.len() + old.len() / 100, "{}", encoded.bytes.len());
}

#[test]
fn thousands_of_small_tensors_fit_into_frames() {
    let random = &mut Random(22);
    let before: Vec<_> =
        (0..6000).map(|_| (TensorType::F32, 8, weights(random, TensorType::F32, 8))).collect();
    let mut after = before.clone();
    after.iter_mut().for_each(|(_, _, bytes)| change(random, bytes, 30));
    check(&model(&before, ""), &model(&after, ""));
}
