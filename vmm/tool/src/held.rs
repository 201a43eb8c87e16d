//! Images that are being served, so that `runnel image` does not take them away by mistake.
//!
//! Who serves an image, or a folder of them, holds a shared lock of the kernel's on its directory, which goes with the
//! process, however that ends. Nobody else locks these directories: an image that is being written has another name.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// A directory that is held for as long as this lives.
#[derive(Debug)]
pub(crate) struct Held {
    _locked: File,
}

/// Holds an image's directory, or a folder of images. `None`, and a warning, where the file system has no locks: images
/// are served all the same.
pub(crate) fn hold(path: &Path) -> Option<Held> {
    let locked = File::open(path).and_then(|folder| {
        rustix::fs::flock(&folder, FlockOperation::LockShared)?;
        Ok(folder)
    });
    if let Err(error) = &locked {
        tracing::warn!("{} cannot be locked against its removal: {error}", path.display());
    }
    Some(Held {
        _locked: locked.ok()?,
    })
}

/// Whether somebody holds the image at `path`, or the folder that it is in.
pub(crate) fn is_held(path: &Path) -> bool {
    let is_locked = |path: &Path| {
        // What cannot be opened nobody holds, and whoever removes it is told.
        let Ok(folder) = File::open(path) else {
            return false;
        };
        let locked = rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive);
        matches!(locked, Err(Errno::WOULDBLOCK))
    };
    is_locked(path) || path.parent().is_some_and(is_locked)
}

/// The processes that hold the image at `path`, or the folder that it is in, as far as the kernel says.
pub(crate) fn holders(path: &Path) -> Vec<u32> {
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let folders = [Some(path), path.parent()].into_iter().flatten();
    let mut holders: Vec<u32> = folders
        .filter_map(|path| path.metadata().ok())
        .flat_map(|folder| holders_in(&locks, folder.dev(), folder.ino()))
        .collect();
    holders.sort_unstable();
    holders.dedup();
    holders
}

/// Who has a lock on a file, of the lines of `/proc/locks` (proc(5)): `1: FLOCK ADVISORY READ 1234 fe:00:5678 0 EOF`,
/// with `->` before the kind of one that is waited for.
fn holders_in(locks: &str, device: u64, inode: u64) -> Vec<u32> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    let holder = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, "FLOCK", _, _, pid, found, ..] = fields[..] else {
            return None;
        };
        // One in a container that cannot be seen from here has the number 0 or -1.
        pid.parse().ok().filter(|pid| *pid > 0 && found == file)
    };
    locks.lines().filter_map(holder).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_a_file_is_read_from_the_kernels_list() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 fe:00:12 0 EOF\n2: FLOCK  ADVISORY  READ 8 fe:00:12 0 EOF\n\
                     2: -> FLOCK  ADVISORY  WRITE 9 fe:00:12 0 EOF\n3: FLOCK  ADVISORY  READ 0 fe:00:12 0 EOF\n\
                     4: FLOCK  ADVISORY  READ 10 fe:00:123 0 EOF\n";
        let device = rustix::fs::makedev(0xfe, 0);
        assert_eq!(holders_in(locks, device, 12), [8]);
        assert!(holders_in("", device, 12).is_empty());
    }

    #[test]
    fn an_image_is_held_as_long_as_one_holder_lives_and_with_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let [web, db] = ["web", "db"].map(|name| folder.path().join(name));
        std::fs::create_dir(&web).unwrap();
        std::fs::create_dir(&db).unwrap();
        assert!(!is_held(&web));
        let (first, second) = (hold(&web).unwrap(), hold(&web).unwrap());
        drop(first);
        assert!(is_held(&web) && !is_held(&db));
        drop(second);
        assert!(!is_held(&web));
        assert!(holders(&web).is_empty());
        let all = hold(folder.path()).unwrap();
        assert!(is_held(&web) && is_held(&db));
        drop(all);
        assert!(!is_held(&db));
    }
}
