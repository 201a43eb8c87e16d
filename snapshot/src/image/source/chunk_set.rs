//! A set of a volume's chunks, one bit each, that many threads read and change at once.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::units::ChunkIndex;

const BITS: u64 = u64::BITS as u64;

#[derive(Debug)]
pub(super) struct ChunkSet {
    words: Vec<AtomicU64>,
    chunks: u64,
}

impl ChunkSet {
    /// An empty set of a volume of so many chunks.
    pub(super) fn new(chunks: u64) -> Self {
        let words = (0..chunks.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        Self { words, chunks }
    }

    /// Whether `chunk` is in it. Whoever sees it there sees what was written before it was put there.
    pub(super) fn contains(&self, chunk: ChunkIndex) -> bool {
        self.at(chunk)
            .is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    pub(super) fn insert(&self, chunk: ChunkIndex) {
        if let Some((word, bit)) = self.at(chunk) {
            word.fetch_or(bit, Ordering::Release);
        }
    }

    pub(super) fn remove(&self, chunk: ChunkIndex) {
        if let Some((word, bit)) = self.at(chunk) {
            word.fetch_and(!bit, Ordering::Release);
        }
    }

    /// Whether each chunk of the volume is in this set or in `other`, one of the same volume.
    pub(super) fn makes_whole_with(&self, other: &Self) -> bool {
        let both = self.words.iter().zip(&other.words);
        let missing: u64 = both
            .map(|(one, two)| one.load(Ordering::Relaxed) | two.load(Ordering::Relaxed))
            .map(|word| u64::from(word.count_zeros()))
            .sum();
        // No chunk belongs to the last bits of the last word.
        missing == self.words.len() as u64 * BITS - self.chunks
    }

    fn at(&self, chunk: ChunkIndex) -> Option<(&AtomicU64, u64)> {
        let word = self.words.get(usize::try_from(chunk.0 / BITS).ok()?)?;
        Some((word, 1 << (chunk.0 % BITS)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_sets_make_a_volume_whole_when_no_chunk_is_in_neither() {
        let (data, zeros) = (ChunkSet::new(66), ChunkSet::new(66));
        for chunk in 0..66 {
            assert!(!data.makes_whole_with(&zeros), "{chunk}");
            let set = if chunk % 3 == 0 { &zeros } else { &data };
            set.insert(ChunkIndex(chunk));
            assert!(set.contains(ChunkIndex(chunk)));
        }
        assert!(data.makes_whole_with(&zeros));
        data.remove(ChunkIndex(65));
        assert!(!data.contains(ChunkIndex(65)) && !data.makes_whole_with(&zeros));
        assert!(ChunkSet::new(0).makes_whole_with(&ChunkSet::new(0)));
        // What a volume does not have is in no set.
        data.insert(ChunkIndex(1 << 40));
        assert!(!data.contains(ChunkIndex(1 << 40)));
    }
}
