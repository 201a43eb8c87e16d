//! virtio 1.2 devices behind the MMIO transport.
//!
//! ```text
//!  vCPU ── MMIO exit ──► MmioTransport ──── registers, status, features, queue addresses
//!    │                        │ DRIVER_OK: activate          │ reset, fault
//!    │ kick: ioeventfd        ▼                              ▼
//!    └──────────────────► event loop ──► ActiveDevice::process ──► interrupt: irqfd
//! ```
//!
//! A device has two halves. What it *is* ([`VirtioDevice`]: features, configuration, what it is built on) belongs to
//! the transport, and vCPUs look at it. What it *does* ([`ActiveDevice`]) exists while a driver has set it up, and
//! runs on an event loop. They share no lock, so that a device which waits for its storage never holds up a vCPU
//! that reads a register.
//!
//! A guest that breaks the rules loses the device that it did it to, until it resets it: `DEVICE_NEEDS_RESET`, a
//! configuration interrupt and a counter. [`registry`] is the one list of all devices.

pub mod block;
pub mod chain;
#[doc(hidden)]
pub mod fuzz;
pub mod link;
pub mod net;
pub mod queue;
pub mod registry;
pub mod rng;
pub mod transport;
mod unit;

#[cfg(test)]
pub(crate) mod mock;

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::bus::Offset;

pub use unit::{ActiveDevice, Context, DeviceFault, Progress, Wake};

/// What a virtio device is. There are no default methods: a device that forgets its state does not compile.
pub trait VirtioDevice: Send + Sized + 'static {
    /// The kind of its section in an image.
    const KIND: &'static str;
    /// The version of [`State`](Self::State).
    const VERSION: u32;
    /// The device ID of virtio 1.2 §5.
    const DEVICE_ID: u32;
    /// What of it an image holds, beside the transport's state.
    type State: Serialize + DeserializeOwned;
    /// What it is built on: a store, a tap.
    type Parts;
    /// Why it cannot be rebuilt.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The feature bits of the device itself; the transport adds those of queues.
    fn features(&self) -> u64;

    /// The largest size of each queue, each a power of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// Reads the configuration space; bytes past its end stay zero.
    fn read_config(&self, offset: Offset, data: &mut [u8]);

    /// Writes the configuration space; what is not writable is ignored.
    fn write_config(&mut self, offset: Offset, data: &[u8]);

    /// A descriptor whose readiness calls the device with [`Wake::Source`].
    fn source(&self) -> Option<RawFd>;

    /// A driver has set the device up, with these of the features offered. What it returns serves the queues.
    ///
    /// # Errors
    /// What kept the device from starting; the driver finds a device that needs a reset.
    fn activate(&mut self, features: u64) -> Result<Box<dyn ActiveDevice>, Self::Error>;

    /// The driver let go of the device: what it had set returns to what it was.
    fn reset(&mut self);

    /// What the device counted, by name; counters only rise.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// Copies the state out.
    fn save(&self) -> Self::State;

    /// Builds the device from state of an untrusted image.
    ///
    /// # Errors
    /// When the state makes no sense or does not fit the parts.
    fn restore(parts: Self::Parts, state: Self::State) -> Result<Self, Self::Error>;
}

/// A counter as [`VirtioDevice::counters`] lists it.
pub(crate) fn counter(name: &'static str, value: &AtomicU64) -> (&'static str, u64) {
    (name, value.load(Ordering::Relaxed))
}

/// Reads a configuration space that is a plain sequence of bytes.
pub(crate) fn read_config_bytes(config: &[u8], offset: Offset, data: &mut [u8]) {
    let start = usize::try_from(offset.0).unwrap_or(usize::MAX).min(config.len());
    for (byte, value) in data.iter_mut().zip(&config[start..]) {
        *byte = *value;
    }
}
