//! The conversation behind its serial port: what the guest writes is heard on its vCPU's thread, what it is told goes
//! in on a thread of its own, no faster than it reads.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use runnel_devices::serial::{Serial, Sink};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::conversation::{Answer, Conversation, Heard, NotAsked};
use super::line::{Generation, HookId};
use crate::console::input::{InputThread, Source, Wait};

/// Of a line that is ignored, so much is shown, once.
const SHOWN_BYTES_MAX: usize = 80;

/// Why there is no guest channel.
#[derive(Debug, thiserror::Error)]
pub enum GuestChannelError {
    /// No event descriptor.
    #[error("no event descriptor is to be had for the guest channel")]
    Event(#[source] io::Error),
    /// No thread.
    #[error("cannot start a thread for the guest channel")]
    Thread(#[source] io::Error),
    /// No randomness.
    #[error("cannot get random bytes for the guest channel")]
    Random(#[source] io::Error),
    /// An image with a line that cannot be.
    #[error("the image has {0} bytes of a line of the guest channel, and a line has fewer")]
    Line(usize),
}

/// What the threads share.
struct Shared {
    /// Held for a few assignments. The serial port's lock may be held when it is taken, and never is taken under it.
    conversation: Mutex<Conversation>,
    /// Told when the guest has said something.
    news: Condvar,
    /// Readable when something is to be sent.
    mail: EventFd,
    has_agent: Arc<AtomicBool>,
}

impl Shared {
    fn conversation(&self) -> MutexGuard<'_, Conversation> {
        // What was heard and what is to be sent is whole after every assignment.
        self.conversation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, byte: u8) {
        let mut conversation = self.conversation();
        match conversation.hear(byte) {
            Heard::Nothing => {}
            Heard::News => {
                let has_agent = conversation.has_agent();
                if self.has_agent.swap(has_agent, Ordering::Relaxed) != has_agent {
                    // For whoever debugs: a guest can say it as often as it likes.
                    tracing::debug!(has_agent, "The guest's agent has come or gone.");
                }
                self.news.notify_all();
            }
            Heard::Ignored(line) if conversation.ignored_lines() == 1 => {
                let shown = line.get(..SHOWN_BYTES_MAX).unwrap_or(&line).escape_ascii();
                tracing::warn!(
                    line = %shown,
                    "the guest says on its channel what is no line of the protocol, or too late: \
                     this and what more of it comes is ignored"
                );
            }
            Heard::Ignored(_) => {}
        }
    }

    fn send(&self) {
        // Fails only if the counter is full: the thread is awake then.
        let _ = self.mail.write(1);
    }
}

/// The monitor's end of the channel.
pub struct GuestChannel {
    shared: Arc<Shared>,
    /// What the machine is to be told when it runs, if it goes on from an image.
    generation: Option<Generation>,
    thread: Option<InputThread>,
}

impl GuestChannel {
    /// That of a machine that boots.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn new() -> Result<Self, GuestChannelError> {
        Self::with(Conversation::default(), None)
    }

    pub(super) fn with(
        conversation: Conversation,
        generation: Option<Generation>,
    ) -> Result<Self, GuestChannelError> {
        let mail = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(GuestChannelError::Event)?;
        let has_agent = Arc::new(AtomicBool::new(conversation.has_agent()));
        let shared = Shared {
            conversation: Mutex::new(conversation),
            news: Condvar::new(),
            mail,
            has_agent,
        };
        Ok(Self {
            shared: Arc::new(shared),
            generation,
            thread: None,
        })
    }

    /// What the guest's output is to be written to.
    #[must_use]
    pub fn sink(&self) -> Sink {
        Box::new(Ear(Arc::clone(&self.shared)))
    }

    /// Lets what the guest is told go to `serial` from now on.
    ///
    /// # Errors
    /// When there is no thread to be had for it.
    pub fn connect(&mut self, serial: &Arc<Serial>) -> Result<(), GuestChannelError> {
        let mouth = Box::new(Mouth(Arc::clone(&self.shared)));
        let thread = InputThread::start("guest channel", mouth, Arc::clone(serial));
        self.thread = Some(thread.map_err(GuestChannelError::Thread)?);
        Ok(())
    }

    /// Tells a machine that goes on from an image that it does. Before its vCPUs run.
    pub fn resume(&self) {
        if let Some(generation) = self.generation {
            self.shared.conversation().restored(generation);
            self.shared.send();
        }
    }

    /// Asks the guest to prepare for a snapshot. [`let_go`](Self::let_go) takes it back.
    ///
    /// # Errors
    /// When nobody is there who could be asked.
    pub fn ask(&self, id: HookId, deadline: Duration) -> Result<(), NotAsked> {
        self.shared.conversation().ask(id, deadline)?;
        self.shared.send();
        Ok(())
    }

    /// What the guest says to what it was asked, waited for no longer than `at_most`.
    #[must_use]
    pub fn answer(&self, at_most: Duration) -> Option<Answer> {
        let is_silent = |conversation: &mut Conversation| conversation.answer().is_none();
        let waited = self
            .shared
            .news
            .wait_timeout_while(self.shared.conversation(), at_most, is_silent);
        let (conversation, _) = waited.unwrap_or_else(PoisonError::into_inner);
        conversation.answer().cloned()
    }

    /// Tells the guest that the snapshot is over, if it was asked and not told yet.
    pub fn let_go(&self) {
        let ignored_lines = {
            let mut conversation = self.shared.conversation();
            if !conversation.let_go() {
                return;
            }
            conversation.ignored_lines()
        };
        self.shared.send();
        tracing::debug!(ignored_lines, "The guest is told that the snapshot is over.");
    }

    /// Whether an agent has announced itself, for whoever wants to look at any time.
    #[must_use]
    pub fn has_agent(&self) -> &Arc<AtomicBool> {
        &self.shared.has_agent
    }

    pub(super) fn conversation(&self) -> MutexGuard<'_, Conversation> {
        self.shared.conversation()
    }
}

