//! A drive in a file of the host, or on a block device of it.
//!
//! The file is locked for as long as it is open: exclusively by a machine that writes it, shared by machines that
//! only read it. Two machines that write one file system destroy it, and one that reads it while another writes sees
//! rubbish.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use runnel_snapshot::block_store::guest_io::{read_slices_at, total, write_slices_at};
use runnel_snapshot::block_store::{BlockStore, GuestSlice};
use runnel_snapshot::capture::content::{OwnContent, add_data_pages};
use runnel_snapshot::copy_before_write::{DriveWrites, EarlyPages, Moment};
use runnel_snapshot::dirty_pages::WrittenPages;
use runnel_snapshot::pager::PageSet;
use runnel_snapshot::units::{ByteRange, PAGE_SIZE};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;

use super::SECTOR_BYTES;

/// How many zeros are written at a time where the file system cannot make holes.
const ZEROS_BYTES: usize = 64 << 10;

/// Why a file cannot be a drive.
#[derive(Debug, thiserror::Error)]
pub enum FileStoreError {
    /// It cannot be opened.
    #[error("cannot open {} {}", path.display(), if *.read_only { "for reading" } else { "for reading and writing" })]
    Open {
        /// Which file.
        path: PathBuf,
        /// How it was to be opened.
        read_only: bool,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("{} is neither a file nor a block device", path.display())]
    NotAFile {
        /// Which path.
        path: PathBuf,
    },
    /// It has not even a sector.
    #[error("{} has {bytes} bytes, less than one sector of 512", path.display())]
    TooSmall {
        /// Which file.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// Somebody else has it.
    #[error(
        "{} is locked by another machine{}",
        path.display(),
        if *.read_only { ", which writes it" } else { ": give each machine a drive of its own, or make both read-only" }
    )]
    Locked {
        /// Which file.
        path: PathBuf,
        /// How it was to be opened.
        read_only: bool,
    },
    /// The host does not say.
    #[error("cannot find out about {}", path.display())]
    Inspect {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A file as a drive. See the module documentation.
#[derive(Debug)]
pub struct FileStore {
    file: Arc<File>,
    bytes: u64,
    read_only: bool,
    /// What has to be kept before the file is written to.
    capture: DriveWrites,
}

impl FileStore {
    /// Opens and locks `path`. A length that is no multiple of 512 is rounded down, with a warning.
    ///
    /// # Errors
    /// When it is no file, has less than a sector, cannot be opened, or is locked by another machine.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, FileStoreError> {
        let owned = || path.to_owned();
        // Without O_NONBLOCK, opening a FIFO would wait for its other end.
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EISDIR) => FileStoreError::NotAFile { path: owned() },
                _ => FileStoreError::Open {
                    path: owned(),
                    read_only,
                    source,
                },
            })?;
        let inspect = |source| FileStoreError::Inspect {
            path: owned(),
            source,
        };
        let kind = file.metadata().map_err(inspect)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(FileStoreError::NotAFile { path: owned() });
        }
        // Metadata has no length of a block device; its end has.
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(inspect)?;
        let rest = bytes % SECTOR_BYTES;
        if bytes == rest {
            return Err(FileStoreError::TooSmall { path: owned(), bytes });
        }
        if rest != 0 {
            tracing::warn!(path = %path.display(), bytes, "the drive's last {rest} bytes are not a whole sector: the guest does not see them");
        }
        let how = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        flock(&file, how).map_err(|error| match error {
            Errno::WOULDBLOCK => FileStoreError::Locked {
                path: owned(),
                read_only,
            },
            other => inspect(other.into()),
        })?;
        Ok(Self {
            file: Arc::new(file),
            bytes: bytes - rest,
            read_only,
            capture: DriveWrites::new(bytes - rest),
        })
    }

    /// The file, for whoever saves its content.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Pages that were written to since the last image of it.
    #[must_use]
    pub fn dirty(&self) -> &Arc<WrittenPages> {
        self.capture.written()
    }

    /// The pages that are no holes. Takes the longer the more holes there are.
    ///
    /// # Errors
    /// When the file's holes cannot be told from its data.
    pub fn data_pages(&self) -> io::Result<PageSet> {
        let mut pages = PageSet::new(self.bytes.div_ceil(PAGE_SIZE));
        add_data_pages(&self.file, self.bytes, 1, &mut pages)?;
        Ok(pages)
    }

    /// The drive's content as it is now, for a snapshot, or of it the pages `within` alone; the machine stands still
    /// while this is called, and may run on when it has returned: what it overwrites then is kept in `early` first.
    ///
    /// # Errors
    /// When the file's holes cannot be told from its data.
    pub fn freeze(&self, within: Option<&PageSet>, early: &Arc<EarlyPages>) -> io::Result<OwnContent> {
        let own = match within {
            Some(within) => within.clone(),
            None => self.data_pages()?,
        };
        let pages = Box::new(self.file.clone());
        let moment = Moment::new(own.clone(), self.bytes, pages, early.clone(), |_| {});
        self.capture.go_by(&moment);
        Ok(OwnContent::new(own, self.bytes, Box::new(moment)))
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let range = ByteRange { start: offset, len };
        if range.fits_in(self.bytes) {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{range} of a drive of {} bytes", self.bytes),
            ))
        }
    }

    fn check_write(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        self.check(offset, len)
    }

    /// Makes `range` zeros, by the first of `ways` that the file system has, or else by writing them.
    fn zero(&self, range: ByteRange, ways: &[FallocateFlags]) -> io::Result<()> {
        self.check_write(range.start, range.len)?;
        if range.len == 0 {
            return Ok(());
        }
        self.capture.before(range);
        for way in ways {
            match fallocate(
                &*self.file,
                *way | FallocateFlags::KEEP_SIZE,
                range.start,
                range.len,
            ) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let zeros = vec![0; ZEROS_BYTES];
        let mut done = 0;
        while done < range.len {
            let piece = usize::try_from(range.len - done).map_or(ZEROS_BYTES, |left| left.min(ZEROS_BYTES));
            self.file.write_all_at(&zeros[..piece], range.start + done)?;
            done += piece as u64;
        }
        Ok(())
    }
}

