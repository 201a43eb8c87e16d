//! Round trips from builder to parser, and what hostile bytes do to the parser.

use proptest::prelude::*;

use super::segment::{KIND_DATA, KIND_ZERO};
use super::*;
use crate::units::{ChunkIndex, ChunkSize};

const CHUNK: u64 = 64 << 10;
const LAYER_BYTES: [u64; 2] = [1 << 40, 1 << 40];

fn data(layer: u16, start: u64, len: u64) -> Entry {
    let digest = ChunkDigest::of(&start.to_le_bytes());
    Entry::Data(StoredChunk {
        layer: LayerNumber(layer),
        frame: ByteRange { start, len },
        digest,
    })
}

fn build(volume_bytes: u64, entries: &[Entry]) -> (IndexRoot, Vec<u8>) {
    let mut builder = IndexBuilder::new(volume_bytes, ChunkSize::DEFAULT, 2).unwrap();
    let mut bytes = INDEX_BLOB_HEADER.to_vec();
    for entry in entries {
        builder
            .push(*entry, |segment| {
                bytes.extend_from_slice(segment);
                Ok::<_, ()>(())
            })
            .unwrap();
    }
    (builder.finish(), bytes)
}

fn parse(root: &IndexRoot, bytes: &[u8], number: u32) -> Result<Segment, SegmentError> {
    let at = root.segment(SegmentIndex(number)).unwrap().stored;
    let bytes = &bytes[at.start as usize..(at.start + at.len) as usize];
    Segment::parse(bytes, root, SegmentIndex(number), &LAYER_BYTES)
}

fn look_up(root: &IndexRoot, bytes: &[u8], chunk: u64) -> Entry {
    let (segment, position) = root.locate(ChunkIndex(chunk)).unwrap();
    parse(root, bytes, segment.0).unwrap().entry(position).unwrap()
}

#[test]
fn a_dense_volume_costs_at_most_40_bytes_a_chunk() {
    let entries: Vec<Entry> = (0..4096).map(|n| data(0, n * 65_000, 65_000)).collect();
    let (root, bytes) = build(4096 * CHUNK, &entries);
    assert!(bytes.len() as u64 <= 36 * 4096, "{}", bytes.len());
    // The worst that one layer can do: zeros between any two chunks of data.
    let entries: Vec<Entry> = (0..4096)
        .map(|n| {
            if n % 2 == 0 {
                data(0, n * 65_020, 65_000)
            } else {
                Entry::Zero
            }
        })
        .collect();
    let (_, sparse) = build(4096 * CHUNK, &entries);
    assert!(sparse.len() as u64 <= 40 * 4096, "{}", sparse.len());
    assert_eq!(root.segments(), 2);
}

#[test]
fn segments_of_zeros_have_no_bytes() {
    let mut builder = IndexBuilder::new(1 << 40, ChunkSize::DEFAULT, 1).unwrap();
    builder
        .push_zeros(
            (1 << 40) / CHUNK,
            |bytes| if bytes.is_empty() { Ok(()) } else { Err(()) },
        )
        .unwrap();
    let root = builder.finish();
    assert_eq!(root.index_bytes(), 8);
    let segment = Segment::parse(&[], &root, SegmentIndex(8191), &[0]).unwrap();
    assert_eq!(segment.entry(2047), Some(Entry::Zero));
    assert_eq!(segment.entry(2048), None);
}

/// Parses `bytes` as the only segment of a volume of eight chunks, under a root that vouches for them.
fn parse_vouched(bytes: &[u8]) -> Result<Segment, SegmentError> {
    let root = IndexRoot::new(
        8 * CHUNK,
        ChunkSize::DEFAULT,
        2,
        [(bytes.len() as u32, *blake3::hash(bytes).as_bytes())],
    );
    Segment::parse(bytes, &root, SegmentIndex(0), &[1000, 1000])
}

/// The run of `chunks` chunks of data whose first frame is `delta` behind the last of `layer`.
fn data_run(chunks: u64, layer: u64, delta: i64, frames: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint::append(chunks << 2 | KIND_DATA, &mut bytes);
    varint::append(layer, &mut bytes);
    varint::append_signed(delta, &mut bytes);
    for len in frames {
        varint::append(*len, &mut bytes);
        bytes.extend_from_slice(&[9; 32]);
    }
    bytes
}

fn zero_run(chunks: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint::append(chunks << 2 | KIND_ZERO, &mut bytes);
    bytes
}