impl fmt::Debug for GuestChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestChannel")
            .field("has_agent", &self.shared.has_agent)
            .finish_non_exhaustive()
    }
}

/// Hears what the guest writes.
struct Ear(Arc<Shared>);

impl Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        bytes.iter().for_each(|byte| self.0.hear(*byte));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Says what there is to be said.
struct Mouth(Arc<Shared>);

impl Source for Mouth {
    fn wait(&self) -> Option<Wait> {
        Some(Wait {
            fd: self.0.mail.as_raw_fd(),
            to_write: false,
        })
    }

    fn wake(&self) -> Option<&EventFd> {
        None
    }

    fn send(&mut self) {}

    fn take(&mut self, buffer: &mut [u8]) -> usize {
        // Fails only if nothing is there. Cleared before it is looked what is to be sent: what comes then is announced.
        let _ = self.0.mail.read();
        let mut conversation = self.0.conversation();
        let bytes = conversation.take(buffer);
        if conversation.has_more() {
            self.0.send();
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use runnel_devices::bus::{BusDevice as _, Offset};
    use runnel_devices::interrupt::Interrupt;
    use runnel_devices::serial::SerialDeps;

    use super::*;

    /// Longer than anything takes here.
    const DEADLINE: Duration = Duration::from_secs(20);

    /// A guest at the other end, which looks at the port's registers by hand.
    struct Guest {
        channel: GuestChannel,
        serial: Arc<Serial>,
    }

    impl Guest {
        fn over(mut channel: GuestChannel) -> Self {
            let deps = SerialDeps {
                interrupt: Interrupt::new().unwrap(),
                output: channel.sink(),
            };
            let serial = Arc::new(Serial::new(deps).unwrap());
            channel.connect(&serial).unwrap();
            Self { channel, serial }
        }

        fn says(&self, text: &str) {
            for byte in text.bytes() {
                self.serial.write(Offset(0), &[byte]);
            }
        }

        /// Reads one line.
        fn reads(&self) -> String {
            let until = Instant::now() + DEADLINE;
            let register = |offset| {
                let mut data = [0];
                self.serial.read(Offset(offset), &mut data);
                data[0]
            };
            let mut line = String::new();
            while !line.ends_with('\n') {
                assert!(Instant::now() < until, "only {line:?} came");
                match register(5) & 1 {
                    0 => std::thread::yield_now(),
                    _ => line.push(char::from(register(0))),
                }
            }
            line
        }
    }

    #[test]
    fn a_guest_that_reads_late_gets_every_line_and_its_answer_is_heard() {
        let guest = Guest::over(GuestChannel::new().unwrap());
        guest.says("hello 1\n");
        assert!(guest.channel.has_agent().load(Ordering::Relaxed));
        // More than the port's FIFO holds.
        let first = HookId::new().unwrap();
        guest.channel.ask(first, DEADLINE).unwrap();
        assert_eq!(guest.channel.answer(Duration::ZERO), None);
        guest.channel.let_go();
        let second = HookId::new().unwrap();
        guest.channel.ask(second, DEADLINE).unwrap();
        for line in [
            format!("prepare {first} 20000\n"),
            format!("resumed {first}\n"),
            format!("prepare {second} 20000\n"),
        ] {
            assert_eq!(guest.reads(), line);
        }
        guest.says(&format!("ready {second}\n"));
        assert_eq!(guest.channel.answer(DEADLINE), Some(Answer::Ready));
        guest.channel.let_go();
        guest.channel.let_go();
        assert_eq!(guest.reads(), format!("resumed {second}\n"));
    }

    #[test]
    fn an_answer_wakes_whoever_waits_for_it() {
        let guest = Guest::over(GuestChannel::new().unwrap());
        guest.says("hello 1\n");
        let id = HookId::new().unwrap();
        guest.channel.ask(id, DEADLINE).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| guest.channel.answer(DEADLINE));
            guest.says(&format!("failed {id} the disk is full\n"));
            assert_eq!(
                waiter.join().unwrap(),
                Some(Answer::Failed("the disk is full".to_owned()))
            );
        });
    }

    #[test]
    fn only_a_machine_that_goes_on_from_an_image_is_told_so() {
        let generation = Generation::new().unwrap();
        let restored = GuestChannel::with(Conversation::default(), Some(generation)).unwrap();
        let guest = Guest::over(restored);
        guest.channel.resume();
        assert_eq!(
            [guest.reads(), guest.reads()].concat(),
            format!("\nrestored {generation}\n")
        );

        let guest = Guest::over(GuestChannel::new().unwrap());
        guest.channel.resume();
        assert!(!guest.channel.conversation().has_more());
    }
}
