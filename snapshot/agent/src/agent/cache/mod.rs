//! The host's cache: the page files of all images of this agent, how much they may take, what is taken out of them where
//! that is too much, which chunk is where, and which is being fetched.
//!
//! ```text
//!   worker ──bytes to come──► Pool (memory, or drives) ──too many──► counted: st_blocks of every page file
//!                                                                          │ still too many
//!      taken out, a chunk at a time, by punching holes:                    ▼
//!        1. images that no machine uses, the one longest unused first
//!        2. images of an earlier agent whose machines have not come back yet
//!        3. images in use: what the fill brought, then what an earlier agent left, then what was waited for
//! ```
//!
//! **Invariant.** A machine never reads a hole: see [`Marks`](runnel_snapshot::source::Marks). So nobody is asked before
//! a chunk goes, and none of this waits for a machine: what one still needs, it asks for again.
//!
//! A page file is open once in this process, as one [`PageFile`], whoever changes it: its lock is what keeps those who
//! bring a chunk and who takes it out apart.
//!
//! What no chunk could be taken out for stays over its quota, and a file system that is full stays full: then what
//! arrives cannot be kept, and that is told. Page files with huge pages are let be: a part of one may become zeros.

mod known;
mod pool;
mod under_way;

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use runnel_snapshot::digest::{BlobDigest, ChunkDigest};
use runnel_snapshot::image::source::{Fetch, Fetching, HostCache, PageFile, SourceError, TakeOut};
use runnel_snapshot::protocol::{AdoptedVolume, CacheStatus};
use runnel_snapshot::source::PageFileLayout;
use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::volume::VolumeName;

use super::pages::PageFolders;
use super::settings::AgentSettings;
use known::KnownChunks;
use pool::Pool;
use under_way::UnderWay;

/// How much of what memory's file system has room for page files take unless told otherwise: tmpfs has half of RAM.
const MEMORY_SHARE: (u64, u64) = (3, 4);

/// As much for drives: the disk is others' too.
const DRIVE_SHARE: (u64, u64) = (1, 2);

/// See the module.
pub(super) struct Cache {
    memory: Pool,
    drives: Pool,
    files: Mutex<Vec<Kept>>,
    uses: Mutex<Uses>,
    known: KnownChunks,
    under_way: UnderWay,
}

/// A page file of an image.
#[derive(Clone)]
struct Kept {
    image: BlobDigest,
    volume: VolumeName,
    file: Arc<PageFile>,
}

/// Which images machines use, and when they did.
#[derive(Default)]
struct Uses {
    images: HashMap<BlobDigest, Use>,
    /// Counts machines that left.
    now: u64,
}

#[derive(Clone, Copy, Default)]
struct Use {
    machines: usize,
    left: u64,
}

/// When an image's chunks are taken out: the smaller, the sooner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    Unused { left: u64 },
    OfAnEarlierAgent,
    InUse,
}

impl Cache {
    /// With what an earlier agent left in its folders.
    pub(super) fn new(settings: &AgentSettings, folders: &PageFolders) -> Self {
        let files: Vec<Kept> = folders
            .left()
            .into_iter()
            .map(|(image, volume, file)| Kept {
                image,
                volume,
                file: Arc::new(file),
            })
            .collect();
        let pool = |folder: &Path, quota, share, is_memory| {
            let of_kind = files.iter().filter(|kept| kept.is_memory() == is_memory);
            let bytes = of_kind.map(|kept| kept.file.allocated_bytes()).sum();
            Pool::new(folder, quota, share, bytes)
        };
        let memory_folder = folders.folder_of(&VolumeName::Memory);
        let drive_folder = folders.drive_folder();
        Self {
            memory: pool(&memory_folder, settings.memory_quota, MEMORY_SHARE, true),
            drives: pool(&drive_folder, settings.drive_quota, DRIVE_SHARE, false),
            files: Mutex::new(files),
            uses: Mutex::default(),
            known: KnownChunks::default(),
            under_way: UnderWay::default(),
        }
    }

