//! The threads that devices run on, and how they are made to stand still.
//!
//! An [`EventLoop`] is one thread that waits for the events of its subscribers and calls them. The machine has one
//! for all devices that never wait for long, and one more for each drive, because a drive's store may wait for a
//! chunk from afar while everything else must go on.
//!
//! ```text
//!            freeze()                     the round of calls ends
//!  running ───────────► asked to stop ─────────────────────────► frozen
//!     ▲                      │ give_up() said so                    │
//!     └──────────────────────┴──────────────────────────────────────┘ Frozen is dropped
//! ```
//!
//! While a [`Frozen`] lives, no subscriber of the loop runs, so no device touches guest memory. A subscriber that has
//! much to do looks at its [`StopFlag`] and returns early; one that waits for a chunk cannot, and then `give_up`
//! decides how long that is tolerated: if it says so, the freeze is withdrawn and the devices go on.
//!
//! **Never** calls a subscriber from two threads, and never drops events: those that come in while frozen are
//! delivered after the thaw.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId};

/// Something that an event loop calls.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// How often a freeze that has to wait asks whether to give up. Too rare, and an operator waits for the answer; too
/// often, and the waiting costs time that the device needs.
const GIVE_UP_POLL: Duration = Duration::from_millis(5);

/// Why an event loop cannot be had or used.
#[derive(Debug, thiserror::Error)]
pub enum EventLoopError {
    /// No epoll instance or event descriptor.
    #[error("event loop {name:?} gets no event descriptors")]
    Create {
        /// Which loop.
        name: String,
        /// Why.
        #[source]
        source: event_manager::Error,
    },
    /// No thread.
    #[error("event loop {name:?} gets no thread")]
    Spawn {
        /// Which loop.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The loop has ended.
    #[error("event loop {name:?} does not answer: it has ended")]
    Ended {
        /// Which loop.
        name: String,
        /// Why.
        #[source]
        source: event_manager::Error,
    },
}

/// Devices that did not come to a halt before the caller gave up.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} still at work; the devices go on", .loops.join(", "))]
pub struct StillBusy {
    /// The names of the loops whose devices were at work.
    pub loops: Vec<String>,
}

/// Tells a subscriber that a freeze waits for it.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Whether to return soon, with work left.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Where a loop's thread waits while it is frozen.
#[derive(Debug, Default)]
struct Gate {
    /// Mirrors `freezes > 0`, for a look without the lock.
    flag: StopFlag,
    /// A leaf: nothing else is locked under it.
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    /// How many freezes are asked for or in force.
    freezes: usize,
    /// The thread stands here.
    parked: bool,
    /// The thread is gone, and will touch nothing any more.
    ended: bool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self) {
        self.lock().freezes += 1;
        self.flag.0.store(true, Ordering::Relaxed);
    }

