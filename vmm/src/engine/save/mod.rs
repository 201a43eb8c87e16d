//! Saving a machine: what it is at a pause becomes an image, or Firecracker's two files.
//!
//! ```text
//!   arm ahead ─► pause ─► state, first chunks, arm the rest ─► resume
//!                                                             └─► capture: memory, then drives ─► publish
//! ```
//!
//! What the machine writes to meanwhile is copied first, so that every page is saved as it was at the pause. Of a machine
//! that is to share its memory nothing is armed: its memory is frozen at the pause, and what it writes is its own.

mod error;
mod meanwhile;
mod sharing;
mod state;

pub use error::SaveError;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use runnel_snapshot::capture::{
    CaptureError, CaptureSettings, Captured, Content, Job, Progress, VolumeSource, raw,
};
use runnel_snapshot::copy_before_write::{EarlyPages, EarlyPagesLimits};
use runnel_snapshot::dirty_pages::DirtyPages;
use runnel_snapshot::image::below::BelowImage;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::publication::check_target;
use runnel_snapshot::overlay::IsCancelled;
use runnel_snapshot::pager::PageSet;
use runnel_snapshot::volume::VolumeName;

use super::KvmGuest;
use super::bases::{Base, Bases};
use super::changed::{ChangedMemory, changed_memory};
use super::drives::{DriveCapture, FileIdentity, data_ahead};
use super::live::Live;
use super::memory::{RamBacking, freeze, memory_content};
use super::watch::watch;
use super::written::Since;
use crate::config::{CreateSnapshot, ResourceId, SaveAs, SnapshotType};
use crate::control::{Beside, GuestError, Operation};
use crate::memory::unmap_ahead;
use meanwhile::Meanwhile;
use sharing::seal_memory;
use state::{first_chunks, machine_state};

pub(super) fn save(
    guest: &mut KvmGuest,
    create: &CreateSnapshot,
    operation: &Operation,
    beside: &mut Beside<'_>,
) -> Result<(), GuestError> {
    let mut saving = Saving::new(guest, create);
    let mut meanwhile = Meanwhile::new(operation, beside);
    if saving.is_diff {
        // While nothing is armed, and the machine runs, if it does.
        let goes_on = || !operation.is_cancelled();
        saving.bases.make_ready(&goes_on);
        if operation.is_cancelled() {
            return Err(SaveError::Capture(CaptureError::Cancelled).into());
        }
    }
    if let (How::Frozen, SaveAs::Image { directory, .. }) = (&saving.how, &create.save_as) {
        // What is frozen stays so: not for a snapshot that cannot be.
        check_target(directory).map_err(|error| SaveError::Capture(error.into()))?;
    }
    if saving.was_running {
        operation.enter("arming");
        // Two files are made of a machine that stands.
        if let SaveAs::Image { directory, .. } = &create.save_as {
            saving.prepare(guest, folder_of(directory));
        }
        meanwhile.pause(guest)?;
    }
    let saved = match &create.save_as {
        SaveAs::Image {
            directory,
            excluded_drives,
        } => {
            let excluded: Vec<_> = excluded_drives.iter().cloned().collect();
            saving.image(guest, directory, &excluded, &mut meanwhile)
        }
        SaveAs::TwoFiles { state, memory } => saving.two_files(guest, state, memory, &mut meanwhile),
    };
    // Also after a failure.
    meanwhile.let_run(guest);
    Ok(saved?)
}

