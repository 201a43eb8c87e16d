//! The two levels of a volume's index.

use runnel_snapshot::index::{
    Entry, INDEX_BLOB_HEADER, IndexBuilder, IndexRoot, Segment, SegmentIndex, VOLUME_BYTES_MAX,
};
use runnel_snapshot::layer::frame::frame_bytes_max;
use runnel_snapshot::units::ChunkIndex;

use crate::input::Input;

/// The most of a volume that a segment covers here, of 128 MiB: every chunk of it is looked at.
const COVERED_BYTES_MAX: u64 = 8 << 20;

/// A root: what is accepted is written as it was.
pub fn index_root(bytes: &[u8]) -> bool {
    let Ok(root) = IndexRoot::parse(bytes) else {
        return false;
    };
    assert_eq!(root.to_bytes(), bytes, "there is one way to write a root");
    assert!((1..=VOLUME_BYTES_MAX).contains(&root.volume_bytes()));
    let mut covered = 0;
    let mut end = INDEX_BLOB_HEADER.len() as u64;
    for number in (0..root.segments()).map(SegmentIndex) {
        let at = root.segment(number).expect("it has so many");
        assert_eq!(at.stored.start, end, "segments lie back to back");
        end += at.stored.len;
        let (first, chunks) = root.chunks_of(number);
        assert_eq!(first.0, covered);
        assert_eq!(root.locate(first), Some((number, 0)));
        covered += u64::from(chunks);
    }
    assert_eq!((covered, end), (root.chunks(), root.index_bytes()));
    assert_eq!(root.locate(ChunkIndex(root.chunks())), None);
    true
}

/// A root of one segment, whose digest is that of `segment`.
fn root_over(segment: &[u8], log2_chunk_size: u8, layers: u16, volume_bytes: u64) -> Option<IndexRoot> {
    let mut bytes = b"RNLX\x01".to_vec();
    bytes.push(log2_chunk_size);
    bytes.extend(layers.to_le_bytes());
    bytes.extend(volume_bytes.to_le_bytes());
    bytes.extend(u32::try_from(segment.len()).ok()?.to_le_bytes());
    bytes.extend(blake3::hash(segment).as_bytes());
    IndexRoot::parse(&bytes).ok()
}

/// A segment under a root that names it: chunk size, volume length, layers and their lengths, then the segment.
pub fn index_segment(bytes: &[u8]) -> bool {
    let mut input = Input::new(bytes);
    let log2_chunk_size = 14 + input.u8() % 8;
    let volume_bytes = u64::from(input.u32()) % COVERED_BYTES_MAX + 1;
    let layers = 1 + input.u8() % 3;
    let layer_bytes: Vec<u64> = (0..layers).map(|_| u64::from(input.u32())).collect();
    let segment = input.rest();
    let Some(root) = root_over(segment, log2_chunk_size, layers.into(), volume_bytes) else {
        return false;
    };
    let Ok(segment) = Segment::parse(segment, &root, SegmentIndex(0), &layer_bytes) else {
        return false;
    };
    assert_eq!(u64::from(segment.chunks_covered()), root.chunks());
    assert_eq!(segment.entry(segment.chunks_covered()), None);
    let entries = || (0..segment.chunks_covered()).filter_map(|chunk| segment.entry(chunk));
    assert_eq!(entries().count() as u64, root.chunks());
    check_frames(entries(), &root, &layer_bytes);
    check_written(&entries().collect::<Vec<_>>(), &root, &layer_bytes);
    true
}

fn check_frames(entries: impl Iterator<Item = Entry>, root: &IndexRoot, layer_bytes: &[u64]) {
    let mut frames = Vec::new();
    for entry in entries {
        for stored in entry.frames() {
            assert!(stored.frame.fits_in(layer_bytes[usize::from(stored.layer.0)]));
            assert!((1..=frame_bytes_max(root.chunk_size())).contains(&stored.frame.len));
            frames.push((stored.layer, stored.frame.start, stored.frame.len));
        }
    }
    frames.sort_unstable();
    for pair in frames.windows(2) {
        let ((layer, start, len), (other_layer, other_start, _)) = (pair[0], pair[1]);
        assert!(
            layer != other_layer || start + len <= other_start,
            "frames overlap"
        );
    }
}

/// The same entries, as this version writes them, are read as they were.
fn check_written(entries: &[Entry], root: &IndexRoot, layer_bytes: &[u64]) {
    let builder = IndexBuilder::new(root.volume_bytes(), root.chunk_size(), root.layers());
    let mut builder = builder.expect("a root's numbers are within bounds");
    let mut written = Vec::new();
    for entry in entries {
        let pushed = builder.push(entry.clone(), |segment| {
            written.extend_from_slice(segment);
            Ok::<_, ()>(())
        });
        pushed.expect("memory takes all");
    }
    let again = builder.finish();
    let segment = Segment::parse(&written, &again, SegmentIndex(0), layer_bytes);
    let segment = segment.expect("what was written can be read");
    for (entry, chunk) in entries.iter().zip(0..) {
        assert_eq!(segment.entry(chunk).as_ref(), Some(entry));
    }
}
