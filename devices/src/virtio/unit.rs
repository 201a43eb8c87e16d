//! The half of a device that runs on an event loop: its queues, and what serves them while a driver is attached.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use runnel_snapshot::block_store::GuestRam;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::link::DriverLink;
use super::queue::{QueueError, VirtQueue};
use crate::event_loop::StopFlag;

/// Why a device is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// The driver has put something into this queue.
    Queue(usize),
    /// The device's own source has something, or has room: a tap.
    Source,
}

/// How a call of a device ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left; the driver kicks when there is more.
    Idle,
    /// It returned early: call again for this queue.
    Again(usize),
}

/// Why a device is taken away from its driver.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFault {
    /// A queue was misused.
    #[error("the driver misused a queue")]
    Queue(#[from] QueueError),
    /// A request has not the form that the device's specification asks for.
    #[error("the driver sent a malformed request: {0}")]
    Request(&'static str),
}

/// What a device works with during one call.
#[derive(Debug)]
pub struct Context<'c> {
    /// Guest RAM.
    pub ram: &'c GuestRam,
    /// The queues, by number; those that the driver did not set up are absent.
    pub queues: &'c mut [Option<VirtQueue>],
    /// Raised when a freeze waits: return [`Progress::Again`] after the request in hand.
    pub stop: &'c StopFlag,
}

/// A device that a driver has set up: serves its queues.
///
/// When a call returns, nothing of the device is under way: each chain taken out was completed or put back.
pub trait ActiveDevice: Send {
    /// Serves what there is to serve.
    ///
    /// # Errors
    /// When the driver broke the rules. The device is not called again until it is reset.
    fn process(&mut self, why: Wake, context: &mut Context<'_>) -> Result<Progress, DeviceFault>;
}

pub(super) struct Active {
    pub(super) device: Box<dyn ActiveDevice>,
    pub(super) queues: Vec<Option<VirtQueue>>,
    /// Rebuilt and not let go on yet: RAM and interrupt controllers may not be there, and a tap does not wait.
    pub(super) is_resting: bool,
}

/// The place where an active device lives. Empty before a driver has set it up, after a reset and after a fault:
/// then nothing touches guest memory.
#[derive(Clone)]
pub(super) struct Unit {
    /// Held by the event loop for one call, which lasts as long as the device works; by the transport to put a
    /// device in or take it out. Taken after the transport's registers, never before.
    active: Arc<Mutex<Option<Active>>>,
    ram: Arc<GuestRam>,
    link: Arc<DriverLink>,
    /// The kind of device, for the log.
    kind: &'static str,
}

impl Unit {
    pub(super) fn new(kind: &'static str, ram: Arc<GuestRam>, link: Arc<DriverLink>) -> Self {
        Self {
            active: Arc::new(Mutex::new(None)),
            ram,
            link,
            kind,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        // A device that panicked left its queues between two requests; the loop's thread has ended with it.
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the device, if a driver has set it up and it is not resting; says for which queue to call again.
    fn run(&self, why: Wake, stop: &StopFlag) -> Option<usize> {
        let mut slot = self.lock();
        let active = slot.as_mut().filter(|active| !active.is_resting)?;
        let mut context = Context {
            ram: &self.ram,
            queues: &mut active.queues,
            stop,
        };
        match active.device.process(why, &mut context) {
            Ok(Progress::Idle) => None,
            Ok(Progress::Again(queue)) => Some(queue),
            Err(fault) => {
                *slot = None;
                self.link.break_device(self.kind, &fault);
                None
            }
        }
    }
}

/// Listens to the kicks of a device's queues, and to its source.
pub(super) struct Runner {
    pub(super) unit: Unit,
    pub(super) kicks: Vec<EventFd>,
    pub(super) source: Option<RawFd>,
    pub(super) stop: StopFlag,
}

/// Marks the source among the events; queues are marked by their number.
const SOURCE: u32 = u32::MAX;

impl MutEventSubscriber for Runner {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let kicks = self
            .kicks
            .iter()
            .zip(0..)
            .map(|(kick, number)| Events::with_data(kick, number, EventSet::IN));
        // The source is edge-triggered: when the guest has no buffers for what waits there, it stays readable.
        let both_ways = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let source = self.source.map(|fd| Events::with_data_raw(fd, SOURCE, both_ways));
        for events in kicks.chain(source) {
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, "a device gets no events");
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        let why = match events.data() {
            SOURCE => Wake::Source,
            number => {
                let queue = number as usize;
                // Before the queue is looked at: a kick that comes in later is a new one.
                let _ = self.kicks[queue].read();
                Wake::Queue(queue)
            }
        };
        if let Some(kick) = self
            .unit
            .run(why, &self.stop)
            .and_then(|queue| self.kicks.get(queue))
        {
            // Through the loop rather than at once, so that other devices and a freeze get their turn.
            let _ = kick.write(1);
        }
    }
}
