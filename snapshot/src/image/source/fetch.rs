//! What a worker does: finds chunks in the index, reads their frames, several at once where they lie together,
//! decodes and verifies them, and writes them to the page file.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::cache::{Copied, HostCache};
use super::chunk_set::ChunkSet;
use super::page_file::{PageFile, Spot};
use super::queue::{AskQueue, Hand, Run};
use super::room::Room;
use crate::blobs::{Blob, BlobError, BlobStore};
use crate::decode::{ChunkDecoder, DecodeError};
use crate::digest::BlobDigest;
use crate::give_way::{FILL, give_way};
use crate::index::{Entry, IndexError, IndexReader, LayerNumber, StoredChunk};
use crate::source::{Arrived, ChunkFailure, ChunkId, ChunkSink, Urgency};
use crate::units::{ByteRange, ChunkIndex};
use crate::volume::VolumeName;

/// What may lie between two frames that are read at once: frames of zeros, which cost less than another request.
const GAP_BYTES_MAX: u64 = 4 << 10;

/// Why a chunk could not be delivered.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("the frame at {frame} of layer {layer} is damaged")]
    Decode {
        layer: BlobDigest,
        frame: ByteRange,
        source: Box<DecodeError>,
    },
    #[error("the page file cannot be written")]
    PageFile(#[source] io::Error),
    #[error("zstd cannot be set up")]
    Decoder(#[source] io::Error),
    #[error("the image has no such volume")]
    NoVolume,
}

impl FetchError {
    /// Whether asking again can help: not when the image's bytes are wrong.
    fn is_transient(&self) -> bool {
        match self {
            Self::Index(IndexError::Blob { source, .. }) | Self::Blob(source) => source.is_transient(),
            Self::Index(_) | Self::Decode { .. } | Self::NoVolume => false,
            // Disk full, memory short: that passes.
            Self::PageFile(_) | Self::Decoder(_) => true,
        }
    }

    fn of_chunk(&self, chunk: ChunkIndex, volume: &dyn std::fmt::Display) -> ChunkFailure {
        let mut reason = format!("{chunk} of {volume}: {self}");
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            reason = format!("{reason}: {cause}");
            source = cause.source();
        }
        ChunkFailure {
            reason,
            transient: self.is_transient(),
        }
    }
}

/// A volume of the image while it is being delivered.
pub(super) struct Volume {
    pub(super) name: VolumeName,
    pub(super) layers: Vec<Blob>,
    pub(super) index: IndexReader,
    pub(super) pages: Arc<PageFile>,
    pub(super) cache: Arc<dyn HostCache>,
    pub(super) copied: Copied,
    pub(super) room: Room,
    /// Chunks whose bytes are in the page file.
    pub(super) present: ChunkSet,
    /// Chunks that the index says are zeros.
    pub(super) zeros: ChunkSet,
    /// Entries that came ahead of the index, with the machine state.
    pub(super) first: OnceLock<HashMap<ChunkIndex, StoredChunk>>,
}

/// What workers and askers share.
pub(super) struct Shared {
    pub(super) store: Arc<dyn BlobStore>,
    pub(super) volumes: Vec<Volume>,
    pub(super) queue: AskQueue,
    /// Stored bytes that are read at once.
    pub(super) read_bytes_max: u64,
    pub(super) sink: OnceLock<Arc<dyn ChunkSink>>,
}

impl Shared {
    /// The life of a worker or filler.
    pub(super) fn work(&self, hand: Hand) {
        if hand != Hand::Worker {
            give_way(FILL);
        }
        let mut hands = Hands::default();
        let has_room = || self.has_room_to_fill();
        while let Some(run) = self.queue.take(hand, has_room, || self.rest(&mut hands)) {
            hands.used = true;
            hands.is_fill = run.urgency == Urgency::Fill;
            let stored_bytes = self.deliver(&run, &mut hands);
            self.queue.finished(run.urgency, stored_bytes);
        }
    }

