//! The network device: one pair of queues over a tap (virtio 1.2 §5.1).
//!
//! Packets move straight between the tap and the guest's buffers, in both directions. What the guest has no buffers
//! for stays in the tap, whose queue in the kernel is bounded and drops as a network does; what the tap has no room
//! for stays in the guest's queue. So a freeze finds nothing half done, and nothing is lost by it.
//!
//! Checksums and segmentation are left to whoever is at the other end, as the driver and the tap agree: a packet
//! begins with a virtio-net header on both sides.
//!
//! **Never** opens a network socket, and never looks into a packet.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use runnel_snapshot::block_store::GuestSlice;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};

use super::{ActiveDevice, VirtioDevice, counter, read_config_bytes};
use crate::bus::Offset;

mod active;
mod state;
mod tap;
#[cfg(test)]
mod tests;

pub use state::NetState;
pub use tap::{Tap, TapError};

/// Bytes of the header before each packet, `num_buffers` included.
const HEADER_BYTES: usize = 12;

/// The receive and the transmit queue.
const QUEUE_SIZES: &[u16] = &[256, 256];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The smallest MTU that a device may tell of (§5.1.4.1).
const MTU_MIN: u16 = 68;

/// What the other end may leave to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestOffloads {
    /// Packets may come without their checksum.
    pub checksum: bool,
    /// TCP segments over IPv4 may come as one large packet.
    pub tso4: bool,
    /// TCP segments over IPv6 may come as one large packet.
    pub tso6: bool,
    /// UDP fragments may come as one large packet.
    pub ufo: bool,
}

impl GuestOffloads {
    fn negotiated(features: u64) -> Self {
        let has = |bit: u32| features & (1 << bit) != 0;
        let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
        // The others make no sense without (§5.1.3.1), and a tap refuses them.
        Self {
            checksum,
            tso4: checksum && has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: checksum && has(VIRTIO_NET_F_GUEST_TSO6),
            ufo: checksum && has(VIRTIO_NET_F_GUEST_UFO),
        }
    }

    /// Whether packets can be larger than a frame.
    fn has_large_packets(self) -> bool {
        self.tso4 || self.tso6 || self.ufo
    }
}

/// The other end of the cable: a tap, or a socket in tests. Nothing of it blocks.
pub trait Backend: Send + Sync {
    /// Readable when there is a packet, writable when there is room.
    fn descriptor(&self) -> RawFd;

    /// What the driver has agreed to take.
    ///
    /// # Errors
    /// When the other end cannot do it.
    fn set_offloads(&self, offloads: GuestOffloads) -> io::Result<()>;

    /// The next packet with its header; says its length, as far as there was room.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn receive(&self, into: &[GuestSlice<'_>]) -> io::Result<usize>;

    /// Sends a packet with its header.
    ///
    /// # Errors
    /// `WouldBlock` when there is no room.
    fn send(&self, from: &[GuestSlice<'_>]) -> io::Result<()>;
}

/// What a network device is built on.
pub struct NetParts {
    /// The interface's identifier in the configuration.
    pub iface_id: String,
    /// The other end.
    pub backend: Arc<dyn Backend>,
    /// The guest's hardware address; without one its driver makes one up.
    pub mac: Option<[u8; 6]>,
    /// The largest packet that the driver is told of; without one it takes Ethernet's. What is at the other end must
    /// take as much: nothing here sets it.
    pub mtu: Option<u16>,
}

impl fmt::Debug for NetParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NetParts")
            .field("iface_id", &self.iface_id)
            .field("mac", &self.mac)
            .field("mtu", &self.mtu)
            .finish_non_exhaustive()
    }
}

/// Why a network device does not start.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The tap does not do what the driver was promised.
    #[error("interface {iface_id:?}: the tap does not take the offloads {offloads:?}")]
    Offloads {
        /// Which interface.
        iface_id: String,
        /// What the driver wants.
        offloads: GuestOffloads,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An MTU that no device may tell of.
    #[error("interface {iface_id:?}: the image has an MTU of {mtu}, and {MTU_MIN} is the least")]
    Mtu {
        /// Which interface.
        iface_id: String,
        /// In the image.
        mtu: u16,
    },
}

