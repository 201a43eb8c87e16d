//! A page file: sparse, written by the source and handed out for reading alone. Without a name, or with one, so that
//! a later process goes on with what is in it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, Mode, OFlags, SeekFrom};

use crate::digest::ChunkDigest;
use crate::units::{ByteRange, PAGE_SIZE};
use crate::unnamed;

/// The file in which the chunks of one volume appear.
#[derive(Debug)]
pub struct PageFile {
    writable: File,
    read_only: Arc<File>,
    /// Whether there may be chunks in it already, written by nobody knows whom.
    inherited: bool,
}

impl PageFile {
    /// A page file on tmpfs, for memory: its pages are what machines map.
    ///
    /// # Errors
    /// When there are no descriptors or no address space left.
    pub fn in_memory(bytes: u64) -> io::Result<Self> {
        let file = rustix::fs::memfd_create("runnel-pages", MemfdFlags::CLOEXEC)?;
        Self::of(file.into(), bytes, false)
    }

    /// A page file in a folder of the host's, for volumes that may be larger than RAM.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn in_folder(folder: &Path, bytes: u64) -> io::Result<Self> {
        Self::of(unnamed::create_in(folder)?, bytes, false)
    }

    /// The page file at `path`, made if it is not there. What is in it is looked at, chunk by chunk, before it counts.
    ///
    /// # Errors
    /// When it is no regular file, or cannot be made.
    pub fn named(path: &Path, bytes: u64) -> io::Result<Self> {
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file: File = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?.into();
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no regular file",
            ));
        }
        Self::of(file, bytes, metadata.len() > 0)
    }

    fn of(writable: File, bytes: u64, inherited: bool) -> io::Result<Self> {
        // Whole pages, so that the last one can be mapped.
        writable.set_len(bytes.next_multiple_of(PAGE_SIZE))?;
        // A second open file, not a duplicate: that one could write.
        let read_only = Arc::new(File::open(format!("/proc/self/fd/{}", writable.as_raw_fd()))?);
        Ok(Self {
            writable,
            read_only,
            inherited,
        })
    }

    /// Writes a chunk that was verified.
    pub(super) fn write(&self, plain: &[u8], at: u64) -> io::Result<()> {
        self.writable.write_all_at(plain, at)
    }

    /// The file for everybody else.
    pub(super) fn for_reading(&self) -> Arc<File> {
        Arc::clone(&self.read_only)
    }

    /// Whether a chunk is in the file since before. `room` is for its bytes.
    pub(super) fn holds(&self, range: ByteRange, digest: &ChunkDigest, room: &mut Vec<u8>) -> bool {
        self.holds_right(range, room, |chunk| ChunkDigest::of(chunk) == *digest)
    }

    /// Whether a chunk of which `are_right` says so is in the file since before. `room` is for its bytes.
    pub(super) fn holds_right(
        &self,
        range: ByteRange,
        room: &mut Vec<u8>,
        are_right: impl FnOnce(&[u8]) -> bool,
    ) -> bool {
        if !self.inherited || !self.has_data(range) {
            return false;
        }
        // The length of a chunk was capped when the index was parsed.
        room.resize(range.len as usize, 0);
        self.writable.read_exact_at(room, range.start).is_ok() && are_right(room)
    }

    /// Whether nothing of a chunk that was written has been taken out since, to make room.
    pub(super) fn is_whole(&self, range: ByteRange) -> bool {
        let hole = rustix::fs::seek(self.writable.as_fd(), SeekFrom::Hole(range.start));
        hole.is_ok_and(|hole| hole >= range.start + range.len)
    }

    fn has_data(&self, range: ByteRange) -> bool {
        // The position that this moves is nobody's: all reads and writes name their offset.
        let next = rustix::fs::seek(self.writable.as_fd(), SeekFrom::Data(range.start));
        next.is_ok_and(|next| next < range.start + range.len)
    }
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
            file.write(b"page", 4096).unwrap();
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

    #[test]
    fn a_named_one_keeps_its_chunks_and_only_whole_ones_count() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        let (first, second) = (vec![1; 4096], vec![2; 4096]);
        let file = PageFile::named(&path, 3 * 4096).unwrap();
        file.write(&first, 0).unwrap();
        file.write(&second[..9], 4096).unwrap();
        let page = |number: u64| ByteRange {
            start: number * 4096,
            len: 4096,
        };
        let mut room = Vec::new();
        let digest = ChunkDigest::of(&first);
        assert!(!file.holds(page(0), &digest, &mut room), "its writer keeps books");
        drop(file);

        let file = PageFile::named(&path, 3 * 4096).unwrap();
        assert!(file.holds(page(0), &digest, &mut room));
        assert!(!file.holds(page(0), &ChunkDigest::of(&second), &mut room));
        assert!(!file.holds(page(1), &ChunkDigest::of(&second), &mut room));
        assert!(
            !file.holds(page(2), &ChunkDigest::of(&vec![0; 4096]), &mut room),
            "a hole holds nothing"
        );

        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(PageFile::named(&link, 4096).is_err());
    }
}
