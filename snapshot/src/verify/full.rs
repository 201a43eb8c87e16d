//! The frames of a full layer, which follow its volume.

use std::sync::atomic::Ordering;

use super::Finding;
use super::volume::{FrameReader, Hands, Look, LookedAt};
use crate::decode::check_zeros;
use crate::image::manifest::LayerKind;
use crate::index::{Entry, IndexError, LayerNumber, PageBits, StoredChunk, parts};
use crate::layer::seek_table::FrameAt;
use crate::units::ChunkIndex;

/// The number of a full layer: it lies below all others.
const FULL: LayerNumber = LayerNumber(0);

impl Look<'_> {
    /// Looks at the full layer, if there is one, together with the other threads that do.
    pub(super) fn full_layer(&self, hands: &mut Hands) {
        let Some(Some(layer)) = self.layers.first() else {
            return;
        };
        if layer.kind != LayerKind::Full {
            return;
        }
        while let Some(numbers) = self.take_frames(layer) {
            if numbers.start == 0 {
                self.length_of_full(layer);
            }
            for frame in numbers.map_while(|number| layer.table.frame(number)) {
                if self.verification.progress.is_cancelled() {
                    return;
                }
                self.full_frame(layer, frame, hands);
                self.verification.progress.add(frame.stored.len);
                if self.layers.len() == 1 {
                    let bytes = &self.verification.volume_bytes;
                    bytes.fetch_add(frame.content.len, Ordering::Relaxed);
                }
            }
        }
    }

    fn length_of_full(&self, layer: &LookedAt) {
        let (found, expected) = (layer.table.content_bytes(), self.volume.root.volume_bytes());
        if found != expected {
            let reason = format!("its frames hold {found} bytes, and the volume has {expected}");
            self.disagree(ChunkIndex(0), layer, reason);
        }
    }

    fn full_frame(&self, layer: &LookedAt, frame: FrameAt, hands: &mut Hands) {
        let chunk_size = self.volume.root.chunk_size();
        let chunk = chunk_size.chunk_holding(frame.content.start);
        if !frame.content.start.is_multiple_of(chunk_size.bytes()) {
            let reason = format!("a frame begins at byte {}, inside it", frame.content.start);
            return self.disagree(chunk, layer, reason);
        }
        let entry = match self.index.entry(chunk) {
            Ok(entry) => entry,
            Err(IndexError::Outside { .. }) => {
                return self.disagree(chunk, layer, "a frame lies behind the end of the volume".into());
            }
            Err(_) => return, // the segment was found already
        };
        match (&entry, in_full(&entry)) {
            (_, Some(stored)) => self.named(chunk, layer, &entry, &stored, frame, hands),
            // Alone, the layer is the volume.
            (Entry::Zero, None) if self.layers.len() == 1 => self.zeros(chunk, layer, frame),
            _ if frame.content.len > self.range_of(chunk).len => self.zeros(chunk, layer, frame),
            _ => {
                if frame.content.len != self.range_of(chunk).len {
                    let reason = format!("the seek table has {} bytes of it", frame.content.len);
                    return self.disagree(chunk, layer, reason);
                }
                self.overwritten(chunk, layer, &frame, hands);
            }
        }
    }

    /// A frame that the index names.
    fn named(
        &self,
        chunk: ChunkIndex,
        layer: &LookedAt,
        entry: &Entry,
        stored: &StoredChunk,
        frame: FrameAt,
        hands: &mut Hands,
    ) {
        let range = self.range_of(chunk);
        if frame.stored != stored.frame || frame.content != range {
            let reason = format!(
                "the index places it at {} of the layer, and the seek table at {} with {} bytes of content",
                stored.frame, frame.stored, frame.content.len
            );
            return self.disagree(chunk, layer, reason);
        }
        let all = PageBits::first(parts::pages_in(range.len));
        let is_part = match entry {
            Entry::Parts(parts) => parts.iter().find(|part| part.stored.layer == FULL),
            _ => None,
        };
        if is_part.is_some_and(|part| part.held != all) {
            let reason = "the index has a frame of a full layer hold some of its pages alone".to_owned();
            return self.disagree(chunk, layer, reason);
        }
        if is_part.is_some() && self.layers.len() == 1 {
            let reason = "the index has it in parts, where nothing lies over the full layer".to_owned();
            return self.disagree(chunk, layer, reason);
        }
        // A chunk of parts counts where its other frames are looked at.
        if self.is_right(chunk, layer, stored, range.len, hands) && is_part.is_none() {
            self.verification.chunks.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn zeros(&self, first: ChunkIndex, layer: &LookedAt, frame: FrameAt) {
        let root = &self.volume.root;
        let end = frame.content.start + frame.content.len; // offsets of a seek table: sums of 2^27 lengths of 32 bits
        if end > root.volume_bytes() {
            return; // found already
        }
        let chunks = root.chunk_size().chunks_in(end);
        let is_alone = self.layers.len() == 1;
        for chunk in (first.0..chunks).map(ChunkIndex) {
            match self.index.entry(chunk) {
                Ok(entry) if entry != Entry::Zero && (is_alone || in_full(&entry).is_some()) => {
                    let reason = "the seek table has it in a run of zeros, and the index not";
                    return self.disagree(chunk, layer, reason.into());
                }
                Ok(_) => {}
                Err(_) => return, // found already
            }
        }
        if !end.is_multiple_of(root.chunk_size().bytes()) && end != root.volume_bytes() {
            let reason = format!("a run of zeros ends at byte {end}, inside it");
            return self.disagree(ChunkIndex(chunks - 1), layer, reason);
        }
        let bytes = FrameReader {
            store: self.store.as_ref(),
            layer: &layer.blob,
            rest: frame.stored,
        };
        if let Err(source) = check_zeros(bytes, frame.content.len) {
            self.verification.find(Finding::Zeros {
                volume: self.volume.name.clone(),
                chunk: first,
                layer: layer.blob.digest,
                frame: frame.stored,
                source,
            });
        }
    }
}

/// The frame of the full layer that an entry names.
fn in_full(entry: &Entry) -> Option<StoredChunk> {
    entry.frames().find(|stored| stored.layer == FULL).copied()
}
