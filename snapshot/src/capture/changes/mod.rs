//! The capture of what changed since an image: a diff layer with the changed pages, and an index merged over it and
//! the layers below.
//!
//! ```text
//! changed pages ─► pieces ─► compressors ─► line, in order ─► ChangesWriter ─► Publication
//! index below ────────────►  plan · read · zero? · zstd      takes over entries of chunks that did not change
//! ```
//!
//! Only chunks of which a page changed are read, and of those the changed pages alone, unless the chunk would be of too
//! many parts: then it is written anew as a whole. Where it is not known which pages changed, more are named, and those
//! that are as they were are found by their digests. A page that changed to zeros takes no bytes. Of the image below the
//! index alone is read: layers that are not used any more are left out, and the others are the same blobs as before.

mod hot;
mod merge;
mod pieces;
mod writer;

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, PoisonError};

use super::CaptureSettings;
use super::content::{Content, Found};
use super::job::CaptureError;
use super::line::Line;
use super::pool::{PLACES_AHEAD, while_compressing};
use super::progress::Progress;
use super::volume_writer::{CompressedChunk, WriteError, WrittenVolume};
use crate::blobs::Blob;
use crate::digest::ChunkDigest;
use crate::image::manifest::ImageVolume;
use crate::image::publication::Publication;
use crate::index::{Entry, IndexError, IndexReader, LAYERS_MAX, PageBits, parts};
use crate::layer::frame::{ChunkCompressor, is_zero};
use crate::pager::PageSet;
use crate::units::{ByteRange, ChunkIndex};
use crate::volume::VolumeName;
pub(super) use hot::{Hot, HotLayer};
use merge::{Kept, Plan};
use pieces::{Piece, Pieces};
use writer::{Changed, ChangesWriter, New};

/// Why changes cannot be put over a volume.
#[derive(Debug, thiserror::Error)]
pub enum ChangesError {
    /// The index below cannot be had.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The image cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// What is to be captured of one volume.
pub(super) struct Changes<'a> {
    pub(super) name: &'a VolumeName,
    /// The whole volume as it is now.
    pub(super) content: &'a dyn Content,
    /// The pages that may differ from `base`.
    pub(super) changed: &'a PageSet,
    /// Whether they are held against the digests of `base`, since many do not.
    pub(super) compares: bool,
    pub(super) base: &'a ImageVolume,
    /// The index of `base`.
    pub(super) index: &'a IndexReader,
}

/// Changes together with the layers below that they leave in use.
pub(super) struct Merge<'a> {
    changes: Changes<'a>,
    kept: Kept,
}

impl<'a> Merge<'a> {
    /// Finds out which layers of the base are still used.
    ///
    /// # Errors
    /// When the volume has another length than its base, or the index below cannot be read.
    pub(super) fn new(changes: Changes<'a>, progress: &Progress) -> Result<Self, CaptureError> {
        let (bytes, below) = (changes.content.bytes(), changes.base.root.volume_bytes());
        if bytes != below {
            return Err(CaptureError::OtherLength {
                volume: changes.name.clone(),
                bytes,
                below,
            });
        }
        let goes_on = || !progress.is_cancelled();
        // What is compared may turn out to be as it was: then all of the base's frames are still used.
        let kept = match changes.compares {
            true => Kept::of(changes.index, &PageSet::new(changes.changed.pages()), &goes_on),
            false => Kept::of(changes.index, changes.changed, &goes_on),
        };
        let kept = kept.map_err(|error| below_failed(changes.name, error.into()))?;
        if progress.is_cancelled() {
            return Err(CaptureError::Cancelled);
        }
        Ok(Self { changes, kept })
    }

    /// Whether there may be as many layers as it would have.
    pub(super) fn fits(&self) -> bool {
        self.kept.count() < LAYERS_MAX
    }

    /// The layers of the base that the new volume has too.
    pub(super) fn kept_layers(&self) -> Vec<Blob> {
        self.kept.of_layers(&self.changes.base.layers)
    }

    /// Writes the diff layer and the index; `position` is that of the volume's figures in `progress`.
    ///
    /// # Errors
    /// When content or the index below cannot be read, the image cannot be written, or it was cancelled.
    pub(super) fn capture(
        self,
        settings: &CaptureSettings,
        publication: &Publication,
        (progress, position): (&Progress, usize),
        wanted: BTreeSet<ChunkIndex>,
    ) -> Result<WrittenVolume, CaptureError> {
        let Self { changes, kept } = self;
        let root = &changes.base.root;
        let compressors = settings.compressors.max(1);
        let mut writer = ChangesWriter::new(publication, changes.index, kept, wanted)?;
        let capture = Capture {
            line: Line::new(
                Pieces::new(changes.changed, root.chunk_size(), root.volume_bytes()),
                compressors + PLACES_AHEAD,
            ),
            changes: &changes,
            progress,
            spare: Mutex::default(),
        };
        while_compressing(
            settings,
            &capture.line,
            || capture.compress(settings.level),
            || capture.write(&mut writer, position),
        )?;
        Ok(writer.finish(changes.base, changes.name.clone())?)
    }
}

