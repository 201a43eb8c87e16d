//! Cuts what changed of a volume into pieces of work, in order.

use super::merge::{bits_of, next_changed};
use crate::index::PageBits;
use crate::pager::PageSet;
use crate::units::{ChunkIndex, ChunkSize};

/// Changed pages of a piece, about: enough that handing it over costs nothing beside compressing them.
const PAGES: u32 = 64;

/// The bytes of a piece's chunks, or one chunk if that is larger: all of them may have to be written anew.
const BYTES_MAX: u64 = 1 << 20;

/// Chunks that changed, in order. What lies between them, and between the last and `end`, did not.
pub(super) struct Piece {
    pub(super) changed: Vec<(ChunkIndex, PageBits)>,
    /// The chunk behind the piece.
    pub(super) end: u64,
}

/// Walks over a volume.
pub(super) struct Pieces<'a> {
    changed: &'a PageSet,
    chunk_size: ChunkSize,
    volume_bytes: u64,
    next: u64,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(changed: &'a PageSet, chunk_size: ChunkSize, volume_bytes: u64) -> Self {
        Self {
            changed,
            chunk_size,
            volume_bytes,
            next: 0,
        }
    }
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let chunks = self.chunk_size.chunks_in(self.volume_bytes);
        if self.next >= chunks {
            return None;
        }
        let chunks_max = (BYTES_MAX / self.chunk_size.bytes()).max(1) as usize;
        let (mut changed, mut pages) = (Vec::new(), 0);
        while pages < PAGES && changed.len() < chunks_max {
            let Some(chunk) = next_changed(self.changed, self.chunk_size, self.volume_bytes, self.next)
            else {
                self.next = chunks;
                break;
            };
            let range = self.chunk_size.range_of(ChunkIndex(chunk), self.volume_bytes);
            let bits = bits_of(self.changed, range);
            pages += bits.count();
            changed.push((ChunkIndex(chunk), bits));
            self.next = chunk + 1;
        }
        Some(Piece {
            changed,
            end: self.next,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PageIndex;

    #[test]
    fn pieces_name_each_changed_chunk_once_and_end_with_the_volume() {
        let mut changed = PageSet::new(1 << 20);
        for page in (0..1 << 19).step_by(1000) {
            changed.insert_run(PageIndex(page), 3);
        }
        changed.insert_run(PageIndex((1 << 19) + 5), 1000);
        let size = ChunkSize::DEFAULT;
        let (mut pages, mut end, mut last) = (0, 0, None);
        for piece in Pieces::new(&changed, size, (1 << 32) - 1) {
            assert!(piece.changed.len() <= 16 && piece.end > end);
            for (chunk, bits) in &piece.changed {
                assert!(Some(chunk.0) > last && (end..piece.end).contains(&chunk.0));
                last = Some(chunk.0);
                pages += u64::from(bits.count());
            }
            end = piece.end;
        }
        assert_eq!((pages, end), (changed.len(), 1 << 16));
    }
}
