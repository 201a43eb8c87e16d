//! An overlay: a machine's private, writable disk data over an image's volume.
//!
//! ```text
//!   guest ──read──► block in the overlay?  ──yes──► the overlay file (local, sparse)
//!                                          ──no───► wait for the chunk ──► the volume's page file
//!   guest ──write─► the overlay file, and the block is the overlay's from then on
//! ```
//!
//! A *block* here is a page of the volume, 4096 bytes. A write that covers only part of a block takes the rest from
//! the image first. Discarded blocks become the overlay's and read as zeros. What the overlay holds is lost with the
//! machine unless a snapshot takes it along. A write for which the host has no room waits for it, and stalls the machine.

mod content;

pub use content::{IsCancelled, OverImage};

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FallocateFlags;

use crate::block_store::{BlockStore, GuestSlice, guest_io};
use crate::copy_before_write::{DriveWrites, EarlyPages, Moment};
use crate::dirty_pages::WrittenPages;
use crate::pager::{Fetcher, PageSet};
use crate::source::{Arrived, ChunkId, SourceVolume, VolumeId};
use crate::units::{ByteRange, ChunkIndex, PAGE_SIZE, PageIndex};
use crate::unnamed;
use crate::volume::VolumeName;

/// A drive whose content is an image's volume, changed by what this machine wrote. See the module.
pub struct Overlay {
    fetcher: Arc<Fetcher>,
    volume: VolumeId,
    about: SourceVolume,
    base: Arc<File>,
    /// Written blocks, at their own offset; everything else is a hole.
    own: Arc<File>,
    /// Where that file is.
    directory: PathBuf,
    read_only: bool,
    /// Held by whoever changes the overlay, so that taking a block over never undoes a write. Taken before `written`;
    /// its holder may wait for a chunk, or for a capture to come by; readers never take it.
    writer: Mutex<()>,
    /// Which blocks are the overlay's: added once their bytes are in the file, never taken out.
    written: Mutex<PageSet>,
    /// What has to be kept before the overlay's file is written to.
    capture: DriveWrites,
}

