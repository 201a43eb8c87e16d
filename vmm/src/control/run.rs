//! The control thread's loop: requests, the machine's end, the wish that the monitor end, and now and then a look at
//! a machine that may be stalled.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Control;
use super::guest::Engine;
use crate::exit::ExitCode;

/// Why the control thread cannot do its work.
#[derive(Debug, thiserror::Error)]
#[error("cannot wait for requests")]
pub struct CannotWait(#[from] std::io::Error);

/// Works until the machine ends, or the monitor is asked to end.
///
/// # Errors
/// When the kernel gives no descriptor to wait with.
pub fn run<E: Engine>(control: &mut Control<E>) -> Result<ExitCode, CannotWait> {
    let inbox = Arc::clone(control.inbox());
    let sleeper = Epoll::new()?;
    wake_on(&sleeper, inbox.event())?;
    let mut knows_end = false;
    loop {
        // Cleared before looking, so that whatever comes while looking wakes the next wait.
        let _ = inbox.event().read();
        loop {
            if inbox.must_end() {
                tracing::info!("The monitor was asked to end.");
                return Ok(ExitCode::Ok);
            }
            if let Some(ended) = control.guest().and_then(|guest| guest.end().ended()) {
                tracing::info!("The machine ended: {ended}.");
                return Ok(ExitCode::from(ended));
            }
            let Some((request, answer)) = inbox.next() else {
                break;
            };
            answer(control.handle(request));
        }
        if !knows_end && let Some(guest) = control.guest() {
            wake_on(&sleeper, guest.end().event())?;
            knows_end = true;
        }
        sleep(&sleeper, control.look_after())?;
    }
}

fn wake_on(sleeper: &Epoll, event: &EventFd) -> std::io::Result<()> {
    let fd = event.as_raw_fd();
    sleeper.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))
}

/// Waits for any event, for `pause` at most; which one is found out by looking.
fn sleep(sleeper: &Epoll, pause: Option<Duration>) -> std::io::Result<()> {
    // Rounded up: 0 would not wait at all.
    let milliseconds = pause.map_or(-1, |pause| {
        i32::try_from(pause.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    });
    match sleeper.wait(milliseconds, &mut [EpollEvent::default()]) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(()),
        Err(error) => Err(error),
    }
}
