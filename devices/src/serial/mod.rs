//! The serial port: a 16550A (COM1 of a PC) whose transmitter is always ready.
//!
//! Output goes byte by byte to a [`Write`] sink; a sink that blocks blocks the vCPU that prints, so whoever supplies
//! it decides about that. Input comes in through [`Serial::offer`], which takes what fits into the receive FIFO and
//! no more: the rest stays with the sender until [`Serial::room`] says that the guest has read.
//!
//! **Interrupts are not lost over a save.** The line is edge-triggered, the cause lives in the registers. A restored
//! port raises its line again for every cause that is pending and enabled, and [`Serial::reassert`] does so once more
//! when the interrupt controller stands: an interrupt too many is harmless, one too few stops a console for good.
//!
//! **Never** opens a file or a terminal, and never holds its lock while it waits for input.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::{BusDevice, Offset};
use crate::interrupt::Interrupt;

mod state;

pub use state::SerialState;

/// Addresses that the port answers at.
pub const ADDRESS_COUNT: u64 = 8;

/// Bytes that wait in the port for the guest to read them; the FIFO of the chip model.
pub const FIFO_BYTES: usize = 64;

/// Where the guest's output goes.
pub type Sink = Box<dyn Write + Send>;

/// What a serial port is built upon.
pub struct SerialDeps {
    /// Raised for received bytes and for an empty transmitter.
    pub interrupt: Interrupt,
    /// Takes the guest's output.
    pub output: Sink,
}

impl fmt::Debug for SerialDeps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialDeps")
            .field("interrupt", &self.interrupt)
            .finish_non_exhaustive()
    }
}

/// Why a serial port cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// No event for «there is room».
    #[error("the serial port gets no event descriptor")]
    Event(#[source] io::Error),
    /// A register of a saved port has bits that the chip does not have, or contradicts another.
    #[error("a saved serial port has {register} {value:#x}, which no such port can have")]
    Register {
        /// Which register.
        register: &'static str,
        /// What it held.
        value: u8,
    },
    /// A saved port holds more input than its FIFO.
    #[error("a saved serial port holds {0} bytes of input, and its FIFO has room for {FIFO_BYTES}")]
    Fifo(usize),
}

/// What went through a serial port.
#[derive(Debug, Default)]
pub struct SerialMetrics {
    /// Bytes the guest printed.
    pub written_bytes: AtomicU64,
    /// Bytes the guest printed and the sink refused.
    pub lost_bytes: AtomicU64,
    /// Bytes the guest read.
    pub read_bytes: AtomicU64,
}

/// Raises the line for the chip model.
struct Line(Interrupt);

impl Trigger for Line {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.signal();
        Ok(())
    }
}

/// Hears from the chip model what happened.
struct Observer {
    metrics: Arc<SerialMetrics>,
    room: Arc<EventFd>,
}

impl SerialEvents for Observer {
    fn buffer_read(&self) {
        self.metrics.read_bytes.fetch_add(1, Ordering::Relaxed);
    }
    fn out_byte(&self) {
        self.metrics.written_bytes.fetch_add(1, Ordering::Relaxed);
    }
    fn tx_lost_byte(&self) {
        self.metrics.lost_bytes.fetch_add(1, Ordering::Relaxed);
    }
    fn in_buffer_empty(&self) {
        // Fails only when the counter is full, and then the event is readable anyway.
        let _ = self.room.write(1);
    }
}

/// A serial port. See the module documentation.
pub struct Serial {
    /// Held for one register access at a time, the sink's write included. No other lock is taken under it.
    uart: Mutex<Uart<Line, Observer, Sink>>,
    /// A second handle to the line, for [`Self::reassert`].
    interrupt: Interrupt,
    room: Arc<EventFd>,
    metrics: Arc<SerialMetrics>,
}

impl Serial {
    /// A port as it is after power-on.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn new(deps: SerialDeps) -> Result<Self, SerialError> {
        Self::from_registers(deps, &vm_superio::SerialState::default())
    }

    /// Builds the port around registers that were checked.
    fn from_registers(deps: SerialDeps, registers: &vm_superio::SerialState) -> Result<Self, SerialError> {
        let room = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(SerialError::Event)?);
        let metrics = Arc::new(SerialMetrics::default());
        let line = Line(deps.interrupt.try_clone().map_err(SerialError::Event)?);
        let observer = Observer {
            metrics: Arc::clone(&metrics),
            room: Arc::clone(&room),
        };
        // The model refuses a FIFO that is too full and nothing else, as our line cannot fail.
        let uart = Uart::from_state(registers, line, observer, deps.output)
            .map_err(|_| SerialError::Fifo(registers.in_buffer.len()))?;
        Ok(Self {
            uart: Mutex::new(uart),
            interrupt: deps.interrupt,
            room,
            metrics,
        })
    }

    /// Gives the guest input: takes as many bytes as the FIFO has room for, from the front, and says how many.
    ///
    /// While the guest has the port in loop-back, the line is cut and input is lost, as on the chip.
    pub fn offer(&self, input: &[u8]) -> usize {
        const MODEM_CONTROL_LOOP: u8 = 0x10;
        const MODEM_CONTROL: u8 = 4;
        let mut uart = self.uart();
        if uart.read(MODEM_CONTROL) & MODEM_CONTROL_LOOP != 0 {
            return input.len();
        }
        // The only error is a full FIFO.
        uart.enqueue_raw_bytes(input).unwrap_or(0)
    }

    /// Becomes readable when the guest has emptied the FIFO: whoever holds input back offers it again.
    #[must_use]
    pub fn room(&self) -> &EventFd {
        &self.room
    }

    /// Raises the line once more. Called after a restore, when the interrupt controller has its state back and
    /// before the vCPUs run.
    pub fn reassert(&self) {
        // The driver looks at the port's registers and finds what is pending, if anything.
        self.interrupt.signal();
    }

    /// What went through.
    #[must_use]
    pub fn metrics(&self) -> &SerialMetrics {
        &self.metrics
    }

    fn uart(&self) -> MutexGuard<'_, Uart<Line, Observer, Sink>> {
        // A sink that panicked left the registers as they were: the byte is lost, the port goes on.
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Registers are one byte wide; wider accesses read all ones and write nothing.
impl BusDevice for Serial {
    fn read(&self, offset: Offset, data: &mut [u8]) {
        if let ([byte], Ok(register)) = (data, u8::try_from(offset.0)) {
            *byte = self.uart().read(register);
        }
    }

