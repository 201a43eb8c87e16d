use proptest::prelude::*;

use super::*;

const SMALL: ChunkSize = ChunkSize::DEFAULT;

fn volume(name: VolumeName, chunks: u64) -> SourceVolume {
    SourceVolume {
        name,
        bytes: chunks * SMALL.bytes(),
        chunk_size: SMALL,
    }
}

fn volumes() -> Vec<SourceVolume> {
    vec![
        volume(VolumeName::Memory, 1000),
        volume(VolumeName::Drive("rootfs".into()), 50),
    ]
}

fn id(volume: u16, chunk: u64) -> ChunkId {
    ChunkId {
        volume: VolumeId(volume),
        chunk: ChunkIndex(chunk),
    }
}

#[test]
fn the_order_survives_and_chunks_that_follow_each_other_take_three_bytes_together() {
    let touched = [id(0, 900), id(0, 901), id(0, 902), id(1, 7), id(0, 3), id(0, 2)];
    let set = WorkingSet::of(&volumes(), touched);
    let bytes = set.to_bytes();
    let read = WorkingSet::parse(&bytes).unwrap();
    assert_eq!(read, set);
    assert_eq!(read.of_volumes(&volumes()).unwrap(), touched);
    let long = WorkingSet::of(&volumes(), (0..1000).map(|chunk| id(0, chunk)));
    let none = WorkingSet::of(&volumes(), []);
    // The chunks' number, in two bytes and in one, and the run.
    assert_eq!(long.to_bytes().len(), none.to_bytes().len() + 1 + 4);
}

#[test]
fn what_is_touched_again_or_outside_is_not_kept() {
    let touched = [
        id(0, 5),
        id(0, 1000),
        id(0, 5),
        id(2, 0),
        id(1, u64::MAX),
        id(1, 49),
    ];
    let set = WorkingSet::of(&volumes(), touched);
    assert_eq!(set.of_volumes(&volumes()).unwrap(), [id(0, 5), id(1, 49)]);
}

#[test]
fn a_working_set_of_another_machine_is_refused_by_what_it_names() {
    let set = WorkingSet::of(&volumes(), [id(0, 999), id(1, 7)]);
    let swapped: Vec<_> = volumes().into_iter().rev().collect();
    assert_eq!(set.of_volumes(&swapped).unwrap(), [id(1, 999), id(0, 7)]);
    let without_drive = [volume(VolumeName::Memory, 1000)];
    let drive = VolumeName::Drive("rootfs".into());
    assert_eq!(set.of_volumes(&without_drive), Err(Misfit::NoVolume(drive)));
    let mut shorter = volumes();
    shorter[0].bytes -= SMALL.bytes();
    let refused = set.of_volumes(&shorter).unwrap_err();
    assert!(
        matches!(refused, Misfit::NoChunk { chunks: 999, .. }),
        "{refused}"
    );
    let mut otherwise = volumes();
    otherwise[1].chunk_size = ChunkSize::new(16 << 10).unwrap();
    let refused = set.of_volumes(&otherwise).unwrap_err();
    assert!(
        matches!(refused, Misfit::ChunkSize { here: 16384, .. }),
        "{refused}"
    );
    // A volume of which nothing was touched may be missing.
    let memory_alone = WorkingSet::of(&volumes(), [id(0, 1)]);
    assert_eq!(memory_alone.of_volumes(&without_drive).unwrap(), [id(0, 1)]);
}

/// A working set of the memory and a drive, of so many chunks, and then these bytes.
fn forged(chunks: u64, runs: &[u8]) -> Vec<u8> {
    let set = WorkingSet::of(&volumes(), []);
    let mut bytes = set.to_bytes();
    assert_eq!(
        bytes.pop(),
        Some(0),
        "the number of chunks is the last of one without"
    );
    varint::append(chunks, &mut bytes);
    bytes.extend(runs);
    bytes
}

fn run(volume: u64, distance: i64, chunks: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    varint::append(volume, &mut bytes);
    varint::append_signed(distance, &mut bytes);
    varint::append(chunks, &mut bytes);
    bytes
}

