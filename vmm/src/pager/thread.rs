//! The pager's thread: reads faults, hands them to the logic, and tries again what the host refused.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use runnel_snapshot::pager::{Fetcher, MemoryPager};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::install::{HostMapping, Installer};
use super::uffd::{Fault, UffdError, Userfaultfd};

/// How often faults that the host refused to let us answer are tried again, in seconds.
const RETRY_SECONDS: i64 = 1;

/// Why the pager did not start.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// This host cannot page.
    #[error("cannot page guest memory on this host")]
    Uffd(#[from] UffdError),
    /// The image's volumes do not fit.
    #[error("the image cannot be paged")]
    Image(#[from] runnel_snapshot::pager::NoMemory),
    /// The thread.
    #[error("cannot start the pager's thread")]
    Thread(#[source] io::Error),
}

/// Guest memory whose missing pages come from a source. Dropping it ends the thread: to be done only when nothing
/// touches guest memory any more.
pub struct Pager {
    logic: Arc<MemoryPager>,
    /// Kept open to the very end: when the last descriptor closes, waiting readers get zeros.
    uffd: Arc<Userfaultfd>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Pager {
    /// Registers guest memory, mapped privately from the page file of the fetcher's `memory` volume, and answers its
    /// faults from now on.
    ///
    /// # Errors
    /// When the host cannot page, or the source has no memory.
    pub fn start(fetcher: &Arc<Fetcher>, mappings: Vec<HostMapping>) -> Result<Self, PagerError> {
        let uffd = Arc::new(Userfaultfd::open()?);
        for mapping in &mappings {
            uffd.register(mapping.start, mapping.bytes)?;
        }
        let installer = Installer {
            uffd: uffd.clone(),
            mappings: mappings.clone(),
        };
        let logic = MemoryPager::new(fetcher, Box::new(installer))?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| PagerError::Thread(error.into()))?;
        let stop = Arc::new(stop);
        let reader = Reader {
            uffd: uffd.clone(),
            mappings,
            logic: logic.clone(),
            stop: stop.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("pager".into())
            .spawn(move || reader.run())
            .map_err(PagerError::Thread)?;
        Ok(Self {
            logic,
            uffd,
            stop,
            thread: Some(thread),
        })
    }

    /// The logic: stalls, counters, discarded pages.
    #[must_use]
    pub fn logic(&self) -> &Arc<MemoryPager> {
        &self.logic
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        // Writing fails only if the counter overflows, and then the thread is being told already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the pager's thread panicked");
        }
        if self.logic.is_awaited() {
            // A thread that could not be ended waits for a page. Closing the descriptor would give it zeros; it is to
            // wait until the process ends.
            std::mem::forget(Arc::clone(&self.uffd));
        }
    }
}

struct Reader {
    uffd: Arc<Userfaultfd>,
    mappings: Vec<HostMapping>,
    logic: Arc<MemoryPager>,
    stop: Arc<OwnedFd>,
}

impl Reader {
    fn run(&self) {
        let mut faults = Vec::new();
        loop {
            let refused = self.logic.has_refused();
            match self.wait(refused) {
                Ok(false) => return,
                Ok(true) => {}
                Err(error) => tracing::error!(%error, "waiting for page faults failed; trying again"),
            }
            if refused {
                self.logic.retry();
            }
            faults.clear();
            if let Err(error) = self.uffd.read(&mut faults) {
                tracing::error!(%error, "reading page faults failed; trying again");
            }
            for fault in &faults {
                self.answer(*fault);
            }
        }
    }

    /// Waits for a fault, or until it is time to try again; `false` when the thread is to end.
    fn wait(&self, refused: bool) -> io::Result<bool> {
        let mut fds = [
            PollFd::new(&*self.uffd, PollFlags::IN),
            PollFd::new(&self.stop, PollFlags::IN),
        ];
        let pause = Timespec {
            tv_sec: RETRY_SECONDS,
            tv_nsec: 0,
        };
        match poll(&mut fds, refused.then_some(&pause)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(fds[1].revents().is_empty()),
            Err(error) => Err(error.into()),
        }
    }

    fn answer(&self, fault: Fault) {
        match self
            .mappings
            .iter()
            .find_map(|mapping| mapping.page_at(fault.address))
        {
            Some(page) => self.logic.fault(page, fault.minor),
            None => tracing::error!(address = fault.address.0, "a page fault outside guest memory"),
        }
    }
}
