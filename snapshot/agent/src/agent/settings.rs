//! What an agent is told when it starts.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use runnel_snapshot::image::source::SourceSettings;

use crate::remote::RemoteSettings;

/// Images that no machine has used for this long are dropped, unless told otherwise.
pub const UNUSED_AFTER: Duration = Duration::from_secs(600);

/// The smallest quota: more than the workers of an image write at once, in chunks of 64 KiB. Below that each chunk may
/// take the place of the one before, without end, before any machine has seen it.
pub const QUOTA_BYTES_MIN: u64 = 4 << 20;

/// How an agent works.
#[derive(Clone, Debug)]
pub struct AgentSettings {
    /// Where it listens.
    pub socket: PathBuf,
    /// Where page files of memory lie: on tmpfs, since machines map them.
    pub memory_folder: PathBuf,
    /// Where page files of drives lie: on a disk, since a drive may be larger than RAM.
    pub drive_folder: PathBuf,
    /// How servers are talked to.
    pub remote: RemoteSettings,
    /// Stored bytes that background fill reads a second, for each image.
    pub fill_bytes_per_second: Option<NonZeroU64>,
    /// How long an image is kept that no machine uses.
    pub unused_after: Duration,
    /// Bytes that page files of memory may take; three quarters of what there is room for, and no less than
    /// [`QUOTA_BYTES_MIN`], unless that is said.
    pub memory_quota: Option<u64>,
    /// Bytes that page files of drives may take; half of what there is room for, and no less than
    /// [`QUOTA_BYTES_MIN`], unless that is said.
    pub drive_quota: Option<u64>,
}

impl AgentSettings {
    /// Settings with the defaults for all but the paths.
    #[must_use]
    pub fn new(socket: PathBuf, memory_folder: PathBuf, drive_folder: PathBuf) -> Self {
        Self {
            socket,
            memory_folder,
            drive_folder,
            remote: RemoteSettings::default(),
            fill_bytes_per_second: None,
            unused_after: UNUSED_AFTER,
            memory_quota: None,
            drive_quota: None,
        }
    }

    /// How the chunks of an image are fetched: from afar, or from a directory of this host.
    pub(super) fn source(&self, is_far: bool) -> SourceSettings {
        let settings = match is_far {
            true => SourceSettings::remote(),
            false => {
                SourceSettings::local(std::thread::available_parallelism().map_or(2, usize::from).max(2))
            }
        };
        SourceSettings {
            fill_bytes_per_second: self.fill_bytes_per_second,
            ..settings
        }
    }
}
