//! Looks chunks up in an index whose segments are read from a store as they are needed, and kept within a bound.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Entry, IndexRoot, Segment, SegmentError, SegmentIndex};
use crate::blobs::{Blob, BlobError, BlobStore};
use crate::digest::BlobDigest;
use crate::units::ChunkIndex;

/// Segments kept parsed: 4 GiB of volume, some 100 KiB each at the default chunk size.
const SEGMENTS_KEPT: usize = 32;

/// Why a chunk could not be looked up.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The volume has no such chunk.
    #[error("{chunk} is outside the volume, which has {chunks} chunks")]
    Outside {
        /// What was asked for.
        chunk: ChunkIndex,
        /// How many there are.
        chunks: u64,
    },
    /// The segment could not be read.
    #[error("{segment} of index {index} cannot be read")]
    Blob {
        /// Which segment.
        segment: SegmentIndex,
        /// The index blob.
        index: BlobDigest,
        /// The store's reason.
        #[source]
        source: BlobError,
    },
    /// The segment is not what it should be.
    #[error("index {index} is not usable")]
    Segment {
        /// The index blob.
        index: BlobDigest,
        /// What is wrong.
        #[source]
        source: SegmentError,
    },
}

/// The index of one volume over a store.
pub struct IndexReader {
    store: Arc<dyn BlobStore>,
    index: Blob,
    root: IndexRoot,
    layer_bytes: Vec<u64>,
    /// The most recently used last.
    kept: Mutex<Vec<(SegmentIndex, Arc<Segment>)>>,
}

impl IndexReader {
    /// Reads segments of `index` from `store`; nothing is read yet.
    #[must_use]
    pub fn new(store: Arc<dyn BlobStore>, index: Blob, root: IndexRoot, layer_bytes: Vec<u64>) -> Self {
        Self {
            store,
            index,
            root,
            layer_bytes,
            kept: Mutex::new(Vec::new()),
        }
    }

    /// How the volume is cut.
    #[must_use]
    pub fn root(&self) -> &IndexRoot {
        &self.root
    }

    /// What the index says of `chunk`.
    ///
    /// # Errors
    /// When the volume has no such chunk, or its segment cannot be had or trusted.
    pub fn entry(&self, chunk: ChunkIndex) -> Result<Entry, IndexError> {
        let outside = || IndexError::Outside {
            chunk,
            chunks: self.root.chunks(),
        };
        let (number, position) = self.root.locate(chunk).ok_or_else(outside)?;
        self.segment(number)?.entry(position).ok_or_else(outside)
    }

    /// A segment, from memory or from the store.
    ///
    /// # Errors
    /// When it cannot be had or trusted.
    pub fn segment(&self, number: SegmentIndex) -> Result<Arc<Segment>, IndexError> {
        if let Some(segment) = self.kept(number) {
            return Ok(segment);
        }
        // Read without the lock: two threads may read the same segment once each, none waits for another's.
        let segment = Arc::new(self.read(number)?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= SEGMENTS_KEPT {
            kept.remove(0);
        }
        kept.push((number, Arc::clone(&segment)));
        Ok(segment)
    }

    fn kept(&self, number: SegmentIndex) -> Option<Arc<Segment>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let position = kept.iter().rposition(|(other, _)| *other == number)?;
        let found = kept.remove(position);
        let segment = Arc::clone(&found.1);
        kept.push(found);
        Some(segment)
    }

    fn read(&self, number: SegmentIndex) -> Result<Segment, IndexError> {
        let unusable = |source| IndexError::Segment {
            index: self.index.digest,
            source,
        };
        let at = self
            .root
            .segment(number)
            .ok_or_else(|| unusable(SegmentError::Missing(number)))?;
        // The root was parsed with a cap on the length of each segment.
        let mut bytes = vec![0; at.stored.len as usize];
        self.store
            .read_range(&self.index, at.stored.start, &mut bytes)
            .map_err(|source| IndexError::Blob {
                segment: number,
                index: self.index.digest,
                source,
            })?;
        Segment::parse(&bytes, &self.root, number, &self.layer_bytes).map_err(unusable)
    }
}
