//! An interface at work.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use runnel_snapshot::block_store::{GuestRam, GuestSlice};

use super::super::chain::{Chain, copy_to_guest};
use super::super::queue::VirtQueue;
use super::super::{ActiveDevice, Context, DeviceFault, Progress, Wake};
use super::{Backend, HEADER_BYTES, NetMetrics, RECEIVE, TRANSMIT};
use crate::event_loop::StopFlag;
use runnel_snapshot::block_store::guest_io::Cursor;

/// The largest packet with its header where the driver takes large ones (§5.1.6.3.1).
const LARGE_BYTES: u64 = 65562;

/// The largest frame with its header otherwise, unless the driver was told of a larger MTU.
const FRAME_BYTES: u64 = 1526;

/// What comes before a packet that is as large as the MTU: this header, and Ethernet's.
const HEADERS_BYTES: u64 = HEADER_BYTES as u64 + 14;

/// Packets moved in one direction before other devices of the loop get their turn.
const PACKETS_PER_CALL_MAX: usize = 128;

/// Slices handed to the kernel in one call; what lies beyond is not offered to a packet.
const SLICES_MAX: usize = 512;

/// Where `num_buffers` lies in the header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// How one direction stands at the end of a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// It goes on when somebody kicks.
    Waits,
    /// It has more to do at once.
    Early,
}

pub(super) struct ActiveNet {
    backend: Arc<dyn Backend>,
    metrics: Arc<NetMetrics>,
    /// Bytes of buffers that must be at hand before a packet is taken from the other end: it would be cut otherwise.
    packet_bytes_max: u64,
    /// Whether a packet may be spread over several chains.
    mergeable: bool,
    /// A direction stopped early, and is looked at in the next call whatever that is for.
    receive_early: bool,
    transmit_early: bool,
}

impl ActiveNet {
    pub(super) fn new(
        backend: Arc<dyn Backend>,
        metrics: Arc<NetMetrics>,
        large_packets: bool,
        mergeable: bool,
        mtu: u16,
    ) -> Self {
        let packet_bytes_max = if large_packets {
            LARGE_BYTES
        } else {
            FRAME_BYTES.max(HEADERS_BYTES + u64::from(mtu))
        };
        Self {
            backend,
            metrics,
            packet_bytes_max,
            mergeable,
            receive_early: false,
            transmit_early: false,
        }
    }

    fn receive(&self, queue: &mut VirtQueue, ram: &GuestRam, stop: &StopFlag) -> Result<Flow, DeviceFault> {
        queue.disable_kicks(ram)?;
        let mut ready = Ready::default();
        let mut flow = Flow::Early;
        for _ in 0..PACKETS_PER_CALL_MAX {
            if stop.is_raised() {
                break;
            }
            if !self.gather(&mut ready, queue, ram)? {
                self.metrics.receive_waits.fetch_add(1, Ordering::Relaxed);
                flow = Flow::Waits;
                break;
            }
            match self.receive_one(&mut ready, queue, ram)? {
                Flow::Early => {}
                Flow::Waits => {
                    flow = Flow::Waits;
                    break;
                }
            }
        }
        // At most the queue's size.
        queue.put_back(ready.chains.len() as u16);
        queue.notify(ram)?;
        Ok(flow)
    }

