//! Loading a machine: from an image, at hand or behind an agent, or from Firecracker's two files.
//!
//! Nothing of memory is read before the vCPUs run but what they are known to need first; everything else comes by fault
//! and in the background.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use runnel_devices::virtio::net::TapError;
use runnel_snapshot::block_store::BlockStore as _;
use runnel_snapshot::digest::BlobDigest;
use runnel_snapshot::image::below::BelowImage;
use runnel_snapshot::image::layout::{Layout, LayoutError};
use runnel_snapshot::image::manifest::ImageManifest;
use runnel_snapshot::image::reference::{BadReference, ImageReference, Wanted};
use runnel_snapshot::image::source::{ImageSource, SourceError, SourceSettings};
use runnel_snapshot::image::{Image, ImageError};
use runnel_snapshot::overlay::{Overlay, OverlayError};
use runnel_snapshot::pager::{Fetcher, FetcherSettings};
use runnel_snapshot::protocol::{AgentImage, AgentSource, ConnectError, Opening};
use runnel_snapshot::section::{SavedSection, Section as _, SectionError};
use runnel_snapshot::source::{ChunkId, PageSource, Urgency};
use runnel_snapshot::state::{MachineState, STATE_BYTES_MAX, StateError};
use runnel_snapshot::units::PageIndex;
use runnel_snapshot::volume::VolumeName;
use runnel_snapshot::working_set::FileError;

use super::bases::{Base, Bases};
use super::description::{Description, DescriptionError, DriveRecord};
use super::drives::{self, Backing, DriveFileError};
use super::memory::{RamBacking, mappings};
use super::recording::Recording;
use super::written::WrittenMemory;
use super::{EngineError, KvmGuest};
use crate::board::BoardError;
use crate::config::{self, LoadFrom, LoadSnapshot, MicrovmConfig, ResourceId};
use crate::control::{GuestError, Operation};
use crate::exit::EndSignal;
use crate::layout::{BadRamSize, RamLayout};
use crate::memory::{self, MemoryError};
use crate::microvm::{CompatibilityError, Microvm, RestoreError, Saved, check_compatibility};
use crate::pager::{Pager, PagerError};
use crate::state::Resumption;

/// How long an agent may take to open an image: it may have to connect, and to fetch manifest and state over a slow link.
const OPEN_DEADLINE: Duration = Duration::from_secs(60);

/// Threads that decode the chunks of an image at hand.
const WORKERS_MAX: usize = 4;

