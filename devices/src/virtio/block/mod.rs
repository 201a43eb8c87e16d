//! The block device: a drive over a [`BlockStore`] (virtio 1.2 §5.2).
//!
//! Data moves straight between the store and the guest's buffers. The store may block for long, over a chunk that is
//! on its way, so each drive has an event loop of its own; requests are carried out one after the other in the order
//! in which the driver made them available, and what the store will be asked for soon is announced to it for a whole
//! batch before the first request waits.
//!
//! **Cache types** are Firecracker's. *Unsafe* offers no flush: what the guest wrote reaches the host's disk when the
//! host pleases. *Writeback* offers flush and lets the driver choose; a driver that takes neither gets write-through,
//! as the specification asks (§5.2.6.2).

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use runnel_snapshot::block_store::BlockStore;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::{ActiveDevice, VirtioDevice, counter, read_config_bytes};
use crate::bus::Offset;

mod active;
mod file_store;
mod request;
mod state;
#[cfg(test)]
mod tests;

pub use file_store::{FileStore, FileStoreError};
pub use state::BlockState;

/// The unit of addresses on the device, whatever the drive's block size.
pub const SECTOR_BYTES: u64 = 512;

/// Descriptors in the request queue.
const QUEUE_SIZES: &[u16] = &[256];

/// Data buffers in one request: the queue's size without the request's header and its status.
const SEGMENTS_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;

/// Bytes in one data buffer: one request is at most 254 MiB, and its length fits a used element many times.
const SEGMENT_BYTES_MAX: u32 = 1 << 20;

/// The logical block size: what a request may be as small as. Firecracker's, and what every file system takes.
const BLOCK_BYTES: u32 = 512;

/// Sectors in one discard or write-zeroes segment: 1 GiB. A store may take its time over them, and a pause waits for
/// one request.
const DISCARD_SECTORS_MAX: u32 = (1 << 30) / SECTOR_BYTES as u32;

/// Segments in one discard or write-zeroes request.
const DISCARD_SEGMENTS_MAX: u32 = 32;

/// What a discard should be aligned to, in sectors: a page, below which an overlay cannot forget.
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;

/// Bytes of the identification that `VIRTIO_BLK_T_GET_ID` asks for.
const ID_BYTES: usize = 20;

/// What the host does with writes that the guest did not flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum CacheType {
    /// No flush is offered; the host's cache decides.
    Unsafe,
    /// The guest's flushes reach stable storage.
    Writeback,
}

/// What a drive is built on.
pub struct BlockParts {
    /// The drive's identifier: what the guest reads as the disk's serial number, its first 20 bytes.
    pub drive_id: String,
    /// Its bytes.
    pub store: Arc<dyn BlockStore>,
    /// What flushes mean.
    pub cache_type: CacheType,
}

impl fmt::Debug for BlockParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockParts")
            .field("drive_id", &self.drive_id)
            .field("bytes", &self.store.bytes())
            .field("cache_type", &self.cache_type)
            .finish_non_exhaustive()
    }
}

/// Why there is no drive.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// Nothing to address.
    #[error("drive {drive_id:?} has {bytes} bytes, less than one sector of 512")]
    Empty {
        /// Which drive.
        drive_id: String,
        /// Its length.
        bytes: u64,
    },
    /// Another disk than the one that the guest knows.
    #[error(
        "drive {drive_id:?} has {found} sectors, and the guest knows it with {expected}: supply the drive of the image"
    )]
    Size {
        /// Which drive.
        drive_id: String,
        /// What there is.
        found: u64,
        /// What was saved.
        expected: u64,
    },
    /// A guest that writes needs a drive that takes it, and one that must not must not.
    #[error("drive {drive_id:?} is {}, and the guest knows it as {}", access(*.found), access(*.expected))]
    Access {
        /// Which drive.
        drive_id: String,
        /// Whether what there is, is read-only.
        found: bool,
        /// Whether it was when it was saved.
        expected: bool,
    },
}

fn access(read_only: bool) -> &'static str {
    if read_only { "read-only" } else { "writable" }
}

/// What a drive did.
#[derive(Debug, Default)]
pub struct BlockMetrics {
    /// Bytes the guest read.
    pub read_bytes: AtomicU64,
    /// Bytes the guest wrote.
    pub written_bytes: AtomicU64,
    /// Reads carried out.
    pub reads: AtomicU64,
    /// Writes carried out.
    pub writes: AtomicU64,
    /// Flushes carried out.
    pub flushes: AtomicU64,
    /// Discards and write-zeroes carried out.
    pub discards: AtomicU64,
    /// Requests that failed: the guest was told.
    pub errors: AtomicU64,
}

