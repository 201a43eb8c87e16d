//! One virtqueue in use: takes chains out, gives them back, and decides about kicks and interrupts (virtio 1.2 §2.7).
//!
//! At the end of each call of a device, every chain that was taken out has been completed or put back, so a queue
//! between two calls is nothing but addresses and two indices. That is what makes it possible to save at any freeze.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use runnel_snapshot::block_store::GuestRam;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError};
use super::link::DriverLink;

/// Flag of the available ring by which a driver without event index asks for no interrupts.
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Bytes before the elements of the available ring, and of each: flags and index, then descriptor numbers.
const AVAIL_HEADER_BYTES: u64 = 4;
const AVAIL_ELEMENT_BYTES: u64 = 2;

/// The same of the used ring, whose elements hold a descriptor number and a length.
const USED_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;

fn ring_error(error: vm_memory::GuestMemoryError) -> QueueError {
    QueueError::Ring(virtio_queue::Error::GuestMemory(error))
}

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
    /// The used index up to which the driver has been considered for interrupts.
    considered: u16,
}

impl VirtQueue {
    /// `queue` was validated by the transport.
    pub(super) fn new(queue: Queue, indirect_allowed: bool, link: Arc<DriverLink>) -> Self {
        let considered = queue.next_used();
        Self {
            queue,
            indirect_allowed,
            link,
            considered,
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
        self.queue.add_used(ram, head, written).map_err(QueueError::Ring)
    }

    /// Gives several chains back at once: heads with the bytes written. The driver sees all of them or none, as it
    /// must where they hold one packet together (§5.1.6.4).
    ///
    /// # Errors
    /// As for [`complete`](Self::complete).
    pub fn complete_together(&mut self, ram: &GuestRam, chains: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((last_head, last_written), before)) = chains.split_last() else {
            return Ok(());
        };
        // All but the last are written where the driver does not look yet; the last one moves the index past all.
        for (head, written) in before {
            let slot = u64::from(self.queue.next_used() % self.queue.size());
            let address = self.queue.used_ring() + USED_HEADER_BYTES + slot * USED_ELEMENT_BYTES;
            let element = u64::from(*head) | u64::from(*written) << 32;
            ram.write_obj(element.to_le(), GuestAddress(address))
                .map_err(ring_error)?;
            self.queue.set_next_used(self.queue.next_used().wrapping_add(1));
        }
        self.complete(ram, *last_head, *last_written)
    }

    /// Interrupts the driver if chains were completed since the last call and it wants to hear of them.
    ///
    /// # Errors
    /// When the rings are not in RAM.
    pub fn notify(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        let used = self.queue.next_used();
        let since = std::mem::replace(&mut self.considered, used);
        if since != used && self.driver_listens(ram, since, used)? {
            self.link.signal_used();
        }
        Ok(())
    }

    /// Whether the driver wants an interrupt for the used index having moved from `since` to `used` (§2.7.7, §2.7.8).
    fn driver_listens(&self, ram: &GuestRam, since: u16, used: u16) -> Result<bool, QueueError> {
        // What was used is visible before the driver's wish is read: otherwise each side may miss the other's.
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        let wish = |at: u64| {
            ram.load::<u16>(GuestAddress(at), Ordering::Relaxed)
                .map(u16::from_le)
                .map_err(ring_error)
        };
        if self.queue.event_idx_enabled() {
            let event =
                wish(avail + AVAIL_HEADER_BYTES + AVAIL_ELEMENT_BYTES * u64::from(self.queue.size()))?;
            Ok(used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(since))
        } else {
            Ok(wish(avail)? & AVAIL_NO_INTERRUPT == 0)
        }
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
