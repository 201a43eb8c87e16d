//! Puts the frames of changed pages in the order of chunks into a diff layer, and writes the merged index beside it.

use std::collections::{BTreeMap, BTreeSet};

use super::ChangesError;
use super::merge::{Kept, joined};
use crate::capture::volume_writer::{CompressedChunk, WriteError, WrittenVolume};
use crate::image::manifest::ImageVolume;
use crate::image::publication::{BlobWriter, Publication};
use crate::index::{
    Entry, INDEX_BLOB_HEADER, IndexBuilder, IndexReader, LayerNumber, PageBits, StoredChunk, StoredPart,
};
use crate::layer::seek_table::SeekTableWriter;
use crate::units::{ByteRange, ChunkIndex};
use crate::volume::VolumeName;

/// Chunks that are taken over from the base between two looks at whether to go on.
const COPIED_AT_ONCE: u64 = 1 << 16;

/// A changed chunk that was looked at.
pub(super) struct Changed {
    pub(super) chunk: ChunkIndex,
    pub(super) new: New,
}

/// What is new of it.
pub(super) enum New {
    /// It is nothing but zeros now.
    Zero,
    /// A frame that is all of it.
    Whole(CompressedChunk),
    /// A frame of so many plain bytes with these pages, or none if they all became zero, beside what remains of it.
    Pages {
        remaining: Vec<StoredPart>,
        frame: Option<(PageBits, CompressedChunk)>,
        plain_bytes: u32,
    },
}

/// See the module.
pub(super) struct ChangesWriter<'a> {
    publication: &'a Publication,
    below: &'a IndexReader,
    kept: Kept,
    /// Made when there is something for it.
    layer: Option<BlobWriter>,
    index: BlobWriter,
    seek_table: SeekTableWriter,
    builder: IndexBuilder,
    /// Whether some chunk was looked at.
    has_changes: bool,
    /// Chunks whose frames are in the layer before their turn in the index has come.
    laid: BTreeMap<ChunkIndex, StoredChunk>,
    /// The chunks whose entries are wanted beside the index.
    wanted: BTreeSet<ChunkIndex>,
    found: BTreeMap<ChunkIndex, Entry>,
}

impl<'a> ChangesWriter<'a> {
    pub(super) fn new(
        publication: &'a Publication,
        below: &'a IndexReader,
        kept: Kept,
        wanted: BTreeSet<ChunkIndex>,
    ) -> Result<Self, WriteError> {
        let root = below.root();
        let builder = IndexBuilder::new(root.volume_bytes(), root.chunk_size(), kept.count() + 1)?;
        let mut index = publication.blob()?;
        index.write(INDEX_BLOB_HEADER)?;
        Ok(Self {
            publication,
            below,
            kept,
            layer: None,
            index,
            seek_table: SeekTableWriter::default(),
            builder,
            has_changes: false,
            laid: BTreeMap::new(),
            wanted,
            found: BTreeMap::new(),
        })
    }

    /// Takes chunks over from the base up to that before `end`, as long as `goes_on` says so.
    pub(super) fn keep_until(&mut self, end: u64, goes_on: &dyn Fn() -> bool) -> Result<(), ChangesError> {
        let below = self.below;
        let root = below.root();
        while self.builder.chunks() < end && goes_on() {
            let Some((number, position)) = root.locate(ChunkIndex(self.builder.chunks())) else {
                break;
            };
            let segment = below.segment(number)?;
            let left = u64::from(segment.chunks_covered() - position).min(end - self.builder.chunks());
            if segment.is_zero() {
                let index = &mut self.index;
                let pushed = self.builder.push_zeros(left, |bytes| index.write(bytes));
                pushed.map_err(WriteError::from)?;
                continue;
            }
            for position in (position..).take(left.min(COPIED_AT_ONCE) as usize) {
                let entry = segment.entry(position).unwrap_or(Entry::Zero);
                self.push(self.kept.renumbered(entry))?;
            }
        }
        Ok(())
    }

