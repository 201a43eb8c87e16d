//! What becomes of the index of a volume of which some pages changed: decided from the index below and the set of
//! changed pages alone, before a byte of the volume is read.

use crate::index::{
    Entry, IndexError, IndexReader, LayerNumber, PARTS_MAX, PageBits, SegmentIndex, StoredChunk, StoredPart,
};
use crate::pager::PageSet;
use crate::units::{ByteRange, ChunkIndex, ChunkSize, PageIndex};

/// What is done with a chunk of which some pages changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    /// Those pages are written, and lie over what remains of the chunk below.
    Over(Vec<StoredPart>),
    /// The whole chunk is written: nothing of it remains, or it would be of too many parts.
    Anew,
}

impl Plan {
    /// For a chunk of `pages` pages that is `base` below, and of which `changed` changed.
    ///
    /// It does not depend on what the pages changed to: which layers are still used is known beforehand so.
    pub(super) fn new(base: &Entry, changed: &PageBits, pages: u32) -> Self {
        let all = PageBits::first(pages);
        let remains = |part: StoredPart| {
            let shown = part.shown.without(changed);
            (!shown.is_empty()).then_some(StoredPart { shown, ..part })
        };
        let remaining: Vec<StoredPart> = match base {
            Entry::Zero => Vec::new(),
            Entry::Data(stored) => remains(whole(*stored, all)).into_iter().collect(),
            Entry::Parts(parts) => parts.iter().copied().filter_map(remains).collect(),
        };
        if *changed == all || remaining.len() >= PARTS_MAX {
            return Self::Anew;
        }
        Self::Over(remaining)
    }
}

/// A full chunk as a part.
pub(super) fn whole(stored: StoredChunk, all: PageBits) -> StoredPart {
    StoredPart {
        stored,
        held: all,
        shown: all,
    }
}

/// A chunk of these parts, and perhaps a new one.
pub(super) fn joined(mut parts: Vec<StoredPart>, new: Option<StoredPart>) -> Entry {
    parts.extend(new);
    match parts.is_empty() {
        true => Entry::Zero,
        false => Entry::Parts(parts.into()),
    }
}

/// The layers below that are still used, and their new numbers.
#[derive(Debug)]
pub(super) struct Kept {
    /// By the number in the base.
    numbers: Vec<Option<LayerNumber>>,
}

impl Kept {
    /// Looks through the index, until every layer was found to be used.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub(super) fn of(
        index: &IndexReader,
        changed: &PageSet,
        goes_on: &dyn Fn() -> bool,
    ) -> Result<Self, IndexError> {
        let root = index.root();
        let mut is_used = vec![false; usize::from(root.layers())];
        for number in (0..root.segments()).map(SegmentIndex) {
            if is_used.iter().all(|used| *used) || !goes_on() {
                break;
            }
            let segment = index.segment(number)?;
            if segment.is_zero() {
                continue;
            }
            let (first, chunks) = root.chunks_of(number);
            for position in 0..chunks {
                let chunk = ChunkIndex(first.0 + u64::from(position));
                let Some(entry) = segment.entry(position) else {
                    continue;
                };
                let range = root.chunk_size().range_of(chunk, root.volume_bytes());
                let bits = bits_of(changed, range);
                match bits.is_empty() {
                    true => entry.frames().for_each(|stored| mark(&mut is_used, stored.layer)),
                    false => {
                        if let Plan::Over(parts) =
                            Plan::new(&entry, &bits, crate::index::parts::pages_in(range.len))
                        {
                            parts
                                .iter()
                                .for_each(|part| mark(&mut is_used, part.stored.layer));
                        }
                    }
                }
            }
        }
        let mut next = 0;
        let numbers = is_used.into_iter().map(|used| {
            used.then(|| {
                next += 1;
                LayerNumber(next - 1)
            })
        });
        Ok(Self {
            numbers: numbers.collect(),
        })
    }

    /// How many there are.
    pub(super) fn count(&self) -> u16 {
        self.numbers.iter().flatten().count() as u16 // of at most 128
    }

    /// Those of `layers`, which are the base's, that are kept.
    pub(super) fn of_layers<T: Copy>(&self, layers: &[T]) -> Vec<T> {
        let kept = layers.iter().zip(&self.numbers);
        kept.filter_map(|(layer, number)| number.map(|_| *layer))
            .collect()
    }

    /// Whether the base's first layer is among them.
    pub(super) fn has_first(&self) -> bool {
        self.numbers.first().is_some_and(Option::is_some)
    }

    /// An entry of the base with the new numbers.
    pub(super) fn renumbered(&self, entry: Entry) -> Entry {
        match entry {
            Entry::Zero => Entry::Zero,
            Entry::Data(stored) => Entry::Data(self.moved(stored)),
            Entry::Parts(parts) => Entry::Parts(parts.iter().map(|part| self.moved_part(*part)).collect()),
        }
    }

    /// A part with its new number.
    pub(super) fn moved_part(&self, part: StoredPart) -> StoredPart {
        StoredPart {
            stored: self.moved(part.stored),
            ..part
        }
    }

    fn moved(&self, stored: StoredChunk) -> StoredChunk {
        // What is read a second time is what was looked through: segments are held against their digest. A layer that was
        // not found used has a number that no index takes.
        let number = self.numbers.get(usize::from(stored.layer.0)).copied().flatten();
        StoredChunk {
            layer: number.unwrap_or(LayerNumber(u16::MAX)),
            ..stored
        }
    }
}

