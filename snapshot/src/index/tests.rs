//! Round trips from builder to parser, and what hostile bytes do to the parser.

use proptest::prelude::*;

use super::segment::{KIND_DATA, KIND_PARTS, KIND_ZERO};
use super::*;
use crate::units::{ChunkIndex, ChunkSize};
use crate::varint;

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
            .push(entry.clone(), |segment| {
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
    parse_vouched_in(bytes, &[1000, 1000])
}

fn parse_vouched_in(bytes: &[u8], layer_bytes: &[u64]) -> Result<Segment, SegmentError> {
    let root = IndexRoot::new(
        8 * CHUNK,
        ChunkSize::DEFAULT,
        2,
        [(bytes.len() as u32, *blake3::hash(bytes).as_bytes())],
    );
    Segment::parse(bytes, &root, SegmentIndex(0), layer_bytes)
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

/// Pages held, pages shown, layer, distance, frame bytes.
type RawPart = ([u8; 2], [u8; 2], u64, i64, u64);

/// A run of one chunk of these parts.
fn parts_run(parts: &[RawPart]) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint::append(1 << 2 | KIND_PARTS, &mut bytes);
    varint::append(parts.len() as u64, &mut bytes);
    for (held, shown, layer, delta, len) in parts {
        bytes.extend_from_slice(held);
        bytes.extend_from_slice(shown);
        varint::append(*layer, &mut bytes);
        varint::append_signed(*delta, &mut bytes);
        varint::append(*len, &mut bytes);
        bytes.extend_from_slice(&[9; 32]);
    }
    bytes
}

#[test]
fn hostile_parts_are_refused() {
    const ALL: [u8; 2] = [0xff; 2];
    let refused = |parts: &[RawPart]| {
        let error = parse_vouched(&[zero_run(7), parts_run(parts)].concat());
        error.map(|_| ()).unwrap_err().to_string()
    };
    let good = [(ALL, [0xfe, 0xff], 0, 0, 100), ([1, 0], [1, 0], 1, 5, 10)];
    parse_vouched(&[zero_run(7), parts_run(&good)].concat()).unwrap();

    assert!(refused(&[]).contains("no parts"));
    let nine: Vec<_> = (0..9).map(|_| ([1, 0], [1, 0], 0, 0, 1)).collect();
    assert!(refused(&nine).contains("too many"));
    assert!(refused(&[(ALL, [0, 0], 0, 0, 1)]).contains("shows no page"));
    assert!(refused(&[([1, 0], [2, 0], 0, 0, 1)]).contains("does not hold"));
    assert!(refused(&[([3, 0], [3, 0], 0, 0, 1), ([2, 0], [2, 0], 1, 0, 1)]).contains("same page"));
    assert!(refused(&[(ALL, ALL, 0, 0, 1)]).contains("whole chunk"));
    assert!(refused(&[([1, 0], [1, 0], 2, 0, 1)]).contains("layer"));
    assert!(refused(&[([1, 0], [1, 0], 0, -1, 1)]).contains("negative"));
    assert!(refused(&[([1, 0], [1, 0], 0, 0, 0)]).contains("empty"));
    assert!(refused(&[([1, 0], [1, 0], 0, 0, 1 << 30)]).contains("too long"));
    assert!(refused(&[([1, 0], [1, 0], 0, 999, 2)]).contains("outside"));
    // Two parts of one frame.
    assert!(refused(&[([1, 0], [1, 0], 0, 0, 10), ([2, 0], [2, 0], 0, -10, 10)]).contains("over that"));
    let whole = parts_run(&good);
    for cut in 1..whole.len() {
        assert!(
            parse_vouched(&[zero_run(7), whole[..cut].to_vec()].concat()).is_err(),
            "{cut}"
        );
    }
    let mut unknown = zero_run(7);
    varint::append(1 << 2 | 3, &mut unknown);
    let error = parse_vouched(&unknown).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, SegmentError::UnknownKind { kind: 3, .. }),
        "{error}"
    );
}

#[test]
fn parts_behind_the_end_of_a_short_last_chunk_are_refused() {
    let parse = |bytes: &[u8], volume_bytes| {
        let segment = (bytes.len() as u32, *blake3::hash(bytes).as_bytes());
        let root = IndexRoot::new(volume_bytes, ChunkSize::DEFAULT, 1, [segment]);
        Segment::parse(bytes, &root, SegmentIndex(0), &[1000])
    };
    let run = parts_run(&[([7, 0], [1, 0], 0, 0, 1)]);
    parse(&run, 2 * 4096 + 1).unwrap();
    assert!(
        parse(&run, 2 * 4096)
            .unwrap_err()
            .to_string()
            .contains("behind the end")
    );
    // And where that is all of it, it is a full chunk.
    let run = parts_run(&[([7, 0], [7, 0], 0, 0, 1)]);
    assert!(
        parse(&run, 2 * 4096 + 1)
            .unwrap_err()
            .to_string()
            .contains("whole chunk")
    );
}

