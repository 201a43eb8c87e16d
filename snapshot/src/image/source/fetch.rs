//! What a worker does: finds chunks in the index, reads their frames, several at once where they lie together,
//! decodes and verifies them, and writes them to the page file. A chunk of several parts is put together aside, and
//! written when all of it is there.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use super::cache::{Copied, Fetch, HostCache, OwnFetch};
use super::chunk_set::ChunkSet;
use super::making::{FrameWanted, InTheMaking, Making, Wanted, together};
use super::page_file::{PageFile, Spot};
use super::queue::{AskQueue, Hand, Run};
use super::room::Room;
use crate::blobs::{Blob, BlobError, BlobStore};
use crate::causes::with_causes;
use crate::decode::{ChunkDecoder, DecodeError};
use crate::digest::{BlobDigest, ChunkDigest};
use crate::give_way::{FILL, give_way};
use crate::index::{Entry, IndexError, IndexReader, LayerNumber, StoredPart};
use crate::layer::frame::is_zero;
use crate::source::{Arrived, ChunkFailure, ChunkId, ChunkSink, Urgency};
use crate::units::{ByteRange, ChunkIndex};
use crate::volume::VolumeName;

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
        ChunkFailure {
            reason: format!("{chunk} of {volume}: {}", with_causes(self)),
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
    pub(super) first: OnceLock<HashMap<ChunkIndex, Entry>>,
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
        let mut left = Vec::new();
        let stored_bytes = self.deliver_these(&run.chunks, Some(&mut left), hands);
        // Nothing is under way here any more that the others could wait for.
        for (id, fetch) in &left {
            if let Some(volume) = self.volume(*id) {
                volume.cache.wait_for(fetch);
            }
        }
        let left: Vec<ChunkId> = left.into_iter().map(|(id, _)| id).collect();
        stored_bytes + self.deliver_these(&left, None, hands)
    }

    /// Answers chunks, but for those that are left to others of the host, if any may be; returns how many stored bytes that
    /// took.
    fn deliver_these(
        &self,
        chunks: &[ChunkId],
        mut left: Option<&mut Vec<(ChunkId, Fetch)>>,
        hands: &mut Hands,
    ) -> u64 {
        let mut stored_bytes = 0;
        let mut making = InTheMaking::default();
        for &id in chunks {
            match self.look_up(id, hands) {
                Ok(Lookup::There(what)) => self.answer(id, Ok(what)),
                Ok(Lookup::Stored(entry, range, fetch)) => {
                    let fetch = match (fetch, &mut left) {
                        (Err(others), Some(left)) => {
                            left.push((id, others));
                            continue;
                        }
                        (fetch, _) => fetch.ok().flatten(),
                    };
                    if making.is_full_for(&entry, range) {
                        stored_bytes += self.make(&mut making, hands);
                    }
                    making.add(id, &entry, range, fetch);
                }
                Err(error) => self.answer(id, Err(&error)),
            }
        }
        stored_bytes + self.make(&mut making, hands)
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
        let entry = match volume.first_entry(id.chunk) {
            Some(entry) => entry,
            None => volume.index.entry(id.chunk)?,
        };
        let spot = volume.spot(id.chunk);
        let mut fetch = Ok(None);
        let is_there = match &entry {
            Entry::Zero => {
                volume.zeros.insert(id.chunk);
                return Ok(Lookup::There(Arrived::Zero));
            }
            Entry::Data(stored) => {
                volume.inherits(spot, &stored.digest, hands) || {
                    // First, or another's fetch could end in between.
                    fetch = volume.begin_fetch(&stored.digest, hands.is_fill).map(Some);
                    volume.copies(spot, stored, hands)
                }
            }
            Entry::Parts(parts) => volume.inherits_parts(spot, parts, hands),
        };
        if is_there {
            return Ok(Lookup::There(Arrived::Data));
        }
        Ok(Lookup::Stored(entry, spot.range, fetch))
    }

    /// Reads the frames of chunks, and answers them; returns how many stored bytes that took.
    fn make(&self, making: &mut InTheMaking, hands: &mut Hands) -> u64 {
        let frames = making.take_frames();
        let mut stored_bytes = 0;
        let mut rest = &frames[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(together(rest, self.read_bytes_max));
            stored_bytes += self.read_together(now, &mut making.chunks, hands);
            rest = later;
        }
        making.clear();
        stored_bytes
    }

    /// Reads frames that lie together, and answers the chunks of which nothing is missing any more, and those that
    /// cannot be had.
    fn read_together(&self, frames: &[FrameWanted], chunks: &mut [Making], hands: &mut Hands) -> u64 {
        // Those of chunks that failed for another frame are not needed.
        let mut waiting: Vec<&FrameWanted> = frames.iter().collect();
        waiting.retain(|wanted| !chunks[wanted.chunk].is_answered);
        let (Some(first), Some(last)) = (waiting.first(), waiting.last()) else {
            return 0;
        };
        let (start, number) = (first.stored().frame.start, first.stored().layer);
        // Each length was capped as it was parsed, and so was their sum as they were joined.
        let bytes = last.stored().frame.start + last.stored().frame.len - start;
        let found = self.volume(chunks[first.chunk].id).ok_or(FetchError::NoVolume);
        let found = found.and_then(|volume| {
            let room = volume.room.check(Instant::now());
            room.map_err(|error| volume.not_kept(error))?;
            Ok((volume, volume.layer(number)?))
        });
        let (volume, layer) = match found {
            Ok(found) => found,
            Err(error) => {
                waiting
                    .iter()
                    .for_each(|wanted| self.fail(&mut chunks[wanted.chunk], &error));
                return 0;
            }
        };
        let mut read_bytes = std::mem::take(&mut hands.frames);
        read_bytes.resize(bytes as usize, 0);
        let mut damaged = Vec::new();
        let read = self
            .store
            .read_right(layer, start, &mut read_bytes, &mut |read_bytes| {
                damaged.clear();
                waiting.retain(|wanted| {
                    let chunk = &mut chunks[wanted.chunk];
                    let at = (wanted.stored().frame.start - start) as usize;
                    let frame = &read_bytes[at..at + wanted.stored().frame.len as usize];
                    match hands.take_in(volume, layer, wanted, chunk, frame) {
                        // Those are read again if there is another place to read them from.
                        Err(error @ FetchError::Decode { .. }) => {
                            damaged.push(error);
                            return true;
                        }
                        Err(error) => self.fail(chunk, &error),
                        Ok(()) if chunk.missing == 0 => {
                            chunk.is_over();
                            self.answer(chunk.id, Ok(Arrived::Data));
                        }
                        Ok(()) => {}
                    }
                    false
                });
                damaged.is_empty()
            });
        hands.frames = read_bytes;
        match read.map_err(FetchError::from) {
            Ok(_) => {
                let damaged = waiting.iter().zip(&damaged);
                damaged.for_each(|(wanted, error)| self.fail(&mut chunks[wanted.chunk], error));
            }
            Err(error) => waiting
                .iter()
                .for_each(|wanted| self.fail(&mut chunks[wanted.chunk], &error)),
        }
        bytes
    }

    fn fail(&self, chunk: &mut Making, error: &FetchError) {
        if !chunk.is_answered {
            chunk.is_over();
            self.answer(chunk.id, Err(error));
        }
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
    /// It is to be fetched: by whoever looked, or by another who is at it already.
    Stored(Entry, ByteRange, Result<Option<OwnFetch>, Fetch>),
}

