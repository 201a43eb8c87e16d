//! The working set: the chunks that a resumed machine touched first, in order, as they were recorded once. Whoever
//! resumes the image later fetches them in that order, before anything that nobody waits for.
//!
//! It is a blob of its image, and a file before that. A wrong one costs time and nothing else: chunks are verified as
//! all others are, and what no volume has is refused as a whole, before anything is fetched for it.
//!
//! All numbers are varints as in an [index](crate::index), but for single bytes.
//!
//! ```text
//! working set = "RNLXWST" | version u8 = 1 | volumes | volumes × volume | chunks | run…
//! volume      = log2 chunk size u8 | name bytes | name
//! run         = volume's position | zigzag(first chunk - the one behind that volume's last run, 0 before its first) |
//!               chunks
//! ```
//!
//! Runs have as many chunks together as is said before them; none comes twice. Some three bytes a run, and zeros are in
//! none: they cost nothing to have.

mod file;

pub use file::{FileError, WorkingSetFile, read_file};

use std::collections::HashSet;

use crate::image::manifest::VOLUMES_MAX;
use crate::source::{ChunkId, SourceVolume, VolumeId};
use crate::units::{ChunkIndex, ChunkSize};
use crate::varint;
use crate::volume::VolumeName;

const MAGIC: &[u8; 7] = b"RNLXWST";
const VERSION: u8 = 1;

/// The most chunks of a working set: 16 GiB at the default chunk size. What a machine touches beyond that it does not
/// touch first.
pub const CHUNKS_MAX: usize = 1 << 18;

/// The longest working set: [`CHUNKS_MAX`] runs of a chunk each, as far apart as they can be.
pub const WORKING_SET_BYTES_MAX: u64 = 2 << 20;

/// Why bytes are no working set.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// It does not begin as one.
    #[error("it is no working set: it does not begin as one")]
    Magic,
    /// A later version wrote it.
    #[error("its format has version {0}, and this Runnel reads up to {VERSION}: use a newer one")]
    Newer(u8),
    /// It is longer than any.
    #[error("it has {0} bytes, and no working set has more than {WORKING_SET_BYTES_MAX}")]
    TooLong(u64),
    /// It makes no sense.
    #[error("it is no working set: {0}")]
    Malformed(&'static str),
}

/// Why a working set is not one of an image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The image has no such volume.
    #[error("it names volume {0}, which the image does not have: it was recorded with another machine")]
    NoVolume(VolumeName),
    /// The volume is cut in another way.
    #[error(
        "it was recorded where volume {volume} is cut into chunks of {recorded} bytes, and here they have {here}: record it anew"
    )]
    ChunkSize {
        /// Which volume.
        volume: VolumeName,
        /// In the working set.
        recorded: u64,
        /// In the image.
        here: u64,
    },
    /// The volume is shorter.
    #[error("it names {chunk} of volume {volume}, which has {chunks}: it was recorded with another machine")]
    NoChunk {
        /// Which volume.
        volume: VolumeName,
        /// Which chunk.
        chunk: ChunkIndex,
        /// How many there are.
        chunks: u64,
    },
}

/// A volume of which chunks were touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordedVolume {
    /// Its name.
    pub name: VolumeName,
    /// How it was cut.
    pub chunk_size: ChunkSize,
}

/// Chunks in the order of their first touch, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    volumes: Vec<RecordedVolume>,
    /// Of `volumes`, by position.
    chunks: Vec<ChunkId>,
}

impl WorkingSet {
    /// What was touched of the volumes of a source. Those that come a second time, those that no volume has, and those
    /// beyond [`CHUNKS_MAX`] are left out.
    #[must_use]
    pub fn of(volumes: &[SourceVolume], touched: impl IntoIterator<Item = ChunkId>) -> Self {
        let mut seen = HashSet::new();
        let exists = |id: &ChunkId| {
            let volume = volumes.get(usize::from(id.volume.0));
            volume.is_some_and(|volume| volume.range_of(id.chunk).len > 0)
        };
        let chunks = touched.into_iter().filter(exists).filter(|id| seen.insert(*id));
        let chunks = chunks.take(CHUNKS_MAX).collect();
        let volumes = volumes.iter().map(|volume| RecordedVolume {
            name: volume.name.clone(),
            chunk_size: volume.chunk_size,
        });
        Self {
            volumes: volumes.take(VOLUMES_MAX).collect(),
            chunks,
        }
    }

