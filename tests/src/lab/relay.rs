//! The network between two hosts that are far apart: every packet arrives, in order, a fixed time after it was sent.
//!
//! A thread takes frames from one tap and gives them to the other when their time has come. It works on packets, not on
//! connections, so handshakes and slow start take as many round trips as they do on a real network; that is what a
//! proxy would hide. Segments that the kernel has put together (TSO) pass in one piece, with their virtio-net header.
//!
//! **Never**: drops or reorders. A sender that is too fast finds its tap's queue full, as with any slow interface.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use runnel_devices::virtio::net::{Backend as _, GuestOffloads, Tap, TapError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// The largest frame: 64 KiB of IP, its Ethernet and virtio-net headers, rounded up.
const FRAME_BYTES_MAX: usize = 64 * 1024 + 64;
/// Frames taken from one side before the other has its turn.
const BATCH: usize = 64;
/// Bytes on their way in one direction: a second of a fast network.
const UNDER_WAY_BYTES_MAX: usize = 256 << 20;

/// One end: a tap made in the network namespace of the thread that calls this.
///
/// # Errors
/// When the host has no taps, or does not let this user make one.
pub fn end(name: &str) -> Result<File, TapError> {
    let tap = Tap::open(name)?;
    let failed = |step| {
        move |source| TapError::SetUp {
            name: name.to_owned(),
            step,
            source,
        }
    };
    tap.set_offloads(GuestOffloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ufo: false,
    })
    .map_err(failed("offloads"))?;
    // SAFETY: the tap is open, and stays so until the descriptor is duplicated below.
    let descriptor = unsafe { BorrowedFd::borrow_raw(tap.descriptor()) };
    let own = descriptor.try_clone_to_owned().map_err(failed("duplicate"))?;
    Ok(File::from(own))
}

/// A relay between two ends; gone when dropped.
#[derive(Debug)]
pub struct Relay {
    thread: Option<JoinHandle<()>>,
    /// Closed to stop the thread.
    stop: Option<UnixStream>,
    spent: Arc<AtomicU64>,
}

impl Relay {
    /// Relays between `ends`, each packet `delay` after it was sent.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(ends: [File; 2], delay: Duration) -> io::Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        let spent = Arc::new(AtomicU64::new(0));
        let clock = Arc::clone(&spent);
        let [left, right] = ends;
        let ways = [
            Way::new(left.try_clone()?, right.try_clone()?),
            Way::new(right, left),
        ];
        let thread = thread::Builder::new()
            .name("relay".to_owned())
            .spawn(move || run(ways, delay, &stopped, &clock))?;
        Ok(Self {
            thread: Some(thread),
            stop: Some(stop),
            spent,
        })
    }

    /// The processor time it has used: what is measured through it has competed with this.
    #[must_use]
    pub fn processor_time(&self) -> Duration {
        Duration::from_nanos(self.spent.load(Ordering::Relaxed))
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            // It has nothing to say but that it panicked, and that was printed.
            let _ = thread.join();
        }
    }
}

/// One direction.
struct Way {
    from: File,
    to: File,
    /// Frames and when they are due, in the order they were sent.
    under_way: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
}

impl Way {
    fn new(from: File, to: File) -> Self {
        Self {
            from,
            to,
            under_way: VecDeque::new(),
            bytes: 0,
        }
    }

    fn has_room(&self) -> bool {
        self.bytes < UNDER_WAY_BYTES_MAX
    }

    fn take(&mut self, delay: Duration, buffer: &mut [u8]) {
        for _ in 0..BATCH {
            // An error other than that there is nothing: the interface is down, or gone with its host.
            let Ok(length) = self.from.read(buffer) else {
                return;
            };
            self.bytes += length;
            self.under_way
                .push_back((Instant::now() + delay, buffer[..length].to_vec()));
        }
    }

    fn deliver(&mut self) {
        let now = Instant::now();
        while let Some((due, frame)) = self.under_way.front()
            && *due <= now
        {
            // An interface that is down takes nothing: the frame is lost, as on a cut cable.
            let _ = self.to.write(frame);
            self.bytes -= frame.len();
            self.under_way.pop_front();
        }
    }
}

fn run(mut ways: [Way; 2], delay: Duration, stopped: &UnixStream, spent: &AtomicU64) {
    let mut buffer = vec![0; FRAME_BYTES_MAX];
    loop {
        for way in &mut ways {
            way.take(delay, &mut buffer);
            way.deliver();
        }
        note_processor_time(spent);
        if wait(&ways, stopped) {
            return;
        }
    }
}

/// Waits for a frame, or for the time of the next; gives whether to stop.
fn wait(ways: &[Way; 2], stopped: &UnixStream) -> bool {
    let due = ways.iter().filter_map(|way| Some(way.under_way.front()?.0)).min();
    let timeout = due.map(|due| {
        let left = due.saturating_duration_since(Instant::now());
        Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        }
    });
    let wanted = |way: &Way| {
        if way.has_room() {
            PollFlags::IN
        } else {
            PollFlags::empty()
        }
    };
    let [left, right] = ways;
    let mut descriptors = [
        PollFd::from_borrowed_fd(left.from.as_fd(), wanted(left)),
        PollFd::from_borrowed_fd(right.from.as_fd(), wanted(right)),
        PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN),
    ];
    match poll(&mut descriptors, timeout.as_ref()) {
        Ok(_) => !descriptors[2].revents().is_empty(),
        Err(error) => error != rustix::io::Errno::INTR,
    }
}

fn note_processor_time(spent: &AtomicU64) {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    let nanos = time
        .tv_sec
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec);
    spent.store(u64::try_from(nanos).unwrap_or(0), Ordering::Relaxed);
}
