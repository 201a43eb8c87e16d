//! Verify finds what is wrong with layers that lie over each other, in images whose digests are all right.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod chain;
mod fixture;

use runnel_snapshot::digest::ChunkDigest;
use runnel_snapshot::image::manifest::{ImageVolume, ManifestDraft};
use runnel_snapshot::image::publication::Publication;
use runnel_snapshot::index::{
    Entry, INDEX_BLOB_HEADER, IndexBuilder, LayerNumber, PageBits, SEGMENT_VOLUME_BYTES, StoredChunk,
    StoredPart,
};
use runnel_snapshot::layer::seek_table::SeekTableWriter;
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::{ByteRange, ChunkSize};
use runnel_snapshot::volume::VolumeName;

use chain::{findings, page_of};
use fixture::{CHUNK, chunk_of};

/// The bytes of a frame, and how much content the seek table claims for it.
type Frame = (Vec<u8>, usize);

struct Forgery {
    volume_bytes: u64,
    layers: Vec<Vec<Frame>>,
    has_full_layer: bool,
    /// Each with the chunks of zeros before it; zeros are behind the last.
    entries: Vec<(u64, Entry)>,
}

fn frame(plain: &[u8]) -> Frame {
    (zstd::bulk::compress(plain, 1).unwrap(), plain.len())
}

fn page_bits(first: u32, count: u32) -> PageBits {
    let mut bits = PageBits::EMPTY;
    bits.insert_run(first, count);
    bits
}

impl Forgery {
    /// Two chunks, over the first of which lies a page, nothing wrong yet. In the layer above is a frame that was
    /// overwritten.
    fn honest() -> Self {
        let layers = vec![
            vec![frame(&chunk_of(1)), frame(&chunk_of(2))],
            vec![frame(&page_of(5)), frame(&page_of(6))],
        ];
        let part = |layer: u16, plain: &[u8], held: PageBits, shown: PageBits| StoredPart {
            stored: StoredChunk {
                layer: LayerNumber(layer),
                frame: ByteRange {
                    start: 0,
                    len: layers[usize::from(layer)][0].0.len() as u64,
                },
                digest: ChunkDigest::of(plain),
            },
            held,
            shown,
        };
        let all = PageBits::first(16);
        let page = page_bits(3, 1);
        let below = part(0, &chunk_of(1), all, all.without(&page));
        let above = part(1, &page_of(5), page, page);
        let second = StoredChunk {
            layer: LayerNumber(0),
            frame: ByteRange {
                start: below.stored.frame.len,
                len: layers[0][1].0.len() as u64,
            },
            digest: ChunkDigest::of(&chunk_of(2)),
        };
        Self {
            volume_bytes: 2 * CHUNK as u64,
            layers,
            has_full_layer: true,
            entries: vec![(0, Entry::Parts([below, above].into())), (0, Entry::Data(second))],
        }
    }

    /// The parts of the first chunk, to change them.
    fn change_parts(&mut self, change: impl Fn(&mut [StoredPart])) {
        let Entry::Parts(parts) = &self.entries[0].1 else {
            panic!("it is of parts")
        };
        let mut parts = parts.to_vec();
        change(&mut parts);
        self.entries[0].1 = Entry::Parts(parts.into());
    }

