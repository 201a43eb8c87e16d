//! Marks: what was taken out of a page file to make room, told by the page file itself to whoever reads it.
//!
//! ```text
//!   page file:  the volume, in whole pages │ a mark of 4 bytes a chunk, in whole pages │ the footer: a page
//!
//!   mark:  even, the chunk is in, if it ever arrived ──take out──► odd, it is out, or about to be
//!                      ▲                                                    │
//!                      └────────────── bytes written, then the mark ────────┘
//! ```
//!
//! Marks only grow. Whoever takes a chunk out marks it before the first byte goes, and whoever brings one marks it after
//! the last byte came; both hold the page file's lock, so that no two change one chunk at a time.
//!
//! **Invariant.** Bytes of a chunk that has arrived are the image's if they were read between two looks at its mark that
//! found the same even number. In every other case the chunk is asked for again and the bytes are thrown away, so a hole
//! is never taken for the image's zeros:
//!
//! | when the chunk is taken out | what a reader finds |
//! | --- | --- |
//! | before it looks first | an odd mark: it does not read |
//! | between the looks, whatever it has read by then | an odd mark, or another even one if the chunk is back already |
//! | after it looked again | nothing: what it has was read before the first byte went |
//! | after the agent said that it arrived, before its monitor heard | an odd mark, as in the first line |
//! | and its taker is killed before it went | an odd mark: it is asked for, and found in the page file by the next agent |
//! | and whoever brings it back is killed halfway | an odd mark still |
//!
//! None of this needs the agent, or a connection to it: a monitor that is about to come back reads safely too. Who *maps*
//! a page file, as machines do with memory, needs no marks: the kernel takes pages that go out of every mapping, and says
//! with the next fault that they are not there.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags};

use crate::units::{ChunkIndex, ChunkSize, PAGE_SIZE};

const MARK_BYTES: u64 = size_of::<u32>() as u64;

/// Begins the footer; the number counts layouts.
const MAGIC: [u8; 8] = *b"rnlmark1";

/// Magic, the volume's bytes, the chunk size.
const FOOTER_BYTES: usize = 24;

/// Where everything is in a page file with marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFileLayout {
    /// Of the volume.
    pub volume_bytes: u64,
    /// How it is cut.
    pub chunk_size: ChunkSize,
}

impl PageFileLayout {
    /// How many chunks there are.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunk_size.chunks_in(self.volume_bytes)
    }

    fn marks_start(&self) -> u64 {
        self.volume_bytes.next_multiple_of(PAGE_SIZE)
    }

    fn marks_bytes(&self) -> u64 {
        (self.chunks() * MARK_BYTES).next_multiple_of(PAGE_SIZE)
    }

    fn footer_start(&self) -> u64 {
        self.marks_start() + self.marks_bytes()
    }

    /// How long the page file is.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.footer_start() + PAGE_SIZE
    }

    fn footer(&self) -> [u8; FOOTER_BYTES] {
        let mut footer = [0; FOOTER_BYTES];
        footer[..8].copy_from_slice(&MAGIC);
        footer[8..16].copy_from_slice(&self.volume_bytes.to_le_bytes());
        footer[16..].copy_from_slice(&self.chunk_size.bytes().to_le_bytes());
        footer
    }

    /// What the footer of a page file says, if it has one that fits.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(file: &File) -> io::Result<Option<Self>> {
        let bytes = file.metadata()?.len();
        let Some(start) = bytes.checked_sub(PAGE_SIZE) else {
            return Ok(None);
        };
        let mut footer = [0; FOOTER_BYTES];
        file.read_exact_at(&mut footer, start)?;
        let word = |at: usize| u64::from_le_bytes(footer[at..at + 8].try_into().expect("eight bytes"));
        let chunk_size = u32::try_from(word(16))
            .ok()
            .and_then(|bytes| ChunkSize::new(bytes).ok());
        let (true, Some(chunk_size)) = (footer[..8] == MAGIC, chunk_size) else {
            return Ok(None);
        };
        let layout = Self {
            volume_bytes: word(8),
            chunk_size,
        };
        // Before anything is computed from a length that overflows.
        let fits = layout.volume_bytes <= bytes && layout.file_bytes() == bytes;
        Ok(fits.then_some(layout))
    }
}

/// The writer's end: marks are changed by writing the file, which fails where a mapping would end the process.
#[derive(Debug)]
pub(crate) struct MarkWriter {
    layout: PageFileLayout,
}

impl MarkWriter {
    /// Makes `file` as long as it must be, with room for all marks; those that are there stay.
    pub(crate) fn new(file: &File, layout: PageFileLayout) -> io::Result<Self> {
        file.set_len(layout.file_bytes())?;
        // Now, since marks change just when there is no room.
        let whole = (layout.marks_start(), layout.marks_bytes() + PAGE_SIZE);
        match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, whole.0, whole.1) {
            // Then each mark is allocated with its first change, or the chunk stays where it is.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        file.write_all_at(&layout.footer(), layout.footer_start())?;
        Ok(Self { layout })
    }

