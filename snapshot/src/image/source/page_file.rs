//! A page file: sparse, written by the source and handed out for reading alone. Without a name, or with one, so that
//! a later process goes on with what is in it, and chunks can be taken out of it to make room. Or somebody else's, whole
//! and sealed, so that nobody writes it and nothing is taken out of it.

mod sealed;
mod take_out;

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::digest::ChunkDigest;
use crate::source::marks::PageFileLayout;
use crate::units::{ByteRange, ChunkIndex, PAGE_SIZE};
use crate::unnamed;
use sealed::Sealed;
pub use sealed::is_sealed;
use take_out::Kept;
pub use take_out::TakeOut;

/// How often a file is opened anew that somebody removes or protects meanwhile.
const ATTEMPTS_MAX: u32 = 3;

/// The file in which the chunks of one volume appear.
#[derive(Debug)]
pub struct PageFile {
    writable: File,
    read_only: Arc<File>,
    /// Whether there may be chunks in it already, written by nobody knows whom.
    inherited: AtomicBool,
    /// Where it has a name.
    folder: Option<PathBuf>,
    /// What it takes to take chunks out again: of one with a name.
    kept: Option<Kept>,
    /// Of one that is somebody else's.
    sealed: Option<Sealed>,
}

/// A chunk, and where it lies in its volume.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spot {
    pub(super) chunk: ChunkIndex,
    pub(super) range: ByteRange,
}

impl PageFile {
    /// A page file on tmpfs, for memory: its pages are what machines map.
    ///
    /// # Errors
    /// When there are no descriptors or no address space left.
    pub fn in_memory(bytes: u64) -> io::Result<Self> {
        let file = rustix::fs::memfd_create("runnel-pages", MemfdFlags::CLOEXEC)?;
        Self::unnamed(file.into(), bytes)
    }

