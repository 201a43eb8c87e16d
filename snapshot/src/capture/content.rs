//! Where the bytes of a volume come from while it is captured.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::copy_before_write::OwnPages;
use crate::pager::PageSet;
use crate::units::{ByteRange, PAGE_SIZE, PageIndex};

/// What a read found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeros alone; the buffer was left as it was.
    Zero,
    /// The buffer holds the bytes. They may still be zeros.
    Data,
}

/// The content of a volume, fixed at one moment. Called from several threads, mostly in ascending order; a capture reads
/// each page once, and the volume of a machine that runs keeps none for longer.
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

/// The content of a file that nobody writes: a memfd of a machine that stands still, a drive that is only read. Its holes are
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

/// The file's own position is not used for anything else: reads are by offset.
impl FileContent {
    /// Where the first data at or behind `from` begins.
    fn data_start(&self, from: u64) -> io::Result<Option<u64>> {
        if from >= self.bytes {
            return Ok(None);
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
            Ok(start) if start < self.bytes => Ok(Some(start)),
            Ok(_) | Err(Errno::NXIO) => Ok(None),
            Err(Errno::INVAL) => Ok(Some(from)), // a file system that knows of no holes
            Err(error) => Err(error.into()),
        }
    }

    /// Where the data ends that begins at `start`. Takes as long as there is data.
    fn data_end(&self, start: u64) -> io::Result<u64> {
        match rustix::fs::seek(&self.file, SeekFrom::Hole(start)) {
            Ok(end) => Ok(end.min(self.bytes)),
            Err(Errno::INVAL | Errno::NXIO) => Ok(self.bytes),
            Err(error) => Err(error.into()),
        }
    }
}

impl Content for FileContent {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        let Some(start) = self.data_start(from)? else {
            return Ok(None);
        };
        let len = self.data_end(start)? - start;
        Ok(Some(ByteRange { start, len }))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        self.file.read_exact_at(into, offset)?;
        Ok(Found::Data)
    }
}

/// A volume of zeros but for its own pages.
pub struct OwnContent {
    own: PageSet,
    bytes: u64,
    pages: Box<dyn OwnPages>,
}

impl OwnContent {
    /// The first `bytes` of a volume whose pages `own` are read from `pages`.
    #[must_use]
    pub fn new(own: PageSet, bytes: u64, pages: Box<dyn OwnPages>) -> Self {
        Self { own, bytes, pages }
    }

    /// Puts the own pages into `into`, which begins at `offset`.
    fn read_over(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let end = offset + into.len() as u64;
        let mut at = offset;
        while let Some(run) = self.next_data(at)?.filter(|run| run.start < end) {
            let run_end = (run.start + run.len).min(end);
            let part = (run.start - offset) as usize..(run_end - offset) as usize;
            self.pages.read(run.start, &mut into[part])?;
            at = run_end;
        }
        Ok(())
    }
}

impl Content for OwnContent {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        let Some((first, count)) = self.own.next_run(PageIndex::holding(from)) else {
            return Ok(None);
        };
        let start = first.offset().max(from);
        let end = PageIndex(first.0 + count).offset().min(self.bytes);
        Ok((start < end).then(|| ByteRange {
            start,
            len: end - start,
        }))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        let end = offset + into.len() as u64;
        if self.next_data(offset)?.is_none_or(|run| run.start >= end) {
            return Ok(Found::Zero);
        }
        into.fill(0);
        self.read_over(offset, into)?;
        Ok(Found::Data)
    }
}

/// A volume that is that of a file but for its own pages.
pub struct OverFile {
    file: FileContent,
    own: OwnContent,
}

impl OverFile {
    /// The volume of `file`, whose pages `own` are read from `pages` instead.
    #[must_use]
    pub fn new(file: FileContent, own: PageSet, pages: Box<dyn OwnPages>) -> Self {
        let bytes = file.bytes;
        Self {
            file,
            own: OwnContent::new(own, bytes, pages),
        }
    }
}

