//! The first chunks of a machine state, held against the volumes of its manifest.

use super::manifest::ImageVolume;
use crate::layer::frame::frame_bytes_max;
use crate::state::FirstChunk;
use crate::units::{ByteRange, ChunkIndex};
use crate::volume::VolumeName;

/// A first chunk that the image's volumes do not have, or whose frame cannot be where it should.
#[derive(Debug, thiserror::Error)]
#[error(
    "the machine state places {chunk} of volume {volume} at {frame} of its layer {layer}, where it cannot be"
)]
pub struct MisplacedChunk {
    volume: VolumeName,
    chunk: ChunkIndex,
    layer: u16,
    frame: ByteRange,
}

/// Checks that whoever fetches one of these by its place alone, without the index, allocates and reads no more than a
/// chunk takes.
pub(super) fn check(first_chunks: &[FirstChunk], volumes: &[ImageVolume]) -> Result<(), MisplacedChunk> {
    let has_place = |first: &&FirstChunk| {
        volumes
            .iter()
            .find(|volume| volume.name == first.volume)
            .is_some_and(|volume| fits(first, volume))
    };
    match first_chunks.iter().find(|first| !has_place(first)) {
        None => Ok(()),
        Some(first) => Err(MisplacedChunk {
            volume: first.volume.clone(),
            chunk: first.chunk,
            layer: first.layer.0,
            frame: first.frame,
        }),
    }
}

fn fits(first: &FirstChunk, volume: &ImageVolume) -> bool {
    let len_max = frame_bytes_max(volume.root.chunk_size());
    let layer = volume.layers.get(usize::from(first.layer.0));
    first.chunk.0 < volume.root.chunks()
        && (1..=len_max).contains(&first.frame.len)
        && layer.is_some_and(|layer| first.frame.fits_in(layer.bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blobs::Blob;
    use crate::digest::{BlobDigest, ChunkDigest};
    use crate::index::{IndexBuilder, LayerNumber};
    use crate::units::ChunkSize;

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
            index: blob(8),
            root: builder.finish(),
        }];
        let first = |change: &dyn Fn(&mut FirstChunk)| {
            let mut first = FirstChunk {
                volume: VolumeName::Memory,
                chunk: ChunkIndex(15),
                layer: LayerNumber(0),
                frame: ByteRange {
                    start: 999_990,
                    len: 10,
                },
                digest: ChunkDigest::of(b"x"),
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
        assert!(refused(&|first| first.layer = LayerNumber(1)));
        assert!(refused(&|first| first.frame.len = 11));
        assert!(refused(&|first| first.frame.len = 0));
        assert!(refused(&|first| first.frame = ByteRange {
            start: u64::MAX,
            len: 2
        }));
        assert!(refused(&|first| first.frame = ByteRange {
            start: 0,
            len: 100_000
        }));
    }
}
