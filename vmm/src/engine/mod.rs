//! Machines on KVM, as the control thread asks for them.

mod bases;
mod changed;
mod description;
mod drives;
#[doc(hidden)]
pub mod fuzz;
mod hook;
mod live;
mod load;
mod memory;
mod paging;
mod recording;
mod save;
mod watch;
mod written;

pub use hook::HookError;
pub use load::LoadError;
pub use save::SaveError;
pub use watch::watch;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::pager::Stall;
use runnel_snapshot::shell::shell_word;

use crate::board::StoreError;
use crate::config::{CreateSnapshot, LoadSnapshot, MicrovmConfig, ResourceId, SaveAs};
use crate::control::{Beside, Engine, Guest, GuestError, Operation, Paging};
use crate::exit::EndSignal;
use crate::microvm::Microvm;
use crate::pager::{Pager, WriteWatch};
use bases::Bases;
use drives::{Backing, open_file};
use memory::RamBacking;
use paging::stall_of;
use recording::Recording;
use written::WrittenMemory;

/// How often it is looked whether a machine is stalled: well below the time after which it counts as that.
const LOOK: Duration = Duration::from_millis(200);
/// How often it is looked whether it no longer is.
const LOOK_WHILE_HELD: Duration = Duration::from_millis(20);
/// How often when everything has arrived: a chunk can get lost again, and that is seldom.
const LOOK_WHEN_COMPLETE: Duration = Duration::from_secs(2);

/// Why a machine on KVM could not do something.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// There is no event descriptor to be had.
    #[error("cannot make an event descriptor")]
    Event(#[source] std::io::Error),
    /// An image or a file is to appear in a directory that is not there.
    #[error("{0} does not exist: make it first, with `mkdir -p {word}`", word = shell_word(.0))]
    NoDirectory(PathBuf),
    /// A machine that was to stand still, and is not wanted to any more.
    #[error("it was cancelled while the machine waited for a chunk; the machine runs on")]
    CalledOff,
    /// A machine that waits for bytes that do not come.
    #[error(
        "the machine is stalled: {chunk} of {volume} is missing ({reason}); try again when GET / no longer says so"
    )]
    Stalled {
        /// Of which volume.
        volume: String,
        /// Which chunk.
        chunk: String,
        /// Why it is missing.
        reason: String,
    },
}

/// Makes machines on KVM.
#[derive(Clone, Debug, Default)]
pub struct KvmEngine {
    /// The machine's identifier, for the agent's log.
    pub machine: String,
}

impl Engine for KvmEngine {
    fn boot(&mut self, config: &MicrovmConfig) -> Result<Box<dyn Guest>, GuestError> {
        let end = EndSignal::new().map_err(EngineError::Event)?;
        let mut drives = Vec::new();
        let machine = Microvm::build_over(config, &end, &mut |drive| {
            let backing = Backing::file(drive, open_file(drive, &drives)?);
            let store = backing.store();
            drives.push((drive.id.clone(), backing));
            Ok::<_, StoreError>(store)
        })?;
        let written = WrittenMemory::new(machine.layout(), config.machine.track_dirty_pages);
        Ok(Box::new(KvmGuest {
            name: self.machine.clone(),
            machine,
            config: config.clone(),
            end,
            is_running: false,
            drives,
            bases: Bases::default(),
            written,
            backing: RamBacking::Own,
            parent: None,
            fill_is_due: false,
            is_held: false,
            recording: None,
            pager: None,
            writes: None,
        }))
    }

    fn load(
        &mut self,
        load: &LoadSnapshot,
        config: &MicrovmConfig,
        operation: &Operation,
    ) -> Result<Box<dyn Guest>, GuestError> {
        Ok(Box::new(load::load(load, config, &self.machine, operation)?))
    }
}

/// A machine on KVM.
struct KvmGuest {
    // Fields drop in this order: what was recorded is written whatever holds up the machine's end, and the pager ends when
    // nothing touches guest memory any more.
    /// What the machine touches first, as long as that is recorded.
    recording: Option<Recording>,
    /// The machine's identifier, for the agent's log.
    name: String,
    machine: Microvm,
    config: MicrovmConfig,
    end: EndSignal,
    is_running: bool,
    /// What stands behind the drives, in the configuration's order.
    drives: Vec<(ResourceId, Backing)>,
    /// What its volumes were when they were last saved, or loaded.
    bases: Bases,
    written: WrittenMemory,
    /// What is behind its memory.
    backing: RamBacking,
    /// The image that the machine was resumed from.
    parent: Option<BlobDigest>,
    /// Whether the vCPUs stand because the machine is stalled, though it counts as running.
    is_held: bool,
    /// Whether the background fill is still to be started, once the vCPUs run.
    fill_is_due: bool,
    pager: Option<Pager>,
    /// Who watches writes to the memory of a machine that was booted, once it has been saved.
    writes: Option<WriteWatch>,
}

