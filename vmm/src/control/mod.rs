//! The control thread: one machine's life, request by request.
//!
//! ```text
//!              InstanceStart            Paused
//!  Not started ─────────────► Running ◄────────► Paused
//!       │                        ▲      Resumed    ▲
//!       └── snapshot/load ───────┴─────────────────┘
//!            (resume_vm)                (otherwise)
//! ```
//!
//! Requests come from the [`Inbox`], in order, one at a time; each is answered once. What a request may do depends
//! on where the machine is, as with Firecracker: [`Fault::PreBoot`] and [`Fault::PostBoot`] are the two refusals of
//! order. A request that fails leaves the machine and its configuration as they were, and the monitor answering,
//! after a failed start or load too (Firecracker ends there).
//!
//! A snapshot takes seconds, and this thread is busy all the while. It looks into the inbox now and then, and answers
//! what need not wait for the snapshot: the machine can be paused, let run and asked for its configuration beside it; a
//! second snapshot comes after the first. What must be answered at once (how far it is, whether the machine is stalled,
//! «stop that») lives in [`Status`], which is shared and never locked for long.
//!
//! **Never**: speaks HTTP (that is `api`), or KVM (that is the [`Engine`]).

mod fault;
mod guest;
mod hold;
mod inbox;
mod lifeline;
mod operation;
mod request;
mod run;
mod signals;
mod status;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

pub use fault::Fault;
pub use guest::{Beside, Engine, Guest, GuestError, Paging, Residency, Stalled, Waits};
pub use inbox::{Inbox, Outcome};
pub use lifeline::watch_lifeline;
pub use operation::{Operation, OperationKind, OperationState, Progress};
pub use request::{Reply, Request};
pub use run::{CannotWait, run};
pub use signals::{SignalError, block_signals, watch_signals};
pub use status::{InstanceInfo, Status, VmState};

use std::sync::Arc;
use std::time::Duration;

use crate::config::{
    CreateSnapshot, LoadSnapshot, LoggerBody, MachineBody, MicrovmConfig, SaveAs, WholeFile,
};

/// Where `PUT /logger` goes.
pub type SetLogger = Box<dyn FnMut(LoggerBody) -> Result<(), GuestError>>;

/// The machine, or what it is to become, and who may be asked to make it.
pub struct Control<E> {
    engine: E,
    inbox: Arc<Inbox>,
    status: Arc<Status>,
    set_logger: SetLogger,
    config: MicrovmConfig,
    /// Something of the machine was configured, so nothing can be loaded any more.
    is_configured: bool,
    guest: Option<Box<dyn Guest>>,
}

impl<E: Engine> Control<E> {
    /// A machine that is not started.
    pub fn new(
        engine: E,
        inbox: Arc<Inbox>,
        status: Arc<Status>,
        config: MicrovmConfig,
        set_logger: SetLogger,
    ) -> Self {
        Self {
            engine,
            inbox,
            status,
            set_logger,
            config,
            is_configured: false,
            guest: None,
        }
    }

    /// Does what `request` asks for.
    ///
    /// # Errors
    /// When it is refused or fails; everything is then as before.
    pub fn handle(&mut self, request: Request) -> Result<Reply, Fault> {
        match self.guest.take() {
            None => self.before_boot(request),
            Some(mut guest) => {
                let outcome = self.after_boot(guest.as_mut(), request);
                self.guest = Some(guest);
                outcome
            }
        }
    }

    fn before_boot(&mut self, request: Request) -> Result<Reply, Fault> {
        match request {
            Request::GetMachineConfig => Ok(Reply::Machine(MachineBody::from(&self.config.machine))),
            Request::GetVmConfig => Ok(Reply::Config(Box::new(WholeFile::describing(&self.config)))),
            Request::PutLogger(body) => {
                (self.set_logger)(body).map_err(Fault::logger)?;
                Ok(Reply::Empty)
            }
            // As with Firecracker, where the console ends does not count as configuring the machine.
            Request::PutSerial(body) => {
                self.config.set_serial(body)?;
                Ok(Reply::Empty)
            }
            Request::PutMachineConfig(body) => self.configure(|config| config.set_machine(body)),
            Request::PatchMachineConfig(update) => self.configure(|config| config.update_machine(&update)),
            Request::PutBootSource(body) => self.configure(|config| config.set_boot_source(body)),
            Request::PutDrive(body) => self.configure(|config| config.put_drive(body)),
            Request::PutInterface(body) => self.configure(|config| config.put_interface(body)),
            Request::PutEntropy(body) => self.configure(|config| config.set_entropy(&body)),
            Request::PutGuestChannel(_) => self.configure(|config| {
                config.guest_channel = true;
                Ok(())
            }),
            Request::InstanceStart => self.start(),
            Request::LoadSnapshot(load) => self.load(&load),
            Request::Pause
            | Request::Resume
            | Request::CreateSnapshot(_)
            | Request::SendCtrlAltDel
            | Request::FlushMetrics => Err(Fault::PreBoot),
        }
    }

