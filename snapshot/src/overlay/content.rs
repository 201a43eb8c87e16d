//! The content of a volume that lies over an image: what the machine wrote itself, and the image's bytes elsewhere.
//!
//! It is what a snapshot of a resumed machine captures. Chunks that the machine never needed are fetched as they are
//! read, so such a snapshot is never short; a chunk that cannot be had ends the snapshot with the reason.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use crate::capture::content::{Content, Found};
use crate::copy_before_write::OwnPages;
use crate::pager::{Fetcher, PageSet};
use crate::source::{Arrived, ChunkId, SourceVolume, VolumeId};
use crate::units::{ByteRange, ChunkIndex, PAGE_SIZE, PageIndex};

/// Chunks that are asked for ahead of the one that is read.
const AHEAD: u64 = 32;

/// Called off from outside, while chunks are waited for.
pub type IsCancelled = Arc<dyn Fn() -> bool + Send + Sync>;

/// See the module.
pub struct OverImage {
    fetcher: Arc<Fetcher>,
    volume: VolumeId,
    about: SourceVolume,
    base: Arc<File>,
    own: PageSet,
    own_pages: Box<dyn OwnPages>,
    /// Pages that are zeros, whatever the image holds, unless they are the machine's own.
    discarded: PageSet,
    is_cancelled: IsCancelled,
}

impl OverImage {
    /// The volume `volume` of the fetcher's source, with the pages `own` read from `own_pages` and the pages `discarded`
    /// as zeros.
    ///
    /// # Panics
    /// If the source has no such volume.
    #[must_use]
    pub fn new(
        fetcher: &Arc<Fetcher>,
        volume: VolumeId,
        own: PageSet,
        own_pages: Box<dyn OwnPages>,
        discarded: PageSet,
        is_cancelled: IsCancelled,
    ) -> Self {
        let about = fetcher.source().volumes()[usize::from(volume.0)].clone();
        let base = fetcher.source().page_file(volume);
        Self {
            fetcher: fetcher.clone(),
            volume,
            about,
            base,
            own,
            own_pages,
            discarded,
            is_cancelled,
        }
    }

    fn chunk_at(&self, offset: u64) -> ChunkId {
        ChunkId {
            volume: self.volume,
            chunk: self.about.chunk_size.chunk_holding(offset),
        }
    }

    /// Reads bytes of one chunk that are the image's.
    fn read_base(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        let id = self.chunk_at(offset);
        if self.fetcher.state(id).is_none() {
            let ahead = (1..=AHEAD).map(|step| ChunkId {
                chunk: ChunkIndex(id.chunk.0 + step),
                ..id
            });
            self.fetcher.prefetch(&ahead.collect::<Vec<_>>());
        }
        let wait = || self.fetcher.wait_unless(id, &*self.is_cancelled);
        let read = || self.base.read_exact_at(into, offset);
        match self.fetcher.read_held(id, wait, read)? {
            Arrived::Zero => Ok(Found::Zero),
            Arrived::Data => Ok(Found::Data),
        }
    }
}

/// Who answers for a run of pages.
#[derive(Clone, Copy, PartialEq, Eq)]
enum From {
    Own,
    Nobody,
    Image,
}

impl OverImage {
    /// The run of bytes at `offset`, at most `len` long, that comes from one place, and from one chunk.
    fn run_at(&self, offset: u64, len: u64) -> (From, u64) {
        let page = PageIndex::holding(offset);
        let chunk = self.about.range_of(self.chunk_at(offset).chunk);
        let end = (offset + len).min(chunk.start + chunk.len);
        let pages = end.div_ceil(PAGE_SIZE) - page.0;
        let (own, own_pages) = self.own.run_at(page, pages);
        let (from, pages) = if own {
            (From::Own, own_pages)
        } else {
            let (discarded, pages) = self.discarded.run_at(page, own_pages);
            (if discarded { From::Nobody } else { From::Image }, pages)
        };
        (from, ((page.0 + pages) * PAGE_SIZE).min(end) - offset)
    }
}