    /// The page file of a volume of an image: the one that is open, or one that `make` opens.
    pub(super) fn page_file(
        &self,
        image: &BlobDigest,
        volume: &VolumeName,
        layout: PageFileLayout,
        make: impl FnOnce() -> Result<PageFile, SourceError>,
    ) -> Result<Arc<PageFile>, SourceError> {
        let mut files = lock(&self.files);
        let position = files
            .iter()
            .position(|kept| kept.image == *image && kept.volume == *volume);
        if let Some(position) = position {
            let file = &files[position].file;
            if file.layout() == Some(layout) {
                file.pass_on();
                return Ok(Arc::clone(file));
            }
            files.remove(position);
        }
        let file = Arc::new(make()?);
        files.push(Kept {
            image: *image,
            volume: volume.clone(),
            file: Arc::clone(&file),
        });
        Ok(file)
    }

    /// Whether there is a page file of a volume of an image, of this agent or an earlier one.
    pub(super) fn has(&self, image: &BlobDigest, volume: &VolumeName) -> bool {
        let files = lock(&self.files);
        let mut files = files.iter();
        files.any(|kept| kept.image == *image && kept.volume == *volume)
    }

    /// Whether `file` is that page file.
    pub(super) fn has_file(&self, image: &BlobDigest, volume: &VolumeName, file: &File) -> bool {
        let files = lock(&self.files);
        let its = files
            .iter()
            .find(|kept| kept.image == *image && kept.volume == *volume);
        its.is_some_and(|kept| kept.file.is_file(file).unwrap_or(false))
    }

    /// Somebody else's file is the page file of a volume of an image that has none. It takes no room here.
    pub(super) fn adopt(&self, image: &BlobDigest, volume: &VolumeName, file: PageFile) {
        lock(&self.files).push(Kept {
            image: *image,
            volume: volume.clone(),
            file: Arc::new(file),
        });
    }

    /// It is not any more.
    pub(super) fn leave_out(&self, image: &BlobDigest, volume: &VolumeName) {
        lock(&self.files).retain(|kept| kept.image != *image || kept.volume != *volume);
    }

    /// An image's page files are removed.
    pub(super) fn forget(&self, image: &BlobDigest) {
        lock(&self.files).retain(|kept| kept.image != *image);
        lock(&self.uses).images.remove(image);
        self.known.tidy();
    }

    /// A machine uses an image from now on.
    pub(super) fn used(&self, image: &BlobDigest) {
        lock(&self.uses).images.entry(*image).or_default().machines += 1;
    }

    /// It does no more.
    pub(super) fn left(&self, image: &BlobDigest) {
        let mut uses = lock(&self.uses);
        uses.now += 1;
        let now = uses.now;
        if let Some(its) = uses.images.get_mut(image) {
            its.machines = its.machines.saturating_sub(1);
            its.left = now;
        }
    }

    /// What it comes to.
    pub(super) fn status(&self) -> CacheStatus {
        let bytes = |is_memory| self.count(is_memory);
        CacheStatus {
            memory: self.memory.status(bytes(true)),
            drives: self.drives.status(bytes(false)),
        }
    }

    /// What page files of an image take.
    pub(super) fn bytes_of(&self, image: &BlobDigest) -> u64 {
        let files = lock(&self.files);
        let its = files.iter().filter(|kept| kept.image == *image);
        its.map(|kept| kept.file.allocated_bytes()).sum()
    }

    /// Those of an image that are somebody else's.
    pub(super) fn adopted(&self, image: &BlobDigest) -> Vec<AdoptedVolume> {
        let files = lock(&self.files);
        let its = files.iter().filter(|kept| kept.image == *image);
        let adopted = its.filter_map(|kept| {
            Some(AdoptedVolume {
                volume: kept.volume.clone(),
                bytes: kept.file.adopted_bytes()?,
            })
        });
        adopted.collect()
    }

    fn pool(&self, volume: &VolumeName) -> &Pool {
        match volume {
            VolumeName::Memory => &self.memory,
            VolumeName::Drive(_) => &self.drives,
        }
    }

