//! A machine that needs no KVM, and remembers what was asked of it.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use runnel_snapshot::units::ChunkIndex;
use runnel_snapshot::volume::VolumeName;

use super::guest::{Beside, Engine, Guest, GuestError, Paging, Residency, Stalled, Waits};
use super::operation::Operation;
use crate::config::{CreateSnapshot, LoadSnapshot, MicrovmConfig};
use crate::exit::{EndSignal, Ended};

/// What was asked of the machine, in order.
pub(crate) type Log = Arc<Mutex<Vec<&'static str>>>;

#[derive(Clone, Default)]
pub(crate) struct FakeEngine {
    pub(crate) log: Log,
    /// Told when a snapshot is being made, which then takes until it is cancelled.
    pub(crate) endless_save: Option<Sender<()>>,
    /// The call that fails.
    pub(crate) fails: Option<&'static str>,
    /// How often the machine wants to be looked after.
    pub(crate) look_again: Option<Duration>,
}

impl FakeEngine {
    fn call(&self, name: &'static str) -> Result<(), GuestError> {
        self.log.lock().unwrap().push(name);
        if self.fails == Some(name) {
            Err(format!("{name} failed").into())
        } else {
            Ok(())
        }
    }

    fn guest(&self, config: &MicrovmConfig) -> Box<dyn Guest> {
        Box::new(FakeGuest {
            engine: self.clone(),
            config: config.clone(),
            end: EndSignal::new().unwrap(),
        })
    }
}

impl Engine for FakeEngine {
    fn boot(&mut self, config: &MicrovmConfig) -> Result<Box<dyn Guest>, GuestError> {
        self.call("boot")?;
        Ok(self.guest(config))
    }

    fn load(
        &mut self,
        _: &LoadSnapshot,
        config: &MicrovmConfig,
        _: &Operation,
    ) -> Result<Box<dyn Guest>, GuestError> {
        self.call("load")?;
        Ok(self.guest(config))
    }
}

struct FakeGuest {
    engine: FakeEngine,
    config: MicrovmConfig,
    end: EndSignal,
}

impl Guest for FakeGuest {
    fn pause(&mut self, _: &dyn Fn() -> bool) -> Result<(), GuestError> {
        self.engine.call("pause")
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.engine.call("resume")
    }

    fn press_ctrl_alt_del(&mut self) -> Result<(), GuestError> {
        self.engine.call("ctrl_alt_del")?;
        self.end.end(Ended::Reset);
        Ok(())
    }

    fn save(
        &mut self,
        _: &CreateSnapshot,
        operation: &Operation,
        beside: &mut Beside<'_>,
    ) -> Result<(), GuestError> {
        operation.enter("copying");
        self.engine.call("save")?;
        beside(self, true);
        self.engine.call("memory is read")?;
        beside(self, false);
        let Some(begun) = &self.engine.endless_save else {
            return Ok(());
        };
        let (cancelled, wait): (Sender<()>, Receiver<()>) = std::sync::mpsc::channel();
        operation.expect_bytes(100);
        operation.advance(40);
        operation.on_cancel(move || drop(cancelled));
        begun.send(())?;
        // Disconnected, once the hook has been called.
        wait.recv().map_err(|_| "cancelled".into())
    }

    fn look_after(&mut self) -> Option<Duration> {
        let again = self.engine.look_again?;
        let mut log = self.engine.log.lock().unwrap();
        log.push("look after");
        // The third time shows that nothing else woke the thread.
        if log.iter().filter(|call| **call == "look after").count() == 3 {
            self.end.end(Ended::Reset);
        }
        Some(again)
    }

    fn config(&self) -> &MicrovmConfig {
        &self.config
    }

    fn end(&self) -> &EndSignal {
        &self.end
    }

    fn paging(&self) -> Option<Arc<dyn Paging>> {
        Some(Arc::new(FakePaging))
    }

    fn agent(&self) -> Option<Arc<AtomicBool>> {
        self.config.guest_channel.then(|| Arc::new(true.into()))
    }
}

struct FakePaging;

impl Paging for FakePaging {
    fn stalled(&self) -> Option<Stalled> {
        Some(Stalled {
            volume: VolumeName::Memory,
            chunk: ChunkIndex(7),
            reason: "away".into(),
            waiting_ms: 1,
            needs_repair: false,
        })
    }

    fn residency(&self) -> Vec<Residency> {
        vec![Residency {
            volume: VolumeName::Memory,
            bytes_resident: 1,
            bytes_total: 2,
        }]
    }

    fn waits(&self) -> Waits {
        Waits {
            count: 3,
            p50_us: 64,
            p99_us: 128,
            longest_us: 100,
        }
    }
}
