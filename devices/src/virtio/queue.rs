//! One virtqueue in use: takes chains out, gives them back, and decides about kicks and interrupts (virtio 1.2 §2.7).
//!
//! At the end of each call of a device, every chain that was taken out has been completed or put back, so a queue
//! between two calls is nothing but addresses and two indices. That is what makes it possible to save at any freeze.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use runnel_snapshot::block_store::GuestRam;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError};
use super::link::DriverLink;

/// Flag of the available ring by which a driver without event index asks for no interrupts.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// What the driver did wrong with a queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The rings themselves: an index that cannot be, or rings that are not in RAM.
    #[error("the rings of a queue make no sense: {0}")]
    Ring(virtio_queue::Error),
    /// One chain.
    #[error("a descriptor chain breaks the rules")]
    Chain(#[from] ChainError),
}

/// A queue that a driver has set up, and whose rings lie in RAM. See the module documentation.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    indirect_allowed: bool,
    link: Arc<DriverLink>,
    /// Chains were completed since the driver was last considered for an interrupt.
    unsignalled: bool,
}

impl VirtQueue {
    /// `queue` was validated by the transport.
    pub(super) fn new(queue: Queue, indirect_allowed: bool, link: Arc<DriverLink>) -> Self {
        Self {
            queue,
            indirect_allowed,
            link,
            unsignalled: false,
        }
    }

    /// The next chain that the driver has made available.
    ///
    /// # Errors
    /// When the driver broke the rules; the device is lost to it.
    pub fn pop<'m>(&mut self, ram: &'m GuestRam) -> Result<Option<Chain<'m>>, QueueError> {
        let Some(head) = self
            .queue
            .iter(ram)
            .map_err(QueueError::Ring)?
            .next()
            .map(|chain| chain.head_index())
        else {
            return Ok(None);
        };
        let table = GuestAddress(self.queue.desc_table());
        Ok(Some(Chain::walk(
            ram,
            table,
            self.queue.size(),
            head,
            self.indirect_allowed,
        )?))
    }

    /// Puts the last `count` popped chains back, so that they are popped again.
    pub fn put_back(&mut self, count: u16) {
        self.queue
            .set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives a chain back to the driver, `written` bytes of it filled.
    ///
    /// # Errors
    /// When the rings are not in RAM, or `head` is not of this queue.
    pub fn complete(&mut self, ram: &GuestRam, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue
            .add_used(ram, head, written)
            .map_err(QueueError::Ring)?;
        self.unsignalled = true;
        Ok(())
    }

    /// Interrupts the driver if chains were completed since the last call and it wants to hear of them.
    ///
    /// # Errors
    /// When the rings are not in RAM.
    pub fn notify(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        if std::mem::take(&mut self.unsignalled) && self.driver_listens(ram)? {
            self.link.signal_used();
        }
        Ok(())
    }

    fn driver_listens(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        // Asked first, as it also orders the used index before what the driver says it wants.
        let due = self.queue.needs_notification(ram).map_err(QueueError::Ring)?;
        if self.queue.event_idx_enabled() {
            return Ok(due);
        }
        let flags: u16 = ram
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(|error| QueueError::Ring(virtio_queue::Error::GuestMemory(error)))?;
        Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to kick while the queue is being served.
    ///
    /// # Errors
    /// When the rings are not in RAM.
    pub fn disable_kicks(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        self.queue.disable_notification(ram).map_err(QueueError::Ring)
    }

    /// Asks the driver to kick for the next chain. True if one has come in already: then it must be served, because
    /// the driver may not have seen the request.
    ///
    /// # Errors
    /// When the rings are not in RAM.
    pub fn enable_kicks(&mut self, ram: &GuestRam) -> Result<bool, QueueError> {
        self.queue.enable_notification(ram).map_err(QueueError::Ring)
    }

    /// How many descriptors the queue has.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    pub(super) fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    pub(super) fn next_used(&self) -> u16 {
        self.queue.next_used()
    }
}
