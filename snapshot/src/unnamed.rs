//! Files without a name: they go with their last user, however it ends.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Makes a file in `folder` for its owner alone, to be read and written.
///
/// # Errors
/// When the folder's file system refuses.
pub(crate) fn create_in(folder: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        // File systems that cannot (NFS, some of FUSE) say so in three ways.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => create_and_unlink(folder),
        Err(error) => Err(error.into()),
    }
}

fn create_and_unlink(folder: &Path) -> io::Result<File> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!(".runnel-unnamed-{}-{number}", std::process::id()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn an_unnamed_file_works_and_leaves_nothing_to_see() {
        let folder = tempfile::tempdir().unwrap();
        for file in [
            create_in(folder.path()).unwrap(),
            create_and_unlink(folder.path()).unwrap(),
        ] {
            file.write_all_at(b"content", 5).unwrap();
            let mut read = [0; 7];
            file.read_exact_at(&mut read, 5).unwrap();
            assert_eq!(&read, b"content");
            assert_eq!(file.metadata().unwrap().mode() & 0o177, 0);
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
        assert!(create_in(&folder.path().join("missing")).is_err());
    }
}
