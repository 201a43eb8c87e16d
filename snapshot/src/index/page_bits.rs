//! A set of the pages of one chunk.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::units::{ChunkSize, PAGE_SIZE};

/// The most pages that a chunk has: 2 MiB of them.
pub(crate) const CHUNK_PAGES_MAX: u32 = ChunkSize::MAX / PAGE_SIZE as u32;
const WORDS: usize = CHUNK_PAGES_MAX.div_ceil(u64::BITS) as usize;
const BYTES: usize = WORDS * 8;

/// Pages of a chunk, counted from its first: page `n` is bit `n % 8` of byte `n / 8`. As text, those bytes in hex
/// without the zeros at the end.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PageBits([u64; WORDS]);

/// Text that is no set of pages.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no set of pages: expected up to {max} hex digits, two a byte, the last byte not zero", max = 2 * BYTES)]
pub struct BadPageBits(String);

impl PageBits {
    /// No page.
    pub const EMPTY: Self = Self([0; WORDS]);

    /// The first `pages` pages, at most those of the largest chunk.
    #[must_use]
    pub fn first(pages: u32) -> Self {
        let mut bits = Self::EMPTY;
        bits.insert_run(0, pages);
        bits
    }

    /// Reads as many pages as `bytes` has bits; `None` if that is more than a chunk has.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut all = [0; BYTES];
        all.get_mut(..bytes.len())?.copy_from_slice(bytes);
        let (words, _) = all.as_chunks();
        let mut bits = Self::EMPTY;
        for (bits, word) in bits.0.iter_mut().zip(words) {
            *bits = u64::from_le_bytes(*word);
        }
        Some(bits)
    }

    /// The pages as bytes, of which those behind the last page are zero.
    #[must_use]
    pub fn to_bytes(self) -> [u8; BYTES] {
        let mut all = [0; BYTES];
        let (words, _) = all.as_chunks_mut();
        for (bits, word) in self.0.iter().zip(words) {
            *word = bits.to_le_bytes();
        }
        all
    }

    /// Adds `count` pages from `first` on; those that no chunk has are left out.
    pub fn insert_run(&mut self, first: u32, count: u32) {
        let end = first.saturating_add(count).min(CHUNK_PAGES_MAX);
        for page in first..end {
            if let Some(word) = self.0.get_mut((page / u64::BITS) as usize) {
                *word |= 1 << (page % u64::BITS);
            }
        }
    }

    /// Whether `page` is among them.
    #[must_use]
    pub fn contains(&self, page: u32) -> bool {
        let word = self.0.get((page / u64::BITS) as usize);
        word.is_some_and(|word| word & 1 << (page % u64::BITS) != 0)
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::EMPTY
    }

    /// Those of these and of `other` together.
    #[must_use]
    pub fn with(&self, other: &Self) -> Self {
        self.joined(other, |own, other| own | other)
    }

    /// Those of these that are not among `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        self.joined(other, |own, other| own & !other)
    }

    /// Whether some page is among both.
    #[must_use]
    pub fn meets(&self, other: &Self) -> bool {
        !self.joined(other, |own, other| own & other).is_empty()
    }

    /// Whether all of these are among `other`.
    #[must_use]
    pub fn is_within(&self, other: &Self) -> bool {
        self.without(other).is_empty()
    }

    /// The pages in order, as runs: the first of each and how many they are.
    pub fn runs(self) -> impl Iterator<Item = (u32, u32)> {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = (next..CHUNK_PAGES_MAX).find(|page| self.contains(*page))?;
            let end = (first..CHUNK_PAGES_MAX).find(|page| !self.contains(*page));
            next = end.unwrap_or(CHUNK_PAGES_MAX);
            Some((first, next - first))
        })
    }

    fn joined(&self, other: &Self, join: impl Fn(u64, u64) -> u64) -> Self {
        let mut joined = *self;
        for (own, other) in joined.0.iter_mut().zip(&other.0) {
            *own = join(*own, *other);
        }
        joined
    }
}

impl fmt::Display for PageBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.to_bytes();
        let used = bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        bytes
            .iter()
            .take(used)
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PageBits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageBits({self})")
    }
}

impl From<PageBits> for String {
    fn from(bits: PageBits) -> Self {
        bits.to_string()
    }
}

impl TryFrom<String> for PageBits {
    type Error = BadPageBits;

    fn try_from(text: String) -> Result<Self, BadPageBits> {
        let digits = text.as_bytes();
        let (pairs, rest) = digits.as_chunks::<2>();
        let value = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let bits = (rest.is_empty() && pairs.len() <= BYTES)
            .then(|| {
                let bytes = pairs
                    .iter()
                    .map(|[high, low]| Some(value(*high)? << 4 | value(*low)?));
                let bytes = bytes.collect::<Option<Vec<u8>>>()?;
                // One spelling.
                (bytes.last() != Some(&0)).then(|| Self::from_bytes(&bytes))?
            })
            .flatten();
        bits.ok_or_else(|| BadPageBits(text.chars().take(160).collect()))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_set_of_pages_is_a_set(
            one in proptest::collection::btree_set(0..CHUNK_PAGES_MAX, 0..40),
            two in proptest::collection::btree_set(0..CHUNK_PAGES_MAX, 0..40),
        ) {
            let of = |pages: &BTreeSet<u32>| {
                let mut bits = PageBits::EMPTY;
                pages.iter().for_each(|page| bits.insert_run(*page, 1));
                bits
            };
            let (a, b) = (of(&one), of(&two));
            prop_assert_eq!(a.count() as usize, one.len());
            prop_assert_eq!(a.is_empty(), one.is_empty());
            prop_assert_eq!(a.with(&b), of(&one.union(&two).copied().collect()));
            prop_assert_eq!(a.without(&b), of(&one.difference(&two).copied().collect()));
            prop_assert_eq!(a.meets(&b), !one.is_disjoint(&two));
            prop_assert_eq!(a.is_within(&b), one.is_subset(&two));
            let pages: BTreeSet<u32> = a.runs().flat_map(|(first, count)| first..first + count).collect();
            prop_assert_eq!(&pages, &one);
            prop_assert_eq!(PageBits::from_bytes(&a.to_bytes()), Some(a));
            prop_assert_eq!(PageBits::try_from(a.to_string()).unwrap(), a);
        }
    }

    #[test]
    fn text_and_bytes_that_are_no_set_of_pages_are_refused() {
        assert_eq!(PageBits::first(10).to_string(), "ff03");
        assert_eq!(PageBits::first(u32::MAX).count(), CHUNK_PAGES_MAX);
        for text in ["f", "0g", "00", "ff00", &"11".repeat(65), "ÿÿ"] {
            assert!(PageBits::try_from(text.to_owned()).is_err(), "{text}");
        }
        assert_eq!(PageBits::from_bytes(&[1; 65]), None);
    }
}
