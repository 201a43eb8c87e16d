//! Where the guest's serial console ends on the host: the monitor's standard input and output, a file, or a socket.
//!
//! What the guest prints goes from its vCPU's thread into a sink, which never waits for long: where the other end may
//! be slow, a queue and a thread stand between. What a person types comes in through a thread of its own, which holds
//! back what does not fit into the port's FIFO until the guest has read.

pub(crate) mod input;
mod output;
mod socket;
mod terminal;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use runnel_devices::serial::{Serial, Sink};

use crate::config;
use input::InputThread;
use output::OutputThread;
use socket::ConsoleSocket;
use terminal::RawTerminal;

/// How much of the guest's output is kept for a reader: all messages of a kernel that panicked before anybody looked.
const QUEUE_BYTES_MAX: usize = 256 << 10;

/// How long a reader that reads nothing may hold up the vCPU that prints, once the queue is full.
const READER_WAIT: Duration = Duration::from_secs(1);

/// Why the console cannot end where it should.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The monitor has no such stream.
    #[error("cannot use the monitor's standard {stream} for the serial console")]
    Standard {
        /// Which one.
        stream: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The file cannot be opened.
    #[error("cannot open {path:?} for the serial console's output")]
    File {
        /// Where it is.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("cannot make the socket {path:?} for the serial console: is another machine's there?")]
    Socket {
        /// Where it would be.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// No thread for input or output.
    #[error("cannot start a thread for the serial console")]
    Thread(#[source] io::Error),
}

/// The host's end of a console. Dropping it gives the terminal back and removes the socket.
#[derive(Debug)]
pub struct Console {
    end: End,
    input: Option<InputThread>,
}

#[derive(Debug)]
enum End {
    Standard {
        /// None where output is a file, which takes what it gets at once.
        _output: Option<OutputThread>,
        /// In raw mode only once there is a guest that listens.
        terminal: Option<RawTerminal>,
    },
    File,
    Socket(Arc<ConsoleSocket>),
}

impl Console {
    /// Opens what `place` says, and gives what the guest's output is to be written to.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn open(place: &config::Serial) -> Result<(Self, Sink), ConsoleError> {
        let (end, sink): (End, Sink) = match place {
            config::Serial::Standard => {
                let (output, sink) = standard_output()?;
                let end = End::Standard {
                    _output: output,
                    terminal: None,
                };
                (end, sink)
            }
            config::Serial::File(path) => {
                let failed = |source| ConsoleError::File {
                    path: path.clone(),
                    source,
                };
                (End::File, Box::new(open_output(path).map_err(failed)?))
            }
            config::Serial::Socket(path) => {
                let failed = |source| ConsoleError::Socket {
                    path: path.clone(),
                    source,
                };
                let socket = Arc::new(ConsoleSocket::bind(path).map_err(failed)?);
                (
                    End::Socket(Arc::clone(&socket)),
                    Box::new(socket::SocketSink(socket)),
                )
            }
        };
        Ok((Self { end, input: None }, sink))
    }

    /// Lets what is typed go to `serial` from now on.
    ///
    /// # Errors
    /// When there is no thread to be had for it.
    pub fn connect(&mut self, serial: &Arc<Serial>) -> Result<(), ConsoleError> {
        let source: Box<dyn input::Source> = match &mut self.end {
            End::Standard { terminal, .. } => {
                let input = duplicate(io::stdin()).map_err(|source| ConsoleError::Standard {
                    stream: "input",
                    source,
                })?;
                *terminal = RawTerminal::enter(&input);
                Box::new(input::Stream::new(input))
            }
            End::File => return Ok(()),
            End::Socket(socket) => Box::new(Arc::clone(socket)),
        };
        let thread = InputThread::start("console", source, Arc::clone(serial));
        self.input = Some(thread.map_err(ConsoleError::Thread)?);
        Ok(())
    }
}

/// The monitor's standard output, and the thread that writes to it where a write may take its time.
fn standard_output() -> Result<(Option<OutputThread>, Sink), ConsoleError> {
    let failed = |source| ConsoleError::Standard {
        stream: "output",
        source,
    };
    let output = duplicate(io::stdout()).map_err(failed)?;
    if output.metadata().map_err(failed)?.is_file() {
        return Ok((None, Box::new(output)));
    }
    let (thread, sink) = OutputThread::start(output).map_err(ConsoleError::Thread)?;
    Ok((Some(thread), Box::new(sink)))
}

fn duplicate(stream: impl std::os::fd::AsFd) -> io::Result<File> {
    Ok(File::from(stream.as_fd().try_clone_to_owned()?))
}

fn open_output(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new()
        // For reading too: a named pipe without a reader could not be opened otherwise.
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        // A pipe that nobody empties loses output; it must not stop the guest.
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
}
