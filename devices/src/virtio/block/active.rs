//! A drive at work: takes requests in batches, carries them out in order, and answers.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use runnel_snapshot::block_store::{BlockStore, GuestRam};
use runnel_snapshot::units::ByteRange;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

use super::super::chain::copy_to_guest;
use super::super::queue::VirtQueue;
use super::super::{ActiveDevice, Context, DeviceFault, Progress, Wake};
use super::request::{Limits, Operation, Request};
use super::{BlockMetrics, ID_BYTES};
use crate::event_loop::StopFlag;

const QUEUE: usize = 0;

/// Requests that are looked at together, so that the store hears of all their reads before the first one waits. As
/// many as Linux keeps in flight on a file system that reads ahead; each holds its parsed buffers.
const BATCH_MAX: usize = 32;

/// Errors of one drive that are logged; all are counted.
const ERRORS_LOGGED_MAX: u64 = 20;

/// When a write is safe.
pub(super) enum Durability {
    /// After a flush.
    OnFlush,
    /// At once.
    EachWrite,
    /// After a flush while this is set, otherwise at once.
    DriverChooses(Arc<AtomicBool>),
}

impl Durability {
    fn of_each_write(&self) -> bool {
        match self {
            Self::OnFlush => false,
            Self::EachWrite => true,
            Self::DriverChooses(writeback) => !writeback.load(Ordering::Relaxed),
        }
    }
}

pub(super) struct ActiveBlock {
    pub(super) store: Arc<dyn BlockStore>,
    pub(super) sectors: u64,
    pub(super) identification: [u8; ID_BYTES],
    pub(super) durability: Durability,
    pub(super) metrics: Arc<BlockMetrics>,
    pub(super) drive_id: String,
}

impl ActiveDevice for ActiveBlock {
    fn process(&mut self, _: Wake, context: &mut Context<'_>) -> Result<Progress, DeviceFault> {
        let ram = context.ram;
        let Some(queue) = context.queues[QUEUE].as_mut() else {
            return Ok(Progress::Idle);
        };
        queue.disable_kicks(ram)?;
        // The loop is this drive's own, so it is left only for a freeze, or to sleep.
        while !context.stop.is_raised() {
            let batch = self.take_batch(queue, ram)?;
            if batch.is_empty() && !queue.enable_kicks(ram)? {
                return Ok(Progress::Idle);
            }
            self.serve_batch(&batch, queue, ram, context.stop)?;
        }
        Ok(Progress::Again(QUEUE))
    }
}

impl ActiveBlock {
    fn take_batch<'m>(
        &self,
        queue: &mut VirtQueue,
        ram: &'m GuestRam,
    ) -> Result<Vec<Request<'m>>, DeviceFault> {
        let limits = Limits {
            sectors: self.sectors,
            read_only: self.store.is_read_only(),
        };
        let mut batch = Vec::new();
        while batch.len() < BATCH_MAX {
            let Some(chain) = queue.pop(ram)? else {
                break;
            };
            batch.push(Request::parse(&chain, limits)?);
        }
        Ok(batch)
    }

    /// Serves a batch in order. What a freeze keeps from being begun goes back into the queue.
    fn serve_batch(
        &self,
        batch: &[Request<'_>],
        queue: &mut VirtQueue,
        ram: &GuestRam,
        stop: &StopFlag,
    ) -> Result<(), DeviceFault> {
        self.announce_reads(batch);
        for (done, request) in batch.iter().enumerate() {
            // Asked before each request, as each may take long.
            if stop.is_raised() {
                queue.put_back((batch.len() - done) as u16); // at most BATCH_MAX
                break;
            }
            let written = self.serve(request);
            queue.complete(ram, request.head, written)?;
            // Not at the batch's end: the next request may wait for a chunk, and this answer is there. A driver that
            // is still looking at the ring says so, and then it costs nothing.
            queue.notify(ram)?;
        }
        Ok(())
    }

    fn announce_reads(&self, batch: &[Request<'_>]) {
        // One request alone is about to ask for itself.
        if batch.len() > 1 {
            let reads: Vec<ByteRange> = batch.iter().filter_map(Request::reads).collect();
            self.store.will_read(&reads);
        }
    }

    /// Carries a request out and answers it; says how many bytes the driver finds written.
    fn serve(&self, request: &Request<'_>) -> u32 {
        let (status, written) = match &request.operation {
            Ok(operation) => match self.carry_out(operation) {
                Ok(written) => (VIRTIO_BLK_S_OK as u8, written),
                Err(error) => {
                    self.log(&error);
                    (VIRTIO_BLK_S_IOERR as u8, 0)
                }
            },
            Err(refusal) => (refusal.status(), 0),
        };
        if status != VIRTIO_BLK_S_OK as u8 {
            self.metrics.errors.fetch_add(1, Ordering::Relaxed);
        }
        request.status.copy_from(&[status]);
        // Parsing left room for the status.
        written + 1
    }

    /// A guest can ask for a broken sector as fast as it likes; the host's log is not its to fill.
    fn log(&self, error: &io::Error) {
        if self.metrics.errors.load(Ordering::Relaxed) < ERRORS_LOGGED_MAX {
            tracing::warn!(drive = self.drive_id, %error, "a request of the guest failed on the host");
        }
    }

    fn carry_out(&self, operation: &Operation<'_>) -> io::Result<u32> {
        let count =
            |counter: &std::sync::atomic::AtomicU64, by: u64| counter.fetch_add(by, Ordering::Relaxed);
        match operation {
            Operation::Read { offset, into, bytes } => {
                self.store.read_at(*offset, into)?;
                count(&self.metrics.reads, 1);
                count(&self.metrics.read_bytes, (*bytes).into());
                return Ok(*bytes);
            }
            Operation::Write { offset, from, bytes } => {
                self.store.write_at(*offset, from)?;
                count(&self.metrics.writes, 1);
                count(&self.metrics.written_bytes, (*bytes).into());
                self.flush_if_due()?;
            }
            Operation::Flush => {
                self.store.flush()?;
                count(&self.metrics.flushes, 1);
            }
            Operation::Identify { into } => return Ok(copy_to_guest(into, &self.identification) as u32),
            Operation::Discard(ranges) => {
                ranges.iter().try_for_each(|range| self.store.discard(*range))?;
                count(&self.metrics.discards, 1);
            }
            Operation::WriteZeroes(ranges) => {
                ranges
                    .iter()
                    .try_for_each(|(range, unmap)| self.store.write_zeroes(*range, *unmap))?;
                count(&self.metrics.discards, 1);
                self.flush_if_due()?;
            }
        }
        Ok(0)
    }

    fn flush_if_due(&self) -> io::Result<()> {
        if self.durability.of_each_write() {
            self.store.flush()
        } else {
            Ok(())
        }
    }
}
