//! Standard input as a lifeline (`--lifeline`): a monitor without a machine does not outlive whoever started it.
//!
//! A tool that dies between starting a monitor and giving it a machine can tell nobody of it: the kernel, which closes
//! the tool's end of the pipe, does.

use std::io;
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};

use super::inbox::Inbox;
use super::status::{Status, VmState};

/// Starts the thread that waits for the other end of standard input to be closed. Nothing is read: it may be a console's.
///
/// # Errors
/// When there is no thread to be had.
pub fn watch_lifeline(inbox: Arc<Inbox>, status: Arc<Status>) -> io::Result<()> {
    let watch = move || {
        if let Err(error) = wait_for_hangup() {
            tracing::warn!(%error, "standard input cannot be watched");
        } else if status.state() == VmState::NotStarted {
            tracing::info!("Whoever started this monitor is gone, and there is no machine yet.");
            status.cancel_all();
            inbox.end();
        } else {
            tracing::debug!("The machine goes on without whoever started it.");
        }
    };
    thread::Builder::new()
        .name("lifeline".to_owned())
        .spawn(watch)
        .map(drop)
}

fn wait_for_hangup() -> io::Result<()> {
    let stdin = io::stdin();
    loop {
        // A hang-up is told unasked. A file, and what else cannot hang up, is waited for in vain.
        let mut fds = [PollFd::new(&stdin, PollFlags::empty())];
        match poll(&mut fds, None) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