    /// The next chunk changed; its frame, if it has a new one, is `frame`.
    pub(super) fn push_changed(
        &mut self,
        changed: Changed,
        frame: &[u8],
        chunk_bytes: u64,
    ) -> Result<(), WriteError> {
        self.has_changes = true;
        let entry = match changed.new {
            New::Zero => Entry::Zero,
            New::Whole(compressed) => Entry::Data(self.write(compressed, frame, chunk_bytes as u32)?),
            New::Pages {
                remaining,
                frame: new,
                plain_bytes,
            } => {
                let new = match new {
                    None => None,
                    Some((pages, compressed)) => Some(StoredPart {
                        stored: self.write(compressed, frame, plain_bytes)?,
                        held: pages,
                        shown: pages,
                    }),
                };
                let remaining = remaining.into_iter().map(|part| self.kept.moved_part(part));
                joined(remaining.collect(), new)
            }
        };
        self.push(entry)
    }

    /// Puts the frame of a whole chunk into the layer, in whatever order; [`push_laid`](Self::push_laid) describes them.
    pub(super) fn lay(
        &mut self,
        chunk: ChunkIndex,
        compressed: CompressedChunk,
        frame: &[u8],
        chunk_bytes: u64,
    ) -> Result<(), WriteError> {
        self.has_changes = true;
        let stored = self.write(compressed, frame, chunk_bytes as u32)?; // at most 2 MiB
        self.laid.insert(chunk, stored);
        Ok(())
    }

    /// Describes all chunks of the volume: those that were laid, and the others as they are in the base.
    pub(super) fn push_laid(&mut self, goes_on: &dyn Fn() -> bool) -> Result<(), ChangesError> {
        for (chunk, stored) in std::mem::take(&mut self.laid) {
            self.keep_until(chunk.0, goes_on)?;
            if !goes_on() {
                return Ok(());
            }
            self.push(Entry::Data(stored))?;
        }
        self.keep_until(self.below.root().chunks(), goes_on)
    }

    /// Puts a frame into the layer.
    fn write(
        &mut self,
        compressed: CompressedChunk,
        frame: &[u8],
        plain_bytes: u32,
    ) -> Result<StoredChunk, WriteError> {
        let layer = match &mut self.layer {
            Some(layer) => layer,
            none => none.insert(self.publication.blob()?),
        };
        let start = layer.bytes();
        layer.write(frame)?;
        self.seek_table.push(compressed.frame_bytes, plain_bytes)?;
        Ok(StoredChunk {
            layer: LayerNumber(self.kept.count()),
            frame: ByteRange {
                start,
                len: u64::from(compressed.frame_bytes),
            },
            digest: compressed.digest,
        })
    }

    fn push(&mut self, entry: Entry) -> Result<(), WriteError> {
        let number = ChunkIndex(self.builder.chunks());
        if entry != Entry::Zero && self.wanted.contains(&number) {
            self.found.insert(number, entry.clone());
        }
        let index = &mut self.index;
        Ok(self.builder.push(entry, |bytes| index.write(bytes))?)
    }

    /// How many chunks were described so far.
    pub(super) fn chunks(&self) -> u64 {
        self.builder.chunks()
    }

    /// How many bytes the new layer has so far.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.layer.as_ref().map_or(0, BlobWriter::bytes)
    }

    /// Ends layer and index and brings both to stable storage.
    pub(super) fn finish(
        mut self,
        base: &ImageVolume,
        name: VolumeName,
    ) -> Result<WrittenVolume, WriteError> {
        let mut layers = self.kept.of_layers(&base.layers);
        let has_full_layer = base.has_full_layer && self.kept.has_first();
        // A full layer alone is its volume, byte for byte. Where pages became zero and nothing else, now or before, an
        // empty layer over it says that it is not.
        let is_as_below = base.layers.len() == 1 && !self.has_changes;
        let wants_empty = layers.is_empty() || has_full_layer && layers.len() == 1 && !is_as_below;
        let layer = match self.layer.take() {
            None if wants_empty => Some(self.publication.blob()?),
            layer => layer,
        };
        match layer {
            None => self.builder.drop_last_layer(),
            Some(mut layer) => {
                self.seek_table.finish(|bytes| layer.write(bytes))?;
                layers.push(layer.finish()?);
            }
        }
        let root = self.builder.finish();
        // As a blob of its own too: see the writer of full volumes.
        self.publication.add(&root.to_bytes())?;
        let volume = ImageVolume {
            name,
            layers,
            has_full_layer,
            index: self.index.finish()?,
            root,
        };
        Ok(WrittenVolume {
            volume,
            wanted: self.found,
        })
    }
}
