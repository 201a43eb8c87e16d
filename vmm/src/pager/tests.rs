//! The pager on this machine's userfaultfd, without KVM: threads and system calls touch a mapping instead of a guest.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use runnel_snapshot::pager::{Fetcher, FetcherSettings};
use runnel_snapshot::source::{
    Arrived, ChunkFailure, ChunkId, ChunkSink, PageSource, SourceVolume, Urgency, VolumeId,
};
use runnel_snapshot::units::{ChunkIndex, ChunkSize, PAGE_SIZE, PageIndex};
use runnel_snapshot::volume::VolumeName;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::*;

mod writes;

const CHUNK: u64 = 64 << 10;
const CHUNKS: u64 = 8;
const BYTES: u64 = CHUNK * CHUNKS;
/// The mapping is cut here, as RAM is at the hole below 4 GiB, in the middle of a chunk.
const CUT: u64 = CHUNK * 4 + 3 * PAGE_SIZE;

/// What the image holds at `page`: chunk 2 is zeros.
fn image_byte(page: u64) -> u8 {
    if page / 16 == 2 {
        0
    } else {
        u8::try_from(page + 1).unwrap()
    }
}

/// Delivers at once, or, when held, on request.
struct Source {
    volumes: [SourceVolume; 1],
    file: Arc<File>,
    sink: OnceLock<Arc<dyn ChunkSink>>,
    held: Mutex<Option<Vec<ChunkId>>>,
}

impl Source {
    fn new(held: bool) -> Arc<Self> {
        let file = File::from(rustix::fs::memfd_create("pages", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(BYTES).unwrap();
        let about = SourceVolume {
            name: VolumeName::Memory,
            bytes: BYTES,
            chunk_size: ChunkSize::DEFAULT,
        };
        Arc::new(Self {
            volumes: [about],
            file: Arc::new(file),
            sink: OnceLock::new(),
            held: Mutex::new(held.then(Vec::new)),
        })
    }

    fn deliver(&self, id: ChunkId) {
        let first = id.chunk.0 * 16;
        let bytes: Vec<u8> = (first..first + 16)
            .flat_map(|page| [image_byte(page); PAGE_SIZE as usize])
            .collect();
        let zero = bytes.iter().all(|byte| *byte == 0);
        if !zero {
            self.file.write_all_at(&bytes, id.chunk.0 * CHUNK).unwrap();
        }
        self.sink
            .get()
            .unwrap()
            .arrived(id, if zero { Arrived::Zero } else { Arrived::Data });
    }

    /// Waits until `count` chunks are held back, and stops holding.
    fn release(&self, count: usize) -> Vec<ChunkId> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let mut held = self.held.lock().unwrap();
            if held.as_ref().is_some_and(|held| held.len() >= count) {
                return held.take().unwrap();
            }
            drop(held);
            assert!(Instant::now() < deadline, "nothing was asked for");
            std::thread::yield_now();
        }
    }
}

impl PageSource for Source {
    fn volumes(&self) -> &[SourceVolume] {
        &self.volumes
    }

    fn page_file(&self, _: VolumeId) -> Arc<File> {
        self.file.clone()
    }

    fn deliver_to(&self, sink: Arc<dyn ChunkSink>) {
        assert!(self.sink.set(sink).is_ok());
    }

    fn ask(&self, chunks: &[ChunkId], _: Urgency) {
        for id in chunks {
            match &mut *self.held.lock().unwrap() {
                Some(held) => held.push(*id),
                None => self.deliver(*id),
            }
        }
    }

    fn cancel(&self, _: &[ChunkId]) {}
}

/// A private, writable mapping of the page file, which nothing unmaps before the process ends: a thread may still
/// wait in it when a test fails.
#[derive(Clone, Copy)]
struct Memory(u64);

impl Memory {
    fn map(file: &File) -> Self {
        Self::map_as(file, MapFlags::PRIVATE)
    }

    /// As the memory of a machine that was booted is.
    fn map_shared(file: &File) -> Self {
        Self::map_as(file, MapFlags::SHARED)
    }

    fn map_as(file: &File, flags: MapFlags) -> Self {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), BYTES as usize, protection, flags, file, 0) };
        Self(start.unwrap() as u64)
    }

    fn mappings(self) -> Vec<HostMapping> {
        let above = PageIndex(CUT / PAGE_SIZE);
        vec![
            HostMapping {
                start: HostAddress(self.0),
                bytes: CUT,
                first_page: PageIndex(0),
            },
            HostMapping {
                start: HostAddress(self.0 + CUT),
                bytes: BYTES - CUT,
                first_page: above,
            },
        ]
    }

    fn slice(self, page: u64, pages: u64) -> &'static mut [u8] {
        assert!((page + pages) * PAGE_SIZE <= BYTES);
        let start = (self.0 + page * PAGE_SIZE) as *mut u8;
        // SAFETY: the mapping is never undone, and tests do not hand the same page to two threads that write.
        unsafe { std::slice::from_raw_parts_mut(start, (pages * PAGE_SIZE) as usize) }
    }

    fn byte(self, page: u64) -> u8 {
        let page = self.slice(page, 1);
        assert!(page.iter().all(|byte| *byte == page[0]));
        page[0]
    }
}