    fn release(&self) {
        let mut state = self.lock();
        state.freezes -= 1;
        self.flag.0.store(state.freezes > 0, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Called by the loop's thread between two rounds: stays while a freeze is in force.
    fn pass(&self) {
        let mut state = self.lock();
        while state.freezes > 0 {
            state.parked = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked = false;
    }

    fn wait_until_parked(&self, give_up: &dyn Fn() -> bool) -> bool {
        let mut state = self.lock();
        while !(state.parked || state.ended) {
            let (woken, _) = self
                .changed
                .wait_timeout(state, GIVE_UP_POLL)
                .unwrap_or_else(PoisonError::into_inner);
            state = woken;
            if !(state.parked || state.ended) && give_up() {
                return false;
            }
        }
        true
    }
}

/// Marks the gate when the thread ends, however it ends.
struct EndsWithThread(Arc<Gate>);

impl Drop for EndsWithThread {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

/// One device thread. See the module documentation.
pub struct EventLoop {
    name: String,
    endpoint: RemoteEndpoint<Subscriber>,
    gate: Arc<Gate>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts the thread. `name` appears in `ps` (its first 15 bytes) and in errors.
    ///
    /// # Errors
    /// When the process has no descriptors or threads left.
    pub fn start(name: &str) -> Result<Self, EventLoopError> {
        let mut manager = EventManager::<Subscriber>::new().map_err(|source| EventLoopError::Create {
            name: name.to_owned(),
            source,
        })?;
        let endpoint = manager.remote_endpoint();
        let gate = Arc::new(Gate::default());
        let stop = Arc::new(AtomicBool::new(false));
        let (thread_gate, thread_stop, thread_name) = (Arc::clone(&gate), Arc::clone(&stop), name.to_owned());
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _ends = EndsWithThread(Arc::clone(&thread_gate));
                while !thread_stop.load(Ordering::Acquire) {
                    if let Err(error) = manager.run() {
                        tracing::error!(%error, event_loop = thread_name, "devices stand still for good");
                        break;
                    }
                    thread_gate.pass();
                }
            })
            .map_err(|source| EventLoopError::Spawn {
                name: name.to_owned(),
                source,
            })?;
        Ok(Self {
            name: name.to_owned(),
            endpoint,
            gate,
            stop,
            thread: Some(thread),
        })
    }

    /// What subscribers look at while they work.
    #[must_use]
    pub fn stop_flag(&self) -> StopFlag {
        self.gate.flag.clone()
    }

    /// Adds a subscriber and returns when it is in place. Not for the loop's own thread, nor while it is frozen:
    /// both would wait for ever.
    ///
    /// # Errors
    /// When the loop has ended.
    pub fn add(&self, subscriber: Subscriber) -> Result<SubscriberId, EventLoopError> {
        self.endpoint
            .call_blocking(move |ops| Ok(ops.add_subscriber(subscriber)))
            .map_err(|source| EventLoopError::Ended {
                name: self.name.clone(),
                source,
            })
    }

    /// Takes a subscriber out; it is not called any more when this returns. The same restrictions as for
    /// [`add`](Self::add).
    ///
    /// # Errors
    /// When the loop has ended, or there is no such subscriber.
    pub fn remove(&self, id: SubscriberId) -> Result<Subscriber, EventLoopError> {
        self.endpoint
            .call_blocking(move |ops| ops.remove_subscriber(id))
            .map_err(|source| EventLoopError::Ended {
                name: self.name.clone(),
                source,
            })
    }

    /// Freezes several loops together. `give_up` is asked every few milliseconds while one of them is at work.
    ///
    /// # Errors
    /// [`StillBusy`] when `give_up` said so; then none is frozen.
    pub fn freeze_all<'l>(
        loops: impl IntoIterator<Item = &'l EventLoop>,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Frozen, StillBusy> {
        let loops: Vec<_> = loops.into_iter().collect();
        // Built first, so that whatever happens below, what was asked for is withdrawn.
        let frozen = Frozen {
            gates: loops.iter().map(|one| Arc::clone(&one.gate)).collect(),
        };
        for one in &loops {
            one.gate.ask();
            // Fails only when the counter is full, and then the loop is awake anyway.
            let _ = one.endpoint.kick();
        }
        let busy: Vec<_> = loops
            .iter()
            .filter(|one| !one.gate.wait_until_parked(give_up))
            .map(|one| one.name.clone())
            .collect();
        if busy.is_empty() {
            Ok(frozen)
        } else {
            Err(StillBusy { loops: busy })
        }
    }

    /// Ends the thread and waits for it: after this nothing of its subscribers runs. Waits as long as a subscriber
    /// does; merely dropping the loop does not wait.
    pub fn shut_down(mut self) {
        self.ask_to_end();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has ended, too, and has printed why.
            let _ = thread.join();
        }
    }

    fn ask_to_end(&self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.endpoint.kick();
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        // Not joined: a device that waits for a chunk which cannot be had must not keep the process from ending.
        self.ask_to_end();
    }
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop")
            .field("name", &self.name)
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

/// Event loops that stand still. Dropping it lets them go on.
#[must_use = "the devices go on as soon as this is dropped"]
#[derive(Debug)]
pub struct Frozen {
    gates: Vec<Arc<Gate>>,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        for gate in &self.gates {
            gate.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use event_manager::{EventOps, Events};
    use vmm_sys_util::epoll::EventSet;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    /// Says when it is called, and returns from the call when it is told.
    struct Worker {
        event: EventFd,
        called: Sender<()>,
        finish: Receiver<()>,
    }

    impl MutEventSubscriber for Worker {
        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }
        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
            self.event.read().unwrap();
            self.called.send(()).unwrap();
            self.finish.recv().unwrap();
        }
    }

