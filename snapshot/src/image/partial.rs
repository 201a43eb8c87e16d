//! Unfinished images, and raw files: hidden beside their target, locked as long as their writer lives.
//!
//! They are called `.<target>.partial-<process>-<number>`. Whoever is killed leaves one behind, unlocked; the next
//! writer of the same target, or [`super::folder::prune`], sweeps it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::FlockOperation;

const MARK: &str = ".partial-";

/// How often a name is tried; each but the last met another process in the act of sweeping.
const ATTEMPTS_MAX: u32 = 100;

/// An unfinished image or file; removed when dropped, unless it was renamed.
#[derive(Debug)]
pub(crate) struct Partial {
    path: PathBuf,
    /// The directory or the file itself, locked.
    locked: File,
}

impl Partial {
    /// Makes a directory in `parent` for the target `name`, for its owner alone.
    pub(super) fn create_directory(parent: &Path, name: &str) -> io::Result<Self> {
        Self::create(parent, name, |path| {
            DirBuilder::new().mode(0o700).create(path)?;
            open(path)
        })
    }

    /// Makes a file in `parent` for the target `name`, for its owner alone.
    pub(crate) fn create_file(parent: &Path, name: &str) -> io::Result<Self> {
        Self::create(parent, name, |path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)
        })
    }

    fn create(parent: &Path, name: &str, make: impl Fn(&Path) -> io::Result<File>) -> io::Result<Self> {
        let mut failure = io::ErrorKind::AlreadyExists.into();
        for _ in 0..ATTEMPTS_MAX {
            let path = parent.join(hidden_name(name));
            match make(&path) {
                Ok(made) if lock(&made) && is_still(&made, &path) => return Ok(Self { path, locked: made }),
                // Somebody swept it before it was locked, or is looking whether to. What is left of it is nobody else's.
                Ok(made) => {
                    if is_still(&made, &path) {
                        let _ = remove(&path, &made);
                    }
                }
                // A killed process of the same number left one, or somebody swept it as soon as it was made.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
                    ) =>
                {
                    failure = error;
                }
                Err(error) => return Err(error),
            }
        }
        Err(failure)
    }

    /// The file, if it is one; the directory otherwise.
    pub(crate) fn file(&self) -> &File {
        &self.locked
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename it is not there any more. A failure leaves a directory that the next writer sweeps.
        let _ = remove(&self.path, &self.locked);
    }
}

/// Where what is being removed goes first, so that nobody sees half of it; `None` for what has no name.
pub(crate) fn path_beside(target: &Path) -> Option<PathBuf> {
    let name = target.file_name()?.to_str()?;
    Some(target.with_file_name(hidden_name(name)))
}

/// Removes unfinished images in `parent` whose writers are gone, of one target or of all; returns which.
///
/// # Errors
/// When the folder cannot be read. What cannot be removed is logged.
pub(crate) fn sweep(parent: &Path, name: Option<&str>) -> io::Result<Vec<PathBuf>> {
    visit_abandoned(parent, name, |path, locked| match remove(path, locked) {
        Ok(()) => {
            tracing::info!(path = %path.display(), "removed an image that was never finished");
            true
        }
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "an unfinished image cannot be removed");
            false
        }
    })
}

/// What [`sweep`] would remove, in the order of paths.
///
/// # Errors
/// When the folder cannot be read.
pub(super) fn abandoned(parent: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = visit_abandoned(parent, None, |_, _| true)?;
    found.sort();
    Ok(found)
}

/// Those unfinished images, of one target or of all, whose writers are gone and of which `visit` says so.
fn visit_abandoned(
    parent: &Path,
    name: Option<&str>,
    mut visit: impl FnMut(&Path, &File) -> bool,
) -> io::Result<Vec<PathBuf>> {
    let mut visited = Vec::new();
    for entry in fs::read_dir(parent)? {
        let entry = entry?;
        let target = entry.file_name().to_str().and_then(target_of).map(str::to_owned);
        if target.is_none_or(|target| name.is_some_and(|name| name != target)) {
            continue;
        }
        let path = entry.path();
        // Held meanwhile: two sweepers do not meet.
        let Some(locked) = open(&path).ok().filter(lock) else {
            continue;
        };
        if visit(&path, &locked) {
            visited.push(path);
        }
    }
    Ok(visited)
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

/// Opens a directory or a file to lock it; not a link, and without waiting for a FIFO's writer.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Locks it; false if somebody else has it locked.
fn lock(file: &File) -> bool {
    rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

fn remove(path: &Path, opened: &File) -> io::Result<()> {
    match opened.metadata()?.is_dir() {
        true => fs::remove_dir_all(path),
        false => fs::remove_file(path),
    }
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
        let alive = Partial::create_directory(folder.path(), "web").unwrap();
        for orphan in [".web.partial-1-1", ".other.partial-1-1"] {
            fs::create_dir(folder.path().join(orphan)).unwrap();
        }
        assert_eq!(
            abandoned(folder.path()).unwrap(),
            [".other.partial-1-1", ".web.partial-1-1"].map(|name| folder.path().join(name))
        );
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
                scope.spawn(|| (0..200).for_each(|_| _ = abandoned(folder.path())));
                scope.spawn(|| {
                    for _ in 0..200 {
                        let partial = Partial::create_directory(folder.path(), "web").unwrap();
                        fs::write(partial.path().join("blob"), "x").unwrap();
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
