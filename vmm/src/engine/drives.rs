//! What stands behind a machine's drives, and their content for a snapshot.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use runnel_devices::virtio::block::{FileStore, FileStoreError};
use runnel_snapshot::block_store::BlockStore;
use runnel_snapshot::capture::content::FileContent;
use runnel_snapshot::capture::{Content, VolumeSource};
use runnel_snapshot::copy_before_write::EarlyPages;
use runnel_snapshot::dirty_pages::DirtyPages;
use runnel_snapshot::overlay::{IsCancelled, Overlay};
use runnel_snapshot::pager::PageSet;

use super::bases::Base;
use crate::config::{Drive, ResourceId};

/// What stands behind a drive.
#[derive(Clone)]
pub(super) enum Backing {
    /// A file of this host.
    File { store: Arc<FileStore>, read_only: bool },
    /// An overlay over the image's volume of this name.
    Overlay(Arc<Overlay>),
}

impl Backing {
    pub(super) fn file(drive: &Drive, store: FileStore) -> Self {
        Self::File {
            store: Arc::new(store),
            read_only: drive.is_read_only,
        }
    }

    pub(super) fn store(&self) -> Arc<dyn BlockStore> {
        match self {
            Self::File { store, .. } => store.clone(),
            Self::Overlay(overlay) => overlay.clone(),
        }
    }

    /// Whether it is the file at `path`, by that name or another.
    fn is_file(&self, path: &Path) -> bool {
        let identity = |about: io::Result<Metadata>| about.map(|about| (about.dev(), about.ino())).ok();
        match self {
            Self::File { store, .. } => {
                let own = identity(store.file().metadata());
                own.is_some() && own == identity(fs::metadata(path))
            }
            Self::Overlay(_) => false,
        }
    }
}

/// Why a file cannot be behind a drive.
#[derive(Debug, thiserror::Error)]
pub enum DriveFileError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileStoreError),
    /// This machine itself has it locked.
    #[error(
        "{} is given twice to this machine, and drive {first} has it already: give each drive a file of its own, \
         or make both read-only",
        path.display()
    )]
    Twice {
        /// Which file.
        path: PathBuf,
        /// Who has it.
        first: ResourceId,
    },
}

/// Opens the file behind a drive of a machine that has `others` open already.
pub(super) fn open_file(
    drive: &Drive,
    others: &[(ResourceId, Backing)],
) -> Result<FileStore, DriveFileError> {
    FileStore::open(&drive.path, drive.is_read_only).map_err(|error| {
        // To the lock, a machine that meets itself is another one.
        match others.iter().find(|(_, other)| other.is_file(&drive.path)) {
            Some((first, _)) if matches!(error, FileStoreError::Locked { .. }) => DriveFileError::Twice {
                path: drive.path.clone(),
                first: first.clone(),
            },
            _ => error.into(),
        }
    })
}

/// A drive's content as it is at a pause.
pub(super) struct DriveContent {
    pub(super) source: VolumeSource,
    /// What was written to it since its base, and is saved with this.
    pub(super) dirty: DirtyPages,
    /// Set if it is a file that the guest may only read, and was this one before it was read.
    pub(super) file: Option<FileIdentity>,
}

/// A file that was captured, so that it need not be captured again while it stays the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileIdentity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileIdentity {
    fn of(file: &File) -> io::Result<Self> {
        let about = file.metadata()?;
        Ok(Self {
            device: about.dev(),
            inode: about.ino(),
            bytes: about.size(),
            modified: (about.mtime(), about.mtime_nsec()),
            changed: (about.ctime(), about.ctime_nsec()),
        })
    }
}

/// Lists the data of a drive's file while the machine runs: at the pause this would take too long. None of a drive that
/// has no file which it may write, or whose storage does not tell.
pub(super) fn data_ahead(backing: &Backing) -> Option<PageSet> {
    match backing {
        Backing::File {
            store,
            read_only: false,
        } => store.data_pages().ok(),
        _ => None,
    }
}

/// How a drive is captured.
pub(super) struct DriveCapture<'a> {
    /// What the drive was, if there is an image of it.
    pub(super) base: Option<&'a Base>,
    /// What the new volume is to lie over.
    pub(super) below: Option<&'a Base>,
    /// The pages of its file that were no holes a moment ago, when the machine still ran, if that was looked at.
    pub(super) data_ahead: Option<&'a PageSet>,
    /// Where what is overwritten is kept, if the machine runs on before all of it was read.
    pub(super) early: &'a Arc<EarlyPages>,
    pub(super) is_cancelled: IsCancelled,
}

