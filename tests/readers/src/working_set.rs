//! What was recorded with a machine.

use runnel_snapshot::index::VOLUME_BYTES_MAX;
use runnel_snapshot::source::SourceVolume;
use runnel_snapshot::units::ChunkSize;
use runnel_snapshot::volume::VolumeName;
use runnel_snapshot::working_set::{CHUNKS_MAX, WORKING_SET_BYTES_MAX, WorkingSet};

/// A working set, held against the volumes of a machine: what is said to be one of its chunks is.
pub fn working_set(bytes: &[u8]) -> bool {
    let Ok(set) = WorkingSet::parse(bytes) else {
        return false;
    };
    assert!(set.len() <= CHUNKS_MAX && set.chunks().count() == set.len());
    let written = set.to_bytes();
    assert!(written.len() as u64 <= WORKING_SET_BYTES_MAX);
    let again = WorkingSet::parse(&written).expect("what was written can be read");
    assert_eq!(again, set);
    for volumes in [machine(1 << 26), machine(VOLUME_BYTES_MAX)] {
        let Ok(chunks) = set.of_volumes(&volumes) else {
            continue;
        };
        assert_eq!(chunks.len(), set.len());
        for id in &chunks {
            let volume = &volumes[usize::from(id.volume.0)];
            assert!(volume.range_of(id.chunk).len > 0, "{id:?}");
        }
        let mut distinct = chunks.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), chunks.len());
    }
    true
}

fn machine(bytes: u64) -> Vec<SourceVolume> {
    let volume = |name| SourceVolume {
        name,
        bytes,
        chunk_size: ChunkSize::DEFAULT,
    };
    vec![
        volume(VolumeName::Memory),
        volume(VolumeName::Drive("rootfs".to_owned())),
    ]
}