#[test]
fn the_largest_segment_there_can_be_is_read() {
    let size = ChunkSize::new(ChunkSize::MIN).unwrap();
    let chunks = SEGMENT_VOLUME_BYTES / size.bytes();
    let mut builder = IndexBuilder::new(SEGMENT_VOLUME_BYTES, size, LAYERS_MAX).unwrap();
    let mut bytes = Vec::new();
    for chunk in 0..chunks {
        let part = |page: u32| {
            let mut pages = PageBits::EMPTY;
            pages.insert_run(page, 1);
            let layer = LayerNumber(LAYERS_MAX - 1 - page as u16);
            let frame = ByteRange {
                start: (chunks - chunk) << 25,
                len: 16_000,
            };
            let stored = StoredChunk {
                layer,
                frame,
                digest: ChunkDigest([9; 32]),
            };
            StoredPart {
                stored,
                held: PageBits::first(4),
                shown: pages,
            }
        };
        let entry = Entry::Parts((0..4).map(part).collect());
        let write = |segment: &[u8]| {
            bytes.extend_from_slice(segment);
            Ok::<_, ()>(())
        };
        builder.push(entry, write).unwrap();
    }
    let root = IndexRoot::parse(&builder.finish().to_bytes()).unwrap();
    let segment = Segment::parse(&bytes, &root, SegmentIndex(0), &[1 << 40; LAYERS_MAX as usize]).unwrap();
    assert!(segment.memory_bytes() < 4 << 20, "{}", segment.memory_bytes());
}

fn entries() -> impl Strategy<Value = Vec<Entry>> {
    // Frames in any order, each in a place of its own.
    let places = Just((0_u64..1 << 12).collect::<Vec<_>>()).prop_shuffle();
    let owners = proptest::array::uniform16(0_usize..5);
    let kinds = proptest::collection::vec((0_u8..3, 0_u16..2, 1_u64..66_000, owners, any::<u16>()), 1..1500);
    (places, kinds).prop_map(|(places, kinds)| {
        let entry = |(place, (kind, layer, len, owners, held)): (u64, (u8, u16, u64, [usize; 16], u16))| {
            let start = place * 100_000_000;
            match kind {
                0 => Entry::Zero,
                1 => data(layer, start, len),
                _ => parts(layer, start, len, owners, held),
            }
        };
        places.into_iter().zip(kinds).map(entry).collect()
    })
}

/// A chunk each page of which is shown by the part that owns it, or by none.
fn parts(layer: u16, start: u64, len: u64, owners: [usize; 16], held: u16) -> Entry {
    let part = |number: usize| {
        let mut shown = PageBits::EMPTY;
        let pages = owners.iter().enumerate().filter(|(_, owner)| **owner == number);
        pages.for_each(|(page, _)| shown.insert_run(page as u32, 1));
        let Entry::Data(stored) = data(layer ^ number as u16 & 1, start + number as u64 * 70_000, len) else {
            unreachable!()
        };
        let held = PageBits::from_bytes(&held.to_le_bytes()).unwrap().with(&shown);
        (!shown.is_empty() && number < 4).then_some(StoredPart { stored, held, shown })
    };
    let parts: Vec<StoredPart> = (0..4).filter_map(part).collect();
    match &parts[..] {
        [] => Entry::Zero,
        [only] if only.shown == PageBits::first(16) => Entry::Data(only.stored),
        _ => Entry::Parts(parts.into()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_was_built_is_read_back(mut entries in entries(), odd in 0..CHUNK) {
        if let Some(last @ Entry::Parts(_)) = entries.last_mut() {
            *last = Entry::Zero; // it may be short
        }
        let volume_bytes = entries.len() as u64 * CHUNK - odd;
        let (root, bytes) = build(volume_bytes, &entries);
        let root = IndexRoot::parse(&root.to_bytes()).unwrap();
        prop_assert_eq!(root.index_bytes(), bytes.len() as u64);
        let segments: Vec<Segment> = (0..root.segments()).map(|n| parse(&root, &bytes, n).unwrap()).collect();
        for (chunk, entry) in entries.iter().enumerate() {
            let (segment, position) = root.locate(ChunkIndex(chunk as u64)).unwrap();
            let read = segments[segment.0 as usize].entry(position);
            prop_assert_eq!(read.as_ref(), Some(entry));
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
    fn changed_segments_never_panic_the_parser_and_what_it_takes_is_whole(
        entries in entries(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let entries: Vec<Entry> = entries.into_iter().chain(std::iter::repeat(Entry::Zero)).take(8).collect();
        let (_, mut bytes) = build(8 * CHUNK, &entries);
        let mut bytes = bytes.split_off(INDEX_BLOB_HEADER.len());
        for (at, byte) in changes.iter().filter(|_| !bytes.is_empty()).cloned().collect::<Vec<_>>() {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(segment) = parse_vouched_in(&bytes, &LAYER_BYTES) {
            for position in 0..8 {
                if let Some(Entry::Parts(parts)) = segment.entry(position) {
                    prop_assert!(crate::index::parts::check(&parts, CHUNK).is_ok());
                }
            }
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