    /// Puts away what the last chunks needed, and the index of a volume all of which is known.
    fn rest(&self, hands: &mut Hands) {
        if !hands.used {
            return;
        }
        *hands = Hands::default();
        let known = self.volumes.iter().filter(|volume| volume.is_known());
        known.for_each(|volume| volume.index.forget());
        give_back_memory();
    }

    /// Answers every chunk of a run; returns how many stored bytes that took.
    fn deliver(&self, run: &Run, hands: &mut Hands) -> u64 {
        let mut stored_bytes = 0;
        // Frames that lie together, waiting to be read at once.
        let mut together: Vec<(ChunkId, StoredChunk)> = Vec::new();
        for &id in &run.chunks {
            match self.look_up(id, hands) {
                Ok(Lookup::There(what)) => self.answer(id, Ok(what)),
                Ok(Lookup::Stored(stored)) => {
                    if !self.joins(&together, id, &stored) {
                        stored_bytes += self.read_together(&mut together, hands);
                    }
                    together.push((id, stored));
                }
                Err(error) => self.answer(id, Err(&error)),
            }
        }
        stored_bytes + self.read_together(&mut together, hands)
    }

    fn look_up(&self, id: ChunkId, hands: &mut Hands) -> Result<Lookup, FetchError> {
        let volume = self.volume(id).ok_or(FetchError::NoVolume)?;
        if volume.present.contains(id.chunk) {
            // Who asks again may have found it gone.
            if volume.pages.is_whole(volume.spot(id.chunk)) {
                return Ok(Lookup::There(Arrived::Data));
            }
            volume.present.remove(id.chunk);
        }
        if volume.zeros.contains(id.chunk) {
            return Ok(Lookup::There(Arrived::Zero));
        }
        let stored = match volume.first_entry(id.chunk) {
            Some(stored) => stored,
            None => match volume.index.entry(id.chunk)? {
                Entry::Zero => {
                    volume.zeros.insert(id.chunk);
                    return Ok(Lookup::There(Arrived::Zero));
                }
                Entry::Data(stored) => stored,
            },
        };
        let spot = volume.spot(id.chunk);
        if volume.inherits(spot, &stored.digest, hands) || volume.copies(spot, &stored, hands) {
            return Ok(Lookup::There(Arrived::Data));
        }
        Ok(Lookup::Stored(stored))
    }

    /// Whether a frame follows on those that wait to be read, and they are not too many with it.
    fn joins(&self, together: &[(ChunkId, StoredChunk)], id: ChunkId, stored: &StoredChunk) -> bool {
        let (Some((first, first_stored)), Some((_, last))) = (together.first(), together.last()) else {
            return true;
        };
        first.volume == id.volume
            && last.layer == stored.layer
            && last
                .frame
                .end()
                .and_then(|end| stored.frame.start.checked_sub(end))
                .is_some_and(|gap| gap <= GAP_BYTES_MAX)
            && stored
                .frame
                .end()
                .is_some_and(|end| end - first_stored.frame.start <= self.read_bytes_max)
    }

