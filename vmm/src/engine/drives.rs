//! What stands behind a machine's drives, and their content for a snapshot.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use runnel_devices::virtio::block::{FileStore, FileStoreError};
use runnel_snapshot::block_store::BlockStore;
use runnel_snapshot::capture::VolumeSource;
use runnel_snapshot::capture::content::FileContent;
use runnel_snapshot::copy_before_write::EarlyPages;
use runnel_snapshot::image::layout::Layout;
use runnel_snapshot::image::manifest::ImageVolume;
use runnel_snapshot::overlay::{IsCancelled, Overlay};

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
    /// Set if whatever volume it becomes will equal the drive for as long as nobody writes to it.
    pub(super) unwritten: Option<Unwritten>,
}

/// Why a drive will still be what was captured of it.
pub(super) enum Unwritten {
    /// It is a file that the guest may only read, and was this one before it was read.
    File(FileIdentity),
    /// It is an overlay in which nothing was written.
    Overlay,
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

/// Volumes of images on this host that equal a drive of this machine, byte for byte.
#[derive(Default)]
pub(super) struct KnownVolumes {
    files: BTreeMap<ResourceId, (FileIdentity, Arc<Layout>, ImageVolume)>,
    images: BTreeMap<ResourceId, (Arc<Layout>, ImageVolume)>,
}

impl KnownVolumes {
    /// Notes that the drive `id`, unwritten at the pause, was captured as `volume`.
    pub(super) fn captured(
        &mut self,
        id: ResourceId,
        unwritten: Unwritten,
        layout: &Arc<Layout>,
        volume: &ImageVolume,
    ) {
        match unwritten {
            Unwritten::File(identity) => {
                self.files.insert(id, (identity, layout.clone(), volume.clone()));
            }
            // What it lies over came from afar, and is here now.
            Unwritten::Overlay => self.resumed(id, layout.clone(), volume.clone()),
        }
    }

    /// Notes that the overlay of drive `id` lies over `volume`.
    pub(super) fn resumed(&mut self, id: ResourceId, layout: Arc<Layout>, volume: ImageVolume) {
        self.images.insert(id, (layout, volume));
    }

    fn of_file(&self, id: &ResourceId, now: &FileIdentity) -> Option<VolumeSource> {
        let (identity, layout, volume) = self.files.get(id)?;
        (now == identity && is_there(layout, volume)).then(|| unchanged(layout, volume))
    }

    fn of_overlay(&self, id: &ResourceId) -> Option<VolumeSource> {
        let (layout, volume) = self.images.get(id)?;
        is_there(layout, volume).then(|| unchanged(layout, volume))
    }
}

fn unchanged(layout: &Arc<Layout>, volume: &ImageVolume) -> VolumeSource {
    VolumeSource::Unchanged {
        layout: layout.clone(),
        volume: volume.clone(),
    }
}

/// Whether the image has not been removed since.
fn is_there(layout: &Layout, volume: &ImageVolume) -> bool {
    let blobs = volume.layers.iter().chain([&volume.index]);
    blobs.into_iter().all(|blob| layout.open_blob(blob).is_ok())
}

/// The content of drive `id` as it is now, while the machine stands; if it is to run on before all of it was read, what
/// it overwrites meanwhile is kept in `early`.
pub(super) fn content_of(
    id: &ResourceId,
    backing: &Backing,
    known: &KnownVolumes,
    early: &Arc<EarlyPages>,
    is_cancelled: IsCancelled,
) -> io::Result<DriveContent> {
    match backing {
        Backing::Overlay(overlay) => {
            let is_unchanged = overlay.is_unchanged();
            if is_unchanged && let Some(source) = known.of_overlay(id) {
                return Ok(DriveContent {
                    source,
                    unwritten: Some(Unwritten::Overlay),
                });
            }
            Ok(DriveContent {
                source: VolumeSource::Content(Arc::new(overlay.freeze(early, is_cancelled))),
                unwritten: is_unchanged.then_some(Unwritten::Overlay),
            })
        }
        Backing::File { store, read_only, .. } => {
            // Before it is read: a file that somebody else writes to meanwhile is another one afterwards.
            let identity = FileIdentity::of(store.file())?;
            let unwritten = read_only.then(|| Unwritten::File(identity.clone()));
            let source = match known.of_file(id, &identity) {
                Some(source) => source,
                None if *read_only => {
                    let file = store.file().try_clone()?;
                    VolumeSource::Content(Arc::new(FileContent::new(file, store.bytes())?))
                }
                None => VolumeSource::Content(Arc::new(store.freeze(early)?)),
            };
            Ok(DriveContent { source, unwritten })
        }
    }
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
