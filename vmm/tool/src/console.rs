//! A guest's serial console on this terminal: standard input and output joined to the monitor's console socket.
//!
//! One thread waits for the keyboard, the guest and signals, and never for a guest that does not read what was typed.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use crate::output::OutputError;
use crate::signals::Signals;
use crate::terminal::RawTerminal;

/// Ctrl-]: leaves the console, as with telnet and virsh.
const LEAVE: u8 = 0x1d;

/// What is read at once.
const PIECE_BYTES: usize = 16 << 10;

/// Why the console cannot be shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConsoleError {
    /// Nobody listens.
    #[error("the console at {socket} cannot be reached")]
    Connect {
        /// Where it should be.
        socket: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The terminal cannot be used.
    #[error("the terminal cannot be set up")]
    Terminal(#[source] io::Error),
    /// Waiting or copying failed.
    #[error("the console broke off")]
    Broken(#[from] io::Error),
    /// What the guest says can be shown no more.
    #[error("what the guest says cannot be shown")]
    Output(#[source] OutputError),
}

/// Why a console is no longer shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Ctrl-] was pressed.
    Key,
    /// The monitor closed it: the machine has ended.
    Ended,
    /// A signal came.
    Signal(i32),
}

/// A connection to a guest's console. There is one at a time: another waits until this one is gone.
#[derive(Debug)]
pub(crate) struct Console {
    socket: UnixStream,
}

impl Console {
    /// Connects to the socket.
    ///
    /// # Errors
    /// When nobody listens.
    pub(crate) fn connect(socket: &Path) -> Result<Self, ConsoleError> {
        let connected = UnixStream::connect(socket);
        let socket = connected.map_err(|source| ConsoleError::Connect {
            socket: socket.to_owned(),
            source,
        })?;
        Ok(Self { socket })
    }

    /// Joins it to standard input and output until one of the two is left.
    ///
    /// # Errors
    /// When the terminal cannot be used.
    pub(crate) fn join(self, signals: &Signals) -> Result<Left, ConsoleError> {
        let input = rustix::stdio::stdin();
        let terminal = RawTerminal::enter(input).map_err(ConsoleError::Terminal)?;
        let mut link = Link {
            socket: self.socket,
            keyboard: Keyboard::new(terminal.is_some()),
            input: Some(input),
        };
        let left = link.carry(signals, &mut io::stdout().lock());
        drop(terminal);
        left
    }
}

/// What was typed and has not been sent yet.
struct Keyboard {
    held: Vec<u8>,
    has_leave_key: bool,
    wants_to_leave: bool,
}

impl Keyboard {
    /// The key that leaves means something on a terminal alone: what a program writes goes to the guest as it is.
    fn new(has_leave_key: bool) -> Self {
        Self {
            held: Vec::new(),
            has_leave_key,
            wants_to_leave: false,
        }
    }

    fn press(&mut self, keys: &[u8]) {
        let leave = keys.iter().position(|key| self.has_leave_key && *key == LEAVE);
        self.held.extend_from_slice(&keys[..leave.unwrap_or(keys.len())]);
        self.wants_to_leave |= leave.is_some();
    }
}

struct Link<'i> {
    socket: UnixStream,
    keyboard: Keyboard,
    /// `None` once it has ended: a guest may still have much to say.
    input: Option<BorrowedFd<'i>>,
}

/// What a wait came to.
struct Ready {
    guest: bool,
    input: bool,
    signal: bool,
}

impl Link<'_> {
    fn carry(&mut self, signals: &Signals, output: &mut impl Write) -> Result<Left, ConsoleError> {
        loop {
            let ready = self.wait(signals)?;
            // Output first: what the guest said before it ended is shown.
            if ready.guest && !self.show(output)? {
                return Ok(Left::Ended);
            }
            if let Some(signal) = ready.signal.then(|| signals.next()).flatten() {
                return Ok(Left::Signal(signal));
            }
            if ready.input {
                self.type_in()?;
            }
            self.send()?;
            if self.keyboard.wants_to_leave {
                return Ok(Left::Key);
            }
        }
    }

    fn wait(&self, signals: &Signals) -> io::Result<Ready> {
        let idle = self.keyboard.held.is_empty();
        let guest = if idle {
            PollFlags::IN
        } else {
            PollFlags::IN | PollFlags::OUT
        };
        let mut entries = vec![
            PollFd::new(&self.socket, guest),
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        ];
        // What the guest does not take is not read from the keyboard either.
        let listens = self.input.filter(|_| idle);
        entries.extend(listens.map(|input| PollFd::from_borrowed_fd(input, PollFlags::IN)));
        match poll(&mut entries, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let any = |at: usize| entries.get(at).is_some_and(|entry| !entry.revents().is_empty());
        let guest = entries[0]
            .revents()
            .intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        Ok(Ready {
            guest,
            signal: any(1),
            input: any(2),
        })
    }

    /// Shows what the guest said. False once there is no more.
    fn show(&mut self, output: &mut impl Write) -> Result<bool, ConsoleError> {
        let mut piece = [0; PIECE_BYTES];
        match self.socket.read(&mut piece) {
            Ok(0) => Ok(false),
            Ok(len) => {
                let shown = output.write_all(&piece[..len]).and_then(|()| output.flush());
                shown.map_err(|error| ConsoleError::Output(error.into()))?;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn type_in(&mut self) -> io::Result<()> {
        let Some(input) = self.input else { return Ok(()) };
        let mut piece = [0; PIECE_BYTES];
        match rustix::io::read(input, &mut piece) {
            Ok(0) => self.input = None,
            Ok(len) => self.keyboard.press(&piece[..len]),
            Err(Errno::INTR | Errno::AGAIN) => {}
            // A terminal that has hung up.
            Err(Errno::IO) => self.input = None,
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Sends what the guest takes now.
    fn send(&mut self) -> io::Result<()> {
        while !self.keyboard.held.is_empty() {
            match send(
                &self.socket,
                &self.keyboard.held,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            ) {
                Ok(sent) => drop(self.keyboard.held.drain(..sent)),
                Err(Errno::INTR) => {}
                // The end is noticed where output is read.
                Err(Errno::AGAIN | Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::thread;

    use super::*;

    #[test]
    fn the_key_that_leaves_is_not_typed_and_nothing_behind_it_is() {
        let mut keyboard = Keyboard::new(true);
        keyboard.press(b"ls\r");
        assert!(!keyboard.wants_to_leave);
        keyboard.press(b"x\x1dy");
        assert!(keyboard.wants_to_leave);
        assert_eq!(keyboard.held, b"ls\rx");
    }

    #[test]
    fn what_no_terminal_types_goes_to_the_guest_as_it_is() {
        let mut keyboard = Keyboard::new(false);
        keyboard.press(b"a\x1db");
        assert_eq!(keyboard.held, b"a\x1db");
        assert!(!keyboard.wants_to_leave);
    }

    #[test]
    fn input_reaches_the_guest_and_its_last_words_are_shown() {
        let (socket, mut guest) = UnixStream::pair().unwrap();
        let typed = tempfile::NamedTempFile::new().unwrap();
        let large = vec![b'k'; 1 << 20];
        std::fs::write(typed.path(), &large).unwrap();
        let input = File::open(typed.path()).unwrap();
        let expected = large.len();
        let guest = thread::spawn(move || {
            let mut heard = vec![0; expected];
            guest.read_exact(&mut heard).unwrap();
            guest.write_all(b"bye").unwrap();
            heard
        });

        let signals = Signals::take().unwrap();
        let mut link = Link {
            socket,
            keyboard: Keyboard::new(false),
            input: Some(input.as_fd()),
        };
        let mut shown = Vec::new();
        assert_eq!(link.carry(&signals, &mut shown).unwrap(), Left::Ended);
        assert_eq!(shown, b"bye");
        assert!(guest.join().unwrap() == large);
    }
}