/// Why a machine cannot be loaded. Nothing is left of it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It was called off.
    #[error("the load was cancelled")]
    Cancelled,
    /// What was given names no image.
    #[error(transparent)]
    Reference(#[from] BadReference),
    /// The image.
    #[error("the image cannot be opened")]
    Image(#[from] ImageError),
    /// The image's directory.
    #[error("the image cannot be opened")]
    Layout(#[from] LayoutError),
    /// The image, as a source of chunks.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] ConnectError),
    /// The state.
    #[error("the machine state cannot be read")]
    State(#[from] StateError),
    /// A file.
    #[error("cannot read {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the machine touches first could not be written down.
    #[error("nothing can be recorded")]
    Record(#[from] FileError),
    /// A section.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// What the machine is made of.
    #[error(transparent)]
    Description(#[from] DescriptionError),
    /// No description.
    #[error(
        "the machine state has no section {:?}: it is not Runnel's",
        Description::KIND
    )]
    NoDescription,
    /// A thread.
    #[error("cannot start the thread that fetches chunks")]
    Fetcher(#[source] io::Error),
    /// The pager.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// RAM.
    #[error(transparent)]
    RamSize(#[from] BadRamSize),
    /// RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// RAM whose length is not the image's.
    #[error("the machine has {ram} bytes of RAM, and its image's memory volume {volume}")]
    MemoryVolume {
        /// By the description.
        ram: u64,
        /// By the image.
        volume: u64,
    },
    /// RAM cannot be paged.
    #[error("guest memory is not mapped as it should be")]
    Mapping(#[source] io::Error),
    /// An override for something that is not there.
    #[error("`{field}` names {id}, and {has}")]
    Stranger {
        /// The field.
        field: &'static str,
        /// The name.
        id: ResourceId,
        /// What there is.
        has: String,
    },
    /// A drive that is not in the image.
    #[error("drive {0} is not in the image: supply it with `drive_overrides`")]
    NotInImage(ResourceId),
    /// A drive's file.
    #[error("drive {id}: give another file with `drive_overrides`")]
    DriveFile {
        /// Which drive.
        id: ResourceId,
        /// Why.
        #[source]
        source: DriveFileError,
    },
    /// A drive's file that is another one.
    #[error(
        "drive {id} had {expected} bytes when the machine was saved, and {} has {found}: give the file that it had then, \
         or a copy of that, with `drive_overrides`",
        path.display()
    )]
    DriveSize {
        /// Which drive.
        id: ResourceId,
        /// Its file.
        path: PathBuf,
        /// The length at the pause.
        expected: u64,
        /// Its length now.
        found: u64,
    },
    /// An interface's tap.
    #[error("interface {id}: put a tap of its own behind it with `network_overrides`")]
    Tap {
        /// Which interface.
        id: String,
        /// Why not the one that it had.
        #[source]
        source: TapError,
    },
    /// A drive's overlay.
    #[error("drive {id}")]
    Overlay {
        /// Which drive.
        id: ResourceId,
        /// Why.
        #[source]
        source: OverlayError,
    },
    /// The host.
    #[error("this host cannot carry the machine")]
    Incompatible(#[from] CompatibilityError),
    /// The machine.
    #[error("the machine cannot be restored on this host")]
    Restore(#[source] RestoreError),
}

impl From<RestoreError> for LoadError {
    fn from(error: RestoreError) -> Self {
        match error {
            // The tap is the saved machine's, which may run here, or run on.
            RestoreError::Board(BoardError::Tap {
                id,
                source: source @ TapError::Busy { .. },
            }) => Self::Tap { id, source },
            other => Self::Restore(other),
        }
    }
}

/// What a machine is loaded from, opened.
struct Opened {
    state: MachineState,
    /// What delivers chunks, if the machine's volumes are an image's.
    fetcher: Option<Arc<Fetcher>>,
    /// The raw memory file, if they are not.
    memory: Option<Arc<File>>,
    digest: Option<BlobDigest>,
    /// The image as what a diff can lie over.
    below: Option<(BelowImage, Arc<ImageManifest>)>,
}

impl Opened {
    /// The volume as what a diff can lie over.
    fn base_of(&self, name: &VolumeName) -> Option<Base> {
        let (place, manifest) = self.below.as_ref()?;
        let mut volumes = manifest.volumes.iter();
        Some(Base {
            place: place.clone(),
            volume: volumes.find(|volume| volume.name == *name)?.clone(),
            image: manifest.digest,
            file: None,
        })
    }
}

pub(super) fn load(
    load: &LoadSnapshot,
    config: &MicrovmConfig,
    machine: &str,
    operation: &Operation,
) -> Result<KvmGuest, GuestError> {
    operation.enter("opening");
    let name = machine.to_owned();
    let mut opened = open(load, machine, operation)?;
    go_on(operation)?;
    let description = take_description(&mut opened.state.sections)?;
    let described = with_overrides(&description, load, config)?;
    check_compatibility(&opened.state.compatibility).map_err(LoadError::from)?;
    let recording = match (&load.record, &opened.fetcher) {
        (Some(record), Some(fetcher)) => Some(Recording::begin(record, fetcher).map_err(LoadError::from)?),
        _ => None,
    };
    ask_for_first_chunks(&opened);

    operation.enter("restoring");
    let layout = RamLayout::new(described.machine.memory.bytes()).map_err(LoadError::from)?;
    let (ram, pager) = map_memory(&opened, layout)?;
    let end = EndSignal::new().map_err(EngineError::Event)?;
    let mut bases = Bases::default();
    if let Some(base) = opened.base_of(&VolumeName::Memory) {
        bases.set(VolumeName::Memory, base);
    }
    let drives = open_drives(&described, &description.drives, load, &opened, &mut bases)?;
    let mut stores = |drive: &config::Drive| match drives.iter().find(|(id, _)| *id == drive.id) {
        Some((_, backing)) => Ok(backing.store()),
        None => Err("the drive was not opened".into()),
    };
    let saved = Saved {
        config: &described,
        ram,
        layout,
        sections: std::mem::take(&mut opened.state.sections),
        stores: &mut stores,
        clock: if load.clock_realtime {
            Resumption::Forward
        } else {
            Resumption::WhereItWas
        },
    };
    let machine = Microvm::restore(saved, &end).map_err(LoadError::from)?;
    go_on(operation)?;
    Ok(KvmGuest {
        name,
        machine,
        config: described,
        end,
        is_running: false,
        drives,
        bases,
        written: WrittenMemory::new(layout, load.track_dirty_pages),
        backing: RamBacking::Foreign,
        parent: opened.digest,
        is_held: false,
        fill_is_due: opened.fetcher.is_some(),
        recording,
        pager,
        writes: None,
    })
}

/// Between two steps: whether the machine is still wanted.
fn go_on(operation: &Operation) -> Result<(), LoadError> {
    if operation.is_cancelled() {
        return Err(LoadError::Cancelled);
    }
    Ok(())
}

fn open(load: &LoadSnapshot, machine: &str, operation: &Operation) -> Result<Opened, LoadError> {
    match &load.from {
        LoadFrom::TwoFiles { state, memory } => open_two_files(state, memory),
        LoadFrom::Image(config::Image::Directory(path)) => open_directory(path, load),
        LoadFrom::Image(config::Image::Agent { reference, socket }) => {
            let opening = Opening {
                agent: socket.clone(),
                image: reference.clone(),
                machine: machine.to_owned(),
                deadline: OPEN_DEADLINE,
            };
            let source = AgentSource::open_unless(opening, &|| operation.is_cancelled()).map_err(
                |error| match error {
                    ConnectError::CalledOff => LoadError::Cancelled,
                    error => error.into(),
                },
            )?;
            let state = MachineState::decode(source.state())?;
            let digest = source.digest();
            let below = at_hand(reference, digest).or_else(|| away(socket, &source));
            Ok(Opened {
                state,
                fetcher: Some(fetcher(Arc::new(source), FetcherSettings::far(), load)?),
                memory: None,
                digest: Some(digest),
                below,
            })
        }
    }
}

/// The directory of an image that an agent reads, if it is one of this host which may be read here too.
fn at_hand(reference: &str, digest: BlobDigest) -> Option<(BelowImage, Arc<ImageManifest>)> {
    let Ok(ImageReference::Directory { path, .. }) = reference.parse() else {
        return None;
    };
    let (image, _) = Image::open_thin(&path, &Wanted::Pinned(digest)).ok()?;
    let layout = Arc::new(Layout::open(&path).ok()?);
    Some((BelowImage::of(layout, &image.manifest), image.manifest))
}

/// The image that an agent reads, as one of another host.
fn away(agent: &Path, source: &AgentSource) -> Option<(BelowImage, Arc<ImageManifest>)> {
    let manifest = ImageManifest::parse(source.manifest()).ok()?;
    let is_it = manifest.digest == source.digest();
    let image = Arc::new(AgentImage::new(agent, manifest.digest));
    is_it.then(|| (BelowImage::Away(image), Arc::new(manifest)))
}

fn open_directory(path: &Path, load: &LoadSnapshot) -> Result<Opened, LoadError> {
    let reference: ImageReference = path.to_string_lossy().parse()?;
    let ImageReference::Directory { path, wanted } = reference else {
        return Err(LoadError::File {
            path: path.to_owned(),
            source: io::ErrorKind::NotFound.into(),
        });
    };
    let image = Image::open_directory(&path, &wanted)?;
    let state = image.state()?;
    let workers = std::thread::available_parallelism()
        .map_or(1, std::num::NonZero::get)
        .min(WORKERS_MAX);
    let source = ImageSource::new(&image, &SourceSettings::local(workers), &overlay_directory(load))?;
    source.learn(&state.first_chunks);
    let layout = Arc::new(Layout::open(&path)?);
    let digest = Some(image.digest());
    let source = Arc::new(source);
    let fetcher = fetcher(source.clone(), FetcherSettings::default(), load)?;
    // Of one that is not at hand the agent asks for these by itself.
    source.ask(&image.recorded_chunks(), Urgency::Recorded);
    Ok(Opened {
        state,
        fetcher: Some(fetcher),
        memory: None,
        digest,
        below: Some((BelowImage::whole(layout), image.manifest.clone())),
    })
}

fn open_two_files(state: &Path, memory: &Path) -> Result<Opened, LoadError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| LoadError::File { path, source }
    };
    let mut bytes = Vec::new();
    let file = File::open(state).map_err(failed(state))?;
    file.take(STATE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed(state))?;
    if bytes.len() as u64 > STATE_BYTES_MAX {
        let source = io::Error::new(
            io::ErrorKind::FileTooLarge,
            "it is no machine state: more than 16 MiB",
        );
        return Err(failed(state)(source));
    }
    let memory = Arc::new(File::open(memory).map_err(failed(memory))?);
    Ok(Opened {
        state: MachineState::decode(&bytes)?,
        fetcher: None,
        memory: Some(memory),
        digest: None,
        below: None,
    })
}

fn fetcher(
    source: Arc<dyn PageSource>,
    mut settings: FetcherSettings,
    load: &LoadSnapshot,
) -> Result<Arc<Fetcher>, LoadError> {
    if let Some(stall_after) = load.stall_after {
        settings.stall_after = stall_after;
    }
    Fetcher::start(source, settings).map_err(LoadError::Fetcher)
}

fn take_description(sections: &mut Vec<SavedSection>) -> Result<Description, LoadError> {
    let position = sections
        .iter()
        .position(|section| section.kind == Description::KIND);
    let section = sections.swap_remove(position.ok_or(LoadError::NoDescription)?);
    Ok(Description::restore((), section.state_of::<Description>()?)?)
}

/// The machine as it is to be here: other taps and files, and the console and the boot timer of this monitor.
fn with_overrides(
    description: &Description,
    load: &LoadSnapshot,
    config: &MicrovmConfig,
) -> Result<MicrovmConfig, LoadError> {
    let mut described = description.config.clone();
    for (id, tap) in &load.taps {
        if !described.override_tap(id, tap) {
            let has = present(
                "interface",
                described.interfaces().iter().map(|interface| &interface.id),
            );
            return Err(LoadError::Stranger {
                field: "network_overrides",
                id: id.clone(),
                has,
            });
        }
    }
    for (id, path) in &load.drives {
        if !described.override_drive(id, path) {
            let has = present("drive", described.drives().iter().map(|drive| &drive.id));
            return Err(LoadError::Stranger {
                field: "drive_overrides",
                id: id.clone(),
                has,
            });
        }
    }
    described.machine.track_dirty_pages = load.track_dirty_pages;
    described.serial = config.serial.clone();
    described.boot_timer = config.boot_timer;
    Ok(described)
}

/// What the machine has of a kind, for whoever named something else.
fn present<'i>(kind: &str, ids: impl Iterator<Item = &'i ResourceId>) -> String {
    let all: Vec<_> = ids.map(ResourceId::as_str).collect();
    match all[..] {
        [] => format!("the machine has no {kind}"),
        [only] => format!("the machine has the {kind} {only} alone"),
        _ => format!("the machine has the {kind}s {}", all.join(", ")),
    }
}

fn ask_for_first_chunks(opened: &Opened) {
    let Some(fetcher) = &opened.fetcher else { return };
    for first in &opened.state.first_chunks {
        if let Some((volume, _)) = fetcher.volume_named(&first.volume) {
            fetcher.prefetch(&[ChunkId {
                volume,
                chunk: first.chunk,
            }]);
        }
    }
}

type Memory = (Arc<runnel_snapshot::block_store::GuestRam>, Option<Pager>);

fn map_memory(opened: &Opened, layout: RamLayout) -> Result<Memory, LoadError> {
    let Some(fetcher) = &opened.fetcher else {
        let file = opened.memory.as_ref().ok_or(LoadError::NoDescription)?;
        return Ok((Arc::new(memory::resumed(layout, file)?), None));
    };
    let (id, volume) = fetcher
        .volume_named(&VolumeName::Memory)
        .ok_or(PagerError::from(runnel_snapshot::pager::NoMemory))?;
    if volume.bytes != layout.bytes() {
        return Err(LoadError::MemoryVolume {
            ram: layout.bytes(),
            volume: volume.bytes,
        });
    }
    let ram = Arc::new(memory::resumed(layout, &fetcher.source().page_file(id))?);
    let pager = Pager::start(fetcher, mappings(&ram, layout).map_err(LoadError::Mapping)?)?;
    // A new identifier is written there before the vCPUs run; that is not to wait for the old one.
    if let Some(offset) = layout.volume_offset(crate::layout::VMGENID.address()) {
        pager.logic().discard(PageIndex::holding(offset), 1);
    }
    Ok((ram, Some(pager)))
}

fn open_drives(
    config: &MicrovmConfig,
    records: &[DriveRecord],
    load: &LoadSnapshot,
    opened: &Opened,
    bases: &mut Bases,
) -> Result<Vec<(ResourceId, Backing)>, LoadError> {
    let directory = overlay_directory(load);
    let mut drives = Vec::new();
    for (drive, record) in config.drives().iter().zip(records) {
        let is_overridden = load.drives.iter().any(|(id, _)| *id == drive.id);
        let backing = match &opened.fetcher {
            Some(fetcher) if record.in_image && !is_overridden => {
                let name = VolumeName::Drive(drive.id.to_string());
                let overlay =
                    Overlay::new(fetcher, &name, &directory, drive.is_read_only).map_err(|source| {
                        LoadError::Overlay {
                            id: drive.id.clone(),
                            source,
                        }
                    })?;
                if let Some(base) = opened.base_of(&name) {
                    bases.set(name, base);
                }
                Backing::Overlay(Arc::new(overlay))
            }
            Some(_) if !is_overridden => return Err(LoadError::NotInImage(drive.id.clone())),
            _ => open_file(drive, record, is_overridden, &drives)?,
        };
        drives.push((drive.id.clone(), backing));
    }
    Ok(drives)
}

fn overlay_directory(load: &LoadSnapshot) -> PathBuf {
    load.overlay_directory.clone().unwrap_or_else(std::env::temp_dir)
}

fn open_file(
    drive: &config::Drive,
    record: &DriveRecord,
    is_overridden: bool,
    others: &[(ResourceId, Backing)],
) -> Result<Backing, LoadError> {
    let store = drives::open_file(drive, others).map_err(|source| LoadError::DriveFile {
        id: drive.id.clone(),
        source,
    })?;
    if store.bytes() != record.bytes {
        return Err(LoadError::DriveSize {
            id: drive.id.clone(),
            path: drive.path.clone(),
            expected: record.bytes,
            found: store.bytes(),
        });
    }
    let now = DriveRecord::of_file(store.file(), store.bytes())
        .ok()
        .and_then(|record| record.modified_ns);
    if !is_overridden && record.modified_ns < now {
        tracing::warn!(
            drive = %drive.id, path = %drive.path.display(),
            "the drive was written after the machine was saved: its memory may not fit its file system"
        );
    }
    Ok(Backing::file(drive, store))
}
