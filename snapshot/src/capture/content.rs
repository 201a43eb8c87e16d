//! Where the bytes of a volume come from while it is captured.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::units::ByteRange;

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeros alone; the buffer was left as it was.
    Zero,
    /// The buffer holds the bytes. They may still be zeros.
    Data,
}

/// The content of a volume, fixed: every read of the same bytes finds the same. Called from several threads, mostly
/// in ascending order.
pub trait Content: Send + Sync {
    /// The volume's length.
    fn bytes(&self) -> u64;

    /// The first run at or behind `from` that may hold something else than zeros, or `None` if there is none. What
    /// was never touched is passed over at no cost.
    ///
    /// # Errors
    /// When the storage cannot tell.
    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>>;

    /// Fills `into` from `offset` on, or says that all of it is zero.
    ///
    /// # Errors
    /// When the bytes cannot be read.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found>;
}

/// The content of a file that nobody writes: a memfd of a machine that stands still, a drive put aside. Its holes are
/// known to be zero.
#[derive(Debug)]
pub struct FileContent {
    file: File,
    bytes: u64,
}

impl FileContent {
    /// The first `bytes` of `file`, which must be that long.
    ///
    /// # Errors
    /// When the file is shorter, or its length cannot be found out.
    pub fn new(file: File, bytes: u64) -> io::Result<Self> {
        // Not the metadata's length, which is 0 for a block device.
        let found = rustix::fs::seek(&file, SeekFrom::End(0))?;
        if found < bytes {
            let reason = format!("the file has {found} bytes, and the volume {bytes}");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, reason));
        }
        Ok(Self { file, bytes })
    }
}

impl Content for FileContent {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        if from >= self.bytes {
            return Ok(None);
        }
        // The file's own position is not used for anything else: reads are by offset.
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) if start < self.bytes => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL) => from, // a file system that knows of no holes
            Err(error) => return Err(error.into()),
        };
        let end = match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(self.bytes),
            Err(Errno::INVAL | Errno::NXIO) => self.bytes,
            Err(error) => return Err(error.into()),
        };
        Ok(Some(ByteRange {
            start,
            len: end - start,
        }))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        self.file.read_exact_at(into, offset)?;
        Ok(Found::Data)
    }
}

/// Bytes at hand.
impl Content for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        let len = self.bytes().saturating_sub(from);
        Ok((len > 0).then_some(ByteRange { start: from, len }))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        let range = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(into.len())?));
        into.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(Found::Data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_of_a_file_are_passed_over() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"x", 32 << 20).unwrap();
        let content = FileContent::new(file, 64 << 20).unwrap();
        let data = content.next_data(0).unwrap().unwrap();
        assert!(data.start <= 32 << 20 && data.end().unwrap() > 32 << 20);
        assert!(data.start > 0 && data.end().unwrap() < 64 << 20);
        assert_eq!(content.next_data(data.end().unwrap()).unwrap(), None);
        assert_eq!(content.next_data(64 << 20).unwrap(), None);
    }

    #[test]
    fn a_file_that_is_shorter_than_its_volume_is_refused() {
        assert!(FileContent::new(tempfile::tempfile().unwrap(), 1).is_err());
    }
}