    /// Takes chains until there is room for any packet. False if the guest has not enough: it will kick.
    fn gather<'m>(
        &self,
        ready: &mut Ready<'m>,
        queue: &mut VirtQueue,
        ram: &'m GuestRam,
    ) -> Result<bool, DeviceFault> {
        while ready.bytes < self.packet_bytes_max && (self.mergeable || ready.chains.is_empty()) {
            // A queue that is all out and still too small is what this driver has: it must do.
            if ready.chains.len() == usize::from(queue.size()) {
                return Ok(true);
            }
            match queue.pop(ram)? {
                Some(chain) => ready.push(chain)?,
                None if queue.enable_kicks(ram)? => queue.disable_kicks(ram)?,
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    fn receive_one(
        &self,
        ready: &mut Ready<'_>,
        queue: &mut VirtQueue,
        ram: &GuestRam,
    ) -> Result<Flow, DeviceFault> {
        let limit = if self.mergeable { usize::MAX } else { 1 };
        let slices: Vec<GuestSlice<'_>> = ready
            .chains
            .iter()
            .take(limit)
            .flat_map(|chain| &chain.writable)
            .take(SLICES_MAX)
            .copied()
            .collect();
        let bytes = match self.backend.receive(&slices) {
            Ok(bytes) if bytes >= HEADER_BYTES => bytes,
            Ok(_) => {
                self.metrics.receive_errors.fetch_add(1, Ordering::Relaxed);
                return Ok(Flow::Early);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Flow::Waits),
            Err(error) => {
                // Its interface is down, or gone. Readiness tells when that changes.
                tracing::debug!(%error, "no packet from the tap");
                self.metrics.receive_errors.fetch_add(1, Ordering::Relaxed);
                return Ok(Flow::Waits);
            }
        };
        let used = ready.take_for(bytes);
        // At most the queue's size, and at least one as the packet has bytes.
        let num_buffers = (used.len() as u16).to_le_bytes();
        let mut header = Cursor::new(&slices);
        drop(header.take(NUM_BUFFERS_OFFSET as u64));
        copy_to_guest(&header.take(2), &num_buffers);
        queue.complete_together(ram, &used)?;
        self.metrics.received_packets.fetch_add(1, Ordering::Relaxed);
        self.metrics
            .received_bytes
            .fetch_add((bytes - HEADER_BYTES) as u64, Ordering::Relaxed);
        Ok(Flow::Early)
    }

    fn transmit(&self, queue: &mut VirtQueue, ram: &GuestRam, stop: &StopFlag) -> Result<Flow, DeviceFault> {
        queue.disable_kicks(ram)?;
        let mut flow = Flow::Early;
        for _ in 0..PACKETS_PER_CALL_MAX {
            if stop.is_raised() {
                break;
            }
            let Some(chain) = queue.pop(ram)? else {
                if queue.enable_kicks(ram)? {
                    continue;
                }
                flow = Flow::Waits;
                break;
            };
            if !self.transmit_one(&chain)? {
                // The descriptor becomes writable when there is room, and that calls the device.
                queue.put_back(1);
                flow = Flow::Waits;
                break;
            }
            queue.complete(ram, chain.head, 0)?;
        }
        queue.notify(ram)?;
        Ok(flow)
    }

    /// False if the other end has no room. A packet that it does not take for another reason is lost, as on a cable.
    fn transmit_one(&self, chain: &Chain<'_>) -> Result<bool, DeviceFault> {
        let bytes = chain.readable_bytes();
        if !chain.writable.is_empty() || bytes < HEADER_BYTES as u64 {
            return Err(DeviceFault::Request(
                "a packet to send is one to be read, and begins with a header",
            ));
        }
        let sent = if bytes > LARGE_BYTES || chain.readable.len() > SLICES_MAX {
            Err(io::ErrorKind::InvalidInput.into())
        } else {
            self.backend.send(&chain.readable)
        };
        match sent {
            Ok(()) => {
                self.metrics.sent_packets.fetch_add(1, Ordering::Relaxed);
                self.metrics
                    .sent_bytes
                    .fetch_add(bytes - HEADER_BYTES as u64, Ordering::Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.metrics.send_waits.fetch_add(1, Ordering::Relaxed);
                return Ok(false);
            }
            Err(error) => {
                tracing::debug!(%error, bytes, "a packet of the guest is lost");
                self.metrics.send_errors.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(true)
    }
}

impl ActiveDevice for ActiveNet {
    fn process(&mut self, why: Wake, context: &mut Context<'_>) -> Result<Progress, DeviceFault> {
        let Context { ram, queues, stop } = context;
        if self.receive_early || matches!(why, Wake::Queue(RECEIVE) | Wake::Source) {
            let flow = match queues[RECEIVE].as_mut() {
                Some(queue) => self.receive(queue, ram, stop)?,
                None => Flow::Waits,
            };
            self.receive_early = flow == Flow::Early;
        }
        if self.transmit_early || matches!(why, Wake::Queue(TRANSMIT) | Wake::Source) {
            let flow = match queues[TRANSMIT].as_mut() {
                Some(queue) => self.transmit(queue, ram, stop)?,
                None => Flow::Waits,
            };
            self.transmit_early = flow == Flow::Early;
        }
        // One call looks at both.
        let early = self.receive_early || self.transmit_early;
        Ok(if early {
            Progress::Again(RECEIVE)
        } else {
            Progress::Idle
        })
    }
}

/// Chains taken from the receive queue and not used yet.
#[derive(Default)]
struct Ready<'m> {
    chains: VecDeque<Chain<'m>>,
    bytes: u64,
}

impl<'m> Ready<'m> {
    fn push(&mut self, chain: Chain<'m>) -> Result<(), DeviceFault> {
        let bytes = chain.writable_bytes();
        if !chain.readable.is_empty() || bytes < HEADER_BYTES as u64 {
            return Err(DeviceFault::Request(
                "a buffer for packets is one to be written, with room for a header",
            ));
        }
        self.bytes += bytes;
        self.chains.push_back(chain);
        Ok(())
    }

    /// Takes the chains that a packet of `bytes` fills: heads with the bytes in each.
    fn take_for(&mut self, bytes: usize) -> Vec<(u16, u32)> {
        let mut left = bytes as u64;
        let mut used = Vec::new();
        while left > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let room = chain.writable_bytes();
            let part = left.min(room);
            self.bytes -= room;
            left -= part;
            used.push((chain.head, part as u32)); // a part of a packet, far below 4 GiB
        }
        used
    }
}
