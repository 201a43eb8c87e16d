//! Unfinished images: hidden directories beside their target, locked as long as their writer lives.
//!
//! They are called `.<target>.partial-<process>-<number>`. Whoever is killed leaves one behind, unlocked; the next
//! writer of the same target, or [`super::folder::prune`], sweeps it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;

const MARK: &str = ".partial-";

/// An unfinished image; removed when dropped, unless it was renamed.
#[derive(Debug)]
pub(super) struct Partial {
    path: PathBuf,
    _lock: File,
}

impl Partial {
    /// Makes one in `parent` for the target `name`, for its owner alone.
    pub(super) fn create(parent: &Path, name: &str) -> io::Result<Self> {
        loop {
            let path = parent.join(hidden_name(name));
            match DirBuilder::new().mode(0o700).create(&path) {
                // A killed process of the same number left it, and somebody else is just sweeping it.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            }
            match lock(&path) {
                Some(lock) if is_still(&lock, &path) => return Ok(Self { path, _lock: lock }),
                // Somebody swept it before it was locked.
                _ => {}
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename it is not there any more. A failure leaves a directory that the next writer sweeps.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Where an image that is being removed goes first, so that nobody sees half of it; `None` for what has no name.
pub(super) fn path_beside(target: &Path) -> Option<PathBuf> {
    let name = target.file_name()?.to_str()?;
    Some(target.with_file_name(hidden_name(name)))
}

/// Removes unfinished images in `parent` whose writers are gone, of one target or of all; returns which.
///
/// # Errors
/// When the folder cannot be read. What cannot be removed is logged.
pub(super) fn sweep(parent: &Path, name: Option<&str>) -> io::Result<Vec<PathBuf>> {
    let mut swept = Vec::new();
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let target = entry.file_name().to_str().and_then(target_of).map(str::to_owned);
        if target.is_none_or(|target| name.is_some_and(|name| name != target)) {
            continue;
        }
        let path = entry.path();
        // Held until it is removed: two sweepers do not meet.
        let Some(_lock) = lock(&path) else { continue };
        match fs::remove_dir_all(&path) {
            Ok(()) => {
                tracing::info!(path = %path.display(), "removed an image that was never finished");
                swept.push(path);
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "an unfinished image cannot be removed")
            }
        }
    }
    Ok(swept)
}

fn hidden_name(name: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(
        ".{name}{MARK}{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// The target of which a directory of this name is unfinished; `None` if it is something else.
fn target_of(name: &str) -> Option<&str> {
    let (target, numbers) = name.strip_prefix('.')?.rsplit_once(MARK)?;
    let (process, number) = numbers.split_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
    (!target.is_empty() && is_number(process) && is_number(number)).then_some(target)
}

/// Locks a directory; `None` if somebody else has it locked, or it is none.
fn lock(path: &Path) -> Option<File> {
    let directory = File::open(path)
        .ok()
        .filter(|file| file.metadata().is_ok_and(|meta| meta.is_dir()))?;
    rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(directory)
}

/// Whether what was opened is still what has that path.
fn is_still(open: &File, path: &Path) -> bool {
    let identity = |meta: io::Result<fs::Metadata>| meta.map(|meta| (meta.dev(), meta.ino())).ok();
    identity(open.metadata()).is_some_and(|open| Some(open) == identity(fs::symlink_metadata(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_writer_makes_is_taken_for_unfinished() {
        assert_eq!(target_of(&hidden_name("web")), Some("web"));
        assert_eq!(target_of(".a.partial-b.partial-1-2"), Some("a.partial-b"));
        for name in [
            "web",
            ".web",
            ".web.partial-",
            ".web.partial-1",
            ".web.partial-1-x",
            ".partial-1-2",
            "web.partial-1-2",
        ] {
            assert_eq!(target_of(name), None, "{name}");
        }
    }

    #[test]
    fn the_living_are_spared_and_others_targets_are_let_be() {
        let folder = tempfile::tempdir().unwrap();
        let alive = Partial::create(folder.path(), "web").unwrap();
        for orphan in [".web.partial-1-1", ".other.partial-1-1"] {
            fs::create_dir(folder.path().join(orphan)).unwrap();
        }
        assert_eq!(
            sweep(folder.path(), Some("web")).unwrap(),
            [folder.path().join(".web.partial-1-1")]
        );
        assert_eq!(
            sweep(folder.path(), None).unwrap(),
            [folder.path().join(".other.partial-1-1")]
        );
        assert!(alive.path().exists());
        drop(alive);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn writers_and_sweepers_at_once_lose_nothing() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..200).for_each(|_| _ = sweep(folder.path(), None)));
                scope.spawn(|| {
                    for _ in 0..200 {
                        let partial = Partial::create(folder.path(), "web").unwrap();
                        fs::write(partial.path().join("blob"), "x").unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
