use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;

use super::*;
use crate::pager::FetcherSettings;
use crate::source::model::{ModelSource, id};
use crate::source::{PageSource, SourceVolume};

const CHUNKS: u64 = 6;
const PAGES_PER_CHUNK: u64 = 4;
const PAGES: u64 = CHUNKS * PAGES_PER_CHUNK;

/// Guest memory as a model: what each page shows, once it is mapped.
#[derive(Clone, Default)]
struct Mapped(Arc<Mutex<BTreeMap<u64, Vec<u8>>>>);

struct ModelInstaller {
    mapped: Mapped,
    file: Arc<std::fs::File>,
    /// Refuses this many calls before it works.
    refusals: Arc<AtomicU64>,
}

impl ModelInstaller {
    fn refuse(&self, first: PageIndex) -> Result<(), InstallError> {
        let left = self.refusals.load(Ordering::SeqCst);
        if left == 0 {
            return Ok(());
        }
        self.refusals.store(left - 1, Ordering::SeqCst);
        Err(InstallError::Host(first, std::io::ErrorKind::OutOfMemory.into()))
    }
}

impl PageInstaller for ModelInstaller {
    fn map(&self, first: PageIndex, count: u64) -> Result<(), InstallError> {
        self.refuse(first)?;
        let mut mapped = self.mapped.0.lock().unwrap();
        for page in first.0..first.0 + count {
            let mut bytes = vec![0; PAGE_SIZE as usize];
            self.file.read_exact_at(&mut bytes, page * PAGE_SIZE).unwrap();
            if bytes.iter().all(|byte| *byte == 0) {
                return Err(InstallError::NotInPageFile(PageIndex(page))); // the model's data pages hold no zeros
            }
            mapped.entry(page).or_insert(bytes);
        }
        Ok(())
    }

    fn zero(&self, first: PageIndex, count: u64) -> Result<(), InstallError> {
        self.refuse(first)?;
        let mut mapped = self.mapped.0.lock().unwrap();
        for page in first.0..first.0 + count {
            mapped.entry(page).or_insert_with(|| vec![0; PAGE_SIZE as usize]);
        }
        Ok(())
    }
}

struct Rig {
    source: Arc<ModelSource>,
    pager: Arc<MemoryPager>,
    mapped: Mapped,
    refusals: Arc<AtomicU64>,
}

/// The image's bytes of a page: zeros in every third chunk, the page's number elsewhere.
fn image_page(page: u64) -> Vec<u8> {
    let byte = if page / PAGES_PER_CHUNK % 3 == 2 {
        0
    } else {
        u8::try_from(page + 1).unwrap()
    };
    vec![byte; PAGE_SIZE as usize]
}

fn rig() -> Rig {
    rig_with(true)
}