fn below_failed(volume: &VolumeName, error: ChangesError) -> CaptureError {
    match error {
        ChangesError::Write(error) => error.into(),
        ChangesError::Index(source) => CaptureError::Below {
            volume: volume.clone(),
            source: Box::new(source),
        },
    }
}

/// A piece that was looked at. Its buffer is used again and again.
struct Finished {
    /// New frames, back to back.
    frames: Vec<u8>,
    changed: Vec<Changed>,
    end: u64,
}

/// What the threads of one capture share.
struct Capture<'a> {
    changes: &'a Changes<'a>,
    line: Line<Pieces<'a>, Finished, CaptureError>,
    progress: &'a Progress,
    /// Buffers that the writer is done with.
    spare: Mutex<Vec<Vec<u8>>>,
}

/// What a compressor keeps between chunks.
struct Hands {
    compressor: ChunkCompressor,
    /// A chunk, as far as it was read.
    chunk: Vec<u8>,
    /// What becomes a frame: the changed pages, or all of the chunk.
    plain: Vec<u8>,
}

impl Hands {
    /// Takes those of `pages` out of the chunk that are not zeros, back to back; which they are.
    fn gather_data(&mut self, pages: &PageBits) -> PageBits {
        let mut data = PageBits::EMPTY;
        self.plain.clear();
        for (first, count) in pages.runs() {
            for page in first..first + count {
                let bytes = page_of(&self.chunk, page);
                if !is_zero(bytes) {
                    self.plain.extend_from_slice(bytes);
                    data.insert_run(page, 1);
                }
            }
        }
        data
    }
}

fn page_of(chunk: &[u8], page: u32) -> &[u8] {
    let (at, len) = parts::bytes_of((page, 1), chunk.len() as u64);
    &chunk[at as usize..][..len as usize]
}

/// Those of the pages `read` that differ from `below`: a frame there whose pages were all read, and are all shown, is
/// compared by its digest; pages that are zeros there are looked at.
fn differing(below: &Entry, read: &PageBits, pages: u32, hands: &mut Hands) -> PageBits {
    let all = PageBits::first(pages);
    let parts = match below {
        Entry::Zero => Vec::new(),
        Entry::Data(stored) => vec![merge::whole(*stored, all)],
        Entry::Parts(parts) => parts.to_vec(),
    };
    let mut zero_below = all;
    let mut differing = *read;
    for part in &parts {
        zero_below = zero_below.without(&part.shown);
        if part.shown == part.held && part.held.is_within(read) {
            hands
                .plain
                .resize(part.plain_bytes(hands.chunk.len() as u64) as usize, 0);
            part.gather(&hands.chunk, &mut hands.plain);
            if ChunkDigest::of(&hands.plain) == part.stored.digest {
                differing = differing.without(&part.held);
            }
        }
    }
    for (first, count) in read.without(&read.without(&zero_below)).runs() {
        for page in (first..first + count).filter(|page| is_zero(page_of(&hands.chunk, *page))) {
            let mut bit = PageBits::EMPTY;
            bit.insert_run(page, 1);
            differing = differing.without(&bit);
        }
    }
    differing
}