impl Content for OverFile {
    fn bytes(&self) -> u64 {
        self.file.bytes
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        let runs = [self.file.next_data(from)?, self.own.next_data(from)?];
        Ok(runs.into_iter().flatten().min_by_key(|run| run.start))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        let end = offset + into.len() as u64;
        // Not where the data ends: that takes as long as there is data.
        let starts = [
            self.file.data_start(offset)?,
            self.own.next_data(offset)?.map(|run| run.start),
        ];
        if starts.into_iter().flatten().all(|start| start >= end) {
            return Ok(Found::Zero);
        }
        self.file.read(offset, into)?;
        self.own.read_over(offset, into)?;
        Ok(Found::Data)
    }
}

/// Adds the pages of `file` to `own` that may hold something else than zeros; those that are in it already are not
/// looked for. Holes shorter than `hole_pages_min` count as data.
///
/// # Errors
/// When the storage cannot tell.
pub fn add_data_pages(file: &File, bytes: u64, hole_pages_min: u64, own: &mut PageSet) -> io::Result<()> {
    let content = FileContent::new(file.try_clone()?, bytes)?;
    let mut found = Vec::new();
    let mut page = PageIndex(0);
    while page.0 < own.pages() {
        let (inside, run) = own.run_at(page, own.pages());
        if !inside {
            data_pages(&content, page, run, hole_pages_min, &mut found)?;
        }
        page.0 += run;
    }
    found
        .into_iter()
        .for_each(|(first, count)| own.insert_run(first, count));
    Ok(())
}

