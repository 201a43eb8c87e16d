//! A set of pages of one volume, as a bitmap.

use crate::units::PageIndex;

/// Which pages of a volume have a property; one bit a page, 32 KiB for each GiB of volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// An empty set for a volume of `pages` pages.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).expect("a bitmap of the volume fits into memory");
        Self {
            words: vec![0; words],
            pages,
        }
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// How many pages the volume has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The first run of pages of the set at or behind `from`, or `None` if there is none.
    #[must_use]
    pub fn next_run(&self, from: PageIndex) -> Option<(PageIndex, u64)> {
        let (inside, outside) = self.run_at(from, self.pages);
        let start = if inside { from } else { PageIndex(from.0 + outside) };
        let (inside, count) = self.run_at(start, self.pages);
        inside.then_some((start, count))
    }

    /// The runs of pages of the set, in order.
    pub fn runs(&self) -> impl Iterator<Item = (PageIndex, u64)> + '_ {
        let mut from = PageIndex(0);
        std::iter::from_fn(move || {
            let (start, count) = self.next_run(from)?;
            from = PageIndex(start.0 + count);
            Some((start, count))
        })
    }

    /// Whether `page` is in the set. A page outside the volume never is.
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        page.0 < self.pages && self.words[word(page)] & bit(page) != 0
    }

    /// Adds the pages from `first` on; the part of the run outside the volume is left out.
    pub fn insert_run(&mut self, first: PageIndex, count: u64) {
        let end = first.0.saturating_add(count).min(self.pages);
        let mut page = first.0;
        while page < end {
            let in_word = (64 - page % 64).min(end - page);
            self.words[word(PageIndex(page))] |= mask(page % 64, in_word);
            page += in_word;
        }
    }

    /// Takes the pages from `first` on out again.
    pub fn remove_run(&mut self, first: PageIndex, count: u64) {
        let end = first.0.saturating_add(count).min(self.pages);
        let mut page = first.0;
        while page < end {
            let in_word = (64 - page % 64).min(end - page);
            self.words[word(PageIndex(page))] &= !mask(page % 64, in_word);
            page += in_word;
        }
    }

    /// Adds the pages of another set of the same volume.
    ///
    /// # Panics
    /// If it is of another volume's length.
    pub fn insert_all(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets of one volume");
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
    }

    /// Takes out the pages that are not in another set of the same volume.
    ///
    /// # Panics
    /// If it is of another volume's length.
    pub fn retain_all(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets of one volume");
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= other;
        }
    }

    /// Adds the pages whose bits are set in a bitmap, the lowest bit first, as KVM writes them; its first bit is that of
    /// `first`. Bits behind the volume's end are left out.
    pub fn insert_bitmap(&mut self, first: PageIndex, bitmap: &[u64]) {
        for (position, bits) in (0..).zip(bitmap) {
            let mut left = *bits;
            while left != 0 {
                let start = left.trailing_zeros();
                let count = (left >> start).trailing_ones();
                self.insert_run(
                    PageIndex(first.0 + position * 64 + u64::from(start)),
                    u64::from(count),
                );
                left &= !mask(u64::from(start), u64::from(count));
            }
        }
    }

    /// The set of all pages that lie in one aligned group of `group` pages with a page of this set: its chunks.
    ///
    /// # Panics
    /// If `group` is 0.
    #[must_use]
    pub fn in_groups_of(&self, group: u64) -> Self {
        let mut grown = Self::new(self.pages);
        let mut from = PageIndex(0);
        while let Some((first, count)) = self.next_run(from) {
            let start = first.0 / group * group;
            let end = (first.0 + count).next_multiple_of(group);
            grown.insert_run(PageIndex(start), end - start);
            from = PageIndex(end);
        }
        grown
    }

    /// How long the run is that starts at `first` and whose pages are all in the set, or all outside it; at most
    /// `limit` pages. The flag says which.
    #[must_use]
    pub fn run_at(&self, first: PageIndex, limit: u64) -> (bool, u64) {
        let inside = self.contains(first);
        let end = first.0.saturating_add(limit).min(self.pages.max(first.0));
        let mut page = first.0;
        while page < end {
            let in_word = (64 - page % 64).min(end - page);
            let bits = (self.words[word(PageIndex(page))] >> (page % 64)) & mask(0, in_word);
            let same = if inside {
                (!bits).trailing_zeros()
            } else {
                bits.trailing_zeros()
            };
            let same = u64::from(same).min(in_word);
            page += same;
            if same < in_word {
                break;
            }
        }
        (inside, page - first.0)
    }

    /// How many pages are in the set.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }
}

const fn word(page: PageIndex) -> usize {
    (page.0 / 64) as usize
}

const fn bit(page: PageIndex) -> u64 {
    1 << (page.0 % 64)
}

/// `count` ones from bit `first` on; `first + count` is at most 64 and `count` at least 1.
const fn mask(first: u64, count: u64) -> u64 {
    (u64::MAX >> (64 - count)) << first
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_page_set_is_a_set(runs in prop::collection::vec((any::<bool>(), 0u64..400, 0u64..200), 0..30)) {
            const PAGES: u64 = 333;
            let mut set = PageSet::new(PAGES);
            let mut model = BTreeSet::new();
            for (insert, first, count) in runs {
                let pages = (first..first + count).filter(|page| *page < PAGES);
                if insert {
                    set.insert_run(PageIndex(first), count);
                    model.extend(pages);
                } else {
                    set.remove_run(PageIndex(first), count);
                    pages.for_each(|page| { model.remove(&page); });
                }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            let mut page = 0;
            while page < PAGES {
                let (inside, count) = set.run_at(PageIndex(page), 100);
                prop_assert!((1..=100).contains(&count));
                prop_assert!((page..page + count).all(|page| model.contains(&page) == inside));
                let next = page + count;
                prop_assert!(next == PAGES || count == 100 || model.contains(&next) != inside);
                page = next;
            }
            prop_assert_eq!(set.run_at(PageIndex(PAGES), 5), (false, 0));
            let listed: Vec<u64> = set.runs().flat_map(|(start, count)| start.0..start.0 + count).collect();
            prop_assert!(listed.iter().eq(model.iter()));
            let pages = |set: &PageSet| -> BTreeSet<u64> {
                set.runs().flat_map(|(start, count)| start.0..start.0 + count).collect()
            };
            let groups: BTreeSet<u64> = model.iter().map(|page| page / 7).collect();
            let grown = set.in_groups_of(7);
            prop_assert!(pages(&grown).into_iter().eq((0..PAGES).filter(|page| groups.contains(&(page / 7)))));
            let mut other = PageSet::new(PAGES);
            other.insert_bitmap(PageIndex(100), &[0xF0F0_0000_0000_0001, u64::MAX, 0, 1 << 41]);
            prop_assert!(pages(&other).into_iter().eq([100].into_iter().chain(152..156).chain(160..228)));
            let mut both = set.clone();
            both.insert_all(&other);
            prop_assert!(pages(&both).into_iter().eq(model.union(&pages(&other)).copied()));
            both.retain_all(&other);
            prop_assert_eq!(&both, &other);
            set.clear();
            prop_assert!(set.is_empty() && set.pages() == PAGES && set.next_run(PageIndex(0)).is_none());
        }
    }
}