/// Why an overlay cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The image lacks the volume.
    #[error("the image has no volume {0}")]
    NoVolume(VolumeName),
    /// There is no room, or no permission.
    #[error("cannot create an overlay of {bytes} bytes in {directory}: choose another `overlay_directory`")]
    Create {
        /// Where.
        directory: String,
        /// How large it would be, when all of it was written.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Overlay {
    /// Makes an empty overlay over a volume of the fetcher's source. Its file has no name and vanishes with the
    /// process; it is made in `directory`.
    ///
    /// # Errors
    /// When the source lacks the volume, or the file cannot be made.
    pub fn new(
        fetcher: &Arc<Fetcher>,
        name: &VolumeName,
        directory: &Path,
        read_only: bool,
    ) -> Result<Self, OverlayError> {
        let (volume, about) = fetcher
            .volume_named(name)
            .ok_or_else(|| OverlayError::NoVolume(name.clone()))?;
        let failed = |source: io::Error| OverlayError::Create {
            directory: directory.display().to_string(),
            bytes: about.bytes,
            source,
        };
        let own = unnamed::create_in(directory).map_err(failed)?;
        own.set_len(about.bytes.next_multiple_of(PAGE_SIZE))
            .map_err(failed)?;
        Ok(Self {
            fetcher: fetcher.clone(),
            volume,
            about: about.clone(),
            base: fetcher.source().page_file(volume),
            own: Arc::new(own),
            directory: directory.to_owned(),
            read_only,
            writer: Mutex::default(),
            written: Mutex::new(PageSet::new(about.bytes.div_ceil(PAGE_SIZE))),
            capture: DriveWrites::new(about.bytes),
        })
    }

    /// The overlay's content as it is now, for a snapshot, or of it the pages `within` alone; the machine stands still
    /// while this is called, and may run on when it has returned: what it overwrites then is kept in `early` first.
    #[must_use]
    pub fn freeze(
        &self,
        within: Option<&PageSet>,
        early: &Arc<EarlyPages>,
        is_cancelled: IsCancelled,
    ) -> OverImage {
        let mut own = self.written().clone();
        if let Some(within) = within {
            own.retain_all(within);
        }
        let moment = Moment::new(
            own.clone(),
            self.about.bytes,
            Box::new(self.own.clone()),
            early.clone(),
            |_| {},
        );
        self.capture.go_by(&moment);
        let nothing = PageSet::new(self.about.bytes.div_ceil(PAGE_SIZE));
        OverImage::new(
            &self.fetcher,
            self.volume,
            own,
            Box::new(moment),
            nothing,
            is_cancelled,
        )
    }

    /// Pages that were written to since the last image of it.
    #[must_use]
    pub fn dirty(&self) -> &Arc<WrittenPages> {
        self.capture.written()
    }

    fn written(&self) -> MutexGuard<'_, PageSet> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_for_writing(&self) -> MutexGuard<'_, ()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, range: ByteRange) -> io::Result<()> {
        if range.fits_in(self.about.bytes) {
            return Ok(());
        }
        let message = format!(
            "{range} lie outside {}, which has {} bytes",
            self.about.name, self.about.bytes
        );
        Err(io::Error::new(io::ErrorKind::InvalidInput, message))
    }

    fn check_write(&self, range: ByteRange) -> io::Result<()> {
        if self.read_only {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("{} is read-only", self.about.name),
            ));
        }
        self.check(range)
    }

    /// Waits until every chunk of `range` that the overlay does not cover is in the page file. Asks for all of them
    /// before it waits for the first.
    fn await_base(&self, range: ByteRange) -> io::Result<()> {
        let missing = self.missing_chunks(range);
        self.fetcher.prefetch(&missing);
        missing
            .into_iter()
            .try_for_each(|id| self.fetcher.wait(id).map(drop))
    }

    fn missing_chunks(&self, range: ByteRange) -> Vec<ChunkId> {
        let Some(last) = range.len.checked_sub(1) else {
            return Vec::new();
        };
        let size = self.about.chunk_size;
        let written = self.written();
        (size.chunk_holding(range.start).0..=size.chunk_holding(range.start + last).0)
            .map(|chunk| ChunkId {
                volume: self.volume,
                chunk: ChunkIndex(chunk),
            })
            .filter(|id| self.fetcher.state(*id).is_none())
            .filter(|id| {
                let chunk = self.about.range_of(id.chunk);
                let start = range.start.max(chunk.start);
                let end = (range.start + range.len).min(chunk.start + chunk.len);
                let first = PageIndex::holding(start);
                let blocks = end.div_ceil(PAGE_SIZE) - first.0;
                written.run_at(first, blocks) != (true, blocks)
            })
            .collect()
    }

    /// Runs of `range` that lie in one place, in order: `(in the overlay, bytes)`.
    fn runs(&self, range: ByteRange) -> Vec<(bool, ByteRange)> {
        let written = self.written();
        let end = range.start + range.len;
        let mut runs = Vec::new();
        let mut start = range.start;
        while start < end {
            let first = PageIndex::holding(start);
            let (own, blocks) = written.run_at(first, end.div_ceil(PAGE_SIZE) - first.0);
            let run_end = ((first.0 + blocks) * PAGE_SIZE).min(end);
            runs.push((
                own,
                ByteRange {
                    start,
                    len: run_end - start,
                },
            ));
            start = run_end;
        }
        runs
    }

    fn cut_into_chunks(&self, run: ByteRange) -> impl Iterator<Item = ByteRange> {
        let (size, end) = (self.about.chunk_size, run.start + run.len);
        let mut start = run.start;
        std::iter::from_fn(move || {
            let next = ((size.chunk_holding(start).0 + 1) * size.bytes()).min(end);
            let len = next.checked_sub(start).filter(|len| *len > 0)?;
            let part = ByteRange { start, len };
            start = next;
            Some(part)
        })
    }

    /// Reads a part of one chunk of the image.
    fn read_base(&self, part: ByteRange, into: &[GuestSlice<'_>]) -> io::Result<()> {
        let id = ChunkId {
            volume: self.volume,
            chunk: self.about.chunk_size.chunk_holding(part.start),
        };
        self.fetcher.touched(id);
        let read = || guest_io::read_slices_at(&self.base, part.start, into);
        match self.fetcher.read_held(id, || self.fetcher.wait(id), read)? {
            Arrived::Data => Ok(()),
            // There is a hole in its place.
            Arrived::Zero => guest_io::read_slices_at(&self.base, part.start, into),
        }
    }

    /// Makes the blocks that `range` covers only in part the overlay's, so that the part around it is not lost.
    fn take_over_edges(&self, range: ByteRange) -> io::Result<()> {
        let end = range.start + range.len;
        if !range.start.is_multiple_of(PAGE_SIZE) {
            self.take_over(PageIndex::holding(range.start))?;
        }
        if !end.is_multiple_of(PAGE_SIZE) && end != self.about.bytes {
            self.take_over(PageIndex::holding(end))?;
        }
        Ok(())
    }

    /// Copies one block of the image into the overlay, unless it is there already.
    fn take_over(&self, block: PageIndex) -> io::Result<()> {
        if self.written().contains(block) {
            return Ok(());
        }
        let len = PAGE_SIZE.min(self.about.bytes - block.offset());
        let id = ChunkId {
            volume: self.volume,
            chunk: self.about.chunk_size.chunk_holding(block.offset()),
        };
        self.fetcher.touched(id);
        let mut bytes = [0; PAGE_SIZE as usize];
        let bytes = &mut bytes[..len as usize];
        let wait = || self.fetcher.wait(id);
        let read = || self.base.read_exact_at(bytes, block.offset());
        self.fetcher.read_held(id, wait, read)?;
        self.keep(block.offset(), || self.own.write_all_at(bytes, block.offset()))?;
        self.written().insert_run(block, 1);
        Ok(())
    }

    /// Has `write` put something into the overlay's file at `offset`; waits while there is no room for it.
    fn keep(&self, offset: u64, write: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        let id = ChunkId {
            volume: self.volume,
            chunk: self.about.chunk_size.chunk_holding(offset),
        };
        self.fetcher.keep(id, &self.directory, write)
    }

    /// Makes `range` the overlay's, as zeros; the whole blocks in it take no room (the file system punches them out,
    /// and writes zeros over parts of blocks).
    fn make_zero(&self, range: ByteRange) -> io::Result<()> {
        self.take_over_edges(range)?;
        self.capture.before(range);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // A file system that shares blocks may need room to take some of them out.
        self.keep(range.start, || {
            Ok(rustix::fs::fallocate(&*self.own, flags, range.start, range.len)?)
        })?;
        self.mark_written(range);
        Ok(())
    }

    fn mark_written(&self, range: ByteRange) {
        let first = PageIndex::holding(range.start);
        self.written()
            .insert_run(first, (range.start + range.len).div_ceil(PAGE_SIZE) - first.0);
    }
}

