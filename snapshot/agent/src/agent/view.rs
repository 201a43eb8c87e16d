//! A folder once more, where nothing can be written.
//!
//! Who gets a descriptor for reading can open the file behind it again, through `/proc/self/fd`, with whatever that file's
//! mode allows: its owner may change the mode, and root is not asked for it. A file that was opened through a mount for
//! reading alone leads back to that mount, which refuses to write for anybody (`mnt_want_write` in the kernel), and this
//! one has no place in any tree of mounts in which its flags could be changed. It takes root to make one; without, the
//! mode is the barrier, and another user id the real one.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// See the module.
#[derive(Debug)]
pub(super) struct ReadOnlyView(OwnedFd);

impl ReadOnlyView {
    /// A view of `folder`; `None` where this user, or this kernel, cannot make one.
    pub(super) fn of(folder: &Path) -> Option<Self> {
        match Self::make(folder) {
            Ok(view) => Some(view),
            Err(error) => {
                tracing::debug!(folder = %folder.display(), %error, "page files are guarded by their mode alone");
                None
            }
        }
    }

    fn make(folder: &Path) -> io::Result<Self> {
        let path = CString::new(folder.as_os_str().as_bytes())?;
        let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
        // SAFETY: it reads a path that ends with a zero, and makes a descriptor.
        let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
        let tree = i32::try_from(tree)
            .ok()
            .filter(|tree| *tree >= 0)
            .ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        let tree = unsafe { OwnedFd::from_raw_fd(tree) };
        let attributes = libc::mount_attr {
            attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV,
            attr_clr: 0,
            propagation: 0,
            userns_fd: 0,
        };
        // SAFETY: it reads an empty path and a structure of the size that is given; it changes the new mount alone.
        let changed = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        if changed < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(tree))
    }

    /// Opens a file of the folder.
    pub(super) fn open(&self, path: &Path) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(rustix::fs::openat(&self.0, path, flags, Mode::empty())?.into())
    }
}