/// What an interface did.
#[derive(Debug, Default)]
pub struct NetMetrics {
    /// Packets given to the guest.
    pub received_packets: AtomicU64,
    /// Their bytes, without headers.
    pub received_bytes: AtomicU64,
    /// Packets that the guest sent.
    pub sent_packets: AtomicU64,
    /// Their bytes, without headers.
    pub sent_bytes: AtomicU64,
    /// Packets from the other end that were lost here: too short for a header.
    pub receive_errors: AtomicU64,
    /// Packets of the guest that the other end did not take.
    pub send_errors: AtomicU64,
    /// How often a packet had to wait because the guest had no buffers.
    pub receive_waits: AtomicU64,
    /// How often a packet had to wait because the other end had no room.
    pub send_waits: AtomicU64,
}

/// An interface. See the module documentation.
#[derive(Debug)]
pub struct Net {
    parts: NetParts,
    metrics: Arc<NetMetrics>,
}

impl Net {
    /// An interface that no driver has touched.
    #[must_use]
    pub fn new(parts: NetParts) -> Self {
        Self {
            parts,
            metrics: Arc::default(),
        }
    }

    /// What the interface did, live.
    #[must_use]
    pub fn metrics(&self) -> Arc<NetMetrics> {
        Arc::clone(&self.metrics)
    }
}

impl VirtioDevice for Net {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
    const DEVICE_ID: u32 = 1;
    type State = NetState;
    type Parts = NetParts;
    type Error = NetError;

    fn features(&self) -> u64 {
        let always = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_UFO,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_UFO,
            VIRTIO_NET_F_MRG_RXBUF,
        ];
        let mac = self.parts.mac.map(|_| VIRTIO_NET_F_MAC);
        let mtu = self.parts.mtu.map(|_| VIRTIO_NET_F_MTU);
        always
            .into_iter()
            .chain(mac)
            .chain(mtu)
            .fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: Offset, data: &mut [u8]) {
        // §5.1.4: the address, then status and max_virtqueue_pairs, whose features are not offered, then the MTU.
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.parts.mac.unwrap_or_default());
        config[10..].copy_from_slice(&self.parts.mtu.unwrap_or_default().to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _: Offset, _: &[u8]) {}

    fn source(&self) -> Option<RawFd> {
        Some(self.parts.backend.descriptor())
    }

    fn activate(&mut self, features: u64) -> Result<Box<dyn ActiveDevice>, NetError> {
        let offloads = GuestOffloads::negotiated(features);
        self.parts
            .backend
            .set_offloads(offloads)
            .map_err(|source| NetError::Offloads {
                iface_id: self.parts.iface_id.clone(),
                offloads,
                source,
            })?;
        Ok(Box::new(active::ActiveNet::new(
            Arc::clone(&self.parts.backend),
            self.metrics(),
            offloads.has_large_packets(),
            features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0,
            self.parts
                .mtu
                .filter(|_| features & (1 << VIRTIO_NET_F_MTU) != 0)
                .unwrap_or_default(),
        )))
    }

    fn reset(&mut self) {}

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let metrics = &self.metrics;
        vec![
            counter("received_packets", &metrics.received_packets),
            counter("received_bytes", &metrics.received_bytes),
            counter("sent_packets", &metrics.sent_packets),
            counter("sent_bytes", &metrics.sent_bytes),
            counter("receive_errors", &metrics.receive_errors),
            counter("send_errors", &metrics.send_errors),
            counter("receive_waits", &metrics.receive_waits),
            counter("send_waits", &metrics.send_waits),
        ]
    }

    fn save(&self) -> NetState {
        NetState {
            mac: self.parts.mac,
            mtu: self.parts.mtu,
        }
    }

    fn restore(parts: NetParts, state: NetState) -> Result<Self, NetError> {
        if let Some(mtu) = state.mtu.filter(|mtu| *mtu < MTU_MIN) {
            return Err(NetError::Mtu {
                iface_id: parts.iface_id,
                mtu,
            });
        }
        // The guest knows itself by the address that was saved, and its driver has read the MTU for good: one that
        // was saved without, by a Runnel that had none, goes on without.
        Ok(Self::new(NetParts {
            mac: state.mac,
            mtu: state.mtu,
            ..parts
        }))
    }
}

/// Any non-blocking descriptor that keeps messages apart can be the other end's.
fn raw(descriptor: &impl AsFd) -> RawFd {
    descriptor.as_fd().as_raw_fd()
}