    fn write(&self, offset: Offset, data: &[u8]) {
        if let (&[byte], Ok(register)) = (data, u8::try_from(offset.0)) {
            // What the sink refused was counted by the observer; the guest cannot be told.
            let _ = self.uart().write(register, byte);
        }
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial")
            .field("metrics", &self.metrics)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const DATA: Offset = Offset(0);
    pub(crate) const INTERRUPT_ENABLE: Offset = Offset(1);
    const MODEM_CONTROL: Offset = Offset(4);

    /// A sink whose content a test can look at.
    #[derive(Clone, Default)]
    pub(crate) struct Screen(pub(crate) Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    pub(crate) fn deps(screen: &Screen) -> SerialDeps {
        SerialDeps {
            interrupt: Interrupt::new().unwrap(),
            output: Box::new(screen.clone()),
        }
    }

    pub(crate) fn read(port: &Serial, offset: Offset) -> u8 {
        let mut data = [0xff];
        port.read(offset, &mut data);
        data[0]
    }

    /// Whether the line was raised since the last look.
    pub(crate) fn raised(port: &Serial) -> bool {
        port.interrupt.event().read().is_ok()
    }

    #[test]
    fn what_the_guest_writes_reaches_the_sink() {
        let screen = Screen::default();
        let port = Serial::new(deps(&screen)).unwrap();
        for byte in b"hello" {
            port.write(DATA, &[*byte]);
        }
        assert_eq!(*screen.0.lock().unwrap(), b"hello");
        assert_eq!(port.metrics().written_bytes.load(Ordering::Relaxed), 5);
    }

    #[test]
    fn input_beyond_the_fifo_stays_with_the_sender_until_the_guest_has_read() {
        let port = Serial::new(deps(&Screen::default())).unwrap();
        let input: Vec<u8> = (0..100).collect();

        let taken = port.offer(&input);
        assert_eq!(taken, FIFO_BYTES);
        assert_eq!(port.offer(&input[taken..]), 0);
        assert!(port.room().read().is_err());

        let mut seen: Vec<u8> = (0..FIFO_BYTES).map(|_| read(&port, DATA)).collect();
        assert!(port.room().read().is_ok(), "the sender hears of the room");
        assert_eq!(port.offer(&input[taken..]), input.len() - taken);
        seen.extend((taken..input.len()).map(|_| read(&port, DATA)));
        assert_eq!(seen, input);
    }

    #[test]
    fn input_raises_the_line_once_the_guest_wants_it() {
        let port = Serial::new(deps(&Screen::default())).unwrap();
        port.offer(b"x");
        assert!(!raised(&port), "the guest has not enabled it");
        port.write(INTERRUPT_ENABLE, &[1]);
        assert!(raised(&port));
    }

    #[test]
    fn input_during_loop_back_is_lost_and_not_held_for_ever() {
        let port = Serial::new(deps(&Screen::default())).unwrap();
        port.write(MODEM_CONTROL, &[0x10]);
        assert_eq!(port.offer(b"abc"), 3);
        port.write(MODEM_CONTROL, &[0]);
        assert_eq!(read(&port, Offset(5)) & 1, 0, "nothing waits");
    }

    #[test]
    fn a_sink_that_fails_loses_bytes_and_counts_them() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let port = Serial::new(SerialDeps {
            interrupt: Interrupt::new().unwrap(),
            output: Box::new(Broken),
        });
        let port = port.unwrap();
        port.write(INTERRUPT_ENABLE, &[2]);
        assert!(raised(&port));
        port.write(DATA, b"x");
        assert_eq!(port.metrics().lost_bytes.load(Ordering::Relaxed), 1);
        assert_eq!(port.metrics().written_bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn wide_accesses_are_not_the_ports() {
        let screen = Screen::default();
        let port = Serial::new(deps(&screen)).unwrap();
        port.write(DATA, b"ab");
        let mut data = [0xff; 4];
        port.read(DATA, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert!(screen.0.lock().unwrap().is_empty());
    }
}