impl Content for OverImage {
    fn bytes(&self) -> u64 {
        self.about.bytes
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        // Which chunks of the image are zeros is known only once they were asked for; reading them says so at once.
        let len = self.about.bytes.saturating_sub(from);
        Ok((len > 0).then_some(ByteRange { start: from, len }))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<Found> {
        let mut found = Found::Zero;
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let (from, len) = self.run_at(at, (into.len() - done) as u64);
            let len = usize::try_from(len).map_err(io::Error::other)?;
            let part = &mut into[done..done + len];
            let part_found = match from {
                From::Nobody => Found::Zero,
                From::Image => self.read_base(at, part)?,
                From::Own => {
                    self.own_pages.read(at, part)?;
                    Found::Data
                }
            };
            match part_found {
                Found::Zero if found == Found::Data => into[done..done + len].fill(0),
                Found::Data if found == Found::Zero => {
                    into[..done].fill(0);
                    found = Found::Data;
                }
                _ => {}
            }
            done += len;
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pager::FetcherSettings;
    use crate::source::model::{ModelSource, id};
    use crate::units::ChunkSize;
    use crate::volume::VolumeName;

    const CHUNK: u64 = 16 << 10;
    const BYTES: u64 = 4 * CHUNK;

    fn rig(cancelled: bool) -> (Arc<ModelSource>, OverImage) {
        let about = SourceVolume {
            name: VolumeName::Memory,
            bytes: BYTES,
            chunk_size: ChunkSize::new(CHUNK as u32).unwrap(),
        };
        // The second chunk is zeros.
        let image = (0..BYTES).map(|at| if at / CHUNK == 1 { 0 } else { 7 }).collect();
        let source = ModelSource::new(vec![(about, image)]);
        let settings = FetcherSettings {
            neighbourhood_bytes: 0,
            fill: false,
            ..FetcherSettings::default()
        };
        let fetcher = Fetcher::start(source.clone(), settings).unwrap();
        let own_file = tempfile::tempfile().unwrap();
        own_file.write_all_at(&vec![9; BYTES as usize], 0).unwrap();
        let (mut own, mut discarded) = (PageSet::new(16), PageSet::new(16));
        own.insert_run(PageIndex(1), 1);
        own.insert_run(PageIndex(5), 1);
        discarded.insert_run(PageIndex(1), 2);
        discarded.insert_run(PageIndex(12), 4);
        let is_cancelled: IsCancelled = Arc::new(move || cancelled);
        let content = OverImage::new(
            &fetcher,
            VolumeId(0),
            own,
            Box::new(own_file),
            discarded,
            is_cancelled,
        );
        (source, content)
    }

    #[test]
    fn own_pages_win_over_discarded_ones_and_those_over_the_image() {
        let (source, content) = rig(false);
        (0..4).for_each(|chunk| source.deliver(id(0, chunk)));
        let mut bytes = vec![0xFF; BYTES as usize];
        assert_eq!(content.read(0, &mut bytes).unwrap(), Found::Data);
        let pages: Vec<u8> = bytes.chunks(PAGE_SIZE as usize).map(|page| page[0]).collect();
        assert!(
            bytes
                .chunks(PAGE_SIZE as usize)
                .all(|page| page.iter().all(|byte| *byte == page[0]))
        );
        assert_eq!(pages, [7, 9, 0, 7, 0, 9, 0, 0, 7, 7, 7, 7, 0, 0, 0, 0]);
    }

    #[test]
    fn a_discarded_chunk_is_zero_without_being_fetched() {
        let (source, content) = rig(false);
        let mut bytes = vec![0xFF; CHUNK as usize];
        assert_eq!(content.read(3 * CHUNK, &mut bytes).unwrap(), Found::Zero);
        assert_eq!(source.asked(), []);
    }

    #[test]
    fn waiting_for_a_chunk_ends_when_the_snapshot_is_cancelled() {
        let (_source, content) = rig(true);
        let mut bytes = vec![0; CHUNK as usize];
        assert!(content.read(0, &mut bytes).is_err());
    }

    #[test]
    fn a_chunk_that_cannot_be_had_ends_the_snapshot_with_the_reason() {
        let (source, content) = rig(false);
        let error = std::thread::scope(|scope| {
            let reader = scope.spawn(|| content.read(2 * CHUNK, &mut vec![0; CHUNK as usize]).unwrap_err());
            source.asked_until(|asked| asked.iter().any(|ask| ask.0 == id(0, 2)));
            source.fail(id(0, 2), "the bytes are wrong", false);
            reader.join().unwrap()
        });
        assert!(error.to_string().contains("the bytes are wrong"), "{error}");
    }
}
