//! The frames of diff layers: what the index has of them, each once, and what it has no more.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::volume::{Hands, Look, LookedAt};
use crate::image::manifest::LayerKind;
use crate::index::{Entry, SegmentIndex, StoredChunk};
use crate::layer::seek_table::LayerSeekTable;
use crate::units::ChunkIndex;

/// Which frames of a diff layer the index names: a bit each.
pub(super) struct Used(Vec<AtomicU64>);

impl Used {
    /// None of the layer's yet; of a full layer, books are not kept.
    pub(super) fn new(table: &LayerSeekTable, kind: LayerKind) -> Self {
        let words = match kind {
            LayerKind::Full => 0,
            LayerKind::Diff => table.frames().div_ceil(u64::BITS),
        };
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    /// Puts a frame in; whether it was there already.
    fn insert(&self, number: u32) -> bool {
        let bit = 1 << (number % u64::BITS);
        let word = self.0.get((number / u64::BITS) as usize);
        word.is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit != 0)
    }

    fn contains(&self, number: u32) -> bool {
        let word = self.0.get((number / u64::BITS) as usize);
        word.is_some_and(|word| word.load(Ordering::Relaxed) & 1 << (number % u64::BITS) != 0)
    }
}

impl Look<'_> {
    /// Looks at the frames of diff layers that the index names, segment by segment, together with the other threads that
    /// do.
    pub(super) fn diff_layers(&self, next_segment: &AtomicU32, hands: &mut Hands) {
        let mut layers = self.layers.iter().flatten();
        if layers.all(|layer| layer.kind == LayerKind::Full) {
            return;
        }
        let root = &self.volume.root;
        loop {
            let number = SegmentIndex(next_segment.fetch_add(1, Ordering::Relaxed));
            if number.0 >= root.segments() {
                return;
            }
            let Ok(segment) = self.index.segment(number) else {
                continue;
            }; // found already
            let (first, chunks) = root.chunks_of(number);
            for position in 0..chunks {
                if self.verification.progress.is_cancelled() {
                    return;
                }
                let chunk = ChunkIndex(first.0 + u64::from(position));
                let entry = segment.entry(position);
                if entry.as_ref().is_some_and(|entry| self.is_elsewhere(entry)) {
                    continue;
                }
                if let Some(entry) = entry {
                    self.entry(chunk, &entry, hands);
                }
                let bytes = &self.verification.volume_bytes;
                bytes.fetch_add(self.range_of(chunk).len, Ordering::Relaxed);
            }
        }
    }

    /// Whether nothing of a chunk is here.
    fn is_elsewhere(&self, entry: &Entry) -> bool {
        let is_here =
            |stored: &StoredChunk| !matches!(self.layers.get(usize::from(stored.layer.0)), Some(None));
        *entry != Entry::Zero && !entry.frames().any(is_here)
    }

    fn entry(&self, chunk: ChunkIndex, entry: &Entry, hands: &mut Hands) {
        let chunk_bytes = self.range_of(chunk).len;
        let are_right = match entry {
            Entry::Zero => false,
            // One of the full layer is looked at there.
            Entry::Data(stored) => self.named_in_diff(chunk, stored, chunk_bytes, hands) == Some(true),
            Entry::Parts(parts) => parts.iter().fold(true, |are_right, part| {
                let is_right = self.named_in_diff(chunk, &part.stored, part.plain_bytes(chunk_bytes), hands);
                are_right && is_right != Some(false)
            }),
        };
        self.verification
            .chunks
            .fetch_add(u64::from(are_right), Ordering::Relaxed);
    }

    /// Whether a frame that the index names is what it says; `None` if it is not a diff layer's.
    fn named_in_diff(
        &self,
        chunk: ChunkIndex,
        stored: &StoredChunk,
        plain_bytes: u64,
        hands: &mut Hands,
    ) -> Option<bool> {
        // That of a layer which is not here is not looked at, and not counted.
        let Some(layer) = self.layers.get(usize::from(stored.layer.0))? else {
            return Some(false);
        };
        if layer.kind == LayerKind::Full {
            return None;
        }
        let found = layer.table.starting_at(stored.frame.start);
        let found = found.and_then(|number| Some((number, layer.table.frame(number)?)));
        let Some((number, frame)) = found else {
            let reason = format!(
                "the index places it at {} of the layer, where the seek table has no frame begin",
                stored.frame
            );
            self.disagree(chunk, layer, reason);
            return Some(false);
        };
        if layer.used.insert(number) {
            let reason = format!("the index places it at {}, as another chunk", stored.frame);
            self.disagree(chunk, layer, reason);
            return Some(false);
        }
        self.verification.progress.add(frame.stored.len);
        if frame.stored != stored.frame || frame.content.len != plain_bytes {
            let reason = format!(
                "the index places it at {} of the layer with {plain_bytes} bytes of content, and the seek table at {} with {}",
                stored.frame, frame.stored, frame.content.len
            );
            self.disagree(chunk, layer, reason);
            return Some(false);
        }
        Some(self.is_right(chunk, layer, stored, plain_bytes, hands))
    }

    /// Looks at what the index has no more of diff layers, when it is known which frames those are.
    pub(super) fn unused(&self, hands: &mut Hands) {
        let layers = self.layers.iter().flatten();
        let layers = layers.filter(|layer| layer.kind == LayerKind::Diff);
        layers.for_each(|layer| self.unused_of(layer, hands));
    }

    fn unused_of(&self, layer: &LookedAt, hands: &mut Hands) {
        while let Some(numbers) = self.take_frames(layer) {
            for number in numbers.filter(|number| !layer.used.contains(*number)) {
                let Some(frame) = layer.table.frame(number) else {
                    continue;
                };
                // Which chunk it was of is not known any more.
                self.overwritten(ChunkIndex(0), layer, &frame, hands);
                self.verification.progress.add(frame.stored.len);
            }
        }
    }
}