fn start(source: &Arc<Source>) -> (Pager, Memory) {
    let settings = FetcherSettings {
        neighbourhood_bytes: 0,
        fill: false,
        ..FetcherSettings::default()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    let memory = Memory::map(&source.file);
    (Pager::start(&fetcher, memory.mappings()).unwrap(), memory)
}

#[test]
fn touched_pages_show_the_image() {
    let source = Source::new(false);
    let (_pager, memory) = start(&source);
    for page in 0..BYTES / PAGE_SIZE {
        assert_eq!(memory.byte(page), image_byte(page), "page {page}");
    }
}

#[test]
fn writes_stay_in_this_mapping() {
    let source = Source::new(false);
    let (_pager, memory) = start(&source);
    memory.slice(5, 1)[0] = 0xEE;
    memory.slice(2 * 16, 1)[0] = 0xDD;
    assert_eq!(memory.slice(5, 1)[..2], [0xEE, image_byte(5)]);
    assert_eq!(memory.slice(2 * 16, 1)[..2], [0xDD, 0]);
    let mut byte = [0];
    source.file.read_exact_at(&mut byte, 5 * PAGE_SIZE).unwrap();
    assert_eq!(byte[0], image_byte(5));
}

#[test]
fn system_calls_fault_pages_in_as_threads_do() {
    let source = Source::new(false);
    let (_pager, memory) = start(&source);
    let mut file = tempfile::tempfile().unwrap();
    // write(2) reads guest memory in the kernel, read(2) writes it there.
    file.write_all(memory.slice(14, 4)).unwrap();
    file.rewind().unwrap();
    file.read_exact(&mut memory.slice(100, 4)[..]).unwrap();
    for page in 0..4 {
        assert_eq!(memory.byte(100 + page), image_byte(14 + page));
    }
}

#[test]
fn many_threads_wait_for_one_chunk_across_the_cut() {
    let source = Source::new(true);
    let (pager, memory) = start(&source);
    let first = CUT / PAGE_SIZE - 3;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (first..first + 16)
            .map(|page| scope.spawn(move || memory.byte(page)))
            .collect();
        for id in source.release(1) {
            assert_eq!(id.chunk, ChunkIndex(4));
            source.deliver(id);
        }
        for (page, thread) in (first..).zip(threads) {
            assert_eq!(thread.join().unwrap(), image_byte(page));
        }
    });
    assert_eq!(pager.logic().stall(), None);
}

#[test]
fn a_missing_chunk_stalls_and_the_thread_goes_on_when_it_comes() {
    let source = Source::new(true);
    let (pager, memory) = start(&source);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| memory.byte(17));
        let asked = source.release(1);
        let failure = ChunkFailure {
            reason: "the host is away".into(),
            transient: false,
        };
        source.sink.get().unwrap().failed(asked[0], failure);
        let stall = pager.logic().stall().unwrap();
        assert_eq!(
            (stall.chunk, stall.reason.as_str()),
            (ChunkIndex(1), "the host is away")
        );
        source.deliver(asked[0]);
        assert_eq!(thread.join().unwrap(), image_byte(17));
    });
    assert_eq!(pager.logic().stall(), None);
}

#[test]
fn a_page_given_back_is_zeros_and_not_the_images_old_content() {
    let source = Source::new(false);
    let (pager, memory) = start(&source);
    assert_eq!(memory.byte(20), image_byte(20));
    memory.slice(21, 1).fill(0x77);
    pager.logic().discard(PageIndex(20), 2);
    // SAFETY: the pages hold plain bytes that no other thread looks at.
    unsafe {
        rustix::mm::madvise(
            (memory.0 + 20 * PAGE_SIZE) as *mut _,
            2 * PAGE_SIZE as usize,
            Advice::LinuxDontNeed,
        )
    }
    .unwrap();
    assert_eq!(
        (memory.byte(20), memory.byte(21), memory.byte(22)),
        (0, 0, image_byte(22))
    );
    assert_eq!(pager.logic().counters().discarded_pages, 2);
}

#[test]
fn a_chunk_punched_out_of_the_page_file_comes_again() {
    let source = Source::new(false);
    let (_pager, memory) = start(&source);
    assert_eq!(memory.byte(50), image_byte(50));
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&*source.file, flags, 0, BYTES).unwrap();
    assert_eq!(memory.byte(50), image_byte(50));
}

#[test]
fn a_thread_that_waits_is_not_given_zeros_when_the_pager_ends() {
    let source = Source::new(true);
    let (pager, memory) = start(&source);
    let (sender, read) = std::sync::mpsc::channel();
    // Left behind: it waits as long as the process lives.
    std::thread::spawn(move || sender.send(memory.byte(17)));
    source.release(1);
    drop(pager);
    assert!(read.recv_timeout(Duration::from_millis(200)).is_err());
}

#[test]
fn pages_that_were_written_are_own_and_those_only_read_are_not() {
    let source = Source::new(false);
    let (_pager, memory) = start(&source);
    memory.byte(3);
    memory.slice(18, 1)[7] = 0x55;
    memory.slice(CUT / PAGE_SIZE + 1, 2).fill(0x66);
    let own = own_pages(&memory.mappings(), BYTES / PAGE_SIZE).unwrap();
    let found: Vec<_> = (0..BYTES / PAGE_SIZE)
        .filter(|page| own.contains(PageIndex(*page)))
        .collect();
    assert_eq!(found, [18, CUT / PAGE_SIZE + 1, CUT / PAGE_SIZE + 2]);
}
