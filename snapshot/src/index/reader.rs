//! Looks chunks up in an index whose segments are read from a store as they are needed, and kept within a bound.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Entry, IndexRoot, Segment, SegmentError, SegmentIndex};
use crate::blobs::{Blob, BlobError, BlobStore};
use crate::digest::BlobDigest;
use crate::units::ChunkIndex;

/// Segments kept parsed: 4 GiB of volume, some 100 KiB each at the default chunk size.
const SEGMENTS_KEPT: usize = 32;

/// Memory that they take at most, whatever they are, unless one alone takes more: those of small chunks are larger, and
/// those of chunks of many parts larger still.
const KEPT_BYTES_MAX: usize = 16 << 20;

/// Segments that are read ahead: as many again stay for those that were asked for.
const SEGMENTS_AHEAD_MAX: usize = SEGMENTS_KEPT / 2;

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
    kept: Mutex<Kept>,
    /// Told when a segment was read, or could not be.
    was_read: Condvar,
}

#[derive(Default)]
struct Kept {
    /// The most recently used last.
    segments: Vec<(SegmentIndex, Arc<Segment>)>,
    /// Being read by some thread. The others that want one wait: a segment from afar is read once.
    reading: Vec<SegmentIndex>,
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
            kept: Mutex::default(),
            was_read: Condvar::new(),
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
        let mut kept = self.lock();
        loop {
            if let Some(segment) = kept.use_again(number) {
                return Ok(segment);
            }
            if !kept.reading.contains(&number) {
                break;
            }
            kept = self.was_read.wait(kept).unwrap_or_else(PoisonError::into_inner);
        }
        kept.reading.push(number);
        drop(kept);
        let read = self.read(number).map(Arc::new);
        let mut kept = self.lock();
        kept.reading.retain(|other| *other != number);
        if let Ok(segment) = &read {
            kept.keep(number, segment);
        }
        // If it failed, one of those who wait tries next.
        self.was_read.notify_all();
        read
    }

    /// Lets go of the segments that are kept; they are read again if they are needed.
    pub fn forget(&self) {
        self.lock().segments = Vec::new();
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the segment of `chunk` and those around it, the nearest first, half as many as are kept, one after
    /// another, for as long as `goes_on` says so.
    ///
    /// # Errors
    /// When one cannot be had or trusted.
    pub fn read_ahead(&self, chunk: ChunkIndex, goes_on: &dyn Fn() -> bool) -> Result<(), IndexError> {
        let start = self.root.locate(chunk).map_or(0, |(number, _)| number.0);
        let mut numbers: Vec<u32> = (0..self.root.segments()).collect();
        numbers.sort_by_key(|number| number.abs_diff(start));
        let mut nearest = numbers
            .into_iter()
            .take(SEGMENTS_AHEAD_MAX)
            .take_while(|_| goes_on());
        nearest.try_for_each(|number| self.segment(SegmentIndex(number)).map(drop))
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
        let mut parsed = Err(SegmentError::Missing(number));
        self.store
            .read_right(&self.index, at.stored.start, &mut bytes, &mut |bytes| {
                parsed = Segment::parse(bytes, &self.root, number, &self.layer_bytes);
                parsed.is_ok()
            })
            .map_err(|source| IndexError::Blob {
                segment: number,
                index: self.index.digest,
                source,
            })?;
        parsed.map_err(unusable)
    }
}

impl Kept {
    fn use_again(&mut self, number: SegmentIndex) -> Option<Arc<Segment>> {
        let position = self.segments.iter().rposition(|(other, _)| *other == number)?;
        let found = self.segments.remove(position);
        let segment = Arc::clone(&found.1);
        self.segments.push(found);
        Some(segment)
    }

    fn keep(&mut self, number: SegmentIndex, segment: &Arc<Segment>) {
        self.segments.push((number, Arc::clone(segment)));
        let bytes = |kept: &Self| -> usize {
            kept.segments
                .iter()
                .map(|(_, segment)| segment.memory_bytes())
                .sum()
        };
        while self.segments.len() > SEGMENTS_KEPT || self.segments.len() > 1 && bytes(self) > KEPT_BYTES_MAX {
            self.segments.remove(0);
        }
    }
}