    fn findings(self) -> String {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("image");
        let publication = Publication::begin(&target).unwrap();
        let mut layers = Vec::new();
        for frames in &self.layers {
            let mut layer = publication.blob().unwrap();
            let mut table = SeekTableWriter::default();
            for (frame, content) in frames {
                layer.write(frame).unwrap();
                table.push(frame.len() as u32, *content as u32).unwrap();
            }
            table.finish(|bytes| layer.write(bytes)).unwrap();
            layers.push(layer.finish().unwrap());
        }
        let mut index = publication.blob().unwrap();
        index.write(INDEX_BLOB_HEADER).unwrap();
        let chunk_size = ChunkSize::DEFAULT;
        let mut builder = IndexBuilder::new(self.volume_bytes, chunk_size, layers.len() as u16).unwrap();
        for (zeros, entry) in self.entries {
            builder.push_zeros(zeros, |bytes| index.write(bytes)).unwrap();
            builder.push(entry, |bytes| index.write(bytes)).unwrap();
        }
        let rest = chunk_size.chunks_in(self.volume_bytes) - builder.chunks();
        builder.push_zeros(rest, |bytes| index.write(bytes)).unwrap();
        let root = builder.finish();
        publication.add(&root.to_bytes()).unwrap();
        let volume = ImageVolume {
            name: VolumeName::Memory,
            layers,
            has_full_layer: self.has_full_layer,
            index: index.finish().unwrap(),
            root,
        };
        let state = MachineState::new(0, Vec::new()).encode().unwrap();
        let draft = ManifestDraft {
            state: publication.add(&state).unwrap(),
            state_inline: None,
            volumes: vec![volume],
            working_set: None,
            parent: None,
            urls: Default::default(),
        };
        publication.publish(&draft, None).unwrap();
        findings(&target)
    }
}

#[test]
fn layers_that_disagree_with_the_index_are_found_although_every_digest_is_right() {
    assert_eq!(Forgery::honest().findings(), "");
    let forged = |change: fn(&mut Forgery), expected: &str| {
        let mut forgery = Forgery::honest();
        change(&mut forgery);
        let found = forgery.findings();
        assert!(found.contains(expected), "expected {expected:?}: {found:?}");
    };
    // Parts that hold other than what they say.
    forged(
        |f| f.change_parts(|parts| parts[0].held = PageBits::first(16).without(&page_bits(3, 1))),
        "hold some of its pages alone",
    );
    forged(
        |f| f.change_parts(|parts| parts[1].held = page_bits(3, 2)),
        "with 8192 bytes of content, and the seek table",
    );
    forged(
        |f| f.layers[1][0] = frame(&page_of(7)),
        "does not match its digest",
    );
    forged(
        |f| f.change_parts(|parts| parts[1].stored.frame.start += 1),
        "no frame begin",
    );
    // Frames that nobody names any more, and that no chunk can have had.
    forged(|f| f.layers[1][1].1 = 1 << 30, "which is no chunk's");
    forged(|f| f.layers[1][1].1 = 9, "does not decompress to a chunk of 9");
    forged(|f| f.layers[1][1].1 = 5000, "decompresses to 4096 bytes");
    forged(
        |f| {
            f.entries[1].1 = Entry::Zero;
            f.layers[0][1] = (b"no frame".to_vec(), CHUNK);
        },
        "does not decompress",
    );
    // A full layer that has other than the volume.
    forged(|f| f.layers[0][1].1 = CHUNK / 2, "the volume has 131072");
    forged(
        |f| f.layers = f.layers.drain(..).rev().collect(),
        "volume memory, chunk 0",
    );
}

#[test]
fn a_frame_of_a_diff_layer_that_two_chunks_have_is_found_however_far_apart_they_are() {
    let plain = chunk_of(9);
    let stored = StoredChunk {
        layer: LayerNumber(0),
        frame: ByteRange {
            start: 0,
            len: frame(&plain).0.len() as u64,
        },
        digest: ChunkDigest::of(&plain),
    };
    let far = SEGMENT_VOLUME_BYTES / CHUNK as u64 - 1;
    let forgery = |entries| Forgery {
        volume_bytes: 2 * SEGMENT_VOLUME_BYTES,
        layers: vec![vec![frame(&plain)]],
        has_full_layer: false,
        entries,
    };
    assert_eq!(forgery(vec![(far, Entry::Data(stored))]).findings(), "");
    let found = forgery(vec![(0, Entry::Data(stored)), (far, Entry::Data(stored))]).findings();
    assert!(found.contains("as another chunk"), "{found}");
}

#[test]
fn parts_over_nothing_are_found_where_a_full_layer_lies_alone() {
    let mut forgery = Forgery::honest();
    forgery.layers.truncate(1);
    let Entry::Parts(parts) = &forgery.entries[0].1 else {
        panic!("it is of parts")
    };
    forgery.entries[0].1 = Entry::Parts(parts[..1].into());
    let found = forgery.findings();
    assert!(found.contains("nothing lies over the full layer"), "{found}");
}
