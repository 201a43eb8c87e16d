//! What a block device reads and writes: a file, an overlay over an image's volume, later a mirror of two.

pub mod guest_io;

use std::io;

use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{GuestMemoryMmap, VolatileSlice};

use crate::units::ByteRange;

/// Guest RAM whose every write by a device thread leaves a mark in a dirty bitmap.
pub type GuestRam = GuestMemoryMmap<AtomicBitmap>;

/// A piece of [`GuestRam`] that data is read into or written from; writes into it mark the bitmap.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// The bytes behind a drive.
///
/// Calls block until the bytes have moved; a store over a remote volume may wait for a chunk that cannot be had, and
/// then the machine is *stalled*. Every device calls from a thread of its own, so one drive never waits for another.
/// Offsets and lengths were checked against [`bytes`](Self::bytes) by the device; a store checks them again.
pub trait BlockStore: Send + Sync {
    /// The drive's length in bytes, a multiple of 512.
    fn bytes(&self) -> u64;

    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;

    /// These bytes will be read soon. A store that must fetch them asks for all of them now; it returns at once.
    fn will_read(&self, ranges: &[ByteRange]);

    /// Fills `into`, one slice after the other, from `offset` on.
    ///
    /// # Errors
    /// When the bytes lie outside the drive or cannot be read.
    fn read_at(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()>;

    /// Writes `from`, one slice after the other, at `offset`.
    ///
    /// # Errors
    /// When the bytes lie outside the drive, or it is read-only, or they cannot be written.
    fn write_at(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()>;

    /// Returns once everything written before is on stable storage.
    ///
    /// # Errors
    /// When the host's storage failed; the guest is told.
    fn flush(&self) -> io::Result<()>;

    /// The guest needs these bytes no more; they read as zeros afterwards.
    ///
    /// # Errors
    /// As for a write.
    fn discard(&self, range: ByteRange) -> io::Result<()>;

    /// Makes these bytes zeros; `unmap` allows giving the space back.
    ///
    /// # Errors
    /// As for a write.
    fn write_zeroes(&self, range: ByteRange, unmap: bool) -> io::Result<()>;
}
