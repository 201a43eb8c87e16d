//! userfaultfd: whether the monitor may page memory in while a machine runs.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::mm::UserfaultfdFlags;

use super::Finding;

const DEVICE: &str = "/dev/userfaultfd";
const CHECK: &str = "userfaultfd";

/// `USERFAULTFD_IOC_NEW` and `UFFDIO_API` of linux/userfaultfd.h.
const NEW: libc::c_ulong = 0xAA00;
const NEGOTIATE: libc::c_ulong = 0xC018_AA3F;

const API: u64 = 0xAA;
const MISSING_SHMEM: u64 = 1 << 5;
const MINOR_SHMEM: u64 = 1 << 10;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

pub(super) fn examine() -> Finding {
    let userfaultfd = match open() {
        Ok(userfaultfd) => userfaultfd,
        Err(error) => {
            let found = format!(
                "no userfaultfd can be opened ({error}): machines boot, and are not resumed from images"
            );
            let advice = format!(
                "run as root, or give your group access to {DEVICE}, or `sysctl vm.unprivileged_userfaultfd=1`"
            );
            return Finding::warning(CHECK, found, advice);
        }
    };
    let mut api = Api {
        api: API,
        features: MISSING_SHMEM | MINOR_SHMEM,
        ioctls: 0,
    };
    // SAFETY: the request reads and writes one `struct uffdio_api`, which `api` is, and is valid for the call.
    let agreed = unsafe { libc::ioctl(userfaultfd.as_raw_fd(), NEGOTIATE, &raw mut api) };
    if agreed == 0 {
        return Finding::ok(CHECK, "faults of the kernel too, and minor ones on shared memory");
    }
    let error = io::Error::last_os_error();
    Finding::warning(
        CHECK,
        format!(
            "it has no minor faults on shared memory ({error}): machines boot, and are not resumed from images"
        ),
        "use Linux 6.1 or newer",
    )
}

/// As the monitor does it: from the device, where access to it suffices, else by the system call.
fn open() -> io::Result<OwnedFd> {
    if let Ok(device) = OpenOptions::new().read(true).write(true).open(DEVICE) {
        // SAFETY: the request takes flags, not a pointer.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW, libc::O_CLOEXEC) };
        if fd >= 0 {
            // SAFETY: the descriptor is new, so nobody else owns it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    // SAFETY: nothing is registered with it, so no memory of this process changes its meaning.
    Ok(unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC) }?)
}
