//! SIGTERM, SIGINT and SIGHUP: the monitor ends in order.
//!
//! They are blocked in every thread and taken by one that does nothing else, so no handler runs in the middle of
//! something. The first one cancels what is under way and asks the control thread to end; should that thread be
//! stuck, the second one ends the process at once.

use std::sync::Arc;
use std::thread;

use vmm_sys_util::signal::{block_signal, create_sigset};

use super::inbox::Inbox;
use super::status::Status;

const SIGNALS: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// Why signals cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum SignalError {
    /// They cannot be blocked.
    #[error("cannot block signal {0}: {1:?}")]
    Block(libc::c_int, vmm_sys_util::signal::Error),
    /// The set of them cannot be made.
    #[error("cannot make a set of signals")]
    Set(#[source] vmm_sys_util::errno::Error),
    /// There is no thread to be had.
    #[error("cannot start the thread that takes signals")]
    Thread(#[source] std::io::Error),
}

/// Blocks the signals in this thread and in those that it starts. To be called before any other thread exists.
///
/// # Errors
/// When the kernel refuses.
pub fn block_signals() -> Result<(), SignalError> {
    for signal in SIGNALS {
        block_signal(signal).map_err(|error| SignalError::Block(signal, error))?;
    }
    Ok(())
}

/// Starts the thread that takes them. `at_once` is called on the second one, just before the process ends.
///
/// # Errors
/// When there is no thread to be had.
pub fn watch_signals(
    inbox: Arc<Inbox>,
    status: Arc<Status>,
    at_once: impl FnOnce() + Send + 'static,
) -> Result<(), SignalError> {
    let set = create_sigset(&SIGNALS).map_err(SignalError::Set)?;
    let take = move || {
        let signal = wait(&set);
        tracing::info!("Received signal {signal}.");
        status.cancel_all();
        inbox.end();
        let signal = wait(&set);
        at_once();
        // The shell's way of saying which signal it was.
        std::process::exit(128 + signal);
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(take)
        .map_err(SignalError::Thread)?;
    Ok(())
}

fn wait(set: &libc::sigset_t) -> libc::c_int {
    let mut signal = 0;
    // SAFETY: both references are valid for the call. It fails only for a set with invalid signals, and then `signal`
    // stays 0.
    unsafe { libc::sigwait(set, &raw mut signal) };
    signal
}
