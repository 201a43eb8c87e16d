//! Images that are being served, so that `runnel image` does not take them away by mistake.
//!
//! Who serves an image, or a folder of them, holds a shared lock of the kernel's on its directory, which goes with the
//! process, however that ends. Nobody else locks these directories: an image that is being written has another name.

use std::fs::File;
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

#[cfg(test)]
mod tests {
    use super::*;

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
        let all = hold(folder.path()).unwrap();
        assert!(is_held(&web) && is_held(&db));
        drop(all);
        assert!(!is_held(&db));
    }
}
