//! An overlay's own blocks at a pause, put aside, so that the machine need not stand while they are read.
//!
//! Only these blocks can change: the image's chunks never do, and are read, or fetched, when the machine runs again.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use super::content::IsCancelled;
use crate::capture::content::{Content as _, FileContent};
use crate::unnamed;

/// Bytes copied between two looks at whether the snapshot is still wanted.
const PIECE_BYTES: u64 = 1 << 20;

/// A copy takes at most one part in so many of the room that its file system has left: a snapshot must not be what
/// fills the disk that the machine writes to.
const ROOM_SHARE: u64 = 2;

/// What was put aside.
pub(super) struct Aside {
    /// Never changes again.
    pub(super) file: File,
    /// Bytes that had to be copied; 0 where the file system shares them.
    pub(super) copied_bytes: u64,
}

/// Puts the content of `own` aside, in a file without a name in `directory`: shared with `own` where the file system
/// can, else copied. `None` if there is no room for a copy, or the storage refuses it; the content must be read where
/// it is then, while the machine stands.
///
/// # Errors
/// When the snapshot is called off meanwhile.
pub(super) fn put_aside(
    own: &File,
    directory: &Path,
    is_cancelled: &IsCancelled,
) -> io::Result<Option<Aside>> {
    let Ok(file) = unnamed::create_in(directory) else {
        return Ok(None);
    };
    if rustix::fs::ioctl_ficlone(&file, own).is_ok() {
        return Ok(Some(Aside {
            file,
            copied_bytes: 0,
        }));
    }
    match copy(own, &file, is_cancelled) {
        Ok(copied) => Ok(copied.map(|copied_bytes| Aside { file, copied_bytes })),
        Err(error) if is_cancelled() => Err(error),
        Err(error) => {
            tracing::warn!(%error, "a drive's own blocks cannot be put aside; the machine stands until they are read");
            Ok(None)
        }
    }
}

/// Copies what is not a hole; `None`, with nothing copied, if that needs too much room.
fn copy(own: &File, aside: &File, is_cancelled: &IsCancelled) -> io::Result<Option<u64>> {
    let about = own.metadata()?;
    let room = rustix::fs::fstatvfs(aside)?;
    // st_blocks counts units of 512 bytes, whatever the file system's are.
    let needed = about.blocks().saturating_mul(512);
    if !fits(needed, room.f_bavail.saturating_mul(room.f_frsize)) {
        return Ok(None);
    }
    aside.set_len(about.size())?;
    let content = FileContent::new(own.try_clone()?, about.size())?;
    let mut piece = vec![0; PIECE_BYTES as usize];
    let (mut at, mut copied) = (0, 0);
    while let Some(run) = content.next_data(at)? {
        at = run.start;
        let end = run.start + run.len;
        while at < end {
            if is_cancelled() {
                return Err(io::Error::other("given up while putting a drive aside"));
            }
            let part = &mut piece[..PIECE_BYTES.min(end - at) as usize];
            own.read_exact_at(part, at)?;
            aside.write_all_at(part, at)?;
            at += part.len() as u64;
            copied += part.len() as u64;
        }
    }
    Ok(Some(copied))
}

fn fits(needed_bytes: u64, free_bytes: u64) -> bool {
    needed_bytes <= free_bytes / ROOM_SHARE
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn never() -> IsCancelled {
        Arc::new(|| false)
    }

    #[test]
    fn what_is_put_aside_stays_and_its_holes_cost_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let own = unnamed::create_in(folder.path()).unwrap();
        own.set_len(64 << 20).unwrap();
        own.write_all_at(&[7; 8192], 32 << 20).unwrap();
        let aside = put_aside(&own, folder.path(), &never()).unwrap().unwrap();
        own.write_all_at(&[9; 8192], 32 << 20).unwrap();
        let mut seen = [0; 8192];
        aside.file.read_exact_at(&mut seen, 32 << 20).unwrap();
        assert_eq!(seen, [7; 8192]);
        assert_eq!(aside.file.metadata().unwrap().size(), 64 << 20);
        assert!(aside.file.metadata().unwrap().blocks() * 512 < 1 << 20);
        assert!(aside.copied_bytes < 1 << 20);
    }

    #[test]
    fn a_copy_leaves_the_machine_as_much_room_as_it_takes() {
        assert!(fits(0, 0));
        assert!(fits(1 << 20, 2 << 20));
        assert!(!fits((1 << 20) + 512, 2 << 20));
    }

    #[test]
    fn no_directory_no_room_and_no_wish_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let own = tempfile::tempfile().unwrap();
        own.write_all_at(&[7; 8192], 0).unwrap();
        let missing = folder.path().join("missing");
        assert!(put_aside(&own, &missing, &never()).unwrap().is_none());

        let cancelled: IsCancelled = Arc::new(|| true);
        let aside = tempfile::tempfile().unwrap();
        assert!(copy(&own, &aside, &cancelled).is_err());

        // A file system that takes nothing.
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(!matches!(copy(&own, &full, &never()), Ok(Some(_))));
    }
}
