//! Descriptor chains, walked strictly: what the driver put into a queue, as pieces of guest RAM (virtio 1.2 §2.7).
//!
//! A chain is walked as a whole before a device sees it. Whatever breaks a rule of the specification is an error and
//! not the chain's end: a device that served the first half of a chain would hide a bug, or an attack.

use runnel_snapshot::block_store::guest_io::{Cursor, total};
use runnel_snapshot::block_store::{GuestRam, GuestSlice};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u32 = 16;

/// What the driver did wrong in a chain.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor that the table does not have.
    #[error("descriptor {index} of a table of {entries}")]
    Index {
        /// The descriptor's number.
        index: u16,
        /// How many there are.
        entries: u16,
    },
    /// A loop, or a chain longer than its queue.
    #[error("a chain of more than {0} descriptors, which is the queue's size")]
    TooLong(u16),
    /// More than a length field can say.
    #[error("a chain of more than 4 GiB")]
    TooLarge,
    /// A descriptor or a buffer outside guest RAM.
    #[error("{len:#x} bytes at {address:#x}, which is not all RAM")]
    OutsideRam {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A buffer for the device to read after one for it to write.
    #[error("a readable buffer after a writable one")]
    ReadableAfterWritable,
    /// An indirect table where none may be.
    #[error("an indirect table {0}")]
    Indirect(&'static str),
}

/// One request of the driver. Its head is owed back to the queue.
#[derive(Debug)]
pub struct Chain<'m> {
    /// The number by which the driver knows it.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<GuestSlice<'m>>,
    /// What the device may write, in order.
    pub writable: Vec<GuestSlice<'m>>,
}

impl<'m> Chain<'m> {
    /// Walks the chain that starts at `head` of the table at `table`.
    pub(super) fn walk(
        ram: &'m GuestRam,
        table: GuestAddress,
        queue_size: u16,
        head: u16,
        indirect_allowed: bool,
    ) -> Result<Self, ChainError> {
        let mut chain = Self {
            head,
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut at = Table {
            ram,
            start: table,
            entries: queue_size,
        };
        let (mut index, mut indirect, mut bytes) = (head, false, 0u32);
        // One more round than the queue has descriptors: the pointer to an indirect table is not a buffer.
        let mut buffers_left = queue_size;
        loop {
            let descriptor = at.descriptor(index)?;
            if descriptor.refers_to_indirect_table() {
                if indirect || !indirect_allowed {
                    return Err(ChainError::Indirect("inside another, or without the feature"));
                }
                at = at.indirect(&descriptor)?;
                (index, indirect) = (0, true);
                continue;
            }
            buffers_left = buffers_left
                .checked_sub(1)
                .ok_or(ChainError::TooLong(queue_size))?;
            bytes = bytes.checked_add(descriptor.len()).ok_or(ChainError::TooLarge)?;
            chain.push(ram, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(chain);
            }
            index = descriptor.next();
        }
    }

    fn push(&mut self, ram: &'m GuestRam, descriptor: &Descriptor) -> Result<(), ChainError> {
        let (address, len) = (descriptor.addr(), descriptor.len());
        let into = if descriptor.is_write_only() {
            &mut self.writable
        } else if self.writable.is_empty() {
            &mut self.readable
        } else {
            return Err(ChainError::ReadableAfterWritable);
        };
        if len == 0 {
            return Ok(()); // allowed, and nothing of it is ever touched
        }
        let outside = || ChainError::OutsideRam {
            address: address.raw_value(),
            len,
        };
        // A buffer that spans two regions of RAM is two slices; one that runs off RAM is refused whole.
        if !GuestMemoryBackend::check_range(ram, address, len as usize) {
            return Err(outside());
        }
        for slice in GuestMemoryBackend::get_slices(ram, address, len as usize) {
            into.push(slice.map_err(|_| outside())?);
        }
        Ok(())
    }

    /// How many bytes the device may read.
    #[must_use]
    pub fn readable_bytes(&self) -> u64 {
        total(&self.readable)
    }

    /// How many bytes the device may write.
    #[must_use]
    pub fn writable_bytes(&self) -> u64 {
        total(&self.writable)
    }
}

/// A descriptor table: the queue's own, or an indirect one.
struct Table<'m> {
    ram: &'m GuestRam,
    start: GuestAddress,
    entries: u16,
}

impl<'m> Table<'m> {
    fn descriptor(&self, index: u16) -> Result<Descriptor, ChainError> {
        if index >= self.entries {
            return Err(ChainError::Index {
                index,
                entries: self.entries,
            });
        }
        let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
        let outside = || ChainError::OutsideRam {
            address: self.start.raw_value().wrapping_add(offset),
            len: DESCRIPTOR_BYTES,
        };
        let address = self.start.checked_add(offset).ok_or_else(outside)?;
        self.ram.read_obj(address).map_err(|_| outside())
    }

    fn indirect(&self, descriptor: &Descriptor) -> Result<Table<'m>, ChainError> {
        let len = descriptor.len();
        if descriptor.has_next() {
            return Err(ChainError::Indirect("with a descriptor after it"));
        }
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(ChainError::Indirect("that is not a number of whole descriptors"));
        }
        let entries = u16::try_from(len / DESCRIPTOR_BYTES)
            .map_err(|_| ChainError::Indirect("of more than 65535 descriptors"))?;
        Ok(Table {
            ram: self.ram,
            start: descriptor.addr(),
            entries,
        })
    }
}

/// Copies from the front of `slices`; says how many bytes there were, at most the length of `into`.
pub fn copy_from_guest(slices: &[GuestSlice<'_>], into: &mut [u8]) -> usize {
    let mut copied = 0;
    for piece in Cursor::new(slices).take(into.len() as u64) {
        copied += piece.copy_to(&mut into[copied..]);
    }
    copied
}

/// Copies to the front of `slices`, which marks them dirty; says how many bytes there was room for.
pub fn copy_to_guest(slices: &[GuestSlice<'_>], from: &[u8]) -> usize {
    let mut copied = 0;
    for piece in Cursor::new(slices).take(from.len() as u64) {
        piece.copy_from(&from[copied..]);
        copied += piece.len();
    }
    copied
}
