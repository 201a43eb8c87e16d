//! How requests reach the control thread, which sleeps on an event descriptor together with the machine's end.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::fault::Fault;
use super::request::{Reply, Request};

/// What becomes of a request.
pub type Outcome = Result<Reply, Fault>;

/// Who hears of it.
type Answer = Box<dyn FnOnce(Outcome) + Send>;

/// Requests in the order in which they came. There are never more than connections: each waits for its answer.
pub struct Inbox {
    queue: Mutex<VecDeque<(Request, Answer)>>,
    must_end: AtomicBool,
    event: EventFd,
}

impl Inbox {
    /// An empty one.
    ///
    /// # Errors
    /// When no event descriptor can be had.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            queue: Mutex::new(VecDeque::new()),
            must_end: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    /// Leaves a request for the control thread. `answer` is called on that thread, and must not block; it is dropped
    /// unheard if the monitor ends before.
    pub fn post(&self, request: Request, answer: impl FnOnce(Outcome) + Send + 'static) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back((request, Box::new(answer)));
        self.wake();
    }

    /// Asks the control thread to end.
    pub fn end(&self) {
        self.must_end.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // Fails only if the counter is full, and then the control thread is awake.
        let _ = self.event.write(1);
    }

    pub(super) fn must_end(&self) -> bool {
        self.must_end.load(Ordering::Acquire)
    }

    pub(super) fn next(&self) -> Option<(Request, Answer)> {
        self.next_that(|_| true)
    }

    /// The first request that is `wanted`; the others keep their places.
    pub(super) fn next_that(&self, wanted: impl Fn(&Request) -> bool) -> Option<(Request, Answer)> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let at = queue.iter().position(|(request, _)| wanted(request))?;
        queue.remove(at)
    }

    /// Readable when there may be something to do.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }
}
