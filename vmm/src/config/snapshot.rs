//! `snapshot/create` and `snapshot/load`: Firecracker's two files, or Runnel's image.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::guest_hook::{BadDeadline, GuestHook, GuestHookBody};
use super::identifier::{BadIdentifier, ResourceId};
use super::network::is_tap_name;

/// Which of Firecracker's snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// Only what was written since the last one.
    Diff,
    /// Everything.
    #[default]
    Full,
}

/// `PUT /snapshot/create`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshotBody {
    /// Which snapshot.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// Firecracker's form: the file that gets the machine state.
    pub snapshot_path: Option<PathBuf>,
    /// Firecracker's form: the file that gets guest memory, raw and sparse.
    pub mem_file_path: Option<PathBuf>,
    /// Runnel's own: the directory that becomes an image; the other two are left out then.
    pub image_path: Option<PathBuf>,
    /// Runnel's own: drives whose content is not taken into the image, and must be supplied at load.
    #[serde(default)]
    pub excluded_drives: Vec<String>,
    /// Runnel's own: how the guest's agent is asked to prepare. If left out, it is asked if there is one, and not insisted
    /// upon.
    pub guest_hook: Option<GuestHookBody>,
    /// Runnel's own: whether the memory of a machine that was booted is frozen as it is at the pause, to be shared with
    /// machines that are loaded from the image; what the machine writes from then on is its own. Of any other machine it
    /// changes nothing.
    #[serde(default)]
    pub freeze_memory: bool,
    /// Runnel's own: the socket of the agent that is given the frozen memory, and delivers it to those machines.
    pub agent_path: Option<PathBuf>,
}

/// Who answers page faults of a loaded machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBackendType {
    /// The kernel, from a file.
    File,
    /// Another process, by Firecracker's handshake.
    Uffd,
}

/// Where guest memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackendBody {
    /// The file or socket.
    pub backend_path: PathBuf,
    /// Which of both.
    pub backend_type: MemoryBackendType,
}

/// Another tap for an interface of a loaded machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// Which interface.
    pub iface_id: String,
    /// Its tap from now on.
    pub host_dev_name: String,
}

/// Another file for a drive of a loaded machine; Runnel's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// Which drive.
    pub drive_id: String,
    /// The file behind it from now on.
    pub path_on_host: PathBuf,
}

/// What backs the memory of a loaded machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotHugePages {
    /// What backed it when it was saved.
    #[default]
    Snapshot,
    /// Pages of 4 KiB.
    None,
    /// Transparent huge pages.
    Transparent,
    /// Pages of 2 MiB from hugetlbfs.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// Another socket for the vsock device of a loaded machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockOverride {
    /// The socket.
    pub uds_path: PathBuf,
}

/// How the chunks that a loaded machine touches first are recorded; Runnel's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordBody {
    /// The file that gets them.
    pub path: PathBuf,
    /// For how long, from the time when the machine runs; until it is paused, saved or ends, unless given.
    pub duration_ms: Option<u64>,
}

/// `PUT /snapshot/load`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshotBody {
    /// Firecracker's form: the machine state.
    pub snapshot_path: Option<PathBuf>,
    /// Firecracker's form, deprecated: guest memory.
    pub mem_file_path: Option<PathBuf>,
    /// Firecracker's form: guest memory.
    pub mem_backend: Option<MemoryBackendBody>,
    /// Deprecated name of `track_dirty_pages`.
    #[serde(default)]
    pub enable_diff_snapshots: bool,
    /// Whether KVM records which pages the guest writes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Whether the machine runs as soon as it is loaded.
    #[serde(default)]
    pub resume_vm: bool,
    /// Other taps.
    #[serde(default)]
    pub network_overrides: Vec<NetworkOverride>,
    /// Another vsock socket.
    pub vsock_override: Option<VsockOverride>,
    /// Whether the guest's clock is set forward by the time that has passed.
    #[serde(default)]
    pub clock_realtime: bool,
    /// What backs guest memory.
    #[serde(default)]
    pub huge_pages: SnapshotHugePages,
    /// Runnel's own: an image's directory, or with `agent_path` whatever the agent can resolve.
    pub image: Option<String>,
    /// Runnel's own: the socket of the agent that fetches the image's chunks.
    pub agent_path: Option<PathBuf>,
    /// Runnel's own: other files behind drives.
    #[serde(default)]
    pub drive_overrides: Vec<DriveOverride>,
    /// Runnel's own: how long a missing chunk may be waited for before the machine counts as stalled.
    pub stall_after_ms: Option<u64>,
    /// Runnel's own: the directory for what the machine writes to its drives, and without an agent for the pages of
    /// drives that have arrived.
    pub overlay_directory: Option<PathBuf>,
    /// Runnel's own: the order in which the machine first touches the image's chunks is written down.
    pub record: Option<RecordBody>,
}

