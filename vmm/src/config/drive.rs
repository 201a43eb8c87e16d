//! `drives/{drive_id}`: virtio block devices over files of the host.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::host_file::{self, Access, HostFileError};
use super::identifier::{BadIdentifier, ResourceId};
use super::limiter::{LimiterUnsupported, RateLimiterBody, refuse_limiter};

/// What a flush from the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// Nothing: the guest is not offered a flush.
    #[default]
    Unsafe,
    /// What was written before it is on stable storage when it returns.
    Writeback,
}

/// Firecracker's choice of how its one thread does I/O. Here every drive has a thread of its own, so both run alike;
/// the choice is kept for whoever asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum IoEngine {
    #[default]
    Sync,
    Async,
}

/// `PUT /drives/{drive_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveBody {
    /// Its name; the path's last part.
    pub drive_id: String,
    /// Which partition is the guest's root, by UUID.
    pub partuuid: Option<String>,
    /// Whether the guest's root is on it.
    pub is_root_device: bool,
    /// What a flush does.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Whether writes are refused.
    pub is_read_only: Option<bool>,
    /// The file or block device behind it.
    pub path_on_host: Option<PathBuf>,
    /// Limits what the guest moves.
    pub rate_limiter: Option<RateLimiterBody>,
    /// How I/O is done.
    pub io_engine: Option<IoEngine>,
    /// A vhost-user back end.
    pub socket: Option<PathBuf>,
}

/// Why a drive cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// Not a name.
    #[error("Invalid drive_id: {0}")]
    Id(#[from] BadIdentifier),
    /// Neither file nor socket.
    #[error("Unable to create the virtio block device: path_on_host is missing")]
    NoPath,
    /// A vhost-user back end.
    #[error(
        "vhost-user block devices (socket) are not supported by this version of Runnel: give path_on_host"
    )]
    VhostUser,
    /// A rate limit.
    #[error(transparent)]
    Limiter(#[from] LimiterUnsupported),
    /// The file cannot be used.
    #[error("Unable to create the virtio block device: {0}")]
    File(#[from] HostFileError),
    /// A partition's UUID that would say something else on the kernel's command line.
    #[error("Invalid partuuid {0:?}: only letters, digits and hyphens are allowed")]
    PartUuid(String),
    /// Two roots.
    #[error("A root block device already exists!")]
    SecondRoot,
}

/// A drive, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// Its name.
    pub id: ResourceId,
    /// The file or block device behind it.
    pub path: PathBuf,
    /// Whether the guest's root is on it; then it is the first drive.
    pub is_root: bool,
    /// Which partition is the guest's root; the whole drive if `None`.
    pub partuuid: Option<String>,
    /// Whether writes are refused.
    pub is_read_only: bool,
    /// What a flush does.
    pub cache_type: CacheType,
    /// What was said of I/O engines.
    pub io_engine: IoEngine,
}

impl Drive {
    /// What the kernel's command line must say for the guest to find its root, if it is here.
    #[must_use]
    pub fn root_argument(&self) -> Option<String> {
        let mode = if self.is_read_only { "ro" } else { "rw" };
        match (self.is_root, &self.partuuid) {
            (false, _) => None,
            (true, Some(uuid)) => Some(format!("root=PARTUUID={uuid} {mode}")),
            (true, None) => Some(format!("root=/dev/vda {mode}")),
        }
    }
}

impl TryFrom<DriveBody> for Drive {
    type Error = DriveError;

    fn try_from(body: DriveBody) -> Result<Self, DriveError> {
        let id = body.drive_id.parse()?;
        if body.socket.is_some() {
            return Err(DriveError::VhostUser);
        }
        let path = body.path_on_host.ok_or(DriveError::NoPath)?;
        refuse_limiter("rate_limiter", body.rate_limiter.as_ref())?;
        if let Some(uuid) = &body.partuuid
            && !uuid.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        {
            return Err(DriveError::PartUuid(uuid.clone()));
        }
        let is_read_only = body.is_read_only.unwrap_or(false);
        host_file::check(
            &path,
            if is_read_only {
                Access::Read
            } else {
                Access::ReadWrite
            },
        )?;
        Ok(Self {
            id,
            path,
            is_root: body.is_root_device,
            partuuid: body.partuuid,
            is_read_only,
            cache_type: body.cache_type,
            io_engine: body.io_engine.unwrap_or_default(),
        })
    }
}

impl From<&Drive> for DriveBody {
    fn from(drive: &Drive) -> Self {
        Self {
            drive_id: drive.id.to_string(),
            partuuid: drive.partuuid.clone(),
            is_root_device: drive.is_root,
            cache_type: drive.cache_type,
            is_read_only: Some(drive.is_read_only),
            path_on_host: Some(drive.path.clone()),
            rate_limiter: None,
            io_engine: Some(drive.io_engine),
            socket: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(more: &str) -> Result<Drive, DriveError> {
        let json =
            format!(r#"{{"drive_id": "rootfs", "is_root_device": true, "is_read_only": true {more}}}"#);
        serde_json::from_str::<DriveBody>(&json).unwrap().try_into()
    }

    #[test]
    fn a_drive_needs_a_file_that_can_be_opened() {
        assert!(matches!(drive(""), Err(DriveError::NoPath)));
        assert!(matches!(
            drive(r#", "path_on_host": "/nonexistent""#),
            Err(DriveError::File(_))
        ));
        assert!(matches!(
            drive(r#", "path_on_host": "/""#),
            Err(DriveError::File(HostFileError::Kind { .. }))
        ));
        assert_eq!(
            drive(r#", "path_on_host": "/proc/self/exe""#).unwrap().cache_type,
            CacheType::Unsafe
        );
    }

    #[test]
    fn what_this_version_cannot_do_is_refused_by_name_and_not_ignored() {
        assert!(matches!(
            drive(r#", "socket": "/run/vhost.sock""#),
            Err(DriveError::VhostUser)
        ));
        let limited =
            r#", "path_on_host": "/proc/self/exe", "rate_limiter": {"ops": {"size": 1, "refill_time": 1}}"#;
        assert!(matches!(drive(limited), Err(DriveError::Limiter(_))));
    }

    #[test]
    fn the_guest_is_told_where_its_root_is_and_nothing_can_be_smuggled_in() {
        let whole = drive(r#", "path_on_host": "/proc/self/exe""#).unwrap();
        assert_eq!(whole.root_argument().as_deref(), Some("root=/dev/vda ro"));
        let part = drive(r#", "path_on_host": "/proc/self/exe", "partuuid": "0eaa91a0-01""#).unwrap();
        assert_eq!(
            part.root_argument().as_deref(),
            Some("root=PARTUUID=0eaa91a0-01 ro")
        );
        assert_eq!(
            Drive {
                is_root: false,
                ..part
            }
            .root_argument(),
            None
        );
        let smuggled = drive(r#", "path_on_host": "/proc/self/exe", "partuuid": "0 init=/bin/sh""#);
        assert!(matches!(smuggled, Err(DriveError::PartUuid(_))));
    }

    #[test]
    fn a_drive_survives_the_way_to_its_body_and_back() {
        let drive = drive(r#", "path_on_host": "/proc/self/exe", "io_engine": "Async""#).unwrap();
        assert_eq!(Drive::try_from(DriveBody::from(&drive)).unwrap(), drive);
    }
}