#[test]
fn hostile_segments_are_refused_even_when_their_root_vouches_for_them() {
    let refused = |parts: &[Vec<u8>]| {
        parse_vouched(&parts.concat())
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };

    parse_vouched(&[zero_run(7), data_run(1, 1, 100, &[900])].concat()).unwrap();
    assert!(refused(&[zero_run(7)]).contains("ends before"));
    assert!(refused(&[zero_run(9)]).contains("beyond the segment"));
    assert!(refused(&[zero_run(8), zero_run(1)]).contains("beyond the segment"));
    assert!(refused(&[zero_run(0), zero_run(8)]).contains("empty"));
    assert!(refused(&[zero_run(1 << 40)]).contains("too long"));
    assert!(refused(&[zero_run(7), data_run(1, 2, 0, &[1])]).contains("layer"));
    assert!(refused(&[zero_run(7), data_run(1, u64::MAX, 0, &[1])]).contains("layer"));
    assert!(refused(&[zero_run(7), data_run(1, 0, -1, &[1])]).contains("negative"));
    assert!(refused(&[zero_run(7), data_run(1, 0, i64::MIN, &[1])]).contains("negative"));
    assert!(refused(&[zero_run(7), data_run(1, 0, i64::MAX, &[1])]).contains("outside"));
    assert!(refused(&[zero_run(7), data_run(1, 0, 100, &[901])]).contains("outside"));
    assert!(refused(&[zero_run(7), data_run(1, 0, 0, &[0])]).contains("frame"));
    assert!(refused(&[zero_run(7), data_run(1, 0, 0, &[1 << 40])]).contains("frame"));
    assert!(refused(&[zero_run(7), data_run(1, 0, 0, &[])]).contains("number"));
    assert!(refused(&[data_run(4, 0, 0, &[10; 4]), data_run(4, 0, -1, &[10; 4])]).contains("chunk 4 at"));
    assert!(
        refused(&[data_run(4, 0, 50, &[10; 4]), data_run(4, 0, -79, &[10; 4])]).contains("of its chunk 7")
    );
    assert!(refused(&[data_run(4, 0, 0, &[10; 4]), data_run(4, 0, -40, &[10; 4])]).contains("over that"));
    // Hot chunks laid together come in an order of their own; and layers do not meet.
    parse_vouched(&[data_run(4, 0, 50, &[10; 4]), data_run(4, 0, -90, &[10; 4])].concat()).unwrap();
    parse_vouched(
        &[
            data_run(4, 0, 50, &[10; 4]),
            data_run(3, 1, 50, &[10; 3]),
            data_run(1, 1, -80, &[50]),
        ]
        .concat(),
    )
    .unwrap();
    let mut cut = data_run(8, 0, 0, &[1, 1, 1, 1, 1, 1, 1, 1]);
    cut.pop();
    assert!(refused(&[cut]).contains("digest"));
}

#[test]
fn the_run_kind_of_diff_chunks_is_refused_by_name() {
    let mut bytes = zero_run(7);
    varint::append(1 << 2 | 2, &mut bytes);
    let error = parse_vouched(&bytes).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, SegmentError::UnknownKind { name: "diff", .. }),
        "{error}"
    );
}

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    // Frames in any order, each in a place of its own.
    let places = Just((0_u64..1 << 12).collect::<Vec<_>>()).prop_shuffle();
    let kinds = proptest::collection::vec((any::<bool>(), 0_u16..2, 1_u64..66_000), 1..3000);
    (places, kinds).prop_map(|(places, kinds)| {
        let entry = |(place, (zero, layer, len))| {
            if zero {
                Entry::Zero
            } else {
                data(layer, place * 100_000_000, len)
            }
        };
        places.into_iter().zip(kinds).map(entry).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_was_built_is_read_back(entries in entries(), odd in 0..CHUNK) {
        let volume_bytes = entries.len() as u64 * CHUNK - odd;
        let (root, bytes) = build(volume_bytes, &entries);
        let root = IndexRoot::parse(&root.to_bytes()).unwrap();
        prop_assert_eq!(root.index_bytes(), bytes.len() as u64);
        let segments: Vec<Segment> = (0..root.segments()).map(|n| parse(&root, &bytes, n).unwrap()).collect();
        for (chunk, entry) in entries.iter().enumerate() {
            let (segment, position) = root.locate(ChunkIndex(chunk as u64)).unwrap();
            prop_assert_eq!(segments[segment.0 as usize].entry(position), Some(*entry));
        }
    }

    #[test]
    fn random_bytes_never_panic_the_parsers(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = IndexRoot::parse(&bytes);
        if let Ok(segment) = parse_vouched(&bytes) {
            prop_assert_eq!(segment.chunks_covered(), 8);
        }
    }

    #[test]
    fn a_changed_byte_is_noticed(at in 0_usize..100, flip in 1_u8..=255) {
        let entries: Vec<Entry> = (0..20).map(|n| data(0, n * 1000, 1000)).collect();
        let (root, mut bytes) = build(20 * CHUNK, &entries);
        bytes[8 + at] ^= flip;
        prop_assert!(matches!(parse(&root, &bytes, 0), Err(SegmentError::Corrupt(_))));
    }
}

#[test]
fn chunks_are_found_across_segments() {
    let entries: Vec<Entry> = (0..5000)
        .map(|n| {
            if n % 3 == 0 {
                Entry::Zero
            } else {
                data(1, n * 70, 70)
            }
        })
        .collect();
    let (root, bytes) = build(5000 * CHUNK, &entries);
    for chunk in [0, 1, 2047, 2048, 2049, 4999] {
        assert_eq!(look_up(&root, &bytes, chunk), entries[chunk as usize]);
    }
}