    struct Rig {
        looped: EventLoop,
        event: EventFd,
        called: Receiver<()>,
        finish: Sender<()>,
        id: SubscriberId,
    }

    fn rig(name: &str) -> Rig {
        let looped = EventLoop::start(name).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let ((called_in, called), (finish, finish_out)) = (channel(), channel());
        let worker = Worker {
            event: event.try_clone().unwrap(),
            called: called_in,
            finish: finish_out,
        };
        let id = looped.add(Box::new(worker)).unwrap();
        Rig {
            looped,
            event,
            called,
            finish,
            id,
        }
    }

    #[test]
    fn events_of_a_frozen_loop_wait_for_the_thaw() {
        let rig = rig("frozen");
        let frozen = EventLoop::freeze_all([&rig.looped], &|| false).unwrap();
        rig.event.write(1).unwrap();
        rig.finish.send(()).unwrap();
        assert!(rig.called.try_recv().is_err(), "the thread stands at the gate");
        drop(frozen);
        rig.called.recv().unwrap();
        rig.looped.shut_down();
    }

    #[test]
    fn a_freeze_waits_for_the_call_in_progress() {
        let rig = rig("busy");
        rig.event.write(1).unwrap();
        rig.called.recv().unwrap();
        let asked = std::cell::Cell::new(0);
        let frozen = EventLoop::freeze_all([&rig.looped], &|| {
            asked.set(asked.get() + 1);
            if asked.get() == 2 {
                rig.finish.send(()).unwrap();
            }
            false
        });
        assert!(
            asked.get() >= 2,
            "it was waiting before the call was allowed to end"
        );
        drop(frozen.unwrap());
        rig.looped.shut_down();
    }

    #[test]
    fn a_freeze_that_is_given_up_leaves_every_loop_running_and_names_the_busy_one() {
        let (busy, idle) = (rig("drive-root"), rig("devices"));
        busy.event.write(1).unwrap();
        busy.called.recv().unwrap();
        assert!(!busy.looped.stop_flag().is_raised());

        let asked = EventLoop::freeze_all([&busy.looped, &idle.looped], &|| {
            assert!(
                busy.looped.stop_flag().is_raised(),
                "the device is told that somebody waits"
            );
            true
        });

        assert_eq!(
            asked.unwrap_err(),
            StillBusy {
                loops: vec!["drive-root".to_owned()]
            }
        );
        assert!(!busy.looped.stop_flag().is_raised());
        idle.event.write(1).unwrap();
        idle.called.recv().unwrap();
        for rig in [busy, idle] {
            rig.finish.send(()).unwrap();
            rig.looped.shut_down();
        }
    }

    #[test]
    fn freezes_nest() {
        let rig = rig("nested");
        let outer = EventLoop::freeze_all([&rig.looped], &|| false).unwrap();
        let inner = EventLoop::freeze_all([&rig.looped], &|| false).unwrap();
        drop(outer);
        assert!(rig.looped.stop_flag().is_raised());
        rig.event.write(1).unwrap();
        assert!(rig.called.try_recv().is_err());
        drop(inner);
        rig.called.recv().unwrap();
        rig.finish.send(()).unwrap();
        rig.looped.shut_down();
    }

    #[test]
    fn a_removed_subscriber_is_not_called_any_more() {
        let rig = rig("removed");
        drop(rig.looped.remove(rig.id).unwrap());
        rig.event.write(1).unwrap();
        // A round trip through the loop: had the event been seen, the call would have happened before.
        assert!(rig.looped.remove(rig.id).is_err());
        assert!(rig.called.try_recv().is_err());
        rig.looped.shut_down();
    }
}
