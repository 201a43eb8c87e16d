//! The agent's directories: page files by image, which outlive the agent, so that a new one goes on with them.
//!
//! ```text
//!   <memory folder>/lock                    locked as long as an agent uses the folder
//!   <memory folder>/<manifest hex>/memory   on tmpfs: what machines map
//!   <memory folder>/<manifest hex>/places   where the image can be read, a line each
//!   <drive folder>/lock
//!   <drive folder>/<manifest hex>/drive-<id>
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::source::{PageFile, SourceError};
use runnel_snapshot::source::PageFileLayout;
use runnel_snapshot::volume::VolumeName;
use rustix::fs::FlockOperation;

use super::view::ReadOnlyView;

/// Why the agent's directories cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// A directory cannot be made or read.
    #[error("{what} {path} failed")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Another agent has it.
    #[error("another agent uses {0}: use that one, or give this one directories of its own")]
    InUse(PathBuf),
    /// Somebody else could read guests' memory there.
    #[error(
        "guests' memory lies in {path}, which must be this user's alone, and is of user {owner} with mode {mode:o}: chown and chmod 700 it, or name another"
    )]
    Exposed {
        /// Which directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
}

/// The directories, this agent's alone as long as this lives.
#[derive(Debug)]
pub(super) struct PageFolders {
    memory: Folder,
    drives: Option<Folder>,
}

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// Through which monitors get page files, if there is one.
    view: Option<ReadOnlyView>,
    _lock: File,
    /// Whether it was not there before.
    is_new: bool,
}

/// The lock's file in a folder.
const LOCK: &str = "lock";

/// The page file of memory.
const MEMORY: &str = "memory";

/// Before a drive's identifier, the page file of that drive.
const DRIVE: &str = "drive-";

/// How often a folder is taken anew that an ending agent just takes away.
const ATTEMPTS_MAX: u32 = 100;

impl PageFolders {
    /// Takes the directories, and makes them where they are missing. Both may be one.
    pub(super) fn take(memory: &Path, drives: &Path) -> Result<Self, PagesError> {
        let memory = Folder::take(memory)?;
        let same = fs::canonicalize(drives).is_ok_and(|drives| drives == memory.path);
        let drives = if same { None } else { Some(Folder::take(drives)?) };
        Ok(Self { memory, drives })
    }

    fn drives(&self) -> &Folder {
        self.drives.as_ref().unwrap_or(&self.memory)
    }

    fn both(&self) -> impl Iterator<Item = &Folder> {
        std::iter::once(&self.memory).chain(&self.drives)
    }

    /// The page file of a volume of an image, with what an earlier agent left in it.
    pub(super) fn page_file(
        &self,
        image: &BlobDigest,
        volume: &VolumeName,
        layout: PageFileLayout,
    ) -> Result<PageFile, SourceError> {
        let its_folder = self.of(volume);
        let name = Path::new(&image.hex()).join(file_name(volume));
        let folder = its_folder.path.join(image.hex());
        make_private(&folder)
            .and_then(|()| PageFile::named(&its_folder.path.join(&name), layout))
            .and_then(|file| its_folder.guard(file, &name))
            .map_err(|source| SourceError::PageFile {
                volume: volume.clone(),
                bytes: layout.volume_bytes,
                place: folder.display().to_string(),
                source,
            })
    }

    /// Where page files of such a volume lie, those of each image in a folder of their own.
    pub(super) fn folder_of(&self, volume: &VolumeName) -> PathBuf {
        self.of(volume).path.clone()
    }

    fn of(&self, volume: &VolumeName) -> &Folder {
        match volume {
            VolumeName::Memory => &self.memory,
            VolumeName::Drive(_) => self.drives(),
        }
    }

    /// Where page files of drives lie.
    pub(super) fn drive_folder(&self) -> PathBuf {
        self.drives().path.clone()
    }

