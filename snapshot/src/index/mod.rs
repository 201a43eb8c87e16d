//! The index of a volume: for every chunk whether it is zero or where its frame lies, and the digest of its bytes.
//!
//! There is one index for each volume and image, *merged over all layers*: an image that lies over fifty others is
//! looked up in one index as that of a single layer is. It has two levels, so that no resume waits for the whole of
//! it: a **root**, inline in the manifest, holds the BLAKE3 of each **segment**; segments, one for each 128 MiB of
//! volume, lie back to back in the index blob and are fetched when they are first needed. Trust goes manifest digest →
//! root → segment → chunk.
//!
//! All numbers are little-endian; a *varint* is LEB128: seven bits a byte, low ones first, no longer than needed.
//!
//! ```text
//! blob     = "RNLXSEG" | version u8 = 1 | segment…
//! root     = "RNLX" | version u8 = 1 | log2 chunk size u8 | layers u16 | volume bytes u64 | segment entry…
//! segment entry (36 bytes) = stored bytes u32 | BLAKE3 of those bytes [32]
//! segment  = run…            the runs cover the chunks of the segment in order and exactly
//! run      = varint (chunks << 2 | kind) | …
//!   kind 0   zero: nothing follows
//!   kind 1   data: varint layer | varint zigzag(first frame's offset - end of that layer's last frame in this
//!            segment, 0 before its first) | chunks × (varint frame bytes | BLAKE3 of the plain bytes [32])
//!   kind 2   parts: chunks × (varint parts | parts × part), 1 to 8 parts a chunk
//! part     = pages held | pages shown | varint layer | varint zigzag(frame's offset - end of that layer's last frame in
//!            this segment) | varint frame bytes | BLAKE3 of the plain bytes of the pages held, back to back [32]
//! pages    = a bit for each page of a whole chunk, the first in the lowest bit of the first byte (2 bytes at 64 KiB)
//! ```
//!
//! A segment of zeros alone has no bytes. A dense volume costs 35 bytes a chunk, and the root 36 for each 128 MiB; a
//! chunk of parts costs some 42 bytes a part ([`parts`]). Layer numbers count the manifest's layers of that volume.

mod builder;
mod page_bits;
pub mod parts;
mod reader;
mod root;
mod segment;

pub use builder::{IndexBuilder, IndexTooLarge};
pub use page_bits::{BadPageBits, PageBits};
pub use parts::{PARTS_MAX, StoredPart};
pub use reader::{IndexError, IndexReader};
pub use root::{IndexRoot, RootError, SegmentAt, SegmentIndex};
pub use segment::{Segment, SegmentError};

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::digest::ChunkDigest;
use crate::units::ByteRange;

/// What an index blob begins with, before its first segment. It also keeps the blob of a volume of zeros from being
/// empty, which not every registry takes.
pub const INDEX_BLOB_HEADER: &[u8; 8] = b"RNLXSEG\x01";

/// The bytes of volume that one segment describes, 128 MiB: some 70 KiB of index, one round trip for most guests.
pub const SEGMENT_VOLUME_BYTES: u64 = 128 << 20;

/// The largest volume of an image, 4 TiB: its root (1.1 MiB) still fits into a manifest that registries accept.
pub const VOLUME_BYTES_MAX: u64 = 4 << 40;

/// The most layers that one volume may have: a chain that long wants squashing.
pub const LAYERS_MAX: u16 = 128;

/// Which of the volume's layers, counted in the manifest's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LayerNumber(pub u16);

/// Where bytes of a chunk are: all of them, or those of some of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// Which layer holds its frame.
    pub layer: LayerNumber,
    /// The bytes of the layer.
    pub frame: ByteRange,
    /// The digest of the frame's plain bytes.
    pub digest: ChunkDigest,
}

/// What the index says of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It is all zeros, and costs no transfer.
    Zero,
    /// It has a frame, which is all of it.
    Data(StoredChunk),
    /// Its pages are in several frames, or some of them are zero; see [`parts`]. At most [`PARTS_MAX`].
    Parts(Arc<[StoredPart]>),
}

impl Entry {
    /// The frames that it is made of.
    pub fn frames(&self) -> impl Iterator<Item = &StoredChunk> {
        let (whole, parts) = match self {
            Self::Zero => (None, None),
            Self::Data(stored) => (Some(stored), None),
            Self::Parts(parts) => (None, Some(parts)),
        };
        let parts = parts.into_iter().flat_map(|parts| parts.iter());
        whole.into_iter().chain(parts.map(|part| &part.stored))
    }
}

#[cfg(test)]
mod tests;
