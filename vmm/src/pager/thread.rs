//! The thread that answers faults: reads them, hands them to the logic, and tries again what the host refused.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use runnel_snapshot::pager::{Fetcher, MemoryPager, WriteProtection};
use runnel_snapshot::units::PAGE_SIZE;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::install::{HostMapping, Installer};
use super::uffd::{Fault, FaultKind, UffdError, Userfaultfd, Watch};

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
    faults: FaultThread,
}

impl Pager {
    /// Registers guest memory, mapped privately from the page file of the fetcher's `memory` volume, and answers its
    /// faults from now on.
    ///
    /// # Errors
    /// When the host cannot page, or the source has no memory.
    pub fn start(fetcher: &Arc<Fetcher>, mappings: Vec<HostMapping>) -> Result<Self, PagerError> {
        let installer = Installer::watch(mappings, Watch::All)?;
        let logic = MemoryPager::new(fetcher, Box::new(installer.clone()))?;
        let faults = FaultThread::start(installer, Some(logic.clone()))?;
        Ok(Self { logic, faults })
    }

    /// The logic: stalls, counters, discarded pages.
    #[must_use]
    pub fn logic(&self) -> &Arc<MemoryPager> {
        &self.logic
    }

    /// Who write-protects the memory.
    #[must_use]
    pub fn write_protection(&self) -> &Arc<WriteProtection> {
        &self.faults.protection
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.faults.end();
        if self.logic.is_awaited() {
            // A thread that could not be ended waits for a page. Closing the descriptor would give it zeros; it is to
            // wait until the process ends.
            std::mem::forget(Arc::clone(&self.faults.uffd));
        }
    }
}

/// Guest memory of a machine that was booted, whose pages the kernel fills in, and whose writes are watched while it is
/// captured. To be dropped like a [`Pager`].
pub struct WriteWatch {
    faults: FaultThread,
}

impl WriteWatch {
    /// Registers guest memory, and answers writes to protected pages from now on. None is protected yet.
    ///
    /// # Errors
    /// When the host cannot.
    pub fn start(mappings: Vec<HostMapping>) -> Result<Self, PagerError> {
        let installer = Installer::watch(mappings, Watch::Writes)?;
        Ok(Self {
            faults: FaultThread::start(installer, None)?,
        })
    }

    /// Who write-protects the memory.
    #[must_use]
    pub fn write_protection(&self) -> &Arc<WriteProtection> {
        &self.faults.protection
    }
}

impl Installer {
    fn watch(mappings: Vec<HostMapping>, watch: Watch) -> Result<Self, UffdError> {
        let uffd = Arc::new(Userfaultfd::open()?);
        for mapping in &mappings {
            uffd.register(mapping.start, mapping.bytes, watch)?;
        }
        Ok(Self { uffd, mappings })
    }
}

/// The thread, and what it shares.
struct FaultThread {
    /// Kept open to the very end: when the last descriptor closes, waiting readers get zeros.
    uffd: Arc<Userfaultfd>,
    protection: Arc<WriteProtection>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl FaultThread {
    fn start(installer: Installer, logic: Option<Arc<MemoryPager>>) -> Result<Self, PagerError> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| PagerError::Thread(error.into()))?;
        let stop = Arc::new(stop);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let refused = eventfd(0, flags).map_err(|error| PagerError::Thread(error.into()))?;
        let refused = Arc::new(refused);
        if let Some(logic) = &logic {
            let refused = refused.clone();
            logic.on_refused(move || {
                // It fails only if the counter is full: then the thread is being told already.
                let _ = rustix::io::write(&refused, &1u64.to_ne_bytes());
            });
        }
        let uffd = installer.uffd.clone();
        let mappings = installer.mappings.clone();
        let pages = mappings
            .iter()
            .map(|mapping| mapping.first_page.0 + mapping.bytes / PAGE_SIZE)
            .max();
        let protection = WriteProtection::new(pages.unwrap_or(0), Box::new(installer));
        let reader = Reader {
            uffd: uffd.clone(),
            mappings,
            logic,
            protection: protection.clone(),
            stop: stop.clone(),
            refused,
        };
        let thread = std::thread::Builder::new()
            .name("pager".into())
            .spawn(move || reader.run())
            .map_err(PagerError::Thread)?;
        Ok(Self {
            uffd,
            protection,
            stop,
            thread: Some(thread),
        })
    }

    fn end(&mut self) {
        // Writing fails only if the counter overflows, and then the thread is being told already.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the pager's thread panicked");
        }
    }
}

impl Drop for FaultThread {
    fn drop(&mut self) {
        self.end();
    }
}

struct Reader {
    uffd: Arc<Userfaultfd>,
    mappings: Vec<HostMapping>,
    /// `None` if the kernel fills in what is missing.
    logic: Option<Arc<MemoryPager>>,
    protection: Arc<WriteProtection>,
    stop: Arc<OwnedFd>,
    /// Readable when the host has refused something since it was last looked.
    refused: Arc<OwnedFd>,
}

impl Reader {
    fn run(&self) {
        let mut faults = Vec::new();
        loop {
            // In this order: what is refused from here on wakes this thread, and is tried again after a pause.
            let _ = rustix::io::read(&self.refused, &mut [0; 8]); // nothing is there, most often
            let refused = self.logic.as_ref().filter(|logic| logic.has_refused());
            match self.wait(refused.is_some()) {
                Ok(false) => return,
                Ok(true) => {}
                Err(error) => tracing::error!(%error, "waiting for page faults failed; trying again"),
            }
            if let Some(logic) = refused {
                logic.retry();
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
            PollFd::new(&*self.refused, PollFlags::IN),
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
        let mapping = self
            .mappings
            .iter()
            .find_map(|mapping| mapping.page_at(fault.address));
        let Some(page) = mapping else {
            return tracing::error!(address = fault.address.0, "a page fault outside guest memory");
        };
        match (fault.kind, &self.logic) {
            (FaultKind::Write, _) => self.protection.write_fault(page),
            (kind, Some(logic)) => logic.fault(page, kind == FaultKind::Minor),
            (_, None) => tracing::error!(page = page.0, "a fault on memory that the kernel fills in"),
        }
    }
}