impl BlockStore for FileStore {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn will_read(&self, _: &[ByteRange]) {}

    fn read_at(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        self.check(offset, total(into))?;
        read_slices_at(&self.file, offset, into)
    }

    fn write_at(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        let len = total(from);
        self.check_write(offset, len)?;
        self.capture.before(ByteRange { start: offset, len });
        write_slices_at(&self.file, offset, from)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.zero(range, &[FallocateFlags::PUNCH_HOLE])
    }

    fn write_zeroes(&self, range: ByteRange, unmap: bool) -> io::Result<()> {
        let ways: &[_] = if unmap {
            &[FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE]
        } else {
            &[FallocateFlags::ZERO_RANGE]
        };
        self.zero(range, ways)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(dir: &tempfile::TempDir, bytes: &[u8]) -> PathBuf {
        let path = dir.path().join("drive");
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn what_is_no_drive_is_refused_by_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("none");
        assert!(matches!(
            FileStore::open(&missing, true),
            Err(FileStoreError::Open { .. })
        ));
        for read_only in [false, true] {
            assert!(matches!(
                FileStore::open(dir.path(), read_only),
                Err(FileStoreError::NotAFile { .. })
            ));
        }
        for bytes in [0, 511] {
            let small = file(&dir, &vec![1; bytes]);
            assert!(matches!(
                FileStore::open(&small, true),
                Err(FileStoreError::TooSmall { .. })
            ));
        }
        assert!(matches!(
            FileStore::open(Path::new("/dev/null"), true),
            Err(FileStoreError::NotAFile { .. })
        ));
    }

    #[test]
    fn an_odd_end_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::open(&file(&dir, &[1; 1300]), true).unwrap();
        assert_eq!(store.bytes(), 1024);
    }

    #[test]
    fn one_machine_writes_or_many_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, &[0; 512]);
        let writer = FileStore::open(&path, false).unwrap();
        for read_only in [true, false] {
            let refused = FileStore::open(&path, read_only).unwrap_err();
            assert!(
                refused.to_string().contains("locked by another machine"),
                "{refused}"
            );
        }
        drop(writer);
        let _readers = [
            FileStore::open(&path, true).unwrap(),
            FileStore::open(&path, true).unwrap(),
        ];
        assert!(matches!(
            FileStore::open(&path, false),
            Err(FileStoreError::Locked { .. })
        ));
    }

    #[test]
    fn what_is_discarded_or_zeroed_reads_as_zeros_and_its_neighbours_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, &[7; 64 << 10]);
        let store = FileStore::open(&path, false).unwrap();
        store
            .discard(ByteRange {
                start: 4096,
                len: 8192,
            })
            .unwrap();
        store
            .write_zeroes(
                ByteRange {
                    start: 20480,
                    len: 512,
                },
                false,
            )
            .unwrap();
        store
            .write_zeroes(
                ByteRange {
                    start: 24576,
                    len: 4096,
                },
                true,
            )
            .unwrap();
        // The way of a file system that can do neither.
        store
            .zero(
                ByteRange {
                    start: 32768,
                    len: 512,
                },
                &[],
            )
            .unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 64 << 10);
        for (at, byte) in bytes.iter().enumerate() {
            let zero = (4096..12288).contains(&at)
                || (20480..20992).contains(&at)
                || (24576..28672).contains(&at)
                || (32768..33280).contains(&at);
            assert_eq!(*byte, if zero { 0 } else { 7 }, "byte {at}");
        }
    }

    #[test]
    fn nothing_is_written_outside_the_drive_or_to_a_read_only_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = file(&dir, &[7; 1024]);
        let store = FileStore::open(&path, false).unwrap();
        for range in [
            ByteRange { start: 1024, len: 1 },
            ByteRange {
                start: u64::MAX,
                len: 2,
            },
        ] {
            assert!(store.discard(range).is_err());
            assert!(store.write_zeroes(range, true).is_err());
        }
        drop(store);
        let store = FileStore::open(&path, true).unwrap();
        assert!(store.discard(ByteRange { start: 0, len: 512 }).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), [7; 1024]);
    }
}