    /// Reads frames that lie together, and answers their chunks.
    fn read_together(&self, together: &mut Vec<(ChunkId, StoredChunk)>, hands: &mut Hands) -> u64 {
        let (Some((first, first_stored)), Some((_, last))) = (together.first(), together.last()) else {
            return 0;
        };
        let (start, number) = (first_stored.frame.start, first_stored.layer);
        // Each length was capped as it was parsed, and so was their sum as they were joined.
        let bytes = last.frame.start + last.frame.len - start;
        let found = self.volume(*first).ok_or(FetchError::NoVolume);
        let found = found.and_then(|volume| {
            let room = volume.room.check(Instant::now());
            room.map_err(|error| volume.not_kept(error))?;
            Ok((volume, volume.layer(number)?))
        });
        let (volume, layer) = match found {
            Ok(found) => found,
            Err(error) => {
                together
                    .drain(..)
                    .for_each(|(id, _)| self.answer(id, Err(&error)));
                return 0;
            }
        };
        let mut frames = std::mem::take(&mut hands.frames);
        frames.resize(bytes as usize, 0);
        let mut damaged = Vec::new();
        let read = self.store.read_right(layer, start, &mut frames, &mut |frames| {
            damaged.clear();
            together.retain(|(id, stored)| {
                let at = (stored.frame.start - start) as usize;
                let frame = &frames[at..at + stored.frame.len as usize];
                match hands.install(volume, layer, *id, stored, frame) {
                    // Those are read again if there is another place to read them from.
                    Err(error @ FetchError::Decode { .. }) => damaged.push(error),
                    installed => {
                        self.answer(*id, installed.as_ref().map(|()| Arrived::Data));
                        return false;
                    }
                }
                true
            });
            damaged.is_empty()
        });
        hands.frames = frames;
        match read.map_err(FetchError::from) {
            Ok(_) => {
                let damaged = together.drain(..).zip(&damaged);
                damaged.for_each(|((id, _), error)| self.answer(id, Err(error)));
            }
            Err(error) => together
                .drain(..)
                .for_each(|(id, _)| self.answer(id, Err(&error))),
        }
        bytes
    }

    fn answer(&self, id: ChunkId, answer: Result<Arrived, &FetchError>) {
        // Before the sink hears of it: what is asked from then on is answered anew.
        self.queue.done(id);
        let Some(sink) = self.sink.get() else { return };
        match answer {
            Ok(what) => sink.arrived(id, what),
            Err(error) => {
                let failure = match self.volume(id) {
                    Some(volume) => error.of_chunk(id.chunk, &volume.name),
                    None => error.of_chunk(id.chunk, &"no volume"),
                };
                sink.failed(id, failure);
            }
        }
    }

    fn volume(&self, id: ChunkId) -> Option<&Volume> {
        self.volumes.get(usize::from(id.volume.0))
    }
}

/// Has the allocator give freed memory back to the host. It keeps it otherwise: some MiB, of each of many monitors.
fn give_back_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, and only gives up memory that is free.
    unsafe {
        libc::malloc_trim(0)
    };
}

enum Lookup {
    There(Arrived),
    Stored(StoredChunk),
}

impl Volume {
    fn spot(&self, chunk: ChunkIndex) -> Spot {
        let root = self.index.root();
        let range = root.chunk_size().range_of(chunk, root.volume_bytes());
        Spot { chunk, range }
    }

    fn first_entry(&self, chunk: ChunkIndex) -> Option<StoredChunk> {
        self.first.get()?.get(&chunk).copied()
    }

    fn layer(&self, number: LayerNumber) -> Result<&Blob, FetchError> {
        self.layers.get(usize::from(number.0)).ok_or(FetchError::NoVolume)
    }

    /// Whether nobody needs the index any more, unless a chunk is taken out of the page file.
    fn is_known(&self) -> bool {
        self.present.makes_whole_with(&self.zeros)
    }
}

/// What a worker keeps between chunks.
#[derive(Default)]
pub(super) struct Hands {
    /// Since the last rest.
    used: bool,
    /// Nobody waits for what they are at.
    pub(super) is_fill: bool,
    decoder: Option<ChunkDecoder>,
    frames: Vec<u8>,
    pub(super) plain: Vec<u8>,
}

impl Hands {
    /// Decodes a frame, and puts its chunk into the page file.
    fn install(
        &mut self,
        volume: &Volume,
        layer: &Blob,
        id: ChunkId,
        stored: &StoredChunk,
        frame: &[u8],
    ) -> Result<(), FetchError> {
        let spot = volume.spot(id.chunk);
        self.plain.resize(spot.range.len as usize, 0);
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => none.insert(ChunkDecoder::new().map_err(FetchError::Decoder)?),
        };
        decoder
            .decode(frame, &stored.digest, &mut self.plain)
            .map_err(|source| FetchError::Decode {
                layer: layer.digest,
                frame: stored.frame,
                source: Box::new(source),
            })?;
        volume.keep(&self.plain, spot, &stored.digest, self.is_fill)
    }
}
