//! SIGINT, SIGTERM and SIGHUP as something to wait for beside other things.
//!
//! They are blocked before anything is started, so that none comes between two steps that belong together, and taken
//! from a descriptor where a command can stop.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

const TAKEN: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// The signals, blocked for this thread and those that it starts from now on.
#[derive(Debug)]
pub(crate) struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Blocks them. To be called before other threads exist.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn take() -> io::Result<Self> {
        let set = set_of(&TAKEN);
        // SAFETY: `set` is initialized and valid for the call; the old mask is not asked for.
        let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        // SAFETY: `set` is initialized and valid for the call.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, so nobody else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd })
    }

    /// The next signal that came, without waiting.
    pub(crate) fn next(&self) -> Option<i32> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let len = size_of::<libc::signalfd_siginfo>();
        // SAFETY: `info` has room for `len` bytes.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), len) };
        if read != len.cast_signed() {
            return None;
        }
        // SAFETY: the kernel has written all of it.
        let info = unsafe { info.assume_init() };
        i32::try_from(info.ssi_signo).ok()
    }

    /// Waits for a signal.
    ///
    /// # Errors
    /// When the kernel cannot wait.
    pub(crate) fn wait(&self) -> io::Result<i32> {
        loop {
            if let Some(signal) = self.next() {
                return Ok(signal);
            }
            match poll(&mut [PollFd::new(self, PollFlags::IN)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Lets signals come again; for a child between fork and exec, so it must not allocate.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn unblock_all() -> io::Result<()> {
    let none = set_of(&[]);
    // SAFETY: `none` is initialized and valid for the call; the old mask is not asked for.
    let failed = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) };
    if failed == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(failed))
    }
}

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the pointer is valid for the call, which initializes what it points to.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: it was initialized just now.
    let mut set = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: the pointer is valid and initialized. It fails only for numbers that are no signal.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}