#[test]
fn hostile_ones_are_refused_before_anything_is_made_of_them() {
    let refused = |bytes: &[u8]| WorkingSet::parse(bytes).unwrap_err().to_string();
    let valid = forged(2, &run(0, 4, 2));
    assert_eq!(WorkingSet::parse(&valid).unwrap().len(), 2);
    for (bytes, reason) in [
        (forged(1 << 20, &run(0, 0, 1 << 20)), "more chunks"),
        (forged(u64::MAX, &[]), "more chunks"),
        (forged(2, &run(0, 0, 3)), "longer than all"),
        (forged(2, &run(0, 0, 0)), "empty"),
        (forged(2, &run(2, 0, 2)), "no volume of its own"),
        (forged(2, &run(0, -1, 2)), "lies in no volume"),
        (forged(2, &run(0, i64::MIN, 2)), "lies in no volume"),
        (
            forged(2, &[run(0, 9, 1), run(0, -1, 1)].concat()),
            "a chunk twice",
        ),
        (forged(2, &run(0, 0, 1)), "malformed"),
        ([&valid[..], &[0]].concat(), "follows its last run"),
        (
            vec![0; WORKING_SET_BYTES_MAX as usize + 1],
            "no working set has more",
        ),
        (b"RNLXWSX\x01".to_vec(), "does not begin"),
        (b"RNLXWST\x02".to_vec(), "newer"),
        (b"RNLXWST\x01\x81\x01".to_vec(), "more volumes"),
        (b"RNLXWST\x01\x01\x10\x05other".to_vec(), "no volume's"),
        (b"RNLXWST\x01\x01\x08\x06memory".to_vec(), "chunk size"),
        (b"RNLXWST\x01\x01\xff\x06memory".to_vec(), "chunk size"),
        (b"RNLXWST\x01\x01\x10\x07memory".to_vec(), "cut off"),
        (
            b"RNLXWST\x01\x02\x10\x06memory\x10\x06memory\x00".to_vec(),
            "volume twice",
        ),
    ] {
        let said = refused(&bytes);
        assert!(said.contains(reason), "{reason}: {said}");
    }
    for cut in 0..valid.len() {
        assert!(WorkingSet::parse(&valid[..cut]).is_err(), "{cut}");
    }
}

#[test]
fn the_longest_of_all_can_be_read() {
    // No two follow each other, and distances are as long as they get in the largest volume.
    let large = SourceVolume {
        name: VolumeName::Memory,
        bytes: crate::index::VOLUME_BYTES_MAX,
        chunk_size: ChunkSize::new(ChunkSize::MIN).unwrap(),
    };
    let last = large.chunk_size.chunks_in(large.bytes) - 1;
    let touched = (0..CHUNKS_MAX as u64 + 1).map(|number| match number % 2 {
        0 => id(0, number),
        _ => id(0, last - number),
    });
    let set = WorkingSet::of(std::slice::from_ref(&large), touched);
    assert_eq!(set.len(), CHUNKS_MAX, "no more are kept");
    let bytes = set.to_bytes();
    assert!(bytes.len() as u64 <= WORKING_SET_BYTES_MAX, "{}", bytes.len());
    assert_eq!(WorkingSet::parse(&bytes).unwrap(), set);
}

#[test]
fn a_file_appears_when_it_is_written_and_replaces_none_but_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("web.working-set");
    let set = WorkingSet::of(&volumes(), [id(0, 5)]);
    drop(WorkingSetFile::create(&path).unwrap());
    assert_eq!(fs_names(folder.path()), Vec::<String>::new());
    for set in [WorkingSet::default(), set] {
        WorkingSetFile::create(&path).unwrap().write(&set).unwrap();
        assert_eq!(read_file(&path).unwrap(), set);
    }
    assert_eq!(fs_names(folder.path()), ["web.working-set"]);
    let taken = WorkingSetFile::create(folder.path()).unwrap_err();
    assert!(matches!(taken, FileError::Taken(_)), "{taken}");
    let missing = WorkingSetFile::create(&folder.path().join("none/set")).unwrap_err();
    assert!(matches!(missing, FileError::Io { .. }), "{missing}");
    std::fs::write(&path, "no set").unwrap();
    let wrong = read_file(&path).unwrap_err();
    assert!(matches!(wrong, FileError::WorkingSet { .. }), "{wrong}");
}

fn fs_names(folder: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

proptest! {
    #[test]
    fn whatever_was_touched_survives(touched in prop::collection::vec((0..3u16, 0..1100u64), 0..200)) {
        let touched = touched.into_iter().map(|(volume, chunk)| id(volume, chunk));
        let set = WorkingSet::of(&volumes(), touched);
        prop_assert_eq!(WorkingSet::parse(&set.to_bytes()).unwrap(), set);
    }

    #[test]
    fn strange_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        let _ = WorkingSet::parse(&[&b"RNLXWST\x01"[..], &bytes].concat());
        let runs = forged(u64::from(bytes.first().copied().unwrap_or(0)), &bytes);
        if let Ok(set) = WorkingSet::parse(&runs) {
            prop_assert_eq!(WorkingSet::parse(&set.to_bytes()).unwrap(), set);
        }
    }
}
