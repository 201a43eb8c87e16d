//! The boot timer of `--boot-timer`: a guest that has booted writes 123 to it, and the time it took is logged.
//!
//! Behaviour and log line are Firecracker's, so that guests and scripts made for it work here. It has no state: a
//! machine that was saved before it had booted says so where it goes on, if the monitor there has one.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::bus::{BusDevice, Offset};

/// What the guest writes, one byte at offset 0.
const BOOTED: u8 = 123;

/// Addresses that the timer answers at: one page.
pub const ADDRESS_COUNT: u64 = 0x1000;

/// A moment, on the clock of the wall and on that of this process's work.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Elapsed time is measured from here.
    pub wall: Instant,
    /// Processor time that the process had used.
    pub cpu: Duration,
}

impl Moment {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
        let seconds = u64::try_from(used.tv_sec).unwrap_or(0);
        let nanos = u32::try_from(used.tv_nsec).unwrap_or(0);
        Self {
            wall: Instant::now(),
            cpu: Duration::new(seconds, nanos),
        }
    }
}

/// The timer. See the module documentation.
#[derive(Debug)]
pub struct BootTimer {
    start: Moment,
    booted_after: OnceLock<Duration>,
}

impl BootTimer {
    /// A timer that counts from `start`.
    #[must_use]
    pub fn new(start: Moment) -> Self {
        Self {
            start,
            booted_after: OnceLock::new(),
        }
    }

    /// How long the guest took to boot, once it has said so.
    #[must_use]
    pub fn booted_after(&self) -> Option<Duration> {
        self.booted_after.get().copied()
    }
}

impl BusDevice for BootTimer {
    fn read(&self, _: Offset, _: &mut [u8]) {}

    fn write(&self, offset: Offset, data: &[u8]) {
        if offset != Offset(0) || data != [BOOTED] {
            return;
        }
        let now = Moment::now();
        let wall = now.wall.duration_since(self.start.wall);
        let cpu = now.cpu.saturating_sub(self.start.cpu);
        if self.booted_after.set(wall).is_ok() {
            tracing::info!(
                "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
                wall.as_micros(),
                wall.as_millis(),
                cpu.as_micros(),
                cpu.as_millis(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_right_byte_stops_the_timer() {
        let timer = BootTimer::new(Moment::now());
        timer.write(Offset(0), &[122]);
        timer.write(Offset(4), &[BOOTED]);
        timer.write(Offset(0), &[BOOTED, 0]);
        assert_eq!(timer.booted_after(), None);

        timer.write(Offset(0), &[BOOTED]);
        let first = timer.booted_after().unwrap();
        timer.write(Offset(0), &[BOOTED]);
        assert_eq!(timer.booted_after(), Some(first), "a guest boots once");
    }
}