/// Why a snapshot cannot be made or loaded that way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// A field is missing.
    #[error("missing field `{0}`")]
    Missing(&'static str),
    /// Neither of two fields.
    #[error("missing field: either `mem_backend` or `mem_file_path` is required")]
    NoMemory,
    /// Both of two fields.
    #[error("too many fields: either `mem_backend` or `mem_file_path` exclusively is required")]
    TwoMemories,
    /// Fields of both forms.
    #[error("too many fields: `{0}` and `{1}` exclude each other")]
    Exclusive(&'static str, &'static str),
    /// State and memory at one path.
    #[error("`snapshot_path` and `mem_file_path` name one file, {}: give each its own", .0.display())]
    OneFile(PathBuf),
    /// A field without the one that it belongs to.
    #[error("`{0}` needs `{1}`")]
    Needs(&'static str, &'static str),
    /// A guest that is asked for longer than it can be.
    #[error(transparent)]
    HookDeadline(#[from] BadDeadline),
    /// Another process as the page-fault handler.
    #[error(
        "`mem_backend` of type Uffd is not supported by this version of Runnel: give type File, \
         or load an image with `image` and `agent_path`"
    )]
    Uffd,
    /// A vsock device.
    #[error("`vsock_override`: there is no vsock device in this version of Runnel: leave it out")]
    Vsock,
    /// Memory of huge pages.
    #[error("`huge_pages` {0:?} is not supported by this version of Runnel: leave it out, or give \"None\"")]
    HugePages(SnapshotHugePages),
    /// A name that nothing can have.
    #[error("Invalid identifier {text:?} in `{field}`: {source}")]
    Id {
        /// In which field.
        field: &'static str,
        /// The text.
        text: String,
        /// What is wrong with it.
        source: BadIdentifier,
    },
    /// One thing twice.
    #[error("`{field}` names {id} twice")]
    Twice {
        /// In which field.
        field: &'static str,
        /// What.
        id: ResourceId,
    },
    /// Not a name that a tap can have.
    #[error("Invalid host_dev_name {0:?}: a tap has a name of 1 to 15 bytes without '/', ':' and blanks")]
    TapName(String),
    /// An image elsewhere, and nobody to fetch it.
    #[error("`image` {0:?} is not on this host: give `agent_path`, the socket of a running `runnel agent`")]
    NoAgent(String),
}

/// What a snapshot becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SaveAs {
    /// Firecracker's two files; drives stay where they are.
    TwoFiles {
        /// Gets the machine state.
        state: PathBuf,
        /// Gets guest memory, raw and sparse.
        memory: PathBuf,
    },
    /// An image directory.
    Image {
        /// The directory.
        directory: PathBuf,
        /// Drives that are left out.
        excluded_drives: BTreeSet<ResourceId>,
    },
}

/// A snapshot to make, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateSnapshot {
    /// Everything, or what changed.
    pub kind: SnapshotType,
    /// What it becomes.
    pub save_as: SaveAs,
    /// How the guest is asked to prepare; [`GuestHook::UNASKED_FOR`] if `None` and there is somebody to ask.
    pub guest_hook: Option<GuestHook>,
    /// Whether memory of the machine's own is frozen.
    pub freezes_memory: bool,
    /// The socket of the agent that gets frozen memory.
    pub agent: Option<PathBuf>,
}