    /// How many chunks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The chunks, each with the volume that it is of, the first touched first.
    pub fn chunks(&self) -> impl Iterator<Item = (&RecordedVolume, ChunkIndex)> {
        let chunks = self.chunks.iter();
        chunks.filter_map(|id| Some((self.volumes.get(usize::from(id.volume.0))?, id.chunk)))
    }

    /// The chunks as those of `volumes`, which are an image's.
    ///
    /// # Errors
    /// When one of them is none of these: then it was recorded with something else, and helps nobody.
    pub fn of_volumes(&self, volumes: &[SourceVolume]) -> Result<Vec<ChunkId>, Misfit> {
        let mut found: Vec<Option<usize>> = vec![None; self.volumes.len()];
        let mut chunks = Vec::with_capacity(self.chunks.len());
        for id in &self.chunks {
            let number = usize::from(id.volume.0);
            let Some((recorded, found)) = self.volumes.get(number).zip(found.get_mut(number)) else {
                continue; // of none of its own: there is none
            };
            let position = match *found {
                Some(position) => position,
                None => *found.insert(fitting(recorded, volumes)?),
            };
            let volume = &volumes[position];
            if volume.range_of(id.chunk).len == 0 {
                return Err(Misfit::NoChunk {
                    volume: volume.name.clone(),
                    chunk: id.chunk,
                    chunks: volume.chunk_size.chunks_in(volume.bytes),
                });
            }
            chunks.push(ChunkId {
                volume: VolumeId(position as u16), // an image has at most VOLUMES_MAX
                chunk: id.chunk,
            });
        }
        Ok(chunks)
    }

    /// The bytes of the blob.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = [&MAGIC[..], &[VERSION]].concat();
        varint::append(self.volumes.len() as u64, &mut bytes);
        for volume in &self.volumes {
            let name = volume.name.to_string();
            bytes.push(volume.chunk_size.bytes().trailing_zeros() as u8);
            varint::append(name.len() as u64, &mut bytes);
            bytes.extend(name.as_bytes());
        }
        varint::append(self.chunks.len() as u64, &mut bytes);
        let mut ends = vec![0; self.volumes.len()];
        let mut rest = &self.chunks[..];
        while let Some(first) = rest.first() {
            let follows = |pair: &&[ChunkId]| {
                pair[0].volume == pair[1].volume && pair[0].chunk.0 + 1 == pair[1].chunk.0
            };
            let run = 1 + rest.windows(2).take_while(follows).count();
            let end = &mut ends[usize::from(first.volume.0)];
            varint::append(u64::from(first.volume.0), &mut bytes);
            varint::append_signed(first.chunk.0.wrapping_sub(*end) as i64, &mut bytes);
            varint::append(run as u64, &mut bytes);
            *end = first.chunk.0 + run as u64;
            rest = &rest[run..];
        }
        bytes
    }

    /// Reads a working set. Whether it is one of an image, [`of_volumes`](Self::of_volumes) tells.
    ///
    /// # Errors
    /// When the bytes are none, or of a newer Runnel.
    pub fn parse(bytes: &[u8]) -> Result<Self, WorkingSetError> {
        if bytes.len() as u64 > WORKING_SET_BYTES_MAX {
            return Err(WorkingSetError::TooLong(bytes.len() as u64));
        }
        let rest = bytes.strip_prefix(MAGIC).ok_or(WorkingSetError::Magic)?;
        let (&version, rest) = rest.split_first().ok_or(WorkingSetError::Magic)?;
        if version != VERSION {
            return Err(WorkingSetError::Newer(version));
        }
        let mut rest = Rest(rest);
        let volumes = rest.volumes()?;
        let chunks = rest.chunks(volumes.len())?;
        match rest.0.is_empty() {
            true => Ok(Self { volumes, chunks }),
            false => Err(WorkingSetError::Malformed("something follows its last run")),
        }
    }
}