    pub(crate) fn layout(&self) -> PageFileLayout {
        self.layout
    }

    /// Marks a chunk as out.
    pub(crate) fn mark_out(&self, file: &File, chunk: ChunkIndex) -> io::Result<()> {
        self.change(file, chunk, |mark| mark | 1)
    }

    /// Marks a chunk as in.
    pub(crate) fn mark_in(&self, file: &File, chunk: ChunkIndex) -> io::Result<()> {
        self.change(file, chunk, |mark| mark.wrapping_add(mark & 1))
    }

    pub(crate) fn is_out(&self, file: &File, chunk: ChunkIndex) -> bool {
        // What cannot be read is not relied on.
        self.mark(file, chunk).is_none_or(|mark| mark & 1 == 1)
    }

    fn mark(&self, file: &File, chunk: ChunkIndex) -> Option<u32> {
        let mut mark = [0; MARK_BYTES as usize];
        file.read_exact_at(&mut mark, self.offset(chunk)?).ok()?;
        Some(u32::from_ne_bytes(mark))
    }

    fn change(&self, file: &File, chunk: ChunkIndex, new: impl FnOnce(u32) -> u32) -> io::Result<()> {
        let outside = || io::Error::new(io::ErrorKind::InvalidInput, "the page file has no such chunk");
        let at = self.offset(chunk).ok_or_else(outside)?;
        let mark = self.mark(file, chunk).ok_or_else(outside)?;
        match new(mark) {
            same if same == mark => Ok(()),
            new => file.write_all_at(&new.to_ne_bytes(), at),
        }
    }

    fn offset(&self, chunk: ChunkIndex) -> Option<u64> {
        (chunk.0 < self.layout.chunks()).then(|| self.layout.marks_start() + chunk.0 * MARK_BYTES)
    }
}

/// The reader's end: the marks, mapped.
#[derive(Debug)]
pub struct Marks {
    start: NonNull<AtomicU32>,
    chunks: u64,
    mapped_bytes: usize,
}

// SAFETY: it is memory that this process only reads, atomically, for as long as the value lives, from any thread.
unsafe impl Send for Marks {}
// SAFETY: as above.
unsafe impl Sync for Marks {}

/// A chunk's even mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(u32);