/// Which image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Image {
    /// A directory of this host, read without an agent.
    Directory(PathBuf),
    /// Whatever the agent at this socket resolves.
    Agent {
        /// The image, in the agent's words.
        reference: String,
        /// The agent's socket.
        socket: PathBuf,
    },
}

/// What a machine is loaded from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadFrom {
    /// Firecracker's two files.
    TwoFiles {
        /// Holds the machine state.
        state: PathBuf,
        /// Holds guest memory.
        memory: PathBuf,
    },
    /// An image.
    Image(Image),
}

/// A machine to load, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadSnapshot {
    /// From what.
    pub from: LoadFrom,
    /// Whether KVM records which pages the guest writes.
    pub track_dirty_pages: bool,
    /// Whether it runs at once.
    pub resume: bool,
    /// Whether its clock is set forward by the time that has passed.
    pub clock_realtime: bool,
    /// Other taps, by interface.
    pub taps: Vec<(ResourceId, String)>,
    /// Other files, by drive.
    pub drives: Vec<(ResourceId, PathBuf)>,
    /// How long a missing chunk may be waited for before the machine counts as stalled; the pager's own idea if
    /// `None`.
    pub stall_after: Option<Duration>,
    /// Where overlays lie; the directory for temporary files if `None`.
    pub overlay_directory: Option<PathBuf>,
    /// What the machine touches first is written down.
    pub record: Option<Record>,
}

/// How the chunks that a machine touches first are recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The file that gets them.
    pub path: PathBuf,
    /// For how long, from the time when the machine runs; until it is paused, saved or ends if `None`.
    pub time: Option<Duration>,
}

impl TryFrom<CreateSnapshotBody> for CreateSnapshot {
    type Error = SnapshotError;

    fn try_from(body: CreateSnapshotBody) -> Result<Self, SnapshotError> {
        if body.agent_path.is_some() && !body.freeze_memory {
            return Err(SnapshotError::Needs("agent_path", "freeze_memory"));
        }
        let excluded = distinct(
            "excluded_drives",
            body.excluded_drives.into_iter().map(|id| (id, ())),
        )?;
        let save_as = match (body.image_path, body.snapshot_path, body.mem_file_path) {
            (Some(directory), None, None) => SaveAs::Image {
                directory,
                excluded_drives: excluded.into_iter().map(|(id, ())| id).collect(),
            },
            (Some(_), Some(_), _) => return Err(SnapshotError::Exclusive("image_path", "snapshot_path")),
            (Some(_), None, Some(_)) => return Err(SnapshotError::Exclusive("image_path", "mem_file_path")),
            (None, _, _) if !excluded.is_empty() => {
                return Err(SnapshotError::Needs("excluded_drives", "image_path"));
            }
            // They are taken of a machine that stands, and whose guest cannot answer.
            (None, Some(_), Some(_)) if body.guest_hook.is_some() => {
                return Err(SnapshotError::Needs("guest_hook", "image_path"));
            }
            (None, _, _) if body.freeze_memory => {
                return Err(SnapshotError::Needs("freeze_memory", "image_path"));
            }
            (None, Some(state), Some(memory)) if state == memory => {
                return Err(SnapshotError::OneFile(state));
            }
            (None, Some(state), Some(memory)) => SaveAs::TwoFiles { state, memory },
            (None, None, _) => return Err(SnapshotError::Missing("snapshot_path")),
            (None, Some(_), None) => return Err(SnapshotError::Missing("mem_file_path")),
        };
        Ok(Self {
            kind: body.snapshot_type,
            save_as,
            guest_hook: body.guest_hook.map(GuestHook::try_from).transpose()?,
            freezes_memory: body.freeze_memory,
            agent: body.agent_path,
        })
    }
}

impl LoadSnapshotBody {
    /// Names the deprecated fields that it uses, for the log and the `Deprecation` header.
    #[must_use]
    pub fn deprecation(&self) -> Option<&'static str> {
        (self.mem_file_path.is_some() || self.enable_diff_snapshots)
            .then_some("PUT /snapshot/load: mem_file_path and enable_diff_snapshots fields are deprecated.")
    }
}

impl TryFrom<LoadSnapshotBody> for LoadSnapshot {
    type Error = SnapshotError;

