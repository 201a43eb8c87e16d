//! Asking the guest to prepare before it is paused for a snapshot, and letting it go on afterwards.
//!
//! The vCPUs run while it is asked. Whatever comes of it, [`KvmGuest::let_guest_go`] is called once the machine runs on.

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{KvmGuest, LOOK_WHILE_HELD};
use crate::config::{GuestHook, Otherwise};
use crate::control::{Guest as _, Operation};
use crate::guest_channel::{Answer, HookId, NotAsked};

/// Why the guest is not ready for a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// There is no way to ask it.
    #[error(
        "the machine has no guest channel, over which its guest could be asked: give it one before it starts \
         (PUT /guest-channel), or leave `guest_hook` out"
    )]
    NoChannel,
    /// It cannot answer.
    #[error(
        "the machine is paused, and its guest cannot answer: let it run first, or leave `guest_hook` out"
    )]
    Paused,
    /// Nobody can be asked.
    #[error(transparent)]
    NotAsked(#[from] NotAsked),
    /// It cannot be named.
    #[error("cannot get random bytes to ask the guest with")]
    Random(#[source] io::Error),
    /// It did not answer.
    #[error("the guest did not say within {0} ms that it is ready; the machine runs on")]
    Silent(u128),
    /// It said that it cannot.
    #[error("the guest is not ready: its agent says {0:?}; the machine runs on")]
    Failed(String),
    /// It is not wanted any more.
    #[error("it was cancelled while the guest was asked; the machine runs on")]
    CalledOff,
    /// There is nobody left.
    #[error("the guest has ended while it was asked")]
    Ended,
}

impl KvmGuest {
    /// Asks the guest as `wanted` says, or if it says nothing, if there is somebody to ask. Returns once the snapshot
    /// may be made.
    pub(super) fn ask_guest(
        &mut self,
        wanted: Option<GuestHook>,
        operation: &Operation,
    ) -> Result<(), HookError> {
        let hook = match wanted {
            None if self.is_running && self.has_agent() => GuestHook::UNASKED_FOR,
            None => return Ok(()),
            Some(hook) => hook,
        };
        if !hook.asks() {
            return Ok(());
        }
        operation.enter("asking the guest");
        match self.prepare(hook.deadline, operation) {
            Err(error @ (HookError::CalledOff | HookError::Ended)) => Err(error),
            Err(error) if hook.otherwise == Otherwise::Proceed => {
                tracing::warn!(%error, "the snapshot is made of a guest that has not prepared for it");
                Ok(())
            }
            prepared => prepared,
        }
    }

    /// Tells the guest that the snapshot is over, if it was asked.
    pub(super) fn let_guest_go(&self) {
        if let Some(channel) = self.machine.board().guest_channel() {
            channel.let_go();
        }
    }

    fn has_agent(&self) -> bool {
        let agent = self.agent();
        agent.is_some_and(|agent| agent.load(Ordering::Relaxed))
    }

    fn prepare(&mut self, deadline: Duration, operation: &Operation) -> Result<(), HookError> {
        let channel = self.machine.board().guest_channel().ok_or(HookError::NoChannel)?;
        if !self.is_running {
            return Err(HookError::Paused);
        }
        channel.ask(HookId::new().map_err(HookError::Random)?, deadline)?;
        let asked = Instant::now();
        loop {
            let left = deadline.saturating_sub(asked.elapsed());
            let channel = self.machine.board().guest_channel().ok_or(HookError::NoChannel)?;
            match channel.answer(left.min(LOOK_WHILE_HELD)) {
                Some(Answer::Ready) => return Ok(()),
                Some(Answer::Failed(why)) => return Err(HookError::Failed(why)),
                None if operation.is_cancelled() => return Err(HookError::CalledOff),
                None if self.end.ended().is_some() => return Err(HookError::Ended),
                None if left.is_zero() => return Err(HookError::Silent(deadline.as_millis())),
                None => {}
            }
            let _ = self.look_after();
        }
    }
}
