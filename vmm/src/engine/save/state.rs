//! What a machine is beside its volumes, and what of these it needs first.

use std::cell::Cell;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use runnel_snapshot::section::{SavedSection, Section as _};
use runnel_snapshot::source::ChunkId;
use runnel_snapshot::state::MachineState;
use runnel_snapshot::units::{ChunkIndex, ChunkSize};
use runnel_snapshot::volume::VolumeName;

use super::SaveError;
use crate::config::ResourceId;
use crate::engine::KvmGuest;
use crate::engine::description::{Description, DriveRecord};
use crate::engine::drives::Backing;

/// All of a machine that stands but its volumes.
pub(super) fn machine_state(
    guest: &KvmGuest,
    in_image: &dyn Fn(&ResourceId) -> bool,
) -> Result<MachineState, SaveError> {
    let saved_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut sections = guest.machine.save()?;
    let records = guest.drives.iter().map(|(id, backing)| {
        record(backing, in_image(id)).map_err(|source| SaveError::Drive {
            id: id.clone(),
            source,
        })
    });
    let description = Description {
        config: guest.config.clone(),
        drives: records.collect::<Result<_, _>>()?,
    };
    if let Some(paused) = guest.machine.paused() {
        sections.push(SavedSection::of::<Description>("", &description.save(&paused)?)?);
    }
    let saved_at_ms = u64::try_from(saved_at.as_millis()).unwrap_or(u64::MAX);
    let mut state = MachineState::new(saved_at_ms, sections);
    state.compatibility = guest.machine.compatibility()?;
    Ok(state)
}

fn record(backing: &Backing, in_image: bool) -> io::Result<DriveRecord> {
    let bytes = backing.store().bytes();
    match backing {
        Backing::File { store, .. } if !in_image => DriveRecord::of_file(store.file(), bytes),
        _ => Ok(DriveRecord {
            in_image,
            bytes,
            modified_ns: None,
        }),
    }
}

/// The chunks that the vCPUs need first, the first vCPU's first.
///
/// Page tables of a resumed machine may still be on their way. A machine that ran is not kept standing for them: what its
/// processors go by is here. Those of one that stood are waited for like everything that a snapshot reads. What cannot
/// be had is left out, since a page fault in this thread could be neither refused nor called off.
pub(super) fn first_chunks(
    guest: &KvmGuest,
    chunk_size: ChunkSize,
    has_run: bool,
    is_cancelled: &dyn Fn() -> bool,
) -> Vec<(VolumeName, ChunkIndex)> {
    let layout = guest.machine.layout();
    // One wait is enough to know that the source is away.
    let has_given_up = Cell::new(false);
    let can_be_read = |address| {
        let (Some(pager), Some(offset)) = (&guest.pager, layout.volume_offset(address)) else {
            return true;
        };
        let logic = pager.logic();
        let fetcher = logic.fetcher();
        let volume = logic.volume();
        let about = &fetcher.source().volumes()[usize::from(volume.0)];
        let chunk = about.chunk_size.chunk_holding(offset);
        let id = ChunkId { volume, chunk };
        if has_run {
            return fetcher.state(id).is_some();
        }
        if !has_given_up.get() {
            has_given_up.set(fetcher.wait_unless(id, is_cancelled).is_err());
        }
        !has_given_up.get()
    };
    let mut chunks = Vec::new();
    for page in guest.machine.first_pages(&can_be_read) {
        if let Some(offset) = layout.volume_offset(page) {
            let chunk = (VolumeName::Memory, chunk_size.chunk_holding(offset));
            if !chunks.contains(&chunk) {
                chunks.push(chunk);
            }
        }
    }
    chunks
}
