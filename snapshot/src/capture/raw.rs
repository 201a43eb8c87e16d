//! Firecracker's form of a machine: one file with its state, and one with its memory, raw and sparse, as its handlers
//! and tools expect (`snapshot_path`, `mem_file_path`).
//!
//! Both are written under names of their own first. Two files cannot be renamed at once, and a state beside the memory
//! of another moment would be a machine that breaks as soon as it runs: [`publish`] takes the old state away first, so
//! that whoever is killed in between leaves no state at all.

mod pages;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use rustix::fs::FlockOperation;

use super::CaptureSettings;
use super::content::{Content, Found};
use super::progress::{Progress, Stage};
use super::splitter::{Piece, Splitter};
use crate::give_way::{CAPTURE, give_way};
use crate::image::partial::{Partial, path_beside, sweep};
use crate::layer::frame::is_zero;
use crate::units::{ByteRange, ChunkIndex};

pub use pages::write_raw_pages;

/// Why there is no raw file. What was at its path before is still there.
#[derive(Debug, thiserror::Error)]
pub enum RawError {
    /// It was called off.
    #[error("the snapshot was cancelled")]
    Cancelled,
    /// Content cannot be read.
    #[error("reading {range} of the volume failed")]
    Read {
        /// Which bytes.
        range: ByteRange,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// What is there is none of ours.
    #[error("{} is no regular file, and is not replaced: name another path", .0.display())]
    NoFile(PathBuf),
    /// A machine has it as its drive.
    #[error("{} is in use, by a running machine for instance, and is not replaced: name another path", .0.display())]
    InUse(PathBuf),
    /// The file cannot be written.
    #[error("{what} {path} failed")]
    Write {
        /// What was attempted.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// Writes `content` for `target`, zeros as holes, down to the disk. What is at `target` stays until [`publish`]. The
/// volume's figures are the first of `progress`.
///
/// # Errors
/// When reading or writing fails, or it was cancelled.
pub fn write_raw(
    content: &dyn Content,
    target: &Path,
    settings: &CaptureSettings,
    progress: &Progress,
) -> Result<RawFile, RawError> {
    let file = RawFile::create(target, content.bytes())?;
    let splitter = Mutex::new(Splitter::new(content, settings.chunk_size));
    let copy = || copy_pieces(content, &file, &splitter, settings, progress);
    thread::scope(|scope| {
        // This thread works too, so that it goes on if no other can be started.
        let others: Vec<_> = (1..settings.compressors)
            .map_while(|_| {
                thread::Builder::new()
                    .name("copy".into())
                    .spawn_scoped(scope, copy)
                    .ok()
            })
            .collect();
        let own = copy();
        others
            .into_iter()
            .map(|other| {
                other
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .fold(own, Result::and)
    })?;
    file.synchronise()?;
    Ok(file)
}

/// Puts a machine's state and its memory in the places of what was there, by renames: a machine that still maps the old
/// memory keeps it.
///
/// # Errors
/// When it was called off before, and nothing has changed; when a rename fails. The old files are both there then, or
/// the old state is not.
pub fn publish(state: RawFile, memory: RawFile, progress: &Progress) -> Result<(), RawError> {
    progress.set_stage(Stage::Publishing);
    // The last moment at which the old files are both there.
    if progress.is_cancelled() {
        return Err(RawError::Cancelled);
    }
    // Again, for copying took a while.
    check_target(&state.target)?;
    check_target(&memory.target)?;
    let old_state = OldState::set_aside(&state)?;
    if let Err(error) = memory.rename() {
        old_state.put_back(&state);
        return Err(error);
    }
    // From here on the old state fits nothing.
    let published = memory
        .synchronise_folder()
        .and_then(|()| state.rename())
        .and_then(|()| state.synchronise_folder());
    old_state.remove();
    published?;
    progress.set_stage(Stage::Published);
    Ok(())
}

/// Whether a file may be put at `target`: nothing is there, or a file that is replaced.
fn check_target(target: &Path) -> Result<(), RawError> {
    match fs::symlink_metadata(target) {
        Ok(about) if !about.is_file() => Err(RawError::NoFile(target.to_owned())),
        // This machine's drive or another's: it would run on, its bytes to be lost when it ends.
        Ok(_) if is_locked(target) => Err(RawError::InUse(target.to_owned())),
        // Whatever keeps it from being looked at keeps it from being written, and is told then.
        _ => Ok(()),
    }
}

/// Whether somebody holds a lock on the file, as machines do on their drives.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
    locked == Err(rustix::io::Errno::WOULDBLOCK)
}

/// The state that was at the target, under a name that the next writer sweeps; none if there was none.
struct OldState(Option<PathBuf>);

impl OldState {
    fn set_aside(state: &RawFile) -> Result<Self, RawError> {
        let Some(aside) = path_beside(&state.target) else {
            return Ok(Self(None));
        };
        match fs::rename(&state.target, &aside) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self(None)),
            Err(error) => return Err(state.failed("setting aside what is in the place of", error)),
        }
        let old_state = Self(Some(aside));
        match state.synchronise_folder() {
            Ok(()) => Ok(old_state),
            Err(error) => {
                old_state.put_back(state);
                Err(error)
            }
        }
    }

    fn put_back(self, state: &RawFile) {
        if let Some(aside) = self.0
            && let Err(error) = fs::rename(&aside, &state.target)
        {
            tracing::error!(path = %aside.display(), %error, "the state that was set aside cannot be put back");
        }
    }

    fn remove(self) {
        if let Some(aside) = self.0
            && let Err(error) = fs::remove_file(&aside)
        {
            tracing::warn!(path = %aside.display(), %error, "the state that was replaced cannot be removed");
        }
    }
}

fn copy_pieces(
    content: &dyn Content,
    file: &RawFile,
    splitter: &Mutex<Splitter<'_>>,
    settings: &CaptureSettings,
    progress: &Progress,
) -> Result<(), RawError> {
    if settings.gives_way {
        give_way(CAPTURE);
    }
    let mut buffer = Vec::new();
    loop {
        if progress.is_cancelled() {
            return Err(RawError::Cancelled);
        }
        let next = splitter.lock().unwrap_or_else(PoisonError::into_inner).next();
        let (first, chunks) = match next.map_err(|(range, source)| RawError::Read { range, source })? {
            None => return Ok(()),
            Some(Piece::Zeros { chunks }) => {
                progress.add_done(0, chunks * settings.chunk_size.bytes());
                continue;
            }
            Some(Piece::Span { first, chunks }) => (first, chunks),
        };
        for number in first.0..first.0 + chunks {
            let range = settings.chunk_size.range_of(ChunkIndex(number), content.bytes());
            buffer.resize(range.len as usize, 0); // at most 2 MiB
            let found = content
                .read(range.start, &mut buffer)
                .map_err(|source| RawError::Read { range, source })?;
            if found == Found::Data && !is_zero(&buffer) {
                file.write(&buffer, range.start)?;
            }
            progress.add_done(0, range.len);
        }
    }
}

/// A file that is written, and not yet in its place. Dropped before, it is gone.
#[derive(Debug)]
pub struct RawFile {
    partial: Partial,
    target: PathBuf,
    parent: PathBuf,
}

impl RawFile {
    fn create(target: &Path, bytes: u64) -> Result<Self, RawError> {
        let failed = |what, path: &Path, source| RawError::Write {
            what,
            path: path.to_owned(),
            source,
        };
        let name = target.file_name().and_then(OsStr::to_str);
        let name = name.ok_or_else(|| failed("creating", target, io::ErrorKind::InvalidFilename.into()))?;
        check_target(target)?;
        let parent = target
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        sweep(parent, Some(name)).map_err(|source| failed("reading", parent, source))?;
        let partial =
            Partial::create_file(parent, name).map_err(|source| failed("creating", target, source))?;
        let enlarged = partial.file().set_len(bytes);
        enlarged.map_err(|source| failed("enlarging", partial.path(), source))?;
        Ok(Self {
            partial,
            target: target.to_owned(),
            parent: parent.to_owned(),
        })
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<(), RawError> {
        self.partial
            .file()
            .write_all_at(bytes, offset)
            .map_err(|source| self.failed("writing", source))
    }

    fn synchronise(&self) -> Result<(), RawError> {
        self.partial
            .file()
            .sync_all()
            .map_err(|source| self.failed("synchronising", source))
    }

    fn rename(&self) -> Result<(), RawError> {
        fs::rename(self.partial.path(), &self.target).map_err(|source| self.failed("renaming", source))
    }

    fn synchronise_folder(&self) -> Result<(), RawError> {
        let synchronised = File::open(&self.parent).and_then(|folder| folder.sync_all());
        synchronised.map_err(|source| self.failed("synchronising the folder of", source))
    }

    fn failed(&self, what: &'static str, source: io::Error) -> RawError {
        RawError::Write {
            what,
            path: self.partial.path().to_owned(),
            source,
        }
    }
}
