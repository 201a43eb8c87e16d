//! Where which chunk is: a table from digests to places in page files, so that a chunk that several images have is
//! fetched for one of them alone.
//!
//! It works as a processor's cache does: a digest has a few places of its own in a table of fixed size, and a new chunk
//! takes that of an old one. An entry is 16 bytes, 256 KiB for each GiB of chunks of 64 KiB, and there is a cap. It is a
//! hint and nothing more: what is found is held against the whole digest, and anything may have happened to it since.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use runnel_snapshot::digest::ChunkDigest;
use runnel_snapshot::image::source::PageFile;
use runnel_snapshot::units::ChunkIndex;

/// The most chunks that are known: 64 GiB of 64 KiB, in a table of 16 MiB, of which untouched pages take no memory.
const CHUNKS_MAX: usize = 1 << 20;

/// The places in which a digest can be.
const WAYS: usize = 4;

/// Eight bytes of the digest, then file and chunk.
type Entry = [u64; 2];

/// The table.
pub(super) struct KnownChunks(Mutex<Table>);

struct Table {
    /// A file's number is never 0, which is that of an empty entry.
    entries: Vec<Entry>,
    files: HashMap<u32, Weak<PageFile>>,
    /// The numbers of the files that are there, by address: a weak reference keeps that from being anybody else's.
    numbers: HashMap<usize, u32>,
    last_number: u32,
}

impl Default for KnownChunks {
    fn default() -> Self {
        Self::new(CHUNKS_MAX)
    }
}

impl KnownChunks {
    /// A table of so many entries, a multiple of [`WAYS`].
    fn new(entries: usize) -> Self {
        Self(Mutex::new(Table {
            entries: vec![[0; 2]; entries],
            files: HashMap::new(),
            numbers: HashMap::new(),
            last_number: 0,
        }))
    }

    /// A chunk is in a page file.
    pub(super) fn add(&self, digest: &ChunkDigest, file: &Arc<PageFile>, chunk: ChunkIndex) {
        // A volume of 64 TiB in the smallest chunks has as many.
        let Ok(chunk) = u32::try_from(chunk.0) else { return };
        let (tag, set) = place_of(digest);
        let mut table = self.lock();
        let number = table.number_of(file);
        let place = u64::from(number) << 32 | u64::from(chunk);
        let ways = table.set(set);
        let same_or_empty = |entry: &Entry| entry[0] == tag || entry[1] == 0;
        let way = ways.iter().position(same_or_empty);
        // Any of the others is as good: which came first is not known.
        let way = way.unwrap_or(usize::from(digest.0[16]) % WAYS);
        ways[way] = [tag, place];
    }

    /// Fills `plain` with the chunk of that digest, if it is as long and is where it was.
    pub(super) fn find(&self, digest: &ChunkDigest, plain: &mut [u8]) -> bool {
        let found = self.candidates(digest);
        found.into_iter().flatten().any(|(file, chunk)| {
            let range = file.range_of(chunk);
            range.len == plain.len() as u64
                && file.read(range.start, plain).is_ok()
                && ChunkDigest::of(plain) == *digest
        })
    }

    fn candidates(&self, digest: &ChunkDigest) -> [Option<(Arc<PageFile>, ChunkIndex)>; WAYS] {
        let (tag, set) = place_of(digest);
        let mut table = self.lock();
        let ways: [Entry; WAYS] = std::array::from_fn(|way| table.set(set)[way]);
        ways.map(|[its_tag, place]| {
            if its_tag != tag || place == 0 {
                return None;
            }
            let file = table.files.get(&((place >> 32) as u32))?.upgrade()?;
            Some((file, ChunkIndex(place & u64::from(u32::MAX))))
        })
    }

    /// Forgets files that are gone. Their entries lead nowhere, and are taken by others in time.
    pub(super) fn tidy(&self) {
        let mut table = self.lock();
        let Table { files, numbers, .. } = &mut *table;
        numbers.retain(|_, number| files.get(number).is_some_and(|file| file.strong_count() > 0));
        files.retain(|_, file| file.strong_count() > 0);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What tells a digest from others in its set, and the number of that set before it is cut to the table's size.
fn place_of(digest: &ChunkDigest) -> (u64, u64) {
    let word = |at: usize| u64::from_le_bytes(digest.0[at..at + 8].try_into().expect("eight bytes"));
    (word(0), word(8))
}

impl Table {
    fn number_of(&mut self, file: &Arc<PageFile>) -> u32 {
        let address = Arc::as_ptr(file) as usize;
        if let Some(number) = self.numbers.get(&address) {
            return *number;
        }
        // After as many files as 32 bits count, entries may lead to another file: a hint that fails.
        self.last_number = self.last_number.wrapping_add(1).max(1);
        self.numbers.insert(address, self.last_number);
        self.files.insert(self.last_number, Arc::downgrade(file));
        self.last_number
    }

    fn set(&mut self, number: u64) -> &mut [Entry] {
        let sets = (self.entries.len() / WAYS) as u64;
        let first = (number % sets) as usize * WAYS;
        &mut self.entries[first..first + WAYS]
    }
}

#[cfg(test)]
mod tests {
    use runnel_snapshot::source::PageFileLayout;
    use runnel_snapshot::units::ChunkSize;

    use super::*;

    const CHUNK: usize = 64 << 10;

    fn file(folder: &std::path::Path, chunks: &[u8]) -> Arc<PageFile> {
        let layout = PageFileLayout {
            volume_bytes: (chunks.len() * CHUNK) as u64,
            chunk_size: ChunkSize::DEFAULT,
        };
        let path = folder.join("memory");
        let file = PageFile::named(&path, layout).unwrap();
        // As root could, whatever its mode is; only the page file itself writes otherwise.
        let bytes: Vec<u8> = chunks.iter().flat_map(|content| [*content; CHUNK]).collect();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        let writable = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&writable, &bytes, 0).unwrap();
        Arc::new(file)
    }

    #[test]
    fn a_chunk_is_found_where_it_is_and_nowhere_once_it_is_gone_or_another() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(folder.path(), &[1, 2]);
        let known = KnownChunks::new(16);
        let (one, two) = (ChunkDigest::of(&[1; CHUNK]), ChunkDigest::of(&[2; CHUNK]));
        let mut plain = vec![0; CHUNK];
        assert!(!known.find(&one, &mut plain));
        known.add(&one, &file, ChunkIndex(0));
        // Which is not so.
        known.add(&two, &file, ChunkIndex(0));
        assert!(known.find(&one, &mut plain) && plain == [1; CHUNK]);
        assert!(!known.find(&two, &mut plain));
        known.add(&two, &file, ChunkIndex(1));
        assert!(known.find(&two, &mut plain));
        assert!(!known.find(&two, &mut plain[..9]), "it is longer");
        drop(file);
        known.tidy();
        assert!(!known.find(&one, &mut plain));
        assert!(known.lock().files.is_empty() && known.lock().numbers.is_empty());
    }

    #[test]
    fn a_table_that_is_full_forgets_and_never_grows() {
        let folder = tempfile::tempdir().unwrap();
        let file = file(folder.path(), &[0; 4]);
        let known = KnownChunks::new(16);
        for number in 0..1000_u32 {
            let digest = ChunkDigest::of(&number.to_le_bytes());
            known.add(&digest, &file, ChunkIndex(u64::from(number % 4)));
        }
        let table = known.lock();
        assert_eq!((table.entries.len(), table.files.len()), (16, 1));
        assert!(table.entries.iter().all(|entry| entry[1] != 0));
    }
}