fn fitting(recorded: &RecordedVolume, volumes: &[SourceVolume]) -> Result<usize, Misfit> {
    let position = volumes.iter().position(|volume| volume.name == recorded.name);
    let position = position.ok_or_else(|| Misfit::NoVolume(recorded.name.clone()))?;
    let here = volumes[position].chunk_size;
    if here != recorded.chunk_size {
        return Err(Misfit::ChunkSize {
            volume: recorded.name.clone(),
            recorded: recorded.chunk_size.bytes(),
            here: here.bytes(),
        });
    }
    Ok(position)
}

/// What was not read yet.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn volumes(&mut self) -> Result<Vec<RecordedVolume>, WorkingSetError> {
        let count = self.number()?;
        if count > VOLUMES_MAX as u64 {
            return Err(WorkingSetError::Malformed("it has more volumes than a machine"));
        }
        let mut volumes: Vec<RecordedVolume> = Vec::new();
        for _ in 0..count {
            let volume = self.volume()?;
            if volumes.iter().any(|other| other.name == volume.name) {
                return Err(WorkingSetError::Malformed("it has a volume twice"));
            }
            volumes.push(volume);
        }
        Ok(volumes)
    }

    fn volume(&mut self) -> Result<RecordedVolume, WorkingSetError> {
        let malformed = WorkingSetError::Malformed;
        let (&log2, rest) = self.0.split_first().ok_or(malformed("it is cut off"))?;
        self.0 = rest;
        let bytes = 1_u32.checked_shl(log2.into()).unwrap_or(0);
        let chunk_size =
            ChunkSize::new(bytes).map_err(|_| malformed("a chunk size is not one of the format"))?;
        let length = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        let (name, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(malformed("it is cut off"))?;
        self.0 = rest;
        let name = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
        let name = name.ok_or(malformed("a name is no volume's"))?;
        Ok(RecordedVolume { name, chunk_size })
    }

    fn chunks(&mut self, volumes: usize) -> Result<Vec<ChunkId>, WorkingSetError> {
        let malformed = WorkingSetError::Malformed;
        let count = self.number()?;
        if count > CHUNKS_MAX as u64 {
            return Err(malformed("it has more chunks than are kept"));
        }
        let mut chunks = Vec::new();
        let mut seen = HashSet::new();
        let mut ends = vec![0_u64; volumes];
        while (chunks.len() as u64) < count {
            let volume = usize::try_from(self.number()?).unwrap_or(usize::MAX);
            let end = ends
                .get_mut(volume)
                .ok_or(malformed("a run is of no volume of its own"))?;
            let distance = varint::take_signed(&mut self.0).ok_or(malformed("a number is malformed"))?;
            let length = varint::take(&mut self.0).ok_or(malformed("a number is malformed"))?;
            if !(1..=count - chunks.len() as u64).contains(&length) {
                return Err(malformed("a run is empty, or longer than all"));
            }
            let first = end.checked_add_signed(distance);
            let behind = first.and_then(|first| first.checked_add(length));
            let (Some(first), Some(behind)) = (first, behind) else {
                return Err(malformed("a run lies in no volume"));
            };
            *end = behind;
            let run = (first..behind).map(|chunk| ChunkId {
                volume: VolumeId(volume as u16), // fewer than VOLUMES_MAX
                chunk: ChunkIndex(chunk),
            });
            for id in run {
                if !seen.insert(id) {
                    return Err(malformed("it has a chunk twice"));
                }
                chunks.push(id);
            }
        }
        Ok(chunks)
    }

    fn number(&mut self) -> Result<u64, WorkingSetError> {
        varint::take(&mut self.0).ok_or(WorkingSetError::Malformed("a number is malformed"))
    }
}

#[cfg(test)]
mod tests;
