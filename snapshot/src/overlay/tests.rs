use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::block_store::GuestRam;
use crate::capture::content::{Content as _, Found};
use crate::copy_before_write::EarlyPagesLimits;
use crate::pager::FetcherSettings;
use crate::source::PageSource as _;
use crate::source::model::{ModelSource, id};
use crate::units::ChunkSize;

const CHUNK: u64 = 16 << 10;
/// Four chunks, the second of them zeros, and a tail that is neither a whole chunk nor a whole block.
const BYTES: u64 = 4 * CHUNK + 5 * 512;

fn image() -> Vec<u8> {
    (0..BYTES)
        .map(|at| {
            if at / CHUNK == 1 {
                0
            } else {
                (at / 512 % 250 + 1) as u8
            }
        })
        .collect()
}

struct Rig {
    source: Arc<ModelSource>,
    overlay: Overlay,
    ram: GuestRam,
}

fn rig(read_only: bool) -> Rig {
    let name = VolumeName::Drive("root".into());
    let chunk_size = ChunkSize::new(CHUNK as u32).unwrap();
    let about = SourceVolume {
        name: name.clone(),
        bytes: BYTES,
        chunk_size,
    };
    let source = ModelSource::new(vec![(about, image())]);
    let settings = FetcherSettings {
        neighbourhood_bytes: 0,
        fill: false,
        ..FetcherSettings::default()
    };
    let fetcher = Fetcher::start(source.clone(), settings).unwrap();
    let overlay = Overlay::new(&fetcher, &name, &std::env::temp_dir(), read_only).unwrap();
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 2 * BYTES as usize)]).unwrap();
    Rig { source, overlay, ram }
}

impl Rig {
    fn deliver_all(&self) {
        (0..5).for_each(|chunk| self.source.deliver(id(0, chunk)));
    }

    /// Reads into two slices, to exercise the cut between them.
    fn read(&self, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        let first = len / 3;
        let slices = [
            self.ram.get_slice(GuestAddress(7), first as usize).unwrap(),
            self.ram
                .get_slice(GuestAddress(7 + first), (len - first) as usize)
                .unwrap(),
        ];
        self.overlay.read_at(offset, &slices)?;
        let mut bytes = vec![0; len as usize];
        self.ram.read_slice(&mut bytes, GuestAddress(7)).unwrap();
        Ok(bytes)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.ram.write_slice(bytes, GuestAddress(0)).unwrap();
        self.overlay.write_at(
            offset,
            &[self.ram.get_slice(GuestAddress(0), bytes.len()).unwrap()],
        )
    }
}

#[test]
fn what_the_guest_reads_of_the_image_is_recorded_and_what_it_wrote_itself_is_not() {
    let rig = rig(false);
    rig.overlay.fetcher.record_touches();
    rig.deliver_all();
    rig.write(2 * CHUNK, &[7; CHUNK as usize]).unwrap();
    rig.read(3 * CHUNK - 512, 1024).unwrap();
    // The rest of a block that is written in part is the image's.
    rig.write(512, &[1; 512]).unwrap();
    let set = rig.overlay.fetcher.recorded();
    let chunks: Vec<u64> = set.chunks().map(|(_, chunk)| chunk.0).collect();
    assert_eq!(chunks, [3, 0]);
}

#[test]
fn a_whole_block_is_written_without_waiting_for_the_image() {
    let rig = rig(false);
    rig.write(4096, &[0xAA; 8192]).unwrap();
    assert_eq!(rig.read(4096, 8192).unwrap(), vec![0xAA; 8192]);
    assert_eq!(rig.source.asked(), []);
}

#[test]
fn a_part_of_a_block_is_written_into_the_images_bytes() {
    let rig = rig(false);
    rig.deliver_all();
    rig.write(1024, &[0xAA; 512]).unwrap();
    let mut expected = image()[..4096].to_vec();
    expected[1024..1536].fill(0xAA);
    assert_eq!(rig.read(0, 4096).unwrap(), expected);
}

