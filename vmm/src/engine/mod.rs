//! Machines on KVM, as the control thread asks for them.

mod paging;
mod watch;

pub use watch::watch;

use std::sync::Arc;

use crate::config::{CreateSnapshot, LoadSnapshot, MicrovmConfig};
use crate::control::{Engine, Guest, GuestError, Operation, Paging};
use crate::exit::EndSignal;
use crate::microvm::Microvm;

/// Why a machine on KVM could not do something.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// There is no event descriptor to be had.
    #[error("cannot make an event descriptor")]
    Event(#[source] std::io::Error),
    /// Something that a later version of Runnel does.
    #[error("{0} is not supported by this version of Runnel")]
    Unsupported(&'static str),
}

/// Makes machines on KVM.
#[derive(Clone, Copy, Debug, Default)]
pub struct KvmEngine;

impl Engine for KvmEngine {
    fn boot(&mut self, config: &MicrovmConfig) -> Result<Box<dyn Guest>, GuestError> {
        let end = EndSignal::new().map_err(EngineError::Event)?;
        let machine = Microvm::build(config, &end)?;
        Ok(Box::new(KvmGuest {
            machine,
            config: config.clone(),
            end,
        }))
    }

    fn load(
        &mut self,
        _: &LoadSnapshot,
        _: &MicrovmConfig,
        _: &Operation,
    ) -> Result<Box<dyn Guest>, GuestError> {
        Err(EngineError::Unsupported("loading a snapshot").into())
    }
}

/// A machine on KVM.
struct KvmGuest {
    machine: Microvm,
    config: MicrovmConfig,
    end: EndSignal,
}

impl Guest for KvmGuest {
    fn pause(&mut self) -> Result<(), GuestError> {
        // All of a booted machine's pages are there, so no vCPU can be stuck.
        Ok(self.machine.pause(&|| false)?)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.machine.unpause();
        Ok(())
    }

    fn press_ctrl_alt_del(&mut self) -> Result<(), GuestError> {
        Err(EngineError::Unsupported("a keyboard").into())
    }

    fn save(&mut self, _: &CreateSnapshot, _: &Operation) -> Result<(), GuestError> {
        Err(EngineError::Unsupported("making a snapshot").into())
    }

    fn config(&self) -> &MicrovmConfig {
        &self.config
    }

    fn end(&self) -> &EndSignal {
        &self.end
    }

    fn paging(&self) -> Option<Arc<dyn Paging>> {
        None
    }
}
