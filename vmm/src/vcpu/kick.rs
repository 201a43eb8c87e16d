//! The signal that brings a vCPU's thread out of `KVM_RUN`.

use std::sync::OnceLock;
use std::thread::JoinHandle;

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// A real-time signal that the C library leaves alone.
fn signal() -> c_int {
    SIGRTMIN()
}

/// Does nothing: that the signal was delivered is what interrupts `KVM_RUN`.
extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

/// Gives the signal its handler, once a process.
pub(super) fn prepare() -> Result<(), errno::Error> {
    static DONE: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *DONE.get_or_init(|| register_signal_handler(signal(), ignore))
}

/// Interrupts `thread`.
pub(super) fn kick(thread: &JoinHandle<()>) {
    // Fails only for a thread that is gone, which needs no kick.
    let _ = thread.kill(signal());
}
