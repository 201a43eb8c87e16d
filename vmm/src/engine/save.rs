//! Saving a machine: what it is at a pause becomes an image, or Firecracker's two files.
//!
//! ```text
//!   arm ahead ─► pause ─► state, first chunks, arm the rest ─► resume
//!                                                             └─► capture: memory, then drives ─► publish
//! ```
//!
//! What the machine writes to meanwhile is copied first, so that every page is saved as it was at the pause.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use runnel_snapshot::capture::progress::Stage;
use runnel_snapshot::capture::{
    CaptureError, CaptureSettings, Captured, Content, Job, Progress, VolumeSource, raw,
};
use runnel_snapshot::copy_before_write::{EarlyPages, EarlyPagesLimits};
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::overlay::IsCancelled;
use runnel_snapshot::section::{SavedSection, Section as _, SectionError};
use runnel_snapshot::source::ChunkId;
use runnel_snapshot::state::{MachineState, StateError};
use runnel_snapshot::units::{ChunkIndex, ChunkSize};
use runnel_snapshot::volume::VolumeName;

use super::KvmGuest;
use super::description::{Description, DescriptionError, DriveRecord};
use super::drives::{Backing, Unwritten, content_of};
use super::live::Live;
use super::memory::memory_content;
use super::watch::watch;
use crate::config::{CreateSnapshot, ResourceId, SaveAs};
use crate::control::{Guest as _, GuestError, Operation};
use crate::microvm::SaveError as MachineSaveError;

/// How often it is looked whether the machine may run on.
const LOOK: Duration = Duration::from_millis(2);