impl BlockStore for Overlay {
    fn bytes(&self) -> u64 {
        // Devices count in sectors; a tail shorter than one is not the guest's.
        self.about.bytes / 512 * 512
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn will_read(&self, ranges: &[ByteRange]) {
        let inside = ranges.iter().filter(|range| self.check(**range).is_ok());
        let missing: Vec<_> = inside.flat_map(|range| self.missing_chunks(*range)).collect();
        self.fetcher.prefetch(&missing);
    }

    fn read_at(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        let range = ByteRange {
            start: offset,
            len: guest_io::total(into),
        };
        self.check(range)?;
        self.await_base(range)?;
        let mut slices = guest_io::Cursor::new(into);
        for (own, run) in self.runs(range) {
            if own {
                guest_io::read_slices_at(&self.own, run.start, &slices.take(run.len))?;
                continue;
            }
            // The image's chunks one by one: each may be taken out of the page file on its own.
            for part in self.cut_into_chunks(run) {
                self.read_base(part, &slices.take(part.len))?;
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        let range = ByteRange {
            start: offset,
            len: guest_io::total(from),
        };
        self.check_write(range)?;
        if range.len == 0 {
            return Ok(());
        }
        let _writer = self.lock_for_writing();
        self.take_over_edges(range)?;
        self.capture.before(range);
        self.keep(offset, || guest_io::write_slices_at(&self.own, offset, from))?;
        self.mark_written(range);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        // An overlay lives as long as its process: there is no crash after which its file could be found again.
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write_zeroes(range, true)
    }

    fn write_zeroes(&self, range: ByteRange, _unmap: bool) -> io::Result<()> {
        self.check_write(range)?;
        if range.len == 0 {
            return Ok(());
        }
        let _writer = self.lock_for_writing();
        self.make_zero(range)
    }
}

#[cfg(test)]
mod tests;