    /// The page files that an earlier agent left. What cannot be opened is left alone.
    pub(super) fn left(&self) -> Vec<(BlobDigest, VolumeName, PageFile)> {
        let mut left = Vec::new();
        for image in self.images() {
            for folder in self.both() {
                let Ok(entries) = fs::read_dir(folder.path.join(image.hex())) else {
                    continue;
                };
                for entry in entries.flatten() {
                    let Some(volume) = entry.file_name().to_str().and_then(volume_of) else {
                        continue;
                    };
                    let name = Path::new(&image.hex()).join(entry.file_name());
                    let file = PageFile::left(&entry.path());
                    match file.and_then(|file| file.map(|file| folder.guard(file, &name)).transpose()) {
                        Ok(Some(file)) => left.push((image, volume, file)),
                        Ok(None) => {}
                        Err(error) => {
                            let path = entry.path();
                            tracing::warn!(path = %path.display(), %error, "a page file cannot be used again");
                        }
                    }
                }
            }
        }
        left
    }

    /// Makes the folder of an image whose memory lies elsewhere, so that its places can be written down.
    pub(super) fn make_for(&self, image: &BlobDigest) {
        let folder = self.memory.path.join(image.hex());
        if let Err(error) = make_private(&folder) {
            tracing::debug!(path = %folder.display(), %error, "an image has no folder");
        }
    }

    /// Where an image's places are written down, beside its memory.
    pub(super) fn places_of(&self, image: &BlobDigest) -> PathBuf {
        self.memory.path.join(image.hex()).join("places")
    }

    /// Removes an image's page files. Machines that map them go on with what they have.
    pub(super) fn remove(&self, image: &BlobDigest) {
        for folder in self.both() {
            let path = folder.path.join(image.hex());
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "page files cannot be removed");
                }
                _ => {}
            }
        }
    }

    /// The images that have page files.
    pub(super) fn images(&self) -> Vec<BlobDigest> {
        let mut found: Vec<BlobDigest> = self
            .both()
            .filter_map(|folder| fs::read_dir(&folder.path).ok())
            .flat_map(|entries| entries.flatten())
            .filter_map(|entry| format!("sha256:{}", entry.file_name().to_str()?).parse().ok())
            .collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}

impl Folder {
    /// Has monitors get a page file of this folder, `name`, through its view.
    fn guard(&self, file: PageFile, name: &Path) -> io::Result<PageFile> {
        match &self.view {
            Some(view) => file.handed_out_as(view.open(name)?),
            None => Ok(file),
        }
    }

    fn take(path: &Path) -> Result<Self, PagesError> {
        for _ in 1..ATTEMPTS_MAX {
            match Self::try_take(path) {
                Err(PagesError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                taken => return taken,
            }
        }
        Self::try_take(path)
    }

    /// Fails with `NotFound` where an ending agent takes it away meanwhile.
    fn try_take(path: &Path) -> Result<Self, PagesError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| PagesError::Io { what, path, source }
        };
        let is_new = !path.exists();
        make_private(path).map_err(failed("creating", path))?;
        let path = &fs::canonicalize(path).map_err(failed("finding", path))?;
        let metadata = fs::metadata(path).map_err(failed("reading", path))?;
        let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
        // In /dev/shm anybody could have made it first.
        if owner != rustix::process::geteuid().as_raw() || mode & 0o077 != 0 {
            let path = path.clone();
            return Err(PagesError::Exposed { path, owner, mode });
        }
        let file = path.join(LOCK);
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&file)
            .map_err(failed("opening", &file))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(PagesError::InUse(path.clone())),
            Err(error) => return Err(failed("locking", &file)(error.into())),
        }
        let inode = |found: io::Result<fs::Metadata>| found.map(|found| (found.dev(), found.ino()));
        let locked = inode(lock.metadata()).map_err(failed("reading", &file))?;
        if locked != inode(fs::metadata(&file)).map_err(failed("reading", &file))? {
            return Err(failed("locking", &file)(io::ErrorKind::NotFound.into()));
        }
        Ok(Self {
            view: ReadOnlyView::of(path),
            path: path.clone(),
            _lock: lock,
            is_new,
        })
    }
}

