//! An interrupt line of a device: an event that the monitor has connected to the guest's interrupt controller.

use std::io;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Raises one interrupt for each signal, by an irqfd that the monitor registers on [`event`](Self::event).
///
/// The line is edge-triggered: what makes an interrupt pending lives in the device's registers and is saved there, so
/// a device signals again after a restore, when a reader may have missed it.
#[derive(Debug)]
pub struct Interrupt(EventFd);

impl Interrupt {
    /// A line that nothing listens to yet; signals sent before an irqfd is registered are delivered on registration.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK).map(Self)
    }

    /// What the monitor registers as irqfd.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.0
    }

    /// Another handle to the same line.
    ///
    /// # Errors
    /// When the process has no file descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Raises the interrupt.
    pub fn signal(&self) {
        // A non-blocking write of 1 fails only while 2^64 - 2 signals wait to be read: the line is up already.
        let _ = self.0.write(1);
    }
}