impl Marks {
    /// The marks of a page file; `None` if it has none, and nothing is ever taken out of it.
    ///
    /// # Errors
    /// When the file cannot be read or mapped, or its footer is not that of this volume.
    pub fn of(file: &File, layout: PageFileLayout) -> io::Result<Option<Self>> {
        if file.metadata()?.len() <= layout.marks_start() || layout.chunks() == 0 {
            return Ok(None);
        }
        if PageFileLayout::read(file)? != Some(layout) {
            let message = "the page file is not one of this volume, or of another version of Runnel";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let mapped_bytes = usize::try_from(layout.marks_bytes()).map_err(io::Error::other)?;
        // SAFETY: a new mapping, where the kernel finds room for it; it touches no memory of this process.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                layout.marks_start(),
            )
        }?;
        Ok(Some(Self {
            start: NonNull::new(start.cast()).expect("the kernel maps nothing at 0"),
            chunks: layout.chunks(),
            mapped_bytes,
        }))
    }

    /// Looks at a chunk before it is read; `None` if it is out.
    #[must_use]
    pub fn look(&self, chunk: ChunkIndex) -> Option<Mark> {
        let mark = self.load(chunk)?;
        (mark & 1 == 0).then_some(Mark(mark))
    }

    /// Whether what was read since that look is the image's.
    #[must_use]
    pub fn is_still(&self, chunk: ChunkIndex, mark: Mark) -> bool {
        // What was read is read before the mark is.
        fence(Ordering::SeqCst);
        self.load(chunk) == Some(mark.0)
    }

    fn load(&self, chunk: ChunkIndex) -> Option<u32> {
        if chunk.0 >= self.chunks {
            return None;
        }
        // SAFETY: so many marks were mapped, as the check says.
        let mark = unsafe { self.start.add(chunk.0 as usize) };
        // SAFETY: it is mapped for as long as `self` lives, aligned, and never written by this process; an agent that
        // cuts the file short is trusted not to.
        let mark = unsafe { mark.as_ref() };
        Some(mark.load(Ordering::SeqCst))
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`, with this length, and nothing refers to it any more.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.mapped_bytes) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "marks stay mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> PageFileLayout {
        PageFileLayout {
            volume_bytes: 5 * (64 << 10) + 512,
            chunk_size: ChunkSize::new(64 << 10).unwrap(),
        }
    }

    #[test]
    fn a_reader_sees_what_a_writer_marks_and_the_next_writer_keeps_it() {
        let file = tempfile::tempfile().unwrap();
        let writer = MarkWriter::new(&file, layout()).unwrap();
        let marks = Marks::of(&file, layout()).unwrap().unwrap();
        let chunk = ChunkIndex(5);
        let seen = marks.look(chunk).unwrap();
        assert!(marks.is_still(chunk, seen));
        writer.mark_out(&file, chunk).unwrap();
        writer.mark_out(&file, chunk).unwrap();
        assert!(!marks.is_still(chunk, seen) && marks.look(chunk).is_none());
        assert!(marks.look(ChunkIndex(4)).is_some());

        let next = MarkWriter::new(&file, PageFileLayout::read(&file).unwrap().unwrap()).unwrap();
        assert!(next.is_out(&file, chunk) && !next.is_out(&file, ChunkIndex(4)));
        next.mark_in(&file, chunk).unwrap();
        next.mark_in(&file, chunk).unwrap();
        assert_ne!(marks.look(chunk), None);
        assert!(!marks.is_still(chunk, seen), "it was out meanwhile");
        assert!(next.mark_out(&file, ChunkIndex(6)).is_err() && marks.look(ChunkIndex(6)).is_none());
    }

    #[test]
    fn a_file_without_marks_has_none_and_one_of_another_volume_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5 * (64 << 10) + 4096).unwrap();
        assert!(Marks::of(&file, layout()).unwrap().is_none());
        assert_eq!(PageFileLayout::read(&file).unwrap(), None);
        MarkWriter::new(&file, layout()).unwrap();
        let other = PageFileLayout {
            chunk_size: ChunkSize::new(128 << 10).unwrap(),
            ..layout()
        };
        assert!(Marks::of(&file, other).is_err());
    }

    /// What those who change a page file do to one chunk of two pages, over and over, step by step.
    const CHANGES: [fn(&File, &MarkWriter); 6] = [
        |file, writer| writer.mark_out(file, CHUNK).unwrap(),
        |file, _| punch(file, 1),
        |file, _| punch(file, 0),
        |file, _| file.write_all_at(&CONTENT[..PAGE], START).unwrap(),
        |file, _| file.write_all_at(&CONTENT[PAGE..], START + PAGE_SIZE).unwrap(),
        |file, writer| writer.mark_in(file, CHUNK).unwrap(),
    ];

    const CHUNK: ChunkIndex = ChunkIndex(1);
    const START: u64 = 64 << 10;
    const PAGE: usize = PAGE_SIZE as usize;
    const CONTENT: [u8; 2 * PAGE] = [7; 2 * PAGE];

    fn punch(file: &File, page: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, flags, START + page * PAGE_SIZE, PAGE_SIZE).unwrap();
    }

    /// Reads the chunk, page by page, with `between` called before each of the four steps; `None` if it is to be asked
    /// for again.
    fn read(file: &File, marks: &Marks, mut between: impl FnMut()) -> Option<Vec<u8>> {
        let mut seen = vec![0; 2 * PAGE];
        between();
        let mark = marks.look(CHUNK)?;
        for page in [0, 1] {
            between();
            let part = &mut seen[page * PAGE..(page + 1) * PAGE];
            file.read_exact_at(part, START + page as u64 * PAGE_SIZE).unwrap();
        }
        between();
        marks.is_still(CHUNK, mark).then_some(seen)
    }

    #[test]
    fn however_steps_interleave_what_counts_as_read_is_the_images() {
        const ROUNDS: usize = 2;
        let steps = CHANGES.len() * ROUNDS;
        let (mut right, mut again) = (0, 0);
        // How many changes are made before each of the reader's steps.
        let ends = |from: usize| from..=steps;
        for first in ends(0) {
            for second in ends(first) {
                for third in ends(second) {
                    for fourth in ends(third) {
                        let file = tempfile::tempfile().unwrap();
                        let writer = MarkWriter::new(&file, layout()).unwrap();
                        let marks = Marks::of(&file, layout()).unwrap().unwrap();
                        // It has arrived.
                        file.write_all_at(&CONTENT, START).unwrap();
                        let mut made = 0;
                        let mut goals = [first, second, third, fourth].into_iter();
                        let seen = read(&file, &marks, || {
                            let goal = goals.next().unwrap();
                            (made..goal).for_each(|step| CHANGES[step % CHANGES.len()](&file, &writer));
                            made = goal;
                        });
                        match seen {
                            Some(seen) => {
                                assert!(seen == CONTENT, "{:?}", [first, second, third, fourth]);
                                right += 1;
                            }
                            None => again += 1,
                        }
                    }
                }
            }
        }
        // Before the first round, between the two and after the last.
        assert_eq!(right, ROUNDS + 1);
        assert!(again > 1000, "{again}");
    }
}