#[test]
fn a_read_asks_for_all_its_chunks_before_it_waits() {
    let rig = rig(false);
    let reader = std::thread::scope(|scope| {
        let reader = scope.spawn(|| rig.read(0, BYTES).unwrap());
        let asked = rig.source.asked_until(|asked| asked.len() > 5);
        assert!((0..5).all(|chunk| asked.iter().any(|ask| ask.0 == id(0, chunk))));
        rig.deliver_all();
        reader.join().unwrap()
    });
    assert_eq!(reader, image());
}

#[test]
fn what_lies_outside_the_drive_or_is_read_only_is_refused() {
    let rig = rig(false);
    rig.deliver_all();
    assert!(rig.read(BYTES - 512, 1024).is_err());
    assert!(rig.write(u64::MAX - 511, &[0; 512]).is_err());
    assert!(
        rig.overlay
            .discard(ByteRange {
                start: BYTES,
                len: 512
            })
            .is_err()
    );
    let read_only = self::rig(true);
    assert_eq!(
        read_only.write(0, &[0; 512]).unwrap_err().kind(),
        io::ErrorKind::PermissionDenied
    );
}

#[test]
fn the_image_itself_is_never_written() {
    let rig = rig(false);
    rig.deliver_all();
    rig.write(0, &vec![0xEE; BYTES as usize]).unwrap();
    let base = rig.source.page_file(VolumeId(0));
    let mut bytes = vec![0; BYTES as usize];
    base.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, image());
}

proptest! {
    #[test]
    fn an_overlay_is_a_disk(steps in prop::collection::vec((0u8..4, 0..BYTES / 512, 1u64..40), 1..40)) {
        let rig = rig(false);
        rig.deliver_all();
        let mut disk = image();
        for (number, (step, sector, sectors)) in steps.into_iter().enumerate() {
            let range = ByteRange { start: sector * 512, len: (sectors * 512).min(BYTES - sector * 512) };
            let part = range.start as usize..(range.start + range.len) as usize;
            match step {
                0 => {
                    let bytes = vec![200 + number as u8; part.len()];
                    rig.write(range.start, &bytes).unwrap();
                    disk[part].copy_from_slice(&bytes);
                }
                1 => {
                    rig.overlay.discard(range).unwrap();
                    disk[part].fill(0);
                }
                2 => {
                    rig.overlay.write_zeroes(range, false).unwrap();
                    disk[part].fill(0);
                }
                _ => prop_assert!(rig.read(range.start, range.len).unwrap() == disk[part]),
            }
        }
        prop_assert!(rig.read(0, BYTES).unwrap() == disk);
    }
}

#[test]
fn frozen_content_stays_while_the_machine_writes_and_the_images_chunks_come_later() {
    let rig = rig(false);
    rig.deliver_all();
    rig.write(0, &[9; 4096]).unwrap();
    rig.write(2 * CHUNK + 512, &[8; 512]).unwrap();
    let expected = rig.read(0, BYTES).unwrap();
    assert!(!rig.overlay.dirty().so_far().is_empty());
    let early = Arc::new(EarlyPages::new(
        EarlyPagesLimits::default(),
        &std::env::temp_dir(),
    ));
    let frozen = rig.overlay.freeze(None, &early, Arc::new(|| false));
    rig.write(0, &[1; 4096]).unwrap();
    rig.write(3 * CHUNK, &[1; 4096]).unwrap();
    rig.overlay
        .discard(ByteRange {
            start: 2 * CHUNK,
            len: 4096,
        })
        .unwrap();
    let mut seen = vec![0xFF; BYTES as usize];
    assert_eq!(frozen.read(0, &mut seen).unwrap(), Found::Data);
    assert!(seen == expected, "the snapshot saw what was written after it");
}

#[test]
fn what_was_not_written_before_the_snapshot_is_not_kept_for_it() {
    let rig = rig(false);
    rig.deliver_all();
    let image = rig.read(0, BYTES).unwrap();
    let early = Arc::new(EarlyPages::new(
        EarlyPagesLimits::default(),
        &std::env::temp_dir(),
    ));
    let frozen = rig.overlay.freeze(None, &early, Arc::new(|| false));
    rig.write(0, &[9; 4096]).unwrap();
    rig.write(0, &[7; 512]).unwrap();
    assert_eq!(early.held(), (0, 0), "the image has it");
    let mut seen = vec![0xFF; BYTES as usize];
    let _ = frozen.read(0, &mut seen).unwrap();
    assert!(seen == image);
}