    fn after_boot(&self, guest: &mut dyn Guest, request: Request) -> Result<Reply, Fault> {
        match request {
            Request::GetMachineConfig => Ok(Reply::Machine(MachineBody::from(&guest.config().machine))),
            Request::GetVmConfig => Ok(Reply::Config(Box::new(WholeFile::describing(guest.config())))),
            Request::Pause => self.pause(guest),
            Request::Resume => self.resume(guest),
            Request::CreateSnapshot(create) => self.create(guest, &create),
            Request::SendCtrlAltDel => {
                guest.press_ctrl_alt_del().map_err(Fault::internal)?;
                Ok(Reply::Empty)
            }
            // There are no metrics, and nothing to flush: Firecracker answers alike if none are configured.
            Request::FlushMetrics => Ok(Reply::Empty),
            Request::PutLogger(_)
            | Request::PutSerial(_)
            | Request::PutMachineConfig(_)
            | Request::PatchMachineConfig(_)
            | Request::PutBootSource(_)
            | Request::PutDrive(_)
            | Request::PutInterface(_)
            | Request::PutEntropy(_)
            | Request::PutGuestChannel(_)
            | Request::InstanceStart
            | Request::LoadSnapshot(_) => Err(Fault::PostBoot),
        }
    }

    fn configure(
        &mut self,
        change: impl FnOnce(&mut MicrovmConfig) -> Result<(), crate::config::ConfigError>,
    ) -> Result<Reply, Fault> {
        // Even if it is refused: Firecracker's clients expect a load to be refused from here on.
        self.is_configured = true;
        change(&mut self.config)?;
        Ok(Reply::Empty)
    }

    /// Boots the machine that was configured; its vCPUs run afterwards.
    fn start(&mut self) -> Result<Reply, Fault> {
        if self.config.boot_source.is_none() {
            return Err(Fault::NoKernel);
        }
        let mut guest = self.engine.boot(&self.config).map_err(Fault::start)?;
        guest.resume().map_err(Fault::start)?;
        self.adopt(guest, VmState::Running);
        Ok(Reply::Empty)
    }

    fn load(&mut self, load: &LoadSnapshot) -> Result<Reply, Fault> {
        if self.is_configured {
            return Err(Fault::LoadNotAllowed);
        }
        let operation = self.status.begin(OperationKind::Load);
        let loaded = self
            .engine
            .load(load, &self.config, &operation)
            .and_then(|mut guest| {
                if load.resume {
                    guest.resume()?;
                }
                Ok(guest)
            });
        match loaded {
            Ok(guest) => {
                operation.succeed();
                self.adopt(
                    guest,
                    if load.resume {
                        VmState::Running
                    } else {
                        VmState::Paused
                    },
                );
                Ok(Reply::Empty)
            }
            Err(error) => Err(operation.fail(Fault::load(error))),
        }
    }

    fn adopt(&mut self, guest: Box<dyn Guest>, state: VmState) {
        self.status.adopt(state, guest.paging(), guest.agent());
        self.guest = Some(guest);
    }

    fn pause(&self, guest: &mut dyn Guest) -> Result<Reply, Fault> {
        if self.status.state() == VmState::Running {
            guest
                .pause(&|| self.status.is_ending())
                .map_err(Fault::internal)?;
            self.status.set_state(VmState::Paused);
        }
        Ok(Reply::Empty)
    }

    fn resume(&self, guest: &mut dyn Guest) -> Result<Reply, Fault> {
        if self.status.state() == VmState::Paused {
            guest.resume().map_err(Fault::internal)?;
            self.status.set_state(VmState::Running);
        }
        Ok(Reply::Empty)
    }

    /// Firecracker's two files are taken of a paused machine alone, since they have no disks to keep in step with;
    /// an image is taken of a running one too, which is paused for as long as it must be.
    fn create(&self, guest: &mut dyn Guest, create: &CreateSnapshot) -> Result<Reply, Fault> {
        let is_running = self.status.state() == VmState::Running;
        if is_running && matches!(create.save_as, SaveAs::TwoFiles { .. }) {
            return Err(Fault::SaveWhileRunning);
        }
        let operation = self.status.begin(OperationKind::Create);
        let mut beside = |guest: &mut dyn Guest, must_stand| self.answer_beside(guest, must_stand);
        match guest.save(create, &operation, &mut beside) {
            Ok(()) => {
                operation.succeed();
                Ok(Reply::Empty)
            }
            Err(error) => Err(operation.fail(Fault::create(error))),
        }
    }

    /// Answers what need not wait until the snapshot of the machine is there.
    fn answer_beside(&self, guest: &mut dyn Guest, must_stand: bool) {
        let goes = |request: &Request| request.goes_beside_a_snapshot(must_stand);
        while let Some((request, answer)) = self.inbox.next_that(goes) {
            answer(self.after_boot(guest, request));
        }
    }

    /// See [`Guest::look_after`]; `None` if there is no machine.
    fn look_after(&mut self) -> Option<Duration> {
        self.guest.as_mut().and_then(|guest| guest.look_after())
    }

    /// Where requests come from.
    pub(super) fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// The machine, once it is there.
    #[must_use]
    pub fn guest(&self) -> Option<&dyn Guest> {
        self.guest.as_deref()
    }

    /// What everybody may look at.
    #[must_use]
    pub fn status(&self) -> &Arc<Status> {
        &self.status
    }
}