/// Where an image, or a file, is to appear.
fn folder_of(image: &Path) -> &Path {
    let folder = image.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// One machine being saved.
struct Saving {
    was_running: bool,
    how: How,
    /// Who gets memory that was frozen.
    agent: Option<PathBuf>,
    is_diff: bool,
    since: Since,
    /// What the volumes were; nothing is looked for if no image is made.
    bases: Bases,
    /// The data of drives' files, as it was listed ahead.
    data_ahead: BTreeMap<ResourceId, PageSet>,
}

/// How memory is kept as it was at the pause.
enum How {
    /// The machine stands until it has been read.
    Standing,
    /// What it writes to is copied first.
    Live(Live),
    /// Nobody can write it any more: what the machine writes is elsewhere.
    Frozen,
}

impl How {
    /// Whether somebody who writes to memory waits for the capture to come by.
    fn holds_writers(&self) -> bool {
        matches!(self, Self::Live(live) if live.holds_writers())
    }
}

/// Memory as it was at the pause.
struct Memory {
    content: Arc<dyn Content>,
    /// The pages that are saved, if those are not all.
    changed: Option<ChangedMemory>,
    dirty: DirtyPages,
}

/// A volume whose content was taken at the pause, and what its base will be once there is an image of it.
struct TakenVolume {
    name: VolumeName,
    dirty: DirtyPages,
    file: Option<FileIdentity>,
}

impl Saving {
    fn new(guest: &KvmGuest, create: &CreateSnapshot) -> Self {
        let is_diff = create.kind == SnapshotType::Diff;
        let since = match create.save_as {
            SaveAs::Image { .. } => Since::Image,
            SaveAs::TwoFiles { .. } => Since::Files,
        };
        // While the machine still runs: it is many files.
        let bases = match since {
            Since::Image if is_diff => guest.bases.for_diff(),
            Since::Image => guest.bases.for_full(),
            Since::Files => Bases::default(),
        };
        let can_freeze = matches!(guest.backing, RamBacking::Own);
        let how = match create.freezes_memory {
            true if can_freeze => How::Frozen,
            true => {
                tracing::info!(
                    "The machine's memory is not its own file alone: it is not frozen, and is saved as ever."
                );
                How::Standing
            }
            false => How::Standing,
        };
        Self {
            was_running: guest.is_running,
            how,
            agent: create.agent.clone(),
            is_diff,
            since,
            bases,
            data_ahead: BTreeMap::new(),
        }
    }

    /// Prepares the machine to run on while it is saved. If that cannot be, it stands meanwhile.
    fn prepare(&mut self, guest: &mut KvmGuest, folder: &Path) {
        if let How::Frozen = self.how
            && let Err(error) = unmap_ahead(guest.machine.ram())
        {
            tracing::debug!(%error, "the machine stands longer");
        }
        if let How::Standing = self.how {
            let armed = self
                .read_so_far(guest)
                .and_then(|within| Live::arm(guest, within.as_ref(), folder));
            match armed {
                Ok(Some(live)) => self.how = How::Live(live),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "guest memory cannot be write-protected: the machine stands until it is saved");
                }
            }
        }
        if !self.is_diff {
            let drives = guest.drives.iter();
            let listed = drives.filter_map(|(id, backing)| Some((id.clone(), data_ahead(backing)?)));
            self.data_ahead = listed.collect();
        }
    }

    /// The pages that would be read if the machine stood now; `None` if all of them.
    fn read_so_far(&self, guest: &KvmGuest) -> io::Result<Option<PageSet>> {
        if !self.saves_changes() || !guest.written.is_logged() {
            return Ok(None);
        }
        guest.written.gather(&guest.machine);
        let changed = changed_memory(guest, self.since, guest.written.so_far(self.since))?;
        Ok(Some(self.read_of(&changed.pages)))
    }

    /// What the new volume of that name is to lie over; `None` if all of it is saved.
    fn below(&self, name: &VolumeName) -> Option<&Base> {
        let base = self.bases.get(name).filter(|_| self.is_diff)?;
        base.has_room_for_a_layer().then_some(base)
    }

    /// Whether not all of memory is saved.
    fn saves_changes(&self) -> bool {
        match self.since {
            Since::Image => self.below(&VolumeName::Memory).is_some(),
            Since::Files => self.is_diff,
        }
    }

    /// What is read so that `changed` can be saved: whole chunks, since one of many parts is written anew.
    fn read_of(&self, changed: &PageSet) -> PageSet {
        match self.below(&VolumeName::Memory) {
            Some(below) => changed.in_groups_of(below.volume.root.chunk_size().pages()),
            None => changed.clone(),
        }
    }

    fn memory(&mut self, guest: &mut KvmGuest, is_cancelled: IsCancelled) -> Result<Memory, SaveError> {
        guest.written.gather(&guest.machine);
        let dirty = guest.written.take(self.since);
        let changed = match self.saves_changes() {
            true => changed_memory(guest, self.since, dirty.pages().clone()).map(Some),
            false => Ok(None),
        };
        let changed = changed.map_err(SaveError::Memory)?;
        // A guess has nearly every page that there is: of these, data alone is armed.
        let known = changed.as_ref().filter(|changed| !changed.is_guess);
        let read = known.map(|changed| self.read_of(&changed.pages));
        let content = match &mut self.how {
            How::Live(live) => live.freeze(guest, read.as_ref(), is_cancelled),
            How::Standing => memory_content(guest, is_cancelled),
            How::Frozen => freeze(guest).or_else(|error| {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(
                    error,
                    "guest memory is not frozen: the machine stands until it is saved"
                );
                self.how = How::Standing;
                memory_content(guest, is_cancelled)
            }),
        };
        Ok(Memory {
            content: content.map_err(SaveError::Memory)?,
            changed,
            dirty,
        })
    }

    fn image(
        &mut self,
        guest: &mut KvmGuest,
        directory: &Path,
        excluded: &[ResourceId],
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<(), SaveError> {
        let operation = meanwhile.operation;
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
        let chunk_size = self
            .below(&VolumeName::Memory)
            .map_or(settings.chunk_size, |below| below.volume.root.chunk_size());
        let first_chunks = first_chunks(guest, chunk_size, self.was_running, &*cancelled);
        let memory = self.memory(guest, cancelled.clone())?;
        let mut volumes = vec![(
            VolumeName::Memory,
            memory_source(memory.content, memory.changed, self.below(&VolumeName::Memory)),
        )];
        let mut taken = vec![TakenVolume {
            name: VolumeName::Memory,
            dirty: memory.dirty,
            file: None,
        }];
        let early = self.early(directory);
        for (id, backing) in guest.drives.iter().filter(|(id, _)| in_image(id)) {
            let name = VolumeName::Drive(id.to_string());
            let capture = DriveCapture {
                base: self.bases.get(&name),
                below: self.below(&name),
                data_ahead: self.data_ahead.get(id),
                early: &early,
                is_cancelled: cancelled.clone(),
            };
            let content = capture.content_of(backing).map_err(|source| SaveError::Drive {
                id: id.clone(),
                source,
            })?;
            volumes.push((name.clone(), content.source));
            taken.push(TakenVolume {
                name,
                dirty: content.dirty,
                file: content.file,
            });
        }
        let mut job = Job::new(settings, volumes)?.with_first_chunks(first_chunks);
        let below = self.below(&VolumeName::Memory).map(|below| below.image);
        if self.is_diff && below.is_none() {
            tracing::info!("there is no image that the diff could lie over: all of memory is saved");
        }
        if let Some(parent) = below.or(guest.parent) {
            job = job.with_parent(parent);
        }
        let progress = job.progress();
        if !matches!(self.how, How::Standing) {
            meanwhile.let_run(guest);
        }
        let is_sealed = matches!(self.how, How::Frozen) && seal_memory(guest);
        operation.enter("copying");
        watch(operation, &progress);
        let captured = meanwhile.work(guest, &self.how, &progress, || job.run(directory, state))??;
        remember(guest, directory, &captured, taken);
        match is_sealed {
            true => self.hand_over(guest, directory, &captured, meanwhile),
            false => Ok(()),
        }
    }

    fn two_files(
        &mut self,
        guest: &mut KvmGuest,
        state_path: &Path,
        memory_path: &Path,
        meanwhile: &mut Meanwhile<'_>,
    ) -> Result<(), SaveError> {
        let operation = meanwhile.operation;
        let state = machine_state(guest, &|_| false)?.encode()?;
        let settings = self.settings();
        let Memory {
            content,
            changed,
            dirty,
        } = self.memory(guest, operation.cancel_flag())?;
        let progress = Arc::new(Progress::new([(VolumeName::Memory, content.bytes())]));
        operation.enter("copying");
        watch(operation, &progress);
        let of_work = progress.clone();
        meanwhile.work(guest, &self.how, &progress, move || {
            let progress = of_work;
            let file = match &changed {
                None => raw::write_raw(&*content, memory_path, &settings, &progress)?,
                Some(changed) => {
                    raw::write_raw_pages(&*content, &changed.pages, memory_path, &settings, &progress)?
                }
            };
            // Nobody waits any longer to write to it: the thread that looks after the machine may wait for that.
            drop(content);
            let of_state = Progress::new([(VolumeName::Memory, state.bytes())]);
            let state = raw::write_raw(&state, state_path, &settings, &of_state)?;
            raw::publish(state, file, &progress)
        })??;
        dirty.saved();
        Ok(())
    }

    fn settings(&self) -> CaptureSettings {
        CaptureSettings {
            gives_way: !matches!(self.how, How::Standing),
            ..CaptureSettings::default()
        }
    }

    /// Where drives keep what is overwritten before it was saved.
    fn early(&self, image: &Path) -> Arc<EarlyPages> {
        match &self.how {
            How::Live(live) => live.early().clone(),
            _ => Arc::new(EarlyPages::new(EarlyPagesLimits::default(), folder_of(image))),
        }
    }
}

