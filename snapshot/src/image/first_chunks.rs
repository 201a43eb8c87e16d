//! The first chunks of a machine state, held against the volumes of its manifest.

use std::fmt;

use super::manifest::ImageVolume;
use crate::index::{Entry, IndexRoot, StoredChunk, parts};
use crate::layer::frame::frame_bytes_max;
use crate::state::FirstChunk;
use crate::units::ChunkIndex;
use crate::volume::VolumeName;

/// A first chunk that the image's volumes do not have, or whose frames cannot be where they should.
#[derive(Debug, thiserror::Error)]
#[error("the machine state places {chunk} of volume {volume} where it cannot be: {places}")]
pub struct MisplacedChunk {
    volume: VolumeName,
    chunk: ChunkIndex,
    places: Places,
}

/// Where the frames of a chunk are said to be.
#[derive(Debug)]
struct Places(Entry);

impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, stored) in self.0.frames().enumerate() {
            let and = if number == 0 { "" } else { ", " };
            write!(f, "{and}{} of its layer {}", stored.frame, stored.layer.0)?;
        }
        Ok(())
    }
}

/// Checks that whoever fetches one of these by its place alone, without the index, allocates and reads no more than a
/// chunk takes.
pub(super) fn check(first_chunks: &[FirstChunk], volumes: &[ImageVolume]) -> Result<(), MisplacedChunk> {
    let has_place = |first: &&FirstChunk| {
        volumes
            .iter()
            .find(|volume| volume.name == first.volume)
            .is_some_and(|volume| fits(first, &volume.root, &volume.layer_bytes()))
    };
    match first_chunks.iter().find(|first| !has_place(first)) {
        None => Ok(()),
        Some(first) => Err(MisplacedChunk {
            volume: first.volume.clone(),
            chunk: first.chunk,
            places: Places(first.entry.clone()),
        }),
    }
}

/// Whether a volume of these layers can have that chunk there.
pub(super) fn fits(first: &FirstChunk, root: &IndexRoot, layer_bytes: &[u64]) -> bool {
    let len_max = frame_bytes_max(root.chunk_size());
    let lies_in_layer = |stored: &StoredChunk| {
        let layer = layer_bytes.get(usize::from(stored.layer.0));
        (1..=len_max).contains(&stored.frame.len) && layer.is_some_and(|bytes| stored.frame.fits_in(*bytes))
    };
    let range = root.chunk_size().range_of(first.chunk, root.volume_bytes());
    let is_chunk = match &first.entry {
        Entry::Zero => false, // it has no place
        Entry::Data(_) => true,
        Entry::Parts(parts) => parts::check(parts, range.len).is_ok(),
    };
    first.chunk.0 < root.chunks() && is_chunk && first.entry.frames().all(lies_in_layer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blobs::Blob;
    use crate::digest::{BlobDigest, ChunkDigest};
    use crate::index::{IndexBuilder, LayerNumber, PageBits, StoredPart};
    use crate::units::{ByteRange, ChunkSize};

    #[test]
    fn chunks_that_have_no_place_in_their_volume_are_refused() {
        let mut builder = IndexBuilder::new(1 << 20, ChunkSize::DEFAULT, 1).unwrap();
        builder.push_zeros(16, |_| Ok::<_, ()>(())).unwrap();
        let blob = |bytes| Blob {
            digest: BlobDigest::of(b"x"),
            bytes,
        };
        let (name, layers) = (VolumeName::Memory, vec![blob(1_000_000)]);
        let volumes = [ImageVolume {
            name,
            layers,
            has_full_layer: true,
            index: blob(8),
            root: builder.finish(),
        }];
        let stored = |change: &dyn Fn(&mut StoredChunk)| {
            let mut stored = StoredChunk {
                layer: LayerNumber(0),
                frame: ByteRange {
                    start: 999_990,
                    len: 10,
                },
                digest: ChunkDigest::of(b"x"),
            };
            change(&mut stored);
            stored
        };
        let first = |change: &dyn Fn(&mut FirstChunk)| {
            let entry = Entry::Data(stored(&|_| {}));
            let mut first = FirstChunk {
                volume: VolumeName::Memory,
                chunk: ChunkIndex(15),
                entry,
            };
            change(&mut first);
            first
        };
        let good = first(&|_| {});
        check(&[], &[]).unwrap();
        check(std::slice::from_ref(&good), &volumes).unwrap();
        let refused =
            |change: &dyn Fn(&mut FirstChunk)| check(&[good.clone(), first(change)], &volumes).is_err();
        assert!(refused(&|first| first.volume = VolumeName::Drive("other".into())));
        assert!(refused(&|first| first.chunk = ChunkIndex(16)));
        let misplaced = |change: &dyn Fn(&mut StoredChunk)| {
            let part = |held: u32| StoredPart {
                stored: stored(change),
                held: PageBits::first(held),
                shown: PageBits::first(1),
            };
            check(
                &[first(&|first| first.entry = Entry::Parts([part(16)].into()))],
                &volumes,
            )
            .is_err()
                && check(
                    &[first(&|first| first.entry = Entry::Data(stored(change)))],
                    &volumes,
                )
                .is_err()
        };
        assert!(misplaced(&|stored| stored.layer = LayerNumber(1)));
        assert!(misplaced(&|stored| stored.frame.len = 11));
        assert!(misplaced(&|stored| stored.frame.len = 0));
        assert!(misplaced(&|stored| stored.frame.start = u64::MAX));
        assert!(misplaced(&|stored| stored.frame = ByteRange {
            start: 0,
            len: 100_000
        }));
        assert!(refused(&|first| first.entry = Entry::Zero));
        let of_pages = |held: u32| {
            let part = StoredPart {
                stored: stored(&|_| {}),
                held: PageBits::first(held),
                shown: PageBits::first(1),
            };
            Entry::Parts([part].into())
        };
        assert!(!refused(&|first| first.entry = of_pages(16)));
        assert!(refused(&|first| first.entry = of_pages(17)));
    }
}