fn mark(is_used: &mut [bool], layer: LayerNumber) {
    if let Some(used) = is_used.get_mut(usize::from(layer.0)) {
        *used = true;
    }
}

/// Which pages of the bytes `range` of a volume, a chunk's, are in the set.
pub(super) fn bits_of(changed: &PageSet, range: ByteRange) -> PageBits {
    let first = PageIndex::holding(range.start);
    let pages = u64::from(crate::index::parts::pages_in(range.len));
    let mut bits = PageBits::EMPTY;
    let mut at = 0;
    while at < pages {
        let (inside, run) = changed.run_at(PageIndex(first.0 + at), pages - at);
        // Behind the end of the set there is no run.
        let run = if run == 0 { pages - at } else { run };
        if inside {
            bits.insert_run(at as u32, run as u32);
        }
        at += run;
    }
    bits
}

/// The next chunk at or behind `from` of which a page changed.
pub(super) fn next_changed(
    changed: &PageSet,
    chunk_size: ChunkSize,
    volume_bytes: u64,
    from: u64,
) -> Option<u64> {
    let pages = PageIndex(volume_bytes.div_ceil(crate::units::PAGE_SIZE));
    let page = PageIndex(from.checked_mul(chunk_size.pages())?);
    let left = pages.0.checked_sub(page.0).filter(|left| *left > 0)?;
    let (inside, run) = changed.run_at(page, left);
    match inside {
        true => Some(from),
        // Behind the end of the set nothing changed.
        false if run == 0 || run == left => None,
        false => Some((page.0 + run) / chunk_size.pages())
            .filter(|chunk| *chunk < chunk_size.chunks_in(volume_bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::ChunkDigest;

    fn stored(layer: u16) -> StoredChunk {
        StoredChunk {
            layer: LayerNumber(layer),
            frame: ByteRange { start: 0, len: 1 },
            digest: ChunkDigest([0; 32]),
        }
    }

    fn bits(first: u32, count: u32) -> PageBits {
        let mut bits = PageBits::EMPTY;
        bits.insert_run(first, count);
        bits
    }

    #[test]
    fn what_is_overwritten_shows_less_and_then_is_gone() {
        let below = whole(stored(0), PageBits::first(4));
        let plan = Plan::new(&Entry::Data(stored(0)), &bits(1, 2), 4);
        let shown = PageBits::first(4).without(&bits(1, 2));
        assert_eq!(plan, Plan::Over(vec![StoredPart { shown, ..below }]));

        let upper = StoredPart {
            stored: stored(1),
            held: bits(1, 2),
            shown: bits(1, 2),
        };
        let entry = Entry::Parts([StoredPart { shown, ..below }, upper].into());
        assert_eq!(
            Plan::new(&entry, &bits(1, 2), 4),
            Plan::Over(vec![StoredPart { shown, ..below }])
        );
        assert_eq!(Plan::new(&entry, &PageBits::first(4), 4), Plan::Anew);
        assert_eq!(Plan::new(&Entry::Zero, &bits(0, 1), 4), Plan::Over(Vec::new()));
    }

    #[test]
    fn a_chunk_that_would_be_of_too_many_parts_is_written_anew() {
        let parts = |count: u32| {
            let part = |page| StoredPart {
                stored: stored(page as u16),
                held: bits(page, 1),
                shown: bits(page, 1),
            };
            Entry::Parts((0..count).map(part).collect())
        };
        let most = PARTS_MAX as u32;
        assert!(matches!(
            Plan::new(&parts(most - 1), &bits(15, 1), 16),
            Plan::Over(_)
        ));
        assert_eq!(Plan::new(&parts(most), &bits(15, 1), 16), Plan::Anew);
        // In the place of one of them there is room.
        assert!(matches!(Plan::new(&parts(most), &bits(0, 1), 16), Plan::Over(_)));
    }

    #[test]
    fn changed_chunks_are_found_also_where_the_set_ends_early() {
        let size = ChunkSize::new(16 << 10).unwrap();
        let mut changed = PageSet::new(10);
        changed.insert_run(PageIndex(5), 1);
        changed.insert_run(PageIndex(9), 1);
        let next = |from| next_changed(&changed, size, 1 << 20, from);
        assert_eq!(
            [next(0), next(1), next(2), next(3), next(64)],
            [Some(1), Some(1), Some(2), None, None]
        );
        let range = |chunk| size.range_of(ChunkIndex(chunk), 1 << 20);
        assert_eq!(bits_of(&changed, range(1)), bits(1, 1));
        assert_eq!(bits_of(&changed, range(2)), bits(1, 1));
        assert!(bits_of(&changed, range(3)).is_empty());
    }
}