    /// A page file in a folder of the host's, for volumes that may be larger than RAM.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn in_folder(folder: &Path, bytes: u64) -> io::Result<Self> {
        Self::unnamed(unnamed::create_in(folder)?, bytes)
    }

    fn unnamed(writable: File, bytes: u64) -> io::Result<Self> {
        // Whole pages, so that the last one can be mapped.
        writable.set_len(bytes.next_multiple_of(PAGE_SIZE))?;
        Self::of(writable, false, None, None)
    }

    /// The page file at `path`, made if it is not there. What is in it is looked at, chunk by chunk, before it counts.
    /// One without marks is not gone on with: who reads it may not look for any.
    ///
    /// # Errors
    /// When it is no regular file, or cannot be made.
    pub fn named(path: &Path, layout: PageFileLayout) -> io::Result<Self> {
        let mut file = open_named(path, OFlags::CREATE)?;
        let mut inherited = file.metadata()?.len() > 0;
        if inherited && PageFileLayout::read(&file)? != Some(layout) {
            std::fs::remove_file(path)?;
            file = open_named(path, OFlags::CREATE | OFlags::EXCL)?;
            inherited = false;
        }
        let kept = Kept::new(&file, layout)?;
        Self::of(file, inherited, path.parent(), Some(kept))
    }

    /// The page file at `path` that an earlier process left, whatever its volume is; `None` if it is none.
    ///
    /// # Errors
    /// When it is no regular file, or cannot be opened.
    pub fn left(path: &Path) -> io::Result<Option<Self>> {
        let file = open_named(path, OFlags::empty())?;
        let Some(layout) = PageFileLayout::read(&file)? else {
            return Ok(None);
        };
        let kept = Kept::new(&file, layout)?;
        Self::of(file, true, path.parent(), Some(kept)).map(Some)
    }

    fn of(writable: File, inherited: bool, folder: Option<&Path>, kept: Option<Kept>) -> io::Result<Self> {
        // A second open file, not a duplicate: that one could write.
        let read_only = Arc::new(File::open(format!("/proc/self/fd/{}", writable.as_raw_fd()))?);
        Ok(Self {
            writable,
            read_only,
            inherited: AtomicBool::new(inherited),
            folder: folder.map(Path::to_owned),
            kept,
            sealed: None,
        })
    }

    /// Has others get it as `read_only`, which is the same file, opened in a way that leads to no writing.
    ///
    /// # Errors
    /// When it is another file.
    pub fn handed_out_as(self, read_only: File) -> io::Result<Self> {
        if !self.is_file(&read_only)? {
            return Err(io::Error::other("somebody has put another file in its place"));
        }
        Ok(Self {
            read_only: Arc::new(read_only),
            ..self
        })
    }

    /// Whether `other` is the same file, however it was opened.
    ///
    /// # Errors
    /// When one of them cannot be looked at.
    pub fn is_file(&self, other: &File) -> io::Result<bool> {
        let (one, other) = (self.writable.metadata()?, other.metadata()?);
        Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
    }

    /// Writes a chunk that was verified; `is_fill` says that nobody waits for it.
    pub(super) fn put(&self, plain: &[u8], spot: Spot, is_fill: bool) -> io::Result<()> {
        match (&self.kept, &self.sealed) {
            (Some(kept), _) => kept.put(&self.writable, plain, spot, is_fill),
            (None, Some(sealed)) => sealed.put(&self.writable, plain, spot),
            (None, None) => self.writable.write_all_at(plain, spot.range.start),
        }
    }

    /// The file for everybody else.
    pub(super) fn for_reading(&self) -> Arc<File> {
        Arc::clone(&self.read_only)
    }

    /// Reads a chunk, or whatever is in its place.
    ///
    /// # Errors
    /// When it lies outside the file, or cannot be read.
    pub fn read(&self, start: u64, into: &mut [u8]) -> io::Result<()> {
        self.writable.read_exact_at(into, start)
    }

    /// Another source goes on with it, which knows nothing of what is in it.
    pub fn pass_on(&self) {
        self.inherited.store(true, Ordering::Relaxed);
    }

    /// Where everything is in it, if it is one that others may find: with a name, or somebody else's.
    #[must_use]
    pub fn layout(&self) -> Option<PageFileLayout> {
        let sealed = || self.sealed.as_ref().map(Sealed::layout);
        self.kept.as_ref().map(Kept::layout).or_else(sealed)
    }

    /// Where a chunk lies; nowhere in one that others do not find, or if there is no such chunk.
    #[must_use]
    pub fn range_of(&self, chunk: ChunkIndex) -> ByteRange {
        let nowhere = ByteRange { start: 0, len: 0 };
        self.layout().map_or(nowhere, |layout| {
            layout.chunk_size.range_of(chunk, layout.volume_bytes)
        })
    }

    /// Whether there are chunks in it that can be taken out.
    #[must_use]
    pub fn has_chunks(&self) -> bool {
        let end = self
            .kept
            .as_ref()
            .map(Kept::layout)
            .map_or(0, |layout| layout.volume_bytes);
        next_data(&self.writable, 0).is_some_and(|next| next < end)
    }

    /// Where it lies, if it has a name: what it is handed out as may not tell.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Bytes that it takes on its file system; none of one that is somebody else's.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        match self.sealed {
            Some(_) => 0,
            None => allocated_bytes(&self.writable),
        }
    }

    /// Bytes that somebody else's file takes; `None` of one that is the source's own.
    #[must_use]
    pub fn adopted_bytes(&self) -> Option<u64> {
        self.sealed.as_ref().map(|_| allocated_bytes(&self.writable))
    }

    /// Whether the file has, or may have, huge pages: taking a part out of one may leave zeros in its place.
    #[must_use]
    pub fn may_have_huge_pages(&self) -> bool {
        // tmpfs says so (`shmem_getattr`), as its block size.
        self.writable
            .metadata()
            .is_ok_and(|about| about.blksize() > PAGE_SIZE)
    }

    /// Whether a chunk is in the file since before: then it counts as put. `room` is for its bytes.
    pub(super) fn holds(&self, spot: Spot, digest: &ChunkDigest, room: &mut Vec<u8>) -> bool {
        self.holds_right(spot, room, |chunk| ChunkDigest::of(chunk) == *digest)
    }

    /// Whether a chunk of which `are_right` says so is in the file since before: then it counts as put. `room` is for
    /// its bytes.
    pub(super) fn holds_right(
        &self,
        spot: Spot,
        room: &mut Vec<u8>,
        mut are_right: impl FnMut(&[u8]) -> bool,
    ) -> bool {
        if !self.inherited.load(Ordering::Relaxed) || !self.has_data(spot.range) {
            return false;
        }
        let mut is_it = || {
            // The length of a chunk was capped when the index was parsed.
            room.resize(spot.range.len as usize, 0);
            self.read(spot.range.start, room).is_ok() && are_right(room)
        };
        match &self.kept {
            Some(kept) => kept.find(&self.writable, spot, is_it),
            None => is_it(),
        }
    }

    /// Whether nothing of a chunk that was written has been taken out since, to make room.
    pub(super) fn is_whole(&self, spot: Spot) -> bool {
        if self
            .kept
            .as_ref()
            .is_some_and(|kept| kept.is_out(&self.writable, spot.chunk))
        {
            return false;
        }
        self.has_no_hole(spot.range)
    }

    fn has_no_hole(&self, range: ByteRange) -> bool {
        // Page by page, for to find where data ends takes as long as there is data: a GiB of it, a millisecond.
        let mut pages = (range.start..range.start + range.len).step_by(PAGE_SIZE as usize);
        pages.all(|page| next_data(&self.writable, page) == Some(page))
    }

    /// Whether part of that range is no hole.
    pub(in crate::image) fn has_data(&self, range: ByteRange) -> bool {
        next_data(&self.writable, range.start).is_some_and(|next| next < range.start + range.len)
    }

    /// Takes chunks out until about `bytes` are free, if there are as many of that kind; returns how many it came to.
    pub fn take_out(&self, bytes: u64, which: TakeOut) -> u64 {
        match &self.kept {
            Some(kept) => {
                let inherited = self.inherited.load(Ordering::Relaxed);
                kept.take_out(&self.writable, bytes, which, inherited)
            }
            None => 0,
        }
    }
}

