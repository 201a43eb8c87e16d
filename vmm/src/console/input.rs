//! The thread that brings input to a serial port, no faster than the guest reads it. The guest channel's port has one, too.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use runnel_devices::serial::{FIFO_BYTES, Serial};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What a source waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wait {
    /// Where its input comes from.
    pub(crate) fd: RawFd,
    /// Whether it also waits to send there.
    pub(crate) to_write: bool,
}

/// Where input comes from, and perhaps output goes.
pub(crate) trait Source: Send {
    /// What to wait for; none, if there will be no more input.
    fn wait(&self) -> Option<Wait>;
    /// Signalled when the answer of [`wait`](Self::wait) has changed.
    fn wake(&self) -> Option<&EventFd>;
    /// Sends what waits to be sent.
    fn send(&mut self);
    /// Takes what is there, into `buffer`; 0 if that was nothing.
    fn take(&mut self, buffer: &mut [u8]) -> usize;
}

/// A stream that ends some time.
pub(crate) struct Stream {
    file: File,
    has_ended: bool,
}

impl Stream {
    pub(crate) fn new(file: File) -> Self {
        Self {
            file,
            has_ended: false,
        }
    }
}

impl Source for Stream {
    fn wait(&self) -> Option<Wait> {
        (!self.has_ended).then(|| Wait {
            fd: self.file.as_raw_fd(),
            to_write: false,
        })
    }

    fn wake(&self) -> Option<&EventFd> {
        None
    }

    fn send(&mut self) {}

    fn take(&mut self, buffer: &mut [u8]) -> usize {
        match self.file.read(buffer) {
            Ok(0) => {
                self.has_ended = true;
                0
            }
            Ok(bytes) => bytes,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) =>
            {
                0
            }
            Err(error) => {
                tracing::warn!(%error, "the serial console's input has ended");
                self.has_ended = true;
                0
            }
        }
    }
}

/// The running thread; dropping it ends it.
pub(crate) struct InputThread {
    quit: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl InputThread {
    pub(crate) fn start(name: &str, source: Box<dyn Source>, serial: Arc<Serial>) -> io::Result<Self> {
        let quit = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let carrier = Carrier {
            source,
            serial,
            quit: Arc::clone(&quit),
            buffer: [0; FIFO_BYTES],
            held: 0..0,
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || carrier.run())?;
        Ok(Self {
            quit,
            thread: Some(thread),
        })
    }
}

impl Drop for InputThread {
    fn drop(&mut self) {
        // Fails only if the counter is full: the thread is awake then.
        let _ = self.quit.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for InputThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InputThread")
    }
}

struct Carrier {
    source: Box<dyn Source>,
    serial: Arc<Serial>,
    quit: Arc<EventFd>,
    buffer: [u8; FIFO_BYTES],
    /// What of the buffer the port has not taken yet.
    held: std::ops::Range<usize>,
}

/// What a wait came to.
struct Ready {
    quit: bool,
    input: bool,
    output: bool,
}

impl Carrier {
    fn run(mut self) {
        // Input that is held back still goes in after the source's end.
        while let Some(wait) = self.source.wait().or(self.held_alone()) {
            let ready = self.wait_for(wait);
            if ready.quit {
                return;
            }
            if ready.output {
                self.source.send();
            }
            if self.held.is_empty() && ready.input {
                self.held = 0..self.source.take(&mut self.buffer);
            }
            self.held.start += self.serial.offer(&self.buffer[self.held.clone()]);
        }
    }

    fn held_alone(&self) -> Option<Wait> {
        (!self.held.is_empty()).then_some(Wait {
            fd: -1,
            to_write: false,
        })
    }

    /// Waits until something can be done; entries without a descriptor are never ready.
    fn wait_for(&self, wait: Wait) -> Ready {
        let entry = |fd, events| libc::pollfd {
            fd,
            events,
            revents: 0,
        };
        let wake = self.source.wake();
        let reading = if self.held.is_empty() { libc::POLLIN } else { 0 };
        let writing = if wait.to_write { libc::POLLOUT } else { 0 };
        // A descriptor with nothing to wait for would still report its end, again and again.
        let source = if reading | writing == 0 { -1 } else { wait.fd };
        let room = if self.held.is_empty() {
            -1
        } else {
            self.serial.room().as_raw_fd()
        };
        let mut entries = [
            entry(self.quit.as_raw_fd(), libc::POLLIN),
            entry(source, reading | writing),
            entry(room, libc::POLLIN),
            entry(wake.map_or(-1, AsRawFd::as_raw_fd), libc::POLLIN),
        ];
        // SAFETY: `entries` is an array of as many entries as are named, valid for the call.
        let _ = unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as libc::nfds_t, -1) };
        // Cleared before anything is done: what comes up meanwhile wakes the next wait.
        if entries[2].revents != 0 {
            let _ = self.serial.room().read();
        }
        if entries[3].revents != 0 {
            let _ = wake.map(EventFd::read);
        }
        let is = |event| entries[1].revents & event != 0;
        Ready {
            quit: entries[0].revents != 0,
            input: is(libc::POLLIN | libc::POLLHUP | libc::POLLERR),
            output: is(libc::POLLOUT),
        }
    }
}
