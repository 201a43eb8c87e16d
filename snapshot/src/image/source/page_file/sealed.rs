//! A page file that somebody else made, which nobody can change any more.

use std::fs::File;
use std::io;

use rustix::fs::SealFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::{PageFile, Spot};
use crate::source::marks::PageFileLayout;
use crate::units::{ByteRange, PAGE_SIZE};

/// The type of tmpfs (linux/magic.h): memory of huge pages alone is of another, and cannot be mapped by page.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// What is known of it.
#[derive(Debug)]
pub(super) struct Sealed(PageFileLayout);

/// Whether nobody can change the file any more, neither its bytes nor its length. No seal can be taken off again.
#[must_use]
pub fn is_sealed(file: &File) -> bool {
    let all = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(all))
}

impl PageFile {
    /// A memfd that is sealed, of a volume of that layout. What it holds is not looked at, and is not known to be right.
    ///
    /// # Errors
    /// When it is none, can still be changed, or has another length.
    pub fn sealed(file: File, layout: PageFileLayout) -> io::Result<Self> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()));
        if !is_sealed(&file) {
            return refuse("it can still be changed");
        }
        if u64::try_from(rustix::fs::fstatfs(&file)?.f_type) != Ok(TMPFS_MAGIC) {
            return refuse("it is not on tmpfs");
        }
        // Marks would lie behind the volume.
        if file.metadata()?.len() != layout.volume_bytes.next_multiple_of(PAGE_SIZE) {
            return refuse("it has another length");
        }
        let pages = Self::of(file, true, None, None)?;
        Ok(Self {
            sealed: Some(Sealed(layout)),
            ..pages
        })
    }

    /// Makes pages of zeros of what are holes in that range. Nobody can write them, but whoever reads them through a
    /// mapping has the kernel make them.
    ///
    /// # Errors
    /// When there is no memory for them.
    pub(in crate::image) fn fill_holes(&self, range: ByteRange) -> io::Result<()> {
        if self.has_no_hole(range) {
            return Ok(());
        }
        let bytes = usize::try_from(range.len).map_err(io::Error::other)?;
        // SAFETY: a new mapping, where the kernel finds room for it; it touches no memory of this process.
        let start = unsafe {
            let (protection, flags) = (ProtFlags::READ, MapFlags::PRIVATE);
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                flags,
                &self.writable,
                range.start,
            )
        }?;
        // SAFETY: that mapping, whole; its pages are read by the kernel, and nobody else knows of it. What cannot be had
        // is told here, and is no signal.
        let filled = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxPopulateRead) };
        // SAFETY: that mapping, which nothing refers to.
        unsafe { rustix::mm::munmap(start, bytes) }?;
        Ok(filled?)
    }
}

impl Sealed {
    pub(super) fn layout(&self) -> PageFileLayout {
        self.0
    }

    /// Counts a verified chunk as put if it is there: it is, unless the file is not what it was taken for.
    pub(super) fn put(&self, file: &File, plain: &[u8], spot: Spot) -> io::Result<()> {
        use std::os::unix::fs::FileExt as _;
        let mut found = vec![0; plain.len()];
        file.read_exact_at(&mut found, spot.range.start)?;
        match found == plain {
            true => Ok(()),
            false => Err(io::Error::other("it is sealed, and holds something else")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use rustix::fs::MemfdFlags;

    use super::*;
    use crate::digest::ChunkDigest;
    use crate::units::{ChunkIndex, ChunkSize};

    const CHUNK: u64 = 16 << 10;

    fn layout() -> PageFileLayout {
        PageFileLayout {
            volume_bytes: 2 * CHUNK,
            chunk_size: ChunkSize::new(CHUNK as u32).unwrap(),
        }
    }

    fn spot(number: u64) -> Spot {
        let chunk = ChunkIndex(number);
        let range = layout().chunk_size.range_of(chunk, layout().volume_bytes);
        Spot { chunk, range }
    }

    /// With a page of sevens in the middle of the first chunk, and nothing else.
    fn memfd(bytes: u64, seals: SealFlags) -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file: File = rustix::fs::memfd_create("test", flags).unwrap().into();
        file.set_len(bytes).unwrap();
        file.write_all_at(&[7; PAGE_SIZE as usize], PAGE_SIZE).unwrap();
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        file
    }

    const ALL: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

    #[test]
    fn what_can_be_changed_or_is_no_such_memory_is_refused() {
        for missing in [SealFlags::WRITE, SealFlags::SHRINK, SealFlags::GROW] {
            let file = memfd(2 * CHUNK, ALL.difference(missing));
            assert!(!is_sealed(&file));
            assert!(PageFile::sealed(file, layout()).is_err(), "{missing:?}");
        }
        for bytes in [CHUNK, 2 * CHUNK + PAGE_SIZE] {
            assert!(PageFile::sealed(memfd(bytes, ALL), layout()).is_err());
        }
        let on_disk = tempfile::tempfile().unwrap();
        on_disk.set_len(2 * CHUNK).unwrap();
        assert!(PageFile::sealed(on_disk, layout()).is_err());
    }

    #[test]
    fn a_chunk_counts_if_it_is_there_and_takes_nobodys_room() {
        let file = PageFile::sealed(memfd(2 * CHUNK, ALL), layout()).unwrap();
        assert_eq!((file.allocated_bytes(), file.has_chunks()), (0, false));
        assert_eq!(file.adopted_bytes(), Some(PAGE_SIZE));
        let mut right = vec![0; CHUNK as usize];
        right[PAGE_SIZE as usize..2 * PAGE_SIZE as usize].fill(7);
        let mut room = Vec::new();
        assert!(file.holds(spot(0), &ChunkDigest::of(&right), &mut room));
        assert!(!file.is_whole(spot(0)));
        file.fill_holes(spot(0).range).unwrap();
        assert!(file.is_whole(spot(0)) && !file.is_whole(spot(1)));
        file.put(&right, spot(0), false).unwrap();
        right[0] = 1;
        assert!(file.put(&right, spot(0), false).is_err());
        assert_eq!(file.take_out(1, super::super::TakeOut::Unused), 0);
        assert!(file.for_reading().write_at(b"x", 0).is_err());
    }
}