impl Volume {
    fn spot(&self, chunk: ChunkIndex) -> Spot {
        let root = self.index.root();
        let range = root.chunk_size().range_of(chunk, root.volume_bytes());
        Spot { chunk, range }
    }

    fn first_entry(&self, chunk: ChunkIndex) -> Option<Entry> {
        self.first.get()?.get(&chunk).cloned()
    }

    /// Whether a chunk of parts is in the page file since before. That can be told only if all of what each frame holds
    /// is still there: where a page was overwritten by a later layer, the digest of the frame below has lost what it is
    /// the digest of, and the chunk is fetched again.
    fn inherits_parts(&self, spot: Spot, parts: &[StoredPart], hands: &mut Hands) -> bool {
        if parts.iter().any(|part| part.held != part.shown) {
            return false;
        }
        let Hands { plain, frames, .. } = hands;
        let holds = self.pages.holds_right(spot, plain, |chunk| {
            let mut zeros = chunk.to_vec();
            let are_right = parts.iter().all(|part| {
                frames.resize(part.plain_bytes(spot.range.len) as usize, 0);
                part.gather(chunk, frames);
                part.clear(&mut zeros);
                ChunkDigest::of(frames) == part.stored.digest
            });
            are_right && is_zero(&zeros)
        });
        if holds {
            self.present.insert(spot.chunk);
        }
        holds
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
    /// Decodes a frame, and puts its chunk into the page file if it was the last that was missing.
    fn take_in(
        &mut self,
        volume: &Volume,
        layer: &Blob,
        wanted: &FrameWanted,
        chunk: &mut Making,
        frame: &[u8],
    ) -> Result<(), FetchError> {
        let plain_bytes = match &wanted.what {
            Wanted::Whole(_) => chunk.range.len,
            Wanted::Part(part) => part.plain_bytes(chunk.range.len),
        };
        self.plain.resize(plain_bytes as usize, 0);
        let decoder = match &mut self.decoder {
            Some(decoder) => decoder,
            none => none.insert(ChunkDecoder::new().map_err(FetchError::Decoder)?),
        };
        let stored = wanted.stored();
        decoder
            .decode(frame, &stored.digest, &mut self.plain)
            .map_err(|source| FetchError::Decode {
                layer: layer.digest,
                frame: stored.frame,
                source: Box::new(source),
            })?;
        chunk.missing -= 1;
        let (plain, digest) = match &wanted.what {
            Wanted::Whole(stored) => (&self.plain, Some(&stored.digest)),
            Wanted::Part(part) => {
                part.place(&self.plain, &mut chunk.plain);
                // Nobody knows one of the whole chunk.
                (&chunk.plain, None)
            }
        };
        if chunk.missing > 0 {
            return Ok(());
        }
        let spot = Spot {
            chunk: chunk.id.chunk,
            range: chunk.range,
        };
        volume.keep(plain, spot, digest, self.is_fill)
    }
}