/// Opens a page file that only its owner can read, and nobody write: its owner's other processes, which get a
/// descriptor for reading, cannot open that again for writing. Who may change its mode, its owner or root, is kept from
/// it by nothing but being another user.
fn open_named(path: &Path, more: OFlags) -> io::Result<File> {
    let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let writable = || rustix::fs::open(path, flags | OFlags::RDWR | more, Mode::RUSR);
    let mut attempts = 1;
    let file: File = loop {
        match writable() {
            Ok(file) => break file.into(),
            Err(Errno::ACCESS) if attempts < ATTEMPTS_MAX => {
                attempts += 1;
                let own: File = rustix::fs::open(path, flags | OFlags::RDONLY, Mode::empty())?.into();
                check_regular(&own)?;
                own.set_permissions(Permissions::from_mode(0o600))?;
            }
            Err(error) => return Err(error.into()),
        }
    };
    check_regular(&file)?;
    file.set_permissions(Permissions::from_mode(0o400))?;
    Ok(file)
}

fn check_regular(file: &File) -> io::Result<()> {
    match file.metadata()?.is_file() {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no regular file",
        )),
    }
}

fn allocated_bytes(file: &File) -> u64 {
    // st_blocks counts units of 512 bytes, whatever the file system's are.
    file.metadata()
        .map_or(0, |about| about.blocks().saturating_mul(512))
}