impl KvmGuest {
    /// Stops vCPUs and devices, unless the machine is stalled or `give_up` says so.
    fn stand_still(&mut self, give_up: &dyn Fn() -> bool) -> Result<(), GuestError> {
        if let Some(stall) = self.stall() {
            return Err(stalled(stall).into());
        }
        let pager = &self.pager;
        let is_in_vain = || {
            give_up()
                || pager
                    .as_ref()
                    .is_some_and(|pager| pager.logic().stall().is_some())
        };
        let paused = self.machine.pause(&is_in_vain);
        // Standing, or let run again.
        self.is_held = false;
        match paused {
            Ok(()) => {
                self.is_running = false;
                self.recording = None;
                Ok(())
            }
            Err(error) => Err(match self.stall() {
                Some(stall) => stalled(stall).into(),
                None if give_up() => EngineError::CalledOff.into(),
                None => error.into(),
            }),
        }
    }

    fn stall(&self) -> Option<Stall> {
        stall_of(self.pager.as_ref()?.logic())
    }

    fn run(&mut self) {
        self.machine.unpause();
        self.is_running = true;
        self.is_held = false;
        self.let_guest_go();
        if let Some(recording) = &mut self.recording {
            recording.machine_runs(Instant::now());
        }
        if std::mem::take(&mut self.fill_is_due)
            && let Some(pager) = &self.pager
        {
            pager.logic().fetcher().start_fill();
        }
    }
}

/// Refuses an image or a file whose directory is not there before the machine stands still for it.
fn check_directory(image: &Path) -> Result<(), EngineError> {
    match image
        .parent()
        .filter(|directory| !directory.as_os_str().is_empty())
    {
        // Whatever else is wrong with it, making the image tells.
        Some(directory) if matches!(directory.try_exists(), Ok(false)) => {
            Err(EngineError::NoDirectory(directory.to_owned()))
        }
        _ => Ok(()),
    }
}

fn stalled(stall: Stall) -> EngineError {
    EngineError::Stalled {
        volume: stall.volume.to_string(),
        chunk: stall.chunk.to_string(),
        reason: stall.reason,
    }
}

impl Guest for KvmGuest {
    fn pause(&mut self, give_up: &dyn Fn() -> bool) -> Result<(), GuestError> {
        self.stand_still(give_up)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.run();
        Ok(())
    }

    fn press_ctrl_alt_del(&mut self) -> Result<(), GuestError> {
        Ok(self.machine.board().keyboard().press_ctrl_alt_del()?)
    }

    fn save(
        &mut self,
        create: &CreateSnapshot,
        operation: &Operation,
        beside: &mut Beside<'_>,
    ) -> Result<(), GuestError> {
        match &create.save_as {
            SaveAs::Image { directory, .. } => check_directory(directory)?,
            SaveAs::TwoFiles { state, memory } => {
                check_directory(state)?;
                check_directory(memory)?;
            }
        }
        let saved = self.ask_guest(create.guest_hook, operation);
        let saved = saved
            .map_err(Into::into)
            .and_then(|()| save::save(self, create, operation, beside));
        // One that was let run has heard of it already.
        self.let_guest_go();
        saved
    }

    fn look_after(&mut self) -> Option<Duration> {
        let recording_ends = self
            .recording
            .as_ref()
            .and_then(|recording| recording.left(Instant::now()));
        if recording_ends == Some(Duration::ZERO) {
            self.recording = None;
        }
        let logic = self.pager.as_ref()?.logic();
        // The guest waits for a chunk that does not come: a thread in a page fault, or a drive.
        let is_stalled = self.is_running && logic.stall().is_some_and(|stall| stall.holds_guest);
        let is_complete = logic.fetcher().counters().is_complete();
        if is_stalled && !self.is_held {
            tracing::warn!("The machine is stalled: vCPUs that wait for nothing stand too until it goes on.");
            self.machine.hold();
        } else if !is_stalled && self.is_held {
            tracing::info!("The machine is not stalled any more.");
            if self.is_running {
                self.machine.let_go();
            }
        }
        self.is_held = is_stalled;
        let pause = match (is_stalled, is_complete) {
            (true, _) => LOOK_WHILE_HELD,
            (false, false) => LOOK,
            (false, true) => LOOK_WHEN_COMPLETE,
        };
        let recording_ends = recording_ends.filter(|left| !left.is_zero());
        Some(recording_ends.map_or(pause, |left| left.min(pause)))
    }

    fn config(&self) -> &MicrovmConfig {
        &self.config
    }

    fn end(&self) -> &EndSignal {
        &self.end
    }

    fn paging(&self) -> Option<Arc<dyn Paging>> {
        Some(self.pager.as_ref()?.logic().clone())
    }

    fn agent(&self) -> Option<Arc<AtomicBool>> {
        Some(self.machine.board().guest_channel()?.has_agent().clone())
    }
}