/// Lists the runs of data in a run of pages.
fn data_pages(
    content: &FileContent,
    first: PageIndex,
    count: u64,
    hole_pages_min: u64,
    found: &mut Vec<(PageIndex, u64)>,
) -> io::Result<()> {
    let end = first.0 + count;
    let mut page = first.0;
    while page < end {
        let Some(data_start) = content.data_start(PageIndex(page).offset())? else {
            return Ok(());
        };
        let start = PageIndex::holding(data_start).0.max(page);
        if start >= end {
            return Ok(()); // what begins there is known, and its end is far
        }
        let data_end = content.data_end(data_start)?.div_ceil(PAGE_SIZE).min(end);
        match found.last_mut() {
            Some((last, len)) if last.0 >= first.0 && start - (last.0 + *len) < hole_pages_min => {
                *len = data_end - last.0;
            }
            _ => found.push((PageIndex(start), data_end - start)),
        }
        page = data_end;
    }
    Ok(())
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
    use proptest::prelude::*;

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
    fn own_pages_are_read_and_everything_else_is_zero() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(40 * PAGE_SIZE).unwrap();
        for page in [3, 4, 30] {
            file.write_all_at(&[page as u8; PAGE_SIZE as usize], page * PAGE_SIZE)
                .unwrap();
        }
        let mut own = PageSet::new(40);
        add_data_pages(&file, 40 * PAGE_SIZE, 1, &mut own).unwrap();
        let runs: Vec<_> = own.runs().collect();
        assert_eq!(runs, [(PageIndex(3), 2), (PageIndex(30), 1)]);

        let content = OwnContent::new(
            own.clone(),
            40 * PAGE_SIZE - 7,
            Box::new(file.try_clone().unwrap()),
        );
        assert_eq!(content.next_data(0).unwrap().unwrap().start, 3 * PAGE_SIZE);
        assert_eq!(content.next_data(31 * PAGE_SIZE).unwrap(), None);
        let mut bytes = vec![0xFF; 8 * PAGE_SIZE as usize];
        assert_eq!(content.read(5 * PAGE_SIZE, &mut bytes).unwrap(), Found::Zero);
        assert_eq!(content.read(0, &mut bytes).unwrap(), Found::Data);
        let firsts: Vec<u8> = bytes.chunks(PAGE_SIZE as usize).map(|page| page[0]).collect();
        assert_eq!(firsts, [0, 0, 0, 3, 4, 0, 0, 0]);

        // What came since is found, and what was known is not forgotten.
        file.write_all_at(b"x", 10 * PAGE_SIZE).unwrap();
        add_data_pages(&file, 40 * PAGE_SIZE, 1, &mut own).unwrap();
        assert_eq!(own.len(), 4);
        let mut coarse = PageSet::new(40);
        add_data_pages(&file, 40 * PAGE_SIZE, 10, &mut coarse).unwrap();
        let runs: Vec<_> = coarse.runs().collect();
        assert_eq!(
            runs,
            [(PageIndex(3), 8), (PageIndex(30), 1)],
            "short holes are not told apart"
        );
    }

    #[test]
    fn own_pages_lie_over_the_file_and_what_is_in_neither_is_zero() {
        const PAGE: usize = PAGE_SIZE as usize;
        let file = |value: u8, pages: &[u64]| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(40 * PAGE_SIZE).unwrap();
            for page in pages {
                file.write_all_at(&[value; PAGE], page * PAGE_SIZE).unwrap();
            }
            file
        };
        let mut own = PageSet::new(40);
        own.insert_run(PageIndex(4), 2);
        own.insert_run(PageIndex(20), 1);
        let below = FileContent::new(file(1, &[3, 4, 30]), 40 * PAGE_SIZE).unwrap();
        // What is there of pages that are not own is nobody's.
        let content = OverFile::new(below, own, Box::new(file(2, &[3, 4, 5, 20, 30])));
        let mut all = vec![0; 40 * PAGE];
        let mut at = 0;
        while let Some(run) = content.next_data(at).unwrap() {
            let part = run.start as usize..(run.start + run.len) as usize;
            assert_eq!(content.read(run.start, &mut all[part]).unwrap(), Found::Data);
            at = run.start + run.len;
        }
        let mut whole = vec![0xFF; 40 * PAGE];
        assert_eq!(content.read(0, &mut whole).unwrap(), Found::Data);
        assert!(all == whole);
        let firsts = |value| {
            (0..40)
                .filter(|page| whole[page * PAGE] == value)
                .collect::<Vec<_>>()
        };
        assert_eq!((firsts(1), firsts(2)), (vec![3, 30], vec![4, 5, 20]));
        assert_eq!(
            content.read(6 * PAGE_SIZE, &mut vec![0; 8 * PAGE]).unwrap(),
            Found::Zero
        );
    }

    proptest! {
        #[test]
        fn a_volume_over_a_file_is_the_same_wherever_it_is_read(
            of_file in prop::collection::btree_set(0_u64..24, 0..12),
            own in prop::collection::btree_set(0_u64..24, 0..12),
            reads in prop::collection::vec((0_u64..24 * PAGE_SIZE, 1_usize..9000), 1..20),
        ) {
            let bytes = 24 * PAGE_SIZE;
            let page_of = |value: u64| vec![value as u8 + 1; PAGE_SIZE as usize];
            let (below, above) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
            let (mut model, mut set) = (vec![0; bytes as usize], PageSet::new(24));
            below.set_len(bytes).unwrap();
            let mut put = |file: &File, page: u64, value: u64| {
                file.write_all_at(&page_of(value), page * PAGE_SIZE).unwrap();
                let start = (page * PAGE_SIZE) as usize;
                model[start..start + PAGE_SIZE as usize].copy_from_slice(&page_of(value));
            };
            of_file.iter().for_each(|page| put(&below, *page, *page));
            for page in &own {
                put(&above, *page, 100 + page);
                set.insert_run(PageIndex(*page), 1);
            }
            let content = OverFile::new(FileContent::new(below, bytes).unwrap(), set, Box::new(above));
            for (offset, len) in reads {
                let len = len.min((bytes - offset) as usize);
                let mut read = vec![0; len];
                content.read(offset, &mut read).unwrap();
                let start = offset as usize;
                prop_assert!(read == model[start..start + len]);
                // Up to where data is said to begin there is none.
                let next = content.next_data(offset).unwrap().map_or(bytes, |run| run.start);
                prop_assert!(model[start..next as usize].iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn a_file_that_is_shorter_than_its_volume_is_refused() {
        assert!(FileContent::new(tempfile::tempfile().unwrap(), 1).is_err());
    }
}