    fn count(&self, is_memory: bool) -> u64 {
        let files = lock(&self.files);
        let of_kind = files.iter().filter(|kept| kept.is_memory() == is_memory);
        of_kind.map(|kept| kept.file.allocated_bytes()).sum()
    }

    /// Takes out `bytes` of page files of one kind, as far as there are as many.
    fn evict(&self, pool: &Pool, is_memory: bool, bytes: u64) -> u64 {
        let files = self.in_turn(is_memory);
        let mut freed = 0;
        let unused = files.iter().filter(|(turn, _)| *turn != Turn::InUse);
        for (_, file) in unused {
            freed += file.take_out(bytes.saturating_sub(freed), TakeOut::Unused);
        }
        for which in [TakeOut::Filled, TakeOut::Inherited, TakeOut::Wanted] {
            for (_, file) in files.iter().filter(|(turn, _)| *turn == Turn::InUse) {
                freed += file.take_out(bytes.saturating_sub(freed), which);
            }
        }
        pool.evicted(freed);
        tracing::debug!(wanted = bytes, freed, is_memory, "chunks were taken out");
        freed
    }

    /// The page files of one kind out of which chunks can be taken, in their turn; of those in use the largest first.
    fn in_turn(&self, is_memory: bool) -> Vec<(Turn, Arc<PageFile>)> {
        let mut files: Vec<Kept> = lock(&self.files).clone();
        files.retain(|kept| kept.is_memory() == is_memory && !(is_memory && kept.file.may_have_huge_pages()));
        let uses = lock(&self.uses);
        let turn = |image: &BlobDigest| match uses.images.get(image) {
            None => Turn::OfAnEarlierAgent,
            Some(its) if its.machines == 0 => Turn::Unused { left: its.left },
            Some(_) => Turn::InUse,
        };
        let mut files: Vec<_> = files
            .into_iter()
            .map(|kept| (turn(&kept.image), kept.file))
            .collect();
        drop(uses);
        files.sort_by_cached_key(|(turn, file)| (*turn, std::cmp::Reverse(file.allocated_bytes())));
        files
    }
}

impl Kept {
    fn is_memory(&self) -> bool {
        self.volume == VolumeName::Memory
    }
}

impl HostCache for Cache {
    fn will_write(&self, volume: &VolumeName, bytes: u64) {
        let (pool, is_memory) = (self.pool(volume), *volume == VolumeName::Memory);
        if pool.add(bytes) {
            return;
        }
        let _evicting = lock(&pool.evicting);
        let over = pool.counted(self.count(is_memory), bytes);
        if over > 0 {
            self.evict(pool, is_memory, over);
        }
    }

    fn make_room(&self, volume: &VolumeName, bytes: u64) -> bool {
        let (pool, is_memory) = (self.pool(volume), *volume == VolumeName::Memory);
        let _evicting = lock(&pool.evicting);
        self.evict(pool, is_memory, pool.wanted(bytes)) > 0
    }

    fn has_room_to_fill(&self, volume: &VolumeName) -> bool {
        let (pool, is_memory) = (self.pool(volume), *volume == VolumeName::Memory);
        if pool.has_spare() {
            return true;
        }
        let files = self.in_turn(is_memory);
        // Machines of an earlier agent's images may be about to come back.
        let mut unused = files
            .iter()
            .filter(|(turn, _)| matches!(turn, Turn::Unused { .. }));
        unused.any(|(_, file)| file.has_chunks())
    }

    fn keeps(&self, digest: &ChunkDigest, file: &Arc<PageFile>, chunk: ChunkIndex) {
        self.known.add(digest, file, chunk);
    }

    fn find(&self, digest: &ChunkDigest, plain: &mut [u8]) -> bool {
        self.known.find(digest, plain)
    }

    fn begin_fetch(&self, digest: &ChunkDigest, is_fill: bool) -> Fetching {
        self.under_way.begin(digest, is_fill)
    }

    fn end_fetch(&self, fetch: &Fetch) {
        self.under_way.end(fetch);
    }

    fn wait_for(&self, fetch: &Fetch) {
        self.under_way.wait_for(fetch);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
