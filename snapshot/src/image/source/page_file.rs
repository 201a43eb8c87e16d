//! A page file: sparse, without a name, written by the source and handed out for reading alone.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::MemfdFlags;

use crate::units::PAGE_SIZE;
use crate::unnamed;

/// The file in which the chunks of one volume appear.
pub(super) struct PageFile {
    writable: File,
    read_only: Arc<File>,
}

impl PageFile {
    /// A page file on tmpfs, for memory: its pages are what machines map.
    pub(super) fn in_memory(bytes: u64) -> io::Result<Self> {
        Self::of(
            rustix::fs::memfd_create("runnel-pages", MemfdFlags::CLOEXEC)?.into(),
            bytes,
        )
    }

    /// A page file in a folder of the host's, for volumes that may be larger than RAM.
    pub(super) fn in_folder(folder: &Path, bytes: u64) -> io::Result<Self> {
        Self::of(unnamed::create_in(folder)?, bytes)
    }

    fn of(writable: File, bytes: u64) -> io::Result<Self> {
        // Whole pages, so that the last one can be mapped.
        writable.set_len(bytes.next_multiple_of(PAGE_SIZE))?;
        // A second open file, not a duplicate: that one could write.
        let read_only = Arc::new(File::open(format!("/proc/self/fd/{}", writable.as_raw_fd()))?);
        Ok(Self { writable, read_only })
    }

    /// The file for the source's own threads.
    pub(super) fn for_writing(&self) -> &File {
        &self.writable
    }

    /// The file for everybody else.
    pub(super) fn for_reading(&self) -> Arc<File> {
        Arc::clone(&self.read_only)
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
            file.for_writing().write_all_at(b"page", 4096).unwrap();
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
}