impl DriveCapture<'_> {
    /// The content of a drive as it is now, while the machine stands.
    pub(super) fn content_of(self, backing: &Backing) -> io::Result<DriveContent> {
        match backing {
            Backing::Overlay(overlay) => self.of_overlay(overlay),
            Backing::File {
                store,
                read_only: true,
            } => self.of_read_only_file(store),
            Backing::File { store, .. } => self.of_file(store),
        }
    }

    fn of_overlay(self, overlay: &Overlay) -> io::Result<DriveContent> {
        let dirty = overlay.dirty().take();
        if let Some(base) = self.base.filter(|_| dirty.pages().is_empty()) {
            return Ok(DriveContent::without_file(base.unchanged(), dirty));
        }
        let freeze =
            |within: Option<&PageSet>| Ok(overlay.freeze(within, self.early, self.is_cancelled.clone()));
        let source = source_of(self.below, dirty.pages(), freeze)?;
        Ok(DriveContent::without_file(source, dirty))
    }

    fn of_file(self, store: &FileStore) -> io::Result<DriveContent> {
        let dirty = store.dirty().take();
        // What was a hole then and is none now was written to.
        let data = self.data_ahead.map(|ahead| {
            let mut data = ahead.clone();
            data.insert_all(dirty.pages());
            data
        });
        let freeze = |within: Option<&PageSet>| store.freeze(within.or(data.as_ref()), self.early);
        let source = source_of(self.below, dirty.pages(), freeze)?;
        Ok(DriveContent::without_file(source, dirty))
    }

    fn of_read_only_file(self, store: &FileStore) -> io::Result<DriveContent> {
        // Before it is read: a file that somebody else writes to meanwhile is another one afterwards.
        let now = FileIdentity::of(store.file())?;
        let source = match self.base.filter(|base| base.file.as_ref() == Some(&now)) {
            Some(base) => base.unchanged(),
            None => {
                let file = store.file().try_clone()?;
                VolumeSource::Content(Arc::new(FileContent::new(file, store.bytes())?))
            }
        };
        Ok(DriveContent {
            source,
            dirty: store.dirty().take(),
            file: Some(now),
        })
    }
}

impl DriveContent {
    fn without_file(source: VolumeSource, dirty: DirtyPages) -> Self {
        Self {
            source,
            dirty,
            file: None,
        }
    }
}

/// What changed over `below`, or all there is. `freeze` fixes the content of the pages that may be read.
fn source_of<C: Content + 'static>(
    below: Option<&Base>,
    changed: &PageSet,
    freeze: impl FnOnce(Option<&PageSet>) -> io::Result<C>,
) -> io::Result<VolumeSource> {
    let Some(below) = below else {
        return Ok(VolumeSource::Content(Arc::new(freeze(None)?)));
    };
    // Whole chunks: one of many parts is written anew.
    let read = changed.in_groups_of(below.volume.root.chunk_size().pages());
    Ok(VolumeSource::Changes {
        content: Arc::new(freeze(Some(&read))?),
        changed: changed.clone(),
        compares: false,
        below: below.place.clone(),
        base: below.volume.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(id: &str, path: &Path, is_read_only: bool) -> Drive {
        Drive {
            id: id.parse().unwrap(),
            path: path.to_owned(),
            is_root: false,
            partuuid: None,
            is_read_only,
            cache_type: Default::default(),
            io_engine: Default::default(),
        }
    }

    #[test]
    fn a_file_that_one_machine_is_given_twice_is_not_another_machines() {
        let folder = tempfile::tempdir().unwrap();
        let (path, link) = (folder.path().join("disk"), folder.path().join("link"));
        fs::write(&path, [0; 512]).unwrap();
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let first = drive("a", &path, false);
        let backing = Backing::file(&first, open_file(&first, &[]).unwrap());
        let others = vec![(first.id.clone(), backing)];
        for name in [&path, &link] {
            let refused = open_file(&drive("b", name, true), &others).err().unwrap();
            assert!(
                matches!(&refused, DriveFileError::Twice { first, .. } if first.as_str() == "a"),
                "{refused}"
            );
        }
        let elsewhere = open_file(&drive("b", &path, false), &[]).err().unwrap();
        assert!(elsewhere.to_string().contains("another machine"), "{elsewhere}");
    }
}
