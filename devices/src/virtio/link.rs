//! What a device and its transport share: the interrupt and why it was raised, and whether the device still works.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::interrupt::Interrupt;

/// Bit of the interrupt status: buffers were used (virtio 1.2 §4.2.2).
pub(super) const USED_BUFFERS: u32 = 1;
/// Bit of the interrupt status: the configuration or the device status changed.
pub(super) const CONFIGURATION: u32 = 2;

/// Faults of one device that are logged; all are counted.
const FAULTS_LOGGED_MAX: u64 = 10;

/// What happened between a device and its driver.
#[derive(Debug, Default)]
pub struct LinkMetrics {
    /// Interrupts raised.
    pub interrupts: AtomicU64,
    /// Kicks that came to the register because no ioeventfd caught them: each costs the vCPU a way out of the guest.
    pub register_kicks: AtomicU64,
    /// How often a driver's misbehaviour cost it the device.
    pub faults: AtomicU64,
    /// Register accesses that made no sense and were ignored.
    pub refused_accesses: AtomicU64,
}

/// The way from the device to its driver. All of it is atomic: it is used under any lock.
#[derive(Debug)]
pub struct DriverLink {
    interrupt: Interrupt,
    status: AtomicU32,
    broken: AtomicBool,
    metrics: LinkMetrics,
}

impl DriverLink {
    pub(super) fn new(interrupt: Interrupt, status: u32, broken: bool) -> Self {
        Self {
            interrupt,
            status: AtomicU32::new(status),
            broken: AtomicBool::new(broken),
            metrics: LinkMetrics::default(),
        }
    }

    /// Tells the driver that buffers were used.
    pub fn signal_used(&self) {
        self.signal(USED_BUFFERS);
    }

    /// Takes the device away from a driver that broke the rules: the device status gets `DEVICE_NEEDS_RESET` and the
    /// driver hears of it. The caller has stopped serving the queues.
    pub(super) fn break_device(&self, device: &'static str, why: &dyn std::error::Error) {
        let before = self.metrics.faults.fetch_add(1, Ordering::Relaxed);
        // A guest can break and reset a device as fast as it likes; the host's log is not its to fill.
        if before < FAULTS_LOGGED_MAX {
            let reason = why
                .source()
                .map(|source| format!(": {source}"))
                .unwrap_or_default();
            tracing::warn!(device, "a guest loses a device until it resets it: {why}{reason}");
        }
        self.broken.store(true, Ordering::Release);
        self.signal(CONFIGURATION);
    }

    /// Raises the line again for whatever the driver may have missed. One interrupt too many is harmless.
    pub(super) fn reassert(&self) {
        self.signal(USED_BUFFERS);
    }

    fn signal(&self, why: u32) {
        // The reason is there before the interrupt that makes the driver look.
        self.status.fetch_or(why, Ordering::AcqRel);
        self.metrics.interrupts.fetch_add(1, Ordering::Relaxed);
        self.interrupt.signal();
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::AcqRel);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.broken.store(false, Ordering::Release);
    }

    /// What happened so far.
    #[must_use]
    pub fn metrics(&self) -> &LinkMetrics {
        &self.metrics
    }
}
