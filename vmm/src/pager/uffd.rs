//! userfaultfd: thin calls over the kernel's interface (linux/userfaultfd.h, Documentation/admin-guide/mm/userfaultfd.rst).
//!
//! The `userfaultfd` crate opens descriptors for faults of user mode only, with which faults inside KVM would become
//! MMIO exits, and lacks the flags for minor faults on shared memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _};
use std::time::Duration;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use super::HostAddress;

const UFFD_API: u64 = 0xAA;
const UFFD_TYPE: u32 = 0xAA;

const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURES: u64 =
    FEATURE_PAGEFAULT_FLAG_WP | FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM | FEATURE_WP_HUGETLBFS_SHMEM;

const REGISTER_MODE_MISSING: u64 = 1 << 0;
const REGISTER_MODE_WP: u64 = 1 << 1;
const REGISTER_MODE_MINOR: u64 = 1 << 2;

const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const EVENT_PAGEFAULT: u8 = 0x12;
const PAGEFAULT_FLAG_WP: u64 = 1 << 1;
const PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_zeropage` and `struct uffdio_continue`: they look alike.
#[repr(C)]
struct Install {
    range: Range,
    mode: u64,
    /// Bytes installed, or a negative errno.
    done: i64,
}

#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFD_TYPE, 0x00);
ioctl_iowr_nr!(UFFDIO_API, UFFD_TYPE, 0x3F, Api);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFD_TYPE, 0x00, Register);
ioctl_ior_nr!(UFFDIO_WAKE, UFFD_TYPE, 0x02, Range);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, UFFD_TYPE, 0x04, Install);
ioctl_iowr_nr!(UFFDIO_WRITEPROTECT, UFFD_TYPE, 0x06, WriteProtect);
ioctl_iowr_nr!(UFFDIO_CONTINUE, UFFD_TYPE, 0x07, Install);

/// Why this host cannot page.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// No descriptor was to be had.
    #[error(
        "cannot open a userfaultfd: run as root, grant access to /dev/userfaultfd, or set the sysctl \
         vm.unprivileged_userfaultfd to 1"
    )]
    Open(#[source] io::Error),
    /// The kernel is too old.
    #[error(
        "this kernel's userfaultfd lacks minor faults or write protection on shared memory; Linux 6.1 or later is needed"
    )]
    Features(#[source] io::Error),
    /// The range could not be registered.
    #[error("cannot register {len} bytes of guest memory with userfaultfd")]
    Register {
        /// How long the range is.
        len: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Whether this host can page: opens a userfaultfd, negotiates, and closes it.
///
/// # Errors
/// What is missing, and what to do about it.
pub fn check_host() -> Result<(), UffdError> {
    Userfaultfd::open().map(drop)
}

/// One page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// The page's first byte.
    pub(super) address: HostAddress,
    /// Why the thread that touched it waits.
    pub(super) kind: FaultKind,
}

/// Why a thread waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaultKind {
    /// It is not there.
    Missing,
    /// It is not mapped, and the page file holds it.
    Minor,
    /// It is write-protected, and the thread writes.
    Write,
}

/// What is to be reported of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    /// Pages that are not mapped, and writes to protected ones.
    All,
    /// Writes to protected pages alone: the kernel fills in the others.
    Writes,
}

/// How far an installation got.
#[derive(Debug)]
pub(super) enum Installed {
    /// All of it.
    All,
    /// So many bytes, then this error: `EEXIST` if the next page is mapped already.
    Part(u64, io::Error),
}

/// A userfaultfd that reports faults of user mode and of the kernel.
#[derive(Debug)]
pub(super) struct Userfaultfd(File);

impl Userfaultfd {
    /// Opens a descriptor, from `/dev/userfaultfd` if there is one (access to it suffices), else by the system call
    /// (which asks for a capability or a sysctl).
    pub(super) fn open() -> Result<Self, UffdError> {
        let uffd = Self(
            open_device()
                .or_else(|_| open_by_call())
                .map_err(UffdError::Open)?,
        );
        let mut api = Api {
            api: UFFD_API,
            features: FEATURES,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes the structure that it is given, whose layout is that of the header.
        let result = unsafe { ioctl_with_mut_ref(&uffd.0, UFFDIO_API(), &mut api) };
        if result < 0 {
            return Err(UffdError::Features(io::Error::last_os_error()));
        }
        Ok(uffd)
    }

    /// Has faults in a range of this process's memory reported.
    pub(super) fn register(&self, start: HostAddress, len: u64, watch: Watch) -> Result<(), UffdError> {
        let range = Range { start: start.0, len };
        let mut register = Register {
            range,
            mode: match watch {
                Watch::All => REGISTER_MODE_MISSING | REGISTER_MODE_MINOR | REGISTER_MODE_WP,
                Watch::Writes => REGISTER_MODE_WP,
            },
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes the structure that it is given. Faults in the range will wait for the
        // pager from here on, and nothing else changes about the memory.
        let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut register) };
        if result < 0 {
            return Err(UffdError::Register {
                len,
                source: io::Error::last_os_error(),
            });
        }
        Ok(())
    }

    /// Takes faults that have been reported, without waiting for one.
    pub(super) fn read(&self, faults: &mut Vec<Fault>) -> io::Result<()> {
        /// `struct uffd_msg`.
        const MESSAGE_BYTES: usize = 32;
        let mut buffer = [0; 64 * MESSAGE_BYTES];
        let read = match (&self.0).read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            result => result?,
        };
        for message in buffer[..read].chunks_exact(MESSAGE_BYTES) {
            let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().expect("eight bytes"));
            if message[0] == EVENT_PAGEFAULT {
                faults.push(Fault {
                    address: HostAddress(word(16)),
                    kind: match word(8) {
                        flags if flags & PAGEFAULT_FLAG_WP != 0 => FaultKind::Write,
                        flags if flags & PAGEFAULT_FLAG_MINOR != 0 => FaultKind::Minor,
                        _ => FaultKind::Missing,
                    },
                });
            }
        }
        Ok(())
    }

    /// Maps pages that the page file holds, and wakes who waits for them.
    pub(super) fn map(&self, start: HostAddress, len: u64) -> Installed {
        self.install(UFFDIO_CONTINUE(), start, len)
    }

    /// Maps zeros, and wakes who waits for them.
    pub(super) fn zero(&self, start: HostAddress, len: u64) -> Installed {
        self.install(UFFDIO_ZEROPAGE(), start, len)
    }

    /// Wakes who waits for a page in the range; if the page is not there, it faults again.
    pub(super) fn wake(&self, start: HostAddress, len: u64) -> io::Result<()> {
        let range = Range { start: start.0, len };
        // SAFETY: the kernel only reads the structure.
        let result = unsafe { ioctl_with_ref(&self.0, UFFDIO_WAKE(), &range) };
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    /// Has writers to these pages wait, or wait no longer; those that wait are woken then. Pages that are there stay
    /// as they are.
    pub(super) fn write_protect(&self, start: HostAddress, len: u64, protect: bool) -> io::Result<()> {
        let mut tries = 0;
        loop {
            let mut write_protect = WriteProtect {
                range: Range { start: start.0, len },
                mode: if protect { WRITEPROTECT_MODE_WP } else { 0 },
            };
            // SAFETY: the kernel reads and writes the structure that it is given. No byte of memory changes; threads
            // that write there wait for the pager, which answers them.
            let result = unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_WRITEPROTECT(), &mut write_protect) };
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            // The memory map is changing for a moment.
            if error.raw_os_error() != Some(libc::EAGAIN) || tries >= WRITE_PROTECT_TRIES_MAX {
                return Err(error);
            }
            std::thread::sleep(BACKOFF_MIN.saturating_mul(1 << tries).min(BACKOFF_MAX));
            tries += 1;
        }
    }

    fn install(&self, request: libc::c_ulong, start: HostAddress, len: u64) -> Installed {
        let mut install = Install {
            range: Range { start: start.0, len },
            mode: 0,
            done: 0,
        };
        // SAFETY: the kernel reads and writes the structure that it is given. It puts pages only where none are, in
        // a registered range, so nothing that a thread could have seen changes.
        let result = unsafe { ioctl_with_mut_ref(&self.0, request, &mut install) };
        if result == 0 {
            return Installed::All;
        }
        let error = io::Error::last_os_error();
        // A part that was done is told as `EAGAIN`, the reason for the rest is found by going on there.
        Installed::Part(u64::try_from(install.done).unwrap_or(0), error)
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn open_device() -> io::Result<File> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the argument is a number, flags for the new descriptor.
    let fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags as libc::c_ulong) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn open_by_call() -> io::Result<File> {
    // SAFETY: takes a number, makes a descriptor, touches nothing else.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = i32::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// How long to wait before a call that said «try again» is repeated: first this, then twice as long each time.
pub(super) const BACKOFF_MIN: Duration = Duration::from_micros(50);
/// How often write protection is tried again before it counts as refused.
const WRITE_PROTECT_TRIES_MAX: u32 = 12;
/// The longest such wait.
pub(super) const BACKOFF_MAX: Duration = Duration::from_millis(20);