impl Capture<'_> {
    fn write(&self, writer: &mut ChangesWriter<'_>, position: usize) -> Result<(), CaptureError> {
        let failed = |error| below_failed(self.changes.name, error);
        let goes_on = || !self.progress.is_cancelled();
        while let Some(finished) = self.line.leave()? {
            let before = writer.chunks();
            let mut frames = &finished.frames[..];
            for changed in finished.changed {
                writer.keep_until(changed.chunk.0, &goes_on).map_err(failed)?;
                if !goes_on() {
                    return Err(CaptureError::Cancelled);
                }
                let (frame, rest) = frames.split_at(changed.new.frame_bytes());
                frames = rest;
                let chunk_bytes = self.range_of(changed.chunk).len;
                writer.push_changed(changed, frame, chunk_bytes)?;
            }
            writer.keep_until(finished.end, &goes_on).map_err(failed)?;
            self.spare
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(finished.frames);
            self.progress
                .add_done(position, self.offset_of(writer.chunks()) - self.offset_of(before));
            self.progress.set_stored(position, writer.stored_bytes());
        }
        match goes_on() {
            true => Ok(()),
            false => Err(CaptureError::Cancelled),
        }
    }

    fn compress(&self, level: i32) {
        let compressor = match ChunkCompressor::new(level) {
            Ok(compressor) => compressor,
            Err(source) => return self.line.fail(CaptureError::Compressor { level, source }),
        };
        let mut hands = Hands {
            compressor,
            chunk: Vec::new(),
            plain: Vec::new(),
        };
        let next = |pieces: &mut Pieces<'_>| match self.progress.is_cancelled() {
            true => Err(CaptureError::Cancelled),
            false => Ok(pieces.next()),
        };
        while let Some((place, piece)) = self.line.take(next) {
            match self.look_at(&piece, &mut hands) {
                Ok(finished) => self.line.put(place, finished),
                Err(error) => return self.line.fail(error),
            }
        }
    }

    fn look_at(&self, piece: &Piece, hands: &mut Hands) -> Result<Finished, CaptureError> {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut frames = spare.unwrap_or_default();
        frames.clear();
        let mut changed = Vec::with_capacity(piece.changed.len());
        for (chunk, bits) in &piece.changed {
            let below = self.changes.index.entry(*chunk);
            let below = below.map_err(|error| below_failed(self.changes.name, error.into()))?;
            if let Some(new) = self.look_at_chunk(self.range_of(*chunk), bits, &below, hands, &mut frames)? {
                changed.push(Changed { chunk: *chunk, new });
            }
        }
        Ok(Finished {
            frames,
            changed,
            end: piece.end,
        })
    }

    /// What is new of a chunk whose pages `read` may differ from `below`, or `None` if none does. Its frame, if it has
    /// one, is appended to `frames`.
    fn look_at_chunk(
        &self,
        range: ByteRange,
        read: &PageBits,
        below: &Entry,
        hands: &mut Hands,
        frames: &mut Vec<u8>,
    ) -> Result<Option<New>, CaptureError> {
        let pages = parts::pages_in(range.len);
        hands.chunk.resize(range.len as usize, 0); // at most 2 MiB
        self.read(range, read, &mut hands.chunk)?;
        let changed = match self.changes.compares {
            true => differing(below, read, pages, hands),
            false => *read,
        };
        if changed.is_empty() {
            return Ok(None);
        }
        let new = match Plan::new(below, &changed, pages) {
            Plan::Anew => {
                // A page that was read is not read again: a machine that runs may have written to it since.
                self.read(range, &PageBits::first(pages).without(read), &mut hands.chunk)?;
                match is_zero(&hands.chunk) {
                    true => New::Zero,
                    false => {
                        hands.plain.clear();
                        hands.plain.extend_from_slice(&hands.chunk);
                        New::Whole(self.append(range, hands, frames)?)
                    }
                }
            }
            Plan::Over(remaining) => {
                let held = hands.gather_data(&changed);
                let frame = match held.is_empty() {
                    true => None,
                    false => Some((held, self.append(range, hands, frames)?)),
                };
                New::Pages {
                    remaining,
                    frame,
                    plain_bytes: hands.plain.len() as u32,
                }
            }
        };
        Ok(Some(new))
    }

    /// Reads pages of the chunk at `range` to where they belong in it.
    fn read(&self, range: ByteRange, pages: &PageBits, chunk: &mut [u8]) -> Result<(), CaptureError> {
        for run in pages.runs() {
            let (at, len) = parts::bytes_of(run, range.len);
            let part = &mut chunk[at as usize..][..len as usize];
            let read = self.changes.content.read(range.start + at, part);
            let found = read.map_err(|source| CaptureError::Read {
                volume: self.changes.name.clone(),
                range: ByteRange {
                    start: range.start + at,
                    len,
                },
                source,
            })?;
            if found == Found::Zero {
                part.fill(0);
            }
        }
        Ok(())
    }

    /// Appends the frame of what is in hand, of the chunk at `range`.
    fn append(
        &self,
        range: ByteRange,
        hands: &mut Hands,
        frames: &mut Vec<u8>,
    ) -> Result<CompressedChunk, CaptureError> {
        let failed = |source: io::Error| CaptureError::Compress {
            volume: self.changes.name.clone(),
            range,
            source,
        };
        let frame_bytes = hands
            .compressor
            .append_frame(&hands.plain, frames)
            .map_err(failed)?;
        Ok(CompressedChunk {
            frame_bytes,
            digest: ChunkDigest::of(&hands.plain),
        })
    }

    fn range_of(&self, chunk: ChunkIndex) -> ByteRange {
        let root = &self.changes.base.root;
        root.chunk_size().range_of(chunk, root.volume_bytes())
    }

    /// Where a chunk begins, or the volume ends.
    fn offset_of(&self, chunk: u64) -> u64 {
        self.range_of(ChunkIndex(chunk)).start
    }
}

impl New {
    fn frame_bytes(&self) -> usize {
        match self {
            Self::Whole(compressed)
            | Self::Pages {
                frame: Some((_, compressed)),
                ..
            } => compressed.frame_bytes as usize,
            Self::Zero | Self::Pages { frame: None, .. } => 0,
        }
    }
}
