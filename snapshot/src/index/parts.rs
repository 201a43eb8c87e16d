//! Chunks of parts: what a chunk is when its pages come from several frames, most often from several layers.
//!
//! A part names a frame, the pages that the frame *holds*, packed back to back in their order, and those of them that
//! it *shows*: the others were overwritten by a later layer, or became zero. Each page of the chunk is shown by one
//! part at most; one that none shows is zero.
//!
//! ```text
//! pages           0 1 2 3
//! layer 0         a b c d   the full chunk:  holds 0-3, shows 0 and 3
//! layer 1           e f     holds 1 and 2,   shows 1
//! layer 2             0     page 2 became zero: no frame at all
//! the chunk       a e 0 d
//! ```

use super::{PageBits, StoredChunk};
use crate::units::PAGE_SIZE;

/// The most parts that a chunk may have, each of which may cost whoever waits for it a request of its own: whoever
/// would write more of them writes the chunk anew.
pub const PARTS_MAX: usize = 8;

/// What one frame has to do with a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredPart {
    /// Its frame, and the digest of what the frame holds.
    pub stored: StoredChunk,
    /// The pages that the frame holds, and nothing else.
    pub held: PageBits,
    /// Those of them that the chunk has from it.
    pub shown: PageBits,
}

impl StoredPart {
    /// How many plain bytes its frame holds, in a chunk of `chunk_bytes`: the last page may be short.
    #[must_use]
    pub fn plain_bytes(&self, chunk_bytes: u64) -> u64 {
        let pages = self.held.runs();
        pages.map(|run| bytes_of(run, chunk_bytes).1).sum()
    }

    /// Copies the pages that it shows from what its frame holds into the chunk.
    ///
    /// # Panics
    /// If `plain` is not as long as [`plain_bytes`](Self::plain_bytes) says for a chunk of that length.
    pub fn place(&self, plain: &[u8], chunk: &mut [u8]) {
        self.each_shown(chunk.len() as u64, |packed, at, len| {
            chunk[at..at + len].copy_from_slice(&plain[packed..packed + len]);
        });
    }

    /// Copies the pages that it shows from the chunk to where they are in what its frame holds.
    ///
    /// # Panics
    /// If `plain` is not as long as [`plain_bytes`](Self::plain_bytes) says for a chunk of that length.
    pub fn gather(&self, chunk: &[u8], plain: &mut [u8]) {
        self.each_shown(chunk.len() as u64, |packed, at, len| {
            plain[packed..packed + len].copy_from_slice(&chunk[at..at + len]);
        });
    }

    /// Makes zeros of the pages of the chunk that it shows.
    pub fn clear(&self, chunk: &mut [u8]) {
        self.each_shown(chunk.len() as u64, |_, at, len| chunk[at..at + len].fill(0));
    }

    /// Calls with each page that is shown: where it lies in what the frame holds, where in the chunk, how long it is.
    fn each_shown(&self, chunk_bytes: u64, mut visit: impl FnMut(usize, usize, usize)) {
        let mut packed = 0;
        for (first, count) in self.held.runs() {
            for page in first..first + count {
                let (at, len) = bytes_of((page, 1), chunk_bytes);
                if self.shown.contains(page) {
                    visit(packed as usize, at as usize, len as usize);
                }
                packed += len;
            }
        }
    }
}

/// How many pages a chunk of so many bytes has.
#[must_use]
pub fn pages_in(chunk_bytes: u64) -> u32 {
    chunk_bytes.div_ceil(PAGE_SIZE) as u32 // at most 512
}

/// Where a run of pages begins in a chunk, and how many bytes it has.
#[must_use]
pub fn bytes_of((first, count): (u32, u32), chunk_bytes: u64) -> (u64, u64) {
    let start = u64::from(first) * PAGE_SIZE;
    let end = (u64::from(first) + u64::from(count)) * PAGE_SIZE;
    (start, end.min(chunk_bytes).saturating_sub(start))
}

/// Whether a chunk of `chunk_bytes` may have these parts; what is wrong otherwise. Where the frames are is not looked
/// at.
///
/// # Errors
/// What is wrong with them.
pub fn check(parts: &[StoredPart], chunk_bytes: u64) -> Result<(), &'static str> {
    let all = PageBits::first(pages_in(chunk_bytes));
    if parts.is_empty() || parts.len() > PARTS_MAX {
        return Err("it has no parts or too many");
    }
    let mut shown = PageBits::EMPTY;
    for part in parts {
        if part.shown.is_empty() {
            return Err("a part shows no page");
        }
        if !part.shown.is_within(&part.held) {
            return Err("a part shows pages that it does not hold");
        }
        if !part.held.is_within(&all) {
            return Err("a part holds pages behind the end of the chunk");
        }
        if part.shown.meets(&shown) {
            return Err("two parts show the same page");
        }
        shown = shown.with(&part.shown);
    }
    // There is one way to say that.
    match parts {
        [only] if only.shown == all => Err("a part that is the whole chunk"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::ChunkDigest;
    use crate::index::LayerNumber;
    use crate::units::ByteRange;

    fn bits(pages: &[u32]) -> PageBits {
        let mut bits = PageBits::EMPTY;
        pages.iter().for_each(|page| bits.insert_run(*page, 1));
        bits
    }

    fn part(held: &[u32], shown: &[u32]) -> StoredPart {
        let frame = ByteRange { start: 0, len: 1 };
        StoredPart {
            stored: StoredChunk {
                layer: LayerNumber(0),
                frame,
                digest: ChunkDigest([0; 32]),
            },
            held: bits(held),
            shown: bits(shown),
        }
    }

    #[test]
    fn shown_pages_come_to_their_places_and_a_short_last_page_stays_short() {
        let chunk_bytes = 3 * PAGE_SIZE + 512;
        let part = part(&[0, 2, 3], &[2, 3]);
        assert_eq!(part.plain_bytes(chunk_bytes), 2 * PAGE_SIZE + 512);
        let plain: Vec<u8> = [vec![1; 4096], vec![2; 4096], vec![3; 512]].concat();
        let mut chunk = vec![0; chunk_bytes as usize];
        part.place(&plain, &mut chunk);
        assert_eq!(chunk, [vec![0; 8192], vec![2; 4096], vec![3; 512]].concat());
    }

    #[test]
    fn parts_that_make_no_chunk_are_refused() {
        let refused = |parts: &[StoredPart]| check(parts, 4 * PAGE_SIZE - 1).unwrap_err();
        check(
            &[part(&[0, 1, 2, 3], &[0, 3]), part(&[1, 2], &[1])],
            4 * PAGE_SIZE - 1,
        )
        .unwrap();
        check(&[part(&[0, 1, 2, 3], &[1, 2, 3])], 4 * PAGE_SIZE - 1).unwrap();
        assert!(refused(&[]).contains("no parts"));
        assert!(refused(&[part(&[0], &[0]); PARTS_MAX + 1]).contains("too many"));
        assert!(refused(&[part(&[0], &[])]).contains("shows no page"));
        assert!(refused(&[part(&[], &[])]).contains("shows no page"));
        assert!(refused(&[part(&[0], &[1])]).contains("does not hold"));
        assert!(refused(&[part(&[0, 4], &[0])]).contains("behind the end"));
        assert!(refused(&[part(&[0, 1], &[0, 1]), part(&[1, 2], &[1])]).contains("same page"));
        assert!(refused(&[part(&[0, 1, 2, 3], &[0, 1, 2, 3])]).contains("whole chunk"));
    }
}