    fn try_from(body: LoadSnapshotBody) -> Result<Self, SnapshotError> {
        match body.huge_pages {
            SnapshotHugePages::Snapshot | SnapshotHugePages::None => {}
            huge => return Err(SnapshotError::HugePages(huge)),
        }
        if body.vsock_override.is_some() {
            return Err(SnapshotError::Vsock);
        }
        let from = match body.image {
            Some(image) => {
                let strays = [
                    ("snapshot_path", body.snapshot_path.is_some()),
                    ("mem_file_path", body.mem_file_path.is_some()),
                    ("mem_backend", body.mem_backend.is_some()),
                ];
                if let Some((field, _)) = strays.into_iter().find(|(_, given)| *given) {
                    return Err(SnapshotError::Exclusive("image", field));
                }
                LoadFrom::Image(image_of(image, body.agent_path)?)
            }
            None if body.agent_path.is_some() => return Err(SnapshotError::Needs("agent_path", "image")),
            None if body.stall_after_ms.is_some() => {
                return Err(SnapshotError::Needs("stall_after_ms", "image"));
            }
            None if body.overlay_directory.is_some() => {
                return Err(SnapshotError::Needs("overlay_directory", "image"));
            }
            None if body.record.is_some() => return Err(SnapshotError::Needs("record", "image")),
            None => two_files(body.snapshot_path, body.mem_file_path, body.mem_backend)?,
        };
        let record = body.record.map(|record| Record {
            path: record.path,
            time: record.duration_ms.map(Duration::from_millis),
        });
        let taps = body
            .network_overrides
            .into_iter()
            .map(|tap| (tap.iface_id, tap.host_dev_name));
        let taps = distinct("network_overrides", taps)?;
        if let Some((_, name)) = taps.iter().find(|(_, name)| !is_tap_name(name)) {
            return Err(SnapshotError::TapName(name.clone()));
        }
        let drives = body
            .drive_overrides
            .into_iter()
            .map(|drive| (drive.drive_id, drive.path_on_host));
        Ok(Self {
            from,
            track_dirty_pages: body.track_dirty_pages || body.enable_diff_snapshots,
            resume: body.resume_vm,
            clock_realtime: body.clock_realtime,
            taps,
            drives: distinct("drive_overrides", drives)?,
            stall_after: body.stall_after_ms.map(Duration::from_millis),
            overlay_directory: body.overlay_directory,
            record,
        })
    }
}

fn two_files(
    state: Option<PathBuf>,
    memory: Option<PathBuf>,
    backend: Option<MemoryBackendBody>,
) -> Result<LoadFrom, SnapshotError> {
    let state = state.ok_or(SnapshotError::Missing("snapshot_path"))?;
    let memory = match (memory, backend) {
        (Some(_), Some(_)) => return Err(SnapshotError::TwoMemories),
        (None, None) => return Err(SnapshotError::NoMemory),
        (Some(path), None) => path,
        (
            None,
            Some(MemoryBackendBody {
                backend_type: MemoryBackendType::File,
                backend_path,
            }),
        ) => backend_path,
        (None, Some(_)) => return Err(SnapshotError::Uffd),
    };
    Ok(LoadFrom::TwoFiles { state, memory })
}

fn image_of(reference: String, agent: Option<PathBuf>) -> Result<Image, SnapshotError> {
    match agent {
        Some(socket) => Ok(Image::Agent { reference, socket }),
        None if reference.contains("://") => Err(SnapshotError::NoAgent(reference)),
        None => Ok(Image::Directory(reference.into())),
    }
}

/// Checks the identifiers of a list, and that each comes once.
fn distinct<T>(
    field: &'static str,
    items: impl Iterator<Item = (String, T)>,
) -> Result<Vec<(ResourceId, T)>, SnapshotError> {
    let mut seen = BTreeSet::new();
    let mut checked = Vec::new();
    for (text, item) in items {
        let id: ResourceId = text
            .parse()
            .map_err(|source| SnapshotError::Id { field, text, source })?;
        if !seen.insert(id.clone()) {
            return Err(SnapshotError::Twice { field, id });
        }
        checked.push((id, item));
    }
    Ok(checked)
}

#[cfg(test)]
mod tests;
