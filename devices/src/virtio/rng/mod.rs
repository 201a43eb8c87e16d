//! The entropy device: the host's randomness for the guest (virtio 1.2 §5.4).
//!
//! Each request is filled from the kernel's generator, at most [`REQUEST_BYTES_MAX`] of it: the device has no rate to
//! keep, but one request must not hold up the other devices of the loop for long. Nothing of it is ever kept, so a
//! snapshot has no entropy in it that two clones could share.

use std::convert::Infallible;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::rand::{GetRandomFlags, getrandom};

use super::chain::copy_to_guest;
use super::{ActiveDevice, Context, DeviceFault, Progress, VirtioDevice, Wake, counter};
use crate::bus::Offset;

pub mod state;

/// The most that one request gets. Linux asks for 64 bytes, its user space through /dev/hwrng for a page.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;

/// Requests served in one call, so that a driver which always has one more does not keep the loop to itself.
const REQUESTS_PER_CALL_MAX: usize = 64;

const QUEUE: usize = 0;
const QUEUE_SIZES: &[u16] = &[256];

/// What the device did.
#[derive(Debug, Default)]
pub struct RngMetrics {
    /// Requests answered.
    pub requests: AtomicU64,
    /// Bytes given to the guest.
    pub bytes: AtomicU64,
    /// Requests that the host's generator did not fill; the guest got nothing.
    pub errors: AtomicU64,
}

/// The entropy device. See the module documentation.
#[derive(Debug, Default)]
pub struct Rng {
    metrics: Arc<RngMetrics>,
}

impl Rng {
    /// A device that no driver has touched.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// What the device did, live.
    #[must_use]
    pub fn metrics(&self) -> Arc<RngMetrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for Rng {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u32 = 1;
    const DEVICE_ID: u32 = 4;
    type State = state::RngState;
    type Parts = ();
    type Error = Infallible;

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, _: Offset, _: &mut [u8]) {}

    fn write_config(&mut self, _: Offset, _: &[u8]) {}

    fn source(&self) -> Option<RawFd> {
        None
    }

    fn activate(&mut self, _: u64) -> Result<Box<dyn ActiveDevice>, Infallible> {
        Ok(Box::new(ActiveRng {
            metrics: self.metrics(),
        }))
    }

    fn reset(&mut self) {}

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let metrics = &self.metrics;
        vec![
            counter("requests", &metrics.requests),
            counter("bytes", &metrics.bytes),
            counter("errors", &metrics.errors),
        ]
    }

    fn save(&self) -> state::RngState {
        state::RngState {}
    }

    fn restore((): (), _: state::RngState) -> Result<Self, Infallible> {
        Ok(Self::new())
    }
}

struct ActiveRng {
    metrics: Arc<RngMetrics>,
}

impl ActiveRng {
    /// Random bytes, as many as the host gives of `len`.
    fn draw(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut drawn = 0;
        while drawn < len {
            match getrandom(&mut bytes[drawn..], GetRandomFlags::empty()) {
                Ok(more) => drawn += more,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "no random bytes for the guest");
                    self.metrics.errors.fetch_add(1, Ordering::Relaxed);
                    break;
                }
            }
        }
        bytes.truncate(drawn);
        bytes
    }
}

impl ActiveDevice for ActiveRng {
    fn process(&mut self, _: Wake, context: &mut Context<'_>) -> Result<Progress, DeviceFault> {
        let Some(queue) = context.queues[QUEUE].as_mut() else {
            return Ok(Progress::Idle);
        };
        for _ in 0..REQUESTS_PER_CALL_MAX {
            if context.stop.is_raised() {
                break;
            }
            let Some(chain) = queue.pop(context.ram)? else {
                queue.notify(context.ram)?;
                if queue.enable_kicks(context.ram)? {
                    continue;
                }
                return Ok(Progress::Idle);
            };
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                return Err(DeviceFault::Request(
                    "a request for entropy is one to be written, and nothing else",
                ));
            }
            let wanted = usize::try_from(chain.writable_bytes())
                .unwrap_or(usize::MAX)
                .min(REQUEST_BYTES_MAX);
            let given = copy_to_guest(&chain.writable, &self.draw(wanted));
            self.metrics.requests.fetch_add(1, Ordering::Relaxed);
            self.metrics.bytes.fetch_add(given as u64, Ordering::Relaxed);
            // At most REQUEST_BYTES_MAX, which fits.
            queue.complete(context.ram, chain.head, given as u32)?;
        }
        queue.notify(context.ram)?;
        Ok(Progress::Again(QUEUE))
    }
}