fn rig_with(has_small_pages: bool) -> Rig {
    let chunk_size = ChunkSize::new((PAGES_PER_CHUNK * PAGE_SIZE) as u32).unwrap();
    let about = SourceVolume {
        name: VolumeName::Memory,
        bytes: PAGES * PAGE_SIZE,
        chunk_size,
    };
    let source = ModelSource::new(vec![(about, (0..PAGES).flat_map(image_page).collect())]);
    let settings = FetcherSettings {
        neighbourhood_bytes: 0,
        fill: false,
        ..FetcherSettings::default()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    let mapped = Mapped::default();
    let refusals = Arc::new(AtomicU64::new(0));
    let installer = ModelInstaller {
        mapped: mapped.clone(),
        file: source.page_file(VolumeId(0)),
        refusals: refusals.clone(),
    };
    let pager = MemoryPager::over(&fetcher, Box::new(installer), has_small_pages).unwrap();
    Rig {
        source,
        pager,
        mapped,
        refusals,
    }
}

impl Rig {
    fn page(&self, page: u64) -> Option<Vec<u8>> {
        self.mapped.0.lock().unwrap().get(&page).cloned()
    }
}

#[test]
fn a_fault_waits_for_its_chunk_and_then_has_all_of_it() {
    let rig = rig();
    rig.pager.fault(PageIndex(5), false);
    assert_eq!(rig.page(5), None);
    rig.source.deliver(id(0, 1));
    for page in 4..8 {
        assert_eq!(rig.page(page), Some(image_page(page)));
    }
    assert_eq!(rig.page(8), None);
    assert_eq!(rig.pager.counters().faults_waiting, 1);
}

#[test]
fn touches_are_recorded_in_their_order_whether_the_chunk_is_here_or_not() {
    let rig = rig();
    let fetcher = rig.pager.fetcher();
    fetcher.record_touches();
    fetcher.prefetch(&[id(0, 4), id(0, 3), id(0, 0)]);
    for chunk in [4, 3, 0] {
        rig.source.deliver(id(0, chunk));
    }
    rig.pager.discard(PageIndex(0), 1);
    // One that is here, one that is not, zeros, the first again, one that was given back.
    for page in [13, 5, 9, 14, 0] {
        rig.pager.fault(PageIndex(page), false);
    }
    rig.source.deliver(id(0, 2));
    let set = fetcher.recorded();
    let chunks: Vec<u64> = set.chunks().map(|(_, chunk)| chunk.0).collect();
    assert_eq!(chunks, [3, 1], "in their order, each once, and no zeros");
    rig.pager.fault(PageIndex(17), false);
    assert!(fetcher.recorded().is_empty(), "it is over");
}

#[test]
fn a_page_of_a_huge_one_is_not_taken_for_the_images() {
    let rig = rig_with(false);
    // Beside it something was written, and it came into being with that.
    rig.pager.fault(PageIndex(5), true);
    assert_eq!(rig.page(5), None);
    rig.source.deliver(id(0, 1));
    assert_eq!(rig.page(5), Some(image_page(5)));
}

#[test]
fn a_page_that_somebody_else_fetched_is_mapped_without_asking() {
    let rig = rig();
    let file = rig.source.page_file(VolumeId(0));
    file.write_all_at(&image_page(5), 5 * PAGE_SIZE).unwrap();
    rig.pager.fault(PageIndex(5), true);
    assert_eq!(rig.page(5), Some(image_page(5)));
    assert_eq!(rig.source.asked(), []);
}

#[test]
fn a_discarded_page_is_zeros_whatever_arrives() {
    let rig = rig();
    rig.pager.discard(PageIndex(5), 1);
    rig.pager.fault(PageIndex(4), false);
    rig.source.deliver(id(0, 1));
    assert_eq!(rig.page(5), Some(vec![0; PAGE_SIZE as usize]));
    assert_eq!(rig.page(4), Some(image_page(4)));
    assert_eq!(rig.page(6), Some(image_page(6)));
    assert_eq!(rig.pager.counters().discarded_pages, 1);
}

#[test]
fn a_chunk_evicted_from_the_page_file_is_fetched_again() {
    let rig = rig();
    rig.pager.fetcher().prefetch(&[id(0, 1)]);
    rig.source.deliver(id(0, 1));
    rig.source
        .page_file(VolumeId(0))
        .write_all_at(&[0; 4 * PAGE_SIZE as usize], 4 * PAGE_SIZE)
        .unwrap();
    rig.source.asked();

    rig.pager.fault(PageIndex(5), false);
    assert_eq!(rig.page(5), None);
    assert_eq!(rig.source.asked(), [(id(0, 1), crate::source::Urgency::Demand)]);
    rig.source.deliver(id(0, 1));
    assert_eq!(rig.page(5), Some(image_page(5)));
}

#[test]
fn a_host_that_refuses_stalls_the_machine_until_it_takes_the_page() {
    let rig = rig();
    let woken = Arc::new(AtomicU64::new(0));
    let wakes = woken.clone();
    rig.pager.on_refused(move || {
        wakes.fetch_add(1, Ordering::SeqCst);
    });
    rig.refusals.store(2, Ordering::SeqCst);
    rig.pager.fault(PageIndex(5), false);
    assert_eq!(woken.load(Ordering::SeqCst), 0);
    rig.source.deliver(id(0, 1));
    assert_eq!(woken.load(Ordering::SeqCst), 1, "somebody has to come back to it");
    assert_eq!(rig.page(5), None);
    assert_eq!(rig.pager.stall().unwrap().chunk, ChunkIndex(1));

    rig.pager.retry();
    assert!(rig.pager.stall().is_some());
    rig.pager.retry();
    assert_eq!(rig.pager.stall(), None);
    assert_eq!(rig.page(5), Some(image_page(5)));
    assert_eq!(rig.pager.counters().install_errors, 2);
}

#[test]
fn a_fault_outside_memory_is_ignored() {
    let rig = rig();
    rig.pager.fault(PageIndex(PAGES), false);
    rig.pager.fault(PageIndex(u64::MAX), true);
    assert!(rig.mapped.0.lock().unwrap().is_empty());
}

proptest! {
    /// Whatever the order of faults, arrivals and discards, a mapped page shows what it should, and every fault is
    /// answered once its chunk is there.
    #[test]
    fn every_interleaving_shows_the_right_bytes(steps in prop::collection::vec((0u8..4, 0..PAGES), 1..60)) {
        let rig = rig();
        let mut faulted = HashSet::new();
        let mut delivered = HashSet::new();
        let mut discarded = HashSet::new();
        for (step, page) in steps {
            let chunk = page / PAGES_PER_CHUNK;
            match step {
                0 => {
                    rig.pager.fault(PageIndex(page), false);
                    faulted.insert(page);
                }
                1 => {
                    rig.source.deliver(id(0, chunk));
                    delivered.insert(chunk);
                }
                2 => rig.pager.fetcher().prefetch(&[id(0, chunk)]),
                _ => {
                    // As a balloon does: note it, then take the page out of the mapping.
                    rig.pager.discard(PageIndex(page), 1);
                    rig.mapped.0.lock().unwrap().remove(&page);
                    discarded.insert(page);
                    faulted.remove(&page);
                }
            }
            for page in &faulted {
                let there = delivered.contains(&(page / PAGES_PER_CHUNK)) || discarded.contains(page);
                prop_assert!(!there || rig.page(*page).is_some(), "page {page} waits for nothing");
            }
            for (page, bytes) in &*rig.mapped.0.lock().unwrap() {
                let right = if discarded.contains(page) { vec![0; PAGE_SIZE as usize] } else { image_page(*page) };
                prop_assert!(*bytes == right, "page {page} shows other bytes");
            }
        }
    }
}