/// As a source of the new image's memory.
fn memory_source(
    content: Arc<dyn Content>,
    changed: Option<ChangedMemory>,
    below: Option<&Base>,
) -> VolumeSource {
    match (changed, below) {
        (Some(changed), Some(below)) => VolumeSource::Changes {
            content,
            changed: changed.pages,
            compares: changed.is_guess,
            below: below.place.clone(),
            base: below.volume.clone(),
        },
        _ => VolumeSource::Content(content),
    }
}

/// Notes what the machine's volumes are now, so that a diff can lie over it, and what is not written to need not be
/// captured again.
fn remember(guest: &mut KvmGuest, directory: &Path, captured: &Captured, taken: Vec<TakenVolume>) {
    let layout = match Layout::open(directory) {
        Ok(layout) => layout,
        // The image is there, whoever has moved it since: what was written to it counts from the one before.
        Err(error) => {
            tracing::warn!(%error, "the image cannot be opened again: the next diff lies over the one before");
            return;
        }
    };
    let place = BelowImage::Here {
        layout: Arc::new(layout),
        urls: Arc::new(captured.urls.clone()),
    };
    for TakenVolume { name, dirty, file } in taken {
        let Some(volume) = captured.volumes.iter().find(|volume| volume.name == name) else {
            continue;
        };
        dirty.saved();
        if let (VolumeName::Memory, RamBacking::Frozen { is_saved, .. }) = (&name, &mut guest.backing) {
            *is_saved = true;
        }
        let base = Base {
            place: place.clone(),
            volume: volume.clone(),
            image: captured.manifest.digest,
            file,
        };
        guest.bases.set(name, base);
    }
}
