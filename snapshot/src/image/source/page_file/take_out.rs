//! Taking chunks out of a page file again, least likely to be needed first; and who may be changing it meanwhile.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use rustix::fs::FallocateFlags;

use super::super::chunk_set::ChunkSet;
use super::{Spot, allocated_bytes, next_data};
use crate::source::marks::{MarkWriter, PageFileLayout};
use crate::units::{ByteRange, ChunkIndex, PAGE_SIZE};

/// Which chunks are taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TakeOut {
    /// All, of an image that no machine uses, the last to arrive first: a machine that is resumed from it begins with
    /// those that came first.
    Unused,
    /// What nobody had asked for when it came, the oldest first.
    Filled,
    /// What an earlier process left, and nobody has asked for since.
    Inherited,
    /// What somebody waited for, the oldest first.
    Wanted,
}

/// The books of a page file out of which chunks are taken.
#[derive(Debug)]
pub(super) struct Kept {
    marks: MarkWriter,
    /// Held to read by those who bring chunks, each its own, from the first byte to the mark; and to write by who takes
    /// one out, from the mark to the last byte.
    gate: RwLock<()>,
    arrivals: Mutex<Arrivals>,
    /// The chunks in `arrivals`.
    listed: ChunkSet,
    /// Up to here it has been looked for what an earlier process left.
    looked_to: AtomicU64,
}

/// Chunks in the order in which they came: 4 bytes each.
#[derive(Debug, Default)]
struct Arrivals {
    filled: VecDeque<u32>,
    wanted: VecDeque<u32>,
}

impl Kept {
    pub(super) fn new(file: &File, layout: PageFileLayout) -> io::Result<Self> {
        Ok(Self {
            marks: MarkWriter::new(file, layout)?,
            gate: RwLock::default(),
            arrivals: Mutex::default(),
            listed: ChunkSet::new(layout.chunks()),
            looked_to: AtomicU64::new(0),
        })
    }

    /// Brings a chunk.
    pub(super) fn put(&self, file: &File, plain: &[u8], spot: Spot, is_fill: bool) -> io::Result<()> {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let written = file.write_all_at(plain, spot.range.start);
        let put = written.and_then(|()| self.marks.mark_in(file, spot.chunk));
        match &put {
            Ok(()) => self.list(spot.chunk, is_fill),
            // Part of a chunk would take room that nobody knows of. What cannot be taken out is written over later.
            Err(_) => drop(punch(file, spot.range)),
        }
        put
    }

    /// Counts a chunk as brought if it is in the file, as `is_it` says.
    pub(super) fn find(&self, file: &File, spot: Spot, is_it: impl FnOnce() -> bool) -> bool {
        let _gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let found = is_it() && self.marks.mark_in(file, spot.chunk).is_ok();
        if found {
            self.list(spot.chunk, false);
        }
        found
    }

    pub(super) fn is_out(&self, file: &File, chunk: ChunkIndex) -> bool {
        self.marks.is_out(file, chunk)
    }

    pub(super) fn take_out(&self, file: &File, bytes: u64, which: TakeOut, inherited: bool) -> u64 {
        let mut freed = 0;
        while freed < bytes {
            let next = match which {
                TakeOut::Unused => self.next_unused().or_else(|| self.next_left(file, inherited)),
                TakeOut::Filled => self.lock().filled.pop_front().map(u64::from).map(ChunkIndex),
                TakeOut::Wanted => self.lock().wanted.pop_front().map(u64::from).map(ChunkIndex),
                TakeOut::Inherited => self.next_left(file, inherited),
            };
            let Some(chunk) = next else { break };
            match self.take_chunk_out(file, chunk) {
                Ok(more) => freed += more,
                Err(error) => tracing::warn!(chunk = chunk.0, %error, "a chunk stays in its page file"),
            }
        }
        freed
    }

    /// Takes one chunk out; returns the bytes that are free now.
    fn take_chunk_out(&self, file: &File, chunk: ChunkIndex) -> io::Result<u64> {
        let _gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        self.listed.remove(chunk);
        let range = self.range_of(chunk);
        let before = allocated_bytes(file);
        self.marks.mark_out(file, chunk)?;
        punch(file, range)?;
        Ok(before.saturating_sub(allocated_bytes(file)))
    }

    fn next_unused(&self) -> Option<ChunkIndex> {
        let mut arrivals = self.lock();
        let last = arrivals.filled.pop_back().or_else(|| arrivals.wanted.pop_back());
        last.map(|chunk| ChunkIndex(chunk.into()))
    }

    /// The next chunk of which something is in the file though it never arrived.
    fn next_left(&self, file: &File, inherited: bool) -> Option<ChunkIndex> {
        let layout = self.marks.layout();
        if !inherited {
            return None;
        }
        loop {
            let at = next_data(file, self.looked_to.load(Ordering::Relaxed))?;
            if at >= layout.volume_bytes {
                return None;
            }
            let chunk = layout.chunk_size.chunk_holding(at);
            let range = self.range_of(chunk);
            self.looked_to
                .store(range.start.saturating_add(range.len), Ordering::Relaxed);
            if !self.listed.contains(chunk) {
                return Some(chunk);
            }
        }
    }

    pub(super) fn layout(&self) -> PageFileLayout {
        self.marks.layout()
    }

    pub(super) fn range_of(&self, chunk: ChunkIndex) -> ByteRange {
        let layout = self.marks.layout();
        layout.chunk_size.range_of(chunk, layout.volume_bytes)
    }

    fn list(&self, chunk: ChunkIndex, is_fill: bool) {
        // A volume of 64 TiB in the smallest chunks has as many.
        let Ok(number) = u32::try_from(chunk.0) else {
            return;
        };
        let mut arrivals = self.lock();
        if self.listed.contains(chunk) {
            return;
        }
        self.listed.insert(chunk);
        match is_fill {
            true => arrivals.filled.push_back(number),
            false => arrivals.wanted.push_back(number),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Arrivals> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn punch(file: &File, range: ByteRange) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    // Whole pages, behind the volume's last byte too: parts of one would be zeroed and stay.
    let whole = range.len.next_multiple_of(PAGE_SIZE);
    Ok(rustix::fs::fallocate(file, flags, range.start, whole)?)
}