/// Why a machine cannot be saved. It runs on, or stays paused, as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Its state.
    #[error("the machine's state cannot be saved")]
    State(#[from] MachineSaveError),
    /// Its description.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// A section.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// Its memory.
    #[error("guest memory cannot be read")]
    Memory(#[source] io::Error),
    /// A drive.
    #[error("drive {id} cannot be read")]
    Drive {
        /// Which drive.
        id: ResourceId,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A drive that is to be left out is not there.
    #[error("`excluded_drives` names {0}, and the machine has no such drive")]
    NoDrive(ResourceId),
    /// The image.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// The raw memory file.
    #[error(transparent)]
    Raw(#[from] raw::RawError),
    /// The capture waits for a chunk, and the machine for the capture.
    #[error(
        "it was given up, since the machine waited for it while {0} of {1} is missing ({2}); the machine runs on"
    )]
    Stalled(ChunkIndex, VolumeName, String),
    /// The state's form.
    #[error(transparent)]
    Encode(#[from] StateError),
}

pub(super) fn save(
    guest: &mut KvmGuest,
    create: &CreateSnapshot,
    operation: &Operation,
) -> Result<(), GuestError> {
    let mut saving = Saving {
        was_running: guest.is_running,
        live: None,
    };
    let directory = match &create.save_as {
        SaveAs::Image { directory, .. } => directory,
        SaveAs::TwoFiles { memory, .. } => memory,
    };
    if saving.was_running {
        operation.enter("arming");
        saving.live = arm(guest, directory);
        operation.enter("pausing");
        // From the first vCPU that stands.
        operation.begin_pause();
        if let Err(error) = guest.stand_still(&|| operation.is_cancelled()) {
            operation.end_pause();
            return Err(error);
        }
    }
    let saved = match &create.save_as {
        SaveAs::Image {
            directory,
            excluded_drives,
        } => {
            let excluded: Vec<_> = excluded_drives.iter().cloned().collect();
            saving.image(guest, directory, &excluded, operation)
        }
        SaveAs::TwoFiles { state, memory } => saving.two_files(guest, state, memory, operation),
    };
    // Also after a failure.
    saving.let_run(guest, operation);
    Ok(saved?)
}

/// Where an image, or a file, is to appear.
fn folder_of(image: &Path) -> &Path {
    let folder = image.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// Prepares the machine to run on while it is saved. If that cannot be, it stands meanwhile.
fn arm(guest: &mut KvmGuest, image: &Path) -> Option<Live> {
    Live::arm(guest, folder_of(image)).unwrap_or_else(|error| {
        tracing::warn!(%error, "guest memory cannot be write-protected: the machine stands until it is saved");
        None
    })
}

/// One machine being saved.
struct Saving {
    was_running: bool,
    /// `None` if the machine stands until its memory has been read.
    live: Option<Live>,
}

impl Saving {
    fn image(
        &mut self,
        guest: &mut KvmGuest,
        directory: &Path,
        excluded: &[ResourceId],
        operation: &Operation,
    ) -> Result<(), SaveError> {
        operation.enter("saving state");
        if let Some(stranger) = excluded
            .iter()
            .find(|id| !guest.drives.iter().any(|drive| drive.0 == **id))
        {
            return Err(SaveError::NoDrive(stranger.clone()));
        }
        let in_image = |id: &ResourceId| !excluded.contains(id);
        let state = machine_state(guest, &in_image)?;
        let settings = self.settings();
        let cancelled = operation.cancel_flag();
        let first_chunks = first_chunks(guest, settings.chunk_size, &*cancelled);
        let memory = self.memory(guest, cancelled.clone())?;
        let mut volumes = vec![(VolumeName::Memory, VolumeSource::Content(memory))];
        let mut unwritten = Vec::new();
        let early = self.early(directory);
        for (id, backing) in guest.drives.iter().filter(|(id, _)| in_image(id)) {
            let content = content_of(id, backing, &guest.known, &early, cancelled.clone());
            let content = content.map_err(|source| SaveError::Drive {
                id: id.clone(),
                source,
            })?;
            if let Some(why) = content.unwritten {
                unwritten.push((id.clone(), why));
            }
            volumes.push((VolumeName::Drive(id.to_string()), content.source));
        }
        let mut job = Job::new(settings, volumes)?.with_first_chunks(first_chunks);
        if let Some(parent) = guest.parent {
            job = job.with_parent(parent);
        }
        let progress = job.progress();
        if self.live.is_some() {
            self.let_run(guest, operation);
        }
        operation.enter("copying");
        watch(operation, &progress);
        let captured = self.while_it_runs(guest, operation, &progress, || job.run(directory, state))??;
        remember(guest, directory, &captured, unwritten);
        Ok(())
    }

    fn two_files(
        &mut self,
        guest: &mut KvmGuest,
        state_path: &Path,
        memory_path: &Path,
        operation: &Operation,
    ) -> Result<(), SaveError> {
        let state = machine_state(guest, &|_| false)?.encode()?;
        let settings = self.settings();
        let memory = self.memory(guest, operation.cancel_flag())?;
        let progress = Arc::new(Progress::new([(VolumeName::Memory, memory.bytes())]));
        if self.live.is_some() {
            self.let_run(guest, operation);
        }
        operation.enter("copying");
        watch(operation, &progress);
        Ok(self.while_it_runs(guest, operation, &progress, || {
            let memory = raw::write_raw(&*memory, memory_path, &settings, &progress)?;
            let of_state = Progress::new([(VolumeName::Memory, state.bytes())]);
            let state = raw::write_raw(&state, state_path, &settings, &of_state)?;
            raw::publish(state, memory, &progress)
        })??)
    }

    fn settings(&self) -> CaptureSettings {
        CaptureSettings {
            gives_way: self.live.is_some(),
            ..CaptureSettings::default()
        }
    }

    fn memory(&mut self, guest: &KvmGuest, is_cancelled: IsCancelled) -> Result<Arc<dyn Content>, SaveError> {
        match &mut self.live {
            Some(live) => live.freeze(guest, is_cancelled),
            None => memory_content(guest, is_cancelled),
        }
        .map_err(SaveError::Memory)
    }

    /// Where drives keep what is overwritten before it was saved.
    fn early(&self, image: &Path) -> Arc<EarlyPages> {
        match &self.live {
            Some(live) => live.early().clone(),
            None => Arc::new(EarlyPages::new(EarlyPagesLimits::default(), folder_of(image))),
        }
    }

    /// Does `work` on a thread of its own, and looks after the machine on this one. One that stands for its memory
    /// runs on as soon as that was read.
    fn while_it_runs<T: Send>(
        &self,
        guest: &mut KvmGuest,
        operation: &Operation,
        progress: &Progress,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, SaveError> {
        let mut stalled = None;
        let done = std::thread::scope(|scope| {
            let work = scope.spawn(work);
            while !work.is_finished() {
                if has_read_memory(progress) {
                    self.let_run(guest, operation);
                }
                let _ = guest.look_after();
                // The capture waits for a chunk that does not come, and the machine for the capture.
                if stalled.is_none() && self.holds_writers() {
                    stalled = guest.stall();
                    if stalled.is_some() {
                        progress.cancel();
                    }
                }
                std::thread::sleep(LOOK);
            }
            work.join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        // It may have been all read just before.
        match stalled {
            Some(stall) if progress.stage() == Stage::Copying => {
                Err(SaveError::Stalled(stall.chunk, stall.volume, stall.reason))
            }
            _ => Ok(done),
        }
    }

    fn holds_writers(&self) -> bool {
        self.live.as_ref().is_some_and(Live::holds_writers)
    }

    /// Lets a machine run on that stands for the snapshot alone.
    fn let_run(&self, guest: &mut KvmGuest, operation: &Operation) {
        if !self.was_running || guest.is_running {
            return;
        }
        guest.run();
        let stood = operation.end_pause().unwrap_or_default();
        tracing::info!(
            stood_ms = u64::try_from(stood.as_millis()).unwrap_or(u64::MAX),
            "The machine runs on after a pause for its snapshot."
        );
    }
}

/// Whether nothing more is read of the memory of a machine that stands.
fn has_read_memory(progress: &Progress) -> bool {
    let volumes = progress.volumes();
    volumes
        .first()
        .is_none_or(|memory| memory.bytes_done == memory.bytes_total)
}

/// Notes which drives need not be captured again while nobody writes to them.
fn remember(
    guest: &mut KvmGuest,
    directory: &Path,
    captured: &Captured,
    unwritten: Vec<(ResourceId, Unwritten)>,
) {
    let layout = match Layout::open(directory) {
        Ok(layout) => Arc::new(layout),
        // The image is there, whoever has moved it since: all that is lost is a shortcut.
        Err(error) => {
            tracing::warn!(%error, "the image cannot be opened again: the next snapshot captures every drive anew");
            return;
        }
    };
    for (id, why) in unwritten {
        let name = VolumeName::Drive(id.to_string());
        if let Some(volume) = captured.volumes.iter().find(|volume| volume.name == name) {
            guest.known.captured(id, why, &layout, volume);
        }
    }
}

fn machine_state(
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
/// Page tables of a resumed machine may still be on their way. They are waited for like everything that a snapshot
/// reads: what cannot be had is left out, since a page fault in this thread could be neither refused nor called off.
fn first_chunks(
    guest: &KvmGuest,
    chunk_size: ChunkSize,
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
