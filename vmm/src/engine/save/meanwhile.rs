//! A machine while it is saved: how long it stands for that, and who looks after it.

use std::time::Duration;

use runnel_snapshot::capture::Progress;
use runnel_snapshot::capture::progress::Stage;

use super::{How, SaveError};
use crate::control::{Beside, Guest as _, GuestError, Operation};
use crate::engine::KvmGuest;

/// How often it is looked whether the machine may run on.
const LOOK: Duration = Duration::from_millis(2);

/// What goes on beside a snapshot.
pub(super) struct Meanwhile<'a> {
    pub(super) operation: &'a Operation,
    /// What else is asked of the machine.
    beside: &'a mut Beside<'a>,
    /// Whether the machine stands for the snapshot alone.
    stands: bool,
}

impl<'a> Meanwhile<'a> {
    /// The machine goes on as it was, running or paused.
    pub(super) fn new(operation: &'a Operation, beside: &'a mut Beside<'a>) -> Self {
        Self {
            operation,
            beside,
            stands: false,
        }
    }

    /// Has a machine that runs stand for the snapshot.
    ///
    /// # Errors
    /// When the machine is stalled, the operation was cancelled, or KVM fails; it runs on then.
    pub(super) fn pause(&mut self, guest: &mut KvmGuest) -> Result<(), GuestError> {
        self.operation.enter("pausing");
        // From the first vCPU that stands.
        self.operation.begin_pause();
        let operation = self.operation;
        match guest.stand_still(&|| operation.is_cancelled()) {
            Ok(()) => {
                self.stands = true;
                Ok(())
            }
            Err(error) => {
                operation.end_pause();
                Err(error)
            }
        }
    }

    /// Lets a machine run on that stands for the snapshot alone.
    pub(super) fn let_run(&mut self, guest: &mut KvmGuest) {
        if !std::mem::take(&mut self.stands) {
            return;
        }
        guest.run();
        let stood = self.operation.end_pause().unwrap_or_default();
        tracing::info!(
            stood_ms = u64::try_from(stood.as_millis()).unwrap_or(u64::MAX),
            "The machine runs on after a pause for its snapshot."
        );
    }

    /// Does `work` on a thread of its own, and looks after the machine on this one, and what else is asked of it. One
    /// that stands for its memory runs on as soon as that was read.
    ///
    /// What is asked may have this thread wait for vCPUs, and those may wait for the capture: what they wait for must end
    /// with `work`, whatever becomes of it.
    pub(super) fn work<T: Send>(
        &mut self,
        guest: &mut KvmGuest,
        how: &How,
        progress: &Progress,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, SaveError> {
        let mut stalled = None;
        let done = std::thread::scope(|scope| {
            let work = scope.spawn(work);
            while !work.is_finished() {
                let has_read = has_read_memory(progress);
                if has_read {
                    self.let_run(guest);
                }
                let _ = guest.look_after();
                (self.beside)(guest, matches!(how, How::Standing) && !has_read);
                // The capture waits for a chunk that does not come, and the machine for the capture.
                if stalled.is_none() && how.holds_writers() {
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
}

/// Whether nothing more is read of the memory of a machine that stands.
fn has_read_memory(progress: &Progress) -> bool {
    let volumes = progress.volumes();
    volumes
        .first()
        .is_none_or(|memory| memory.bytes_done == memory.bytes_total)
}