/// Where the next byte at or behind `from` lies that is not in a hole.
fn next_data(file: &File, from: u64) -> Option<u64> {
    // The position that this moves is nobody's: all reads and writes name their offset.
    rustix::fs::seek(file.as_fd(), SeekFrom::Data(from)).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_is_handed_out_reads_what_was_written_and_cannot_write() {
        let folder = tempfile::tempdir().unwrap();
        for file in [
            PageFile::in_memory(4097).unwrap(),
            PageFile::in_folder(folder.path(), 4097).unwrap(),
        ] {
            let spot = Spot {
                chunk: ChunkIndex(0),
                range: ByteRange { start: 4096, len: 4 },
            };
            file.put(b"page", spot, false).unwrap();
            let shared = file.for_reading();
            let mut bytes = [0; 4];
            shared.read_exact_at(&mut bytes, 4096).unwrap();
            assert_eq!(&bytes, b"page");
            assert_eq!(shared.metadata().unwrap().len(), 8192);
            assert!(shared.write_at(b"x", 0).is_err());
        }
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            0,
            "it has no name"
        );
    }

    const CHUNK: u64 = 16 << 10;

    fn layout() -> PageFileLayout {
        PageFileLayout {
            volume_bytes: 2 * CHUNK + 4096,
            chunk_size: crate::units::ChunkSize::new(CHUNK as u32).unwrap(),
        }
    }

    fn spot(number: u64) -> Spot {
        let chunk = ChunkIndex(number);
        Spot {
            chunk,
            range: layout().chunk_size.range_of(chunk, layout().volume_bytes),
        }
    }

    #[test]
    fn a_named_one_keeps_its_chunks_and_only_whole_ones_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let (first, second) = (vec![1; CHUNK as usize], vec![2; CHUNK as usize]);
        let file = PageFile::named(&path, layout()).unwrap();
        file.put(&first, spot(0), false).unwrap();
        file.writable.write_all_at(&second[..9], CHUNK).unwrap();
        let mut room = Vec::new();
        let digest = ChunkDigest::of(&first);
        assert!(!file.holds(spot(0), &digest, &mut room), "its writer keeps books");
        drop(file);

        let file = PageFile::named(&path, layout()).unwrap();
        assert!(file.holds(spot(0), &digest, &mut room));
        assert!(!file.holds(spot(0), &ChunkDigest::of(&second), &mut room));
        assert!(!file.holds(spot(1), &ChunkDigest::of(&second), &mut room));
        assert!(
            !file.holds(spot(2), &ChunkDigest::of(&vec![0; 4096]), &mut room),
            "a hole holds nothing"
        );

        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(PageFile::named(&link, layout()).is_err());
    }

    #[test]
    fn what_is_taken_out_is_gone_is_marked_and_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("drive");
        let file = PageFile::named(&path, layout()).unwrap();
        let empty = file.allocated_bytes();
        let plain = vec![7; CHUNK as usize];
        // The second came because nobody waited.
        file.put(&plain, spot(0), false).unwrap();
        file.put(&plain, spot(1), true).unwrap();
        file.put(&plain[..4096], spot(2), false).unwrap();
        let marks = crate::source::Marks::of(&file.for_reading(), layout())
            .unwrap()
            .unwrap();
        let seen = [0, 1, 2].map(|number| marks.look(ChunkIndex(number)).unwrap());
        let out = || [0, 1, 2].map(|number| !marks.is_still(ChunkIndex(number), seen[number as usize]));

        assert_eq!(file.take_out(1, TakeOut::Filled), CHUNK);
        assert_eq!(out(), [false, true, false]);
        assert!(!file.is_whole(spot(1)) && file.is_whole(spot(0)));
        assert_eq!(file.take_out(1 << 30, TakeOut::Filled), 0, "there is no other");
        assert_eq!(file.take_out(1, TakeOut::Wanted), CHUNK, "the oldest");
        assert_eq!(out(), [true, true, false]);
        file.put(&plain, spot(0), false).unwrap();
        assert_eq!(out(), [true, true, false], "what was read before is not the same");
        assert!(marks.look(ChunkIndex(0)).is_some() && file.is_whole(spot(0)));
        drop(file);

        // What an earlier one left is found by looking.
        let file = PageFile::left(&path).unwrap().unwrap();
        assert_eq!(file.take_out(1 << 30, TakeOut::Wanted), 0);
        assert_eq!(file.take_out(1 << 30, TakeOut::Unused), CHUNK + 4096);
        assert_eq!(file.allocated_bytes(), empty);
        assert_eq!(out(), [true; 3]);
    }

    #[test]
    fn one_without_marks_is_left_to_those_who_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("drive");
        std::fs::write(&path, vec![7; CHUNK as usize]).unwrap();
        let read = File::open(&path).unwrap();
        assert!(PageFile::left(&path).unwrap().is_none());
        let file = PageFile::named(&path, layout()).unwrap();
        file.put(&vec![8; CHUNK as usize], spot(0), false).unwrap();
        assert_eq!(file.take_out(1, TakeOut::Unused), CHUNK);
        let mut seen = vec![0; CHUNK as usize];
        read.read_exact_at(&mut seen, 0).unwrap();
        assert_eq!(seen, vec![7; CHUNK as usize]);
    }

    #[test]
    fn one_with_a_name_cannot_be_opened_for_writing_but_by_its_next_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let mode = || std::fs::metadata(&path).unwrap().mode() & 0o7777;
        drop(PageFile::named(&path, layout()).unwrap());
        assert_eq!(mode(), 0o400);
        drop(PageFile::named(&path, layout()).unwrap());
        assert_eq!(mode(), 0o400);
    }
}