impl Drop for Folder {
    /// Leaves nothing where no page files stay for the next agent. Still locked: who waits to take it finds it gone, or
    /// with another lock.
    fn drop(&mut self) {
        let Ok(mut entries) = fs::read_dir(&self.path) else {
            return;
        };
        if entries.all(|entry| entry.is_ok_and(|entry| entry.file_name() == LOCK)) {
            // What cannot be removed is taken again by the next one.
            let _ = fs::remove_file(self.path.join(LOCK));
            if self.is_new {
                let _ = fs::remove_dir(&self.path);
            }
        }
    }
}

fn file_name(volume: &VolumeName) -> String {
    match volume {
        VolumeName::Memory => MEMORY.to_owned(),
        // An identifier of a drive is letters, digits, '-' and '_'.
        VolumeName::Drive(id) => format!("{DRIVE}{id}"),
    }
}

/// The volume whose page file has that name.
fn volume_of(name: &str) -> Option<VolumeName> {
    match name {
        MEMORY => Some(VolumeName::Memory),
        name => Some(VolumeName::Drive(name.strip_prefix(DRIVE)?.to_owned())),
    }
}

/// Makes a directory for its owner alone, unless there is one.
fn make_private(path: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.mode(0o700).recursive(true);
    builder.create(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use runnel_snapshot::units::ChunkSize;

    use super::*;

    fn layout(volume_bytes: u64) -> PageFileLayout {
        PageFileLayout {
            volume_bytes,
            chunk_size: ChunkSize::DEFAULT,
        }
    }

    #[test]
    fn two_agents_do_not_share_and_a_later_one_finds_the_same_files() {
        let folder = tempfile::tempdir().unwrap();
        let (memory, drives) = (folder.path().join("m"), folder.path().join("d"));
        let image = BlobDigest::of(b"image");
        let first = PageFolders::take(&memory, &drives).unwrap();
        for (memory, drives) in [
            (&memory, &folder.path().join("e")),
            (&folder.path().join("n"), &drives),
        ] {
            assert!(matches!(
                PageFolders::take(memory, drives),
                Err(PagesError::InUse(_))
            ));
        }
        let inode = |folders: &PageFolders| {
            folders
                .page_file(&image, &VolumeName::Memory, layout(4096))
                .unwrap();
            fs::metadata(memory.join(image.hex()).join("memory"))
                .unwrap()
                .ino()
        };
        let before = inode(&first);
        first
            .page_file(&image, &VolumeName::Drive("root".into()), layout(512))
            .unwrap();
        assert!(drives.join(image.hex()).join("drive-root").is_file());
        drop(first);
        let second = PageFolders::take(&memory, &drives).unwrap();
        assert_eq!(inode(&second), before);
        assert_eq!(second.images(), [image]);
        let left: Vec<_> = second.left().into_iter().map(|(_, volume, _)| volume).collect();
        assert_eq!(left, [VolumeName::Memory, VolumeName::Drive("root".into())]);
        second.remove(&image);
        assert_eq!(second.images(), []);
        drop(second);
        assert!(!memory.join("lock").exists() && !drives.join("lock").exists());
        drop(PageFolders::take(&folder.path().join("n"), &folder.path().join("n")).unwrap());
        assert!(!folder.path().join("n").exists());
    }

    #[test]
    fn agents_that_come_and_go_at_once_never_have_one_folder_together() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pages");
        let holders = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let Ok(taken) = PageFolders::take(&path, &path) else {
                            continue;
                        };
                        assert_eq!(holders.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                        holders.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                        drop(taken);
                    }
                });
            }
        });
    }

    #[test]
    fn one_directory_serves_for_both_and_an_open_one_for_neither() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("both");
        // Held, or it would go again.
        let _taken = PageFolders::take(&path, &path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(
            PageFolders::take(&path, &path),
            Err(PagesError::Exposed { .. })
        ));
    }
}