/// A drive. See the module documentation.
pub struct Block {
    parts: BlockParts,
    /// Whole sectors of the store.
    sectors: u64,
    /// Whether the driver wants write-back (`writeback` of the configuration space). Shared with the active half,
    /// which looks at it for each write.
    writeback: Arc<AtomicBool>,
    metrics: Arc<BlockMetrics>,
}

impl Block {
    /// A drive that no driver has touched.
    ///
    /// # Errors
    /// When the store holds not even a sector.
    pub fn new(parts: BlockParts) -> Result<Self, BlockError> {
        let bytes = parts.store.bytes();
        let sectors = bytes / SECTOR_BYTES;
        if sectors == 0 {
            return Err(BlockError::Empty {
                drive_id: parts.drive_id,
                bytes,
            });
        }
        let writeback = Arc::new(AtomicBool::new(true));
        Ok(Self {
            parts,
            sectors,
            writeback,
            metrics: Arc::default(),
        })
    }

    /// What the drive did, live.
    #[must_use]
    pub fn metrics(&self) -> Arc<BlockMetrics> {
        Arc::clone(&self.metrics)
    }

    /// The configuration space (§5.2.4), as far as the features offered go.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.sectors.to_le_bytes());
        put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &BLOCK_BYTES.to_le_bytes());
        put(WRITEBACK_OFFSET, &[self.writeback.load(Ordering::Relaxed).into()]);
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &DISCARD_SEGMENTS_MAX.to_le_bytes());
        put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
        put(48, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(52, &DISCARD_SEGMENTS_MAX.to_le_bytes());
        put(56, &[1]); // write_zeroes_may_unmap
        config
    }

    /// What the guest reads as the disk's serial number.
    fn identification(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        for (byte, letter) in id.iter_mut().zip(self.parts.drive_id.bytes()) {
            *byte = letter;
        }
        id
    }
}

/// Where in the configuration space the driver chooses between write-back and write-through.
const WRITEBACK_OFFSET: usize = 32;

impl VirtioDevice for Block {
    const KIND: &'static str = "virtio-block";
    const VERSION: u32 = 1;
    const DEVICE_ID: u32 = 2;
    type State = BlockState;
    type Parts = BlockParts;
    type Error = BlockError;

    fn features(&self) -> u64 {
        let mut features =
            1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        if self.parts.store.is_read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        if self.parts.cache_type == CacheType::Writeback {
            features |= 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        }
        features
    }

    fn queue_sizes(&self) -> &'static [u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: Offset, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: Offset, data: &[u8]) {
        // Offered with write-back alone; elsewhere the byte means nothing.
        if offset == Offset(WRITEBACK_OFFSET as u64)
            && self.parts.cache_type == CacheType::Writeback
            && let [value @ (0 | 1)] = data
        {
            self.writeback.store(*value == 1, Ordering::Relaxed);
        }
    }

    fn source(&self) -> Option<RawFd> {
        None
    }

    fn activate(&mut self, features: u64) -> Result<Box<dyn ActiveDevice>, BlockError> {
        let has = |bit: u32| features & (1 << bit) != 0;
        let durability = match (
            self.parts.cache_type,
            has(VIRTIO_BLK_F_CONFIG_WCE),
            has(VIRTIO_BLK_F_FLUSH),
        ) {
            (CacheType::Unsafe, _, _) => active::Durability::OnFlush,
            (CacheType::Writeback, true, _) => active::Durability::DriverChooses(Arc::clone(&self.writeback)),
            (CacheType::Writeback, false, true) => active::Durability::OnFlush,
            (CacheType::Writeback, false, false) => active::Durability::EachWrite,
        };
        Ok(Box::new(active::ActiveBlock {
            store: Arc::clone(&self.parts.store),
            sectors: self.sectors,
            identification: self.identification(),
            durability,
            metrics: self.metrics(),
            drive_id: self.parts.drive_id.clone(),
        }))
    }

    fn reset(&mut self) {
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let metrics = &self.metrics;
        vec![
            counter("read_bytes", &metrics.read_bytes),
            counter("written_bytes", &metrics.written_bytes),
            counter("reads", &metrics.reads),
            counter("writes", &metrics.writes),
            counter("flushes", &metrics.flushes),
            counter("discards", &metrics.discards),
            counter("errors", &metrics.errors),
        ]
    }

    fn save(&self) -> BlockState {
        BlockState {
            sectors: self.sectors,
            read_only: self.parts.store.is_read_only(),
            cache_type: self.parts.cache_type,
            writeback: self.writeback.load(Ordering::Relaxed),
        }
    }

    fn restore(parts: BlockParts, state: BlockState) -> Result<Self, BlockError> {
        state::restore(parts, &state)
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("parts", &self.parts)
            .field("metrics", &self.metrics)
            .finish_non_exhaustive()
    }
}
